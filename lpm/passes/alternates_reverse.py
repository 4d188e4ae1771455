"""Cluster alternates backwards: one scalar's gradient by any number of parameters (paper, eq. 8 and 11).

The run carries the reference weight alone, one more word per cell of a shared sum, and keeps a tape
(`lpm.kernels.adjoint`). The way back carries one number per slot; what reaches the tables and factors of a contagion
goes on through torch to parameters, the environment and opened sums, and the cotangents of sums are added up in one
more round per step, as those of the tangent are.

A long run's tape would not fit in memory. So the run is cut into segments wherever the tape has grown too long: of a
segment that is over, what it began with is kept, stages and alternatives, and its tape is made again when the way back
comes to it, from the sums opened then and without a round. It is the same tape, so the cuts change no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vjp, vmap

from lpm import ring
from lpm.flame.contagion import Contagion
from lpm.kernels.adjoint import Cotangents, Tape, gather_edges, pull, pull_sent, shifts
from lpm.kernels.alternates import Alternates
from lpm.kernels.clusters import Frame
from lpm.kernels.cpu import workers
from lpm.kernels.spec import Slopes, hazards
from lpm.networks import Edges, Network
from lpm.passes.carried import Contagions, Told, environment
from lpm.passes.kept import Kept
from lpm.passes.plain import Plain
from lpm.passes.steps import Arrays, Rounds, Steps

__all__ = ["AlternatesReverse"]

Floats = NDArray[np.float64]

TAPE_BYTES_PER_AGENT = 260
"""How long a segment's tape may grow, in each lane: a whole epidemic of the reference workload fits."""

TAPE_BYTES = 1 << 30
"""A tape so long is never cut: to make it again takes time, and a smaller population has room."""

_REFERENCE = "~reference"
_START = -1
"""The start comes before step 0 and has a tape too."""


@dataclass
class _Segment:
    """A part of the run.

    Attributes:
        first: its first step.
        carry: what it began with, besides alternatives; nothing at the start.
        alternatives: with which it began, compactly.
        tapes: what each of its steps did to the weights, by contagion and lane; None once the segment is over.
    """

    first: int
    carry: Arrays = field(default_factory=dict)
    alternatives: dict[str, NDArray[Any]] = field(default_factory=dict)
    tapes: list[dict[str, dict[int, Tape]]] | None = field(default_factory=list)


class AlternatesReverse(Plain):
    """Values and the reference weight forwards, cotangents back."""

    def __init__(self, loop: Steps, rounds: Rounds) -> None:
        super().__init__(loop, rounds)
        assert isinstance(loop.executor, Alternates)
        self.executor = loop.executor
        self.contagions = Contagions(loop, self.executor)
        # What each step began with, and the sums and references that were opened in it.
        self.kept = Kept()
        self.segments = [_Segment(_START)]
        agents = sum(each.spec.agents for each in self.contagions.all)
        self._room = max(TAPE_BYTES, TAPE_BYTES_PER_AGENT * agents * loop.lanes)
        self._used = 0

    def _tell(self, told: list[Told], reference: Mapping[str, Floats]) -> None:
        """The contagions carry no parameter's weight: derivatives of what they are told have no columns."""
        for contagion, (cumulative, factors) in zip(self.contagions.all, told, strict=True):
            mine = {
                network.name: reference[f"{contagion.name}/{network.name}"]
                for network in contagion.spec.networks
                if network.shared and reference
            }
            slopes = Slopes(
                {s: tuple(np.zeros((1, 1, 0)) for _ in tables) for s, tables in cumulative.items()},
                {name: np.zeros((1, 0)) for name in factors},
                mine,
            )
            self.executor.tell(contagion.spec, slopes)

    def _take_tapes(self) -> None:
        taken = {each.name: self.executor.take_tapes(each.spec) for each in self.contagions.all}
        tapes = self.segments[-1].tapes
        assert tapes is not None
        tapes.append(taken)
        self._used += sum(tape.nbytes for lanes in taken.values() for tape in lanes.values())

    def _cut(self, t: int) -> None:
        """Begin a segment with step t; the tape of the one before is forgotten."""
        self.segments[-1].tapes = None
        self.segments.append(_Segment(t, self.carry, self.contagions.snapshot()))
        self._used = 0

    def start(self) -> None:
        self._start()
        self.contagions.require_followed(self.carry)
        self.rounds.see(self.loop.env(self.carry))

    def _start(self) -> None:
        self._tell(self.contagions.told_first(self.loop.theta)[0], {})
        self.carry = self.loop.start(self.loop.theta)
        self._take_tapes()

    def step(self, t: int) -> Arrays:
        if self._used > self._room:
            self._cut(t)
        summed = self.loop.emit(t, self.loop.theta, self.carry)
        emitted = self.contagions.emitted(self.carry)
        sums, opened = self.open(t, summed, {f"{key}{_REFERENCE}": value[..., 0] for key, value in emitted.items()})
        references = {key: torch.from_numpy(value) for key, value in opened.items()}
        self.kept.add(environment(self.carry), sums | references)
        records = self._step(t)
        self.rounds.see(self.loop.env(self.carry))
        return records

    def _given(self, t: int) -> tuple[Arrays, Arrays, dict[str, Floats]]:
        """The environment with which a step began, the sums opened in it, and their references [cells, lanes, 1]."""
        env, opened = self.kept[t]
        sums = {key: value for key, value in opened.items() if not key.endswith(_REFERENCE)}
        return env, sums, {key: opened[f"{key}{_REFERENCE}"].numpy()[..., None] for key in sums}

    def _step(self, t: int) -> Arrays:
        """What happens between two rounds, the first time and again."""
        theta = self.loop.theta
        env, sums, reference = self._given(t)
        self._tell(self.contagions.told(t, theta, env, sums)[0], reference)
        self.carry, records = self.loop.advance(t, theta, self.carry, sums)
        self._take_tapes()
        return records

    def _tape(self, t: int) -> dict[str, dict[int, Tape]]:
        """What step t did to the weights; asked for once each, from the last step to the start."""
        while self.segments[-1].first > t:
            self.segments.pop()
        segment = self.segments[-1]
        if segment.tapes is None:
            segment.tapes = []
            if segment.first == _START:
                self._start()
            else:
                self.carry = segment.carry
                self.contagions.restore(self.loop, segment.alternatives)
            for again in range(max(segment.first, 0), t + 1):
                self._step(again)
        return segment.tapes.pop()

    def finish(self, words: NDArray[np.int64], cotangent: Any) -> dict[str, Any]:
        pulled = torch.tensor(cotangent(ring.decode(words)), dtype=torch.float64)
        batch, theta = pulled.shape[0], self.loop.theta
        back = {
            each.name: _Back(each, self.loop, self.executor.frame(each.spec), batch) for each in self.contagions.all
        }
        total = torch.zeros((batch, *theta.shape), dtype=torch.float64)
        # Outputs are linear in the records: anywhere is as good as nowhere to take their transpose.
        records = {key: value for each in back.values() for key, value in each.records().items()}
        pull_records = vjp(self.loop.model.values, records)[1]
        after = {
            key: torch.zeros((batch, *value.shape), dtype=torch.float64)
            for key, value in environment(self.carry).items()
        }
        for t in reversed(range(len(self.kept))):
            env, sums, _ = self._given(t)
            (by_records,) = vmap(pull_records)(pulled[:, t])
            taken = self._tape(t)
            for name, each in back.items():
                each.step(taken[name], by_records)
            seen = vjp(lambda theta, env, sums, t=t: self.contagions.told(t, theta, env, sums), theta, env, sums)
            told, pull_told = seen[0][0], seen[1]
            told_back = [each.told(*parts) for each, parts in zip(back.values(), told, strict=True)]
            by_theta, by_env, by_sums = vmap(pull_told)((told_back, after, torch.zeros_like(total)))
            total, after = total + by_theta, by_env
            more = {key: value for each in back.values() for key, value in each.sums().items()}
            if more:
                by_sums = {key: by_sums[key] + torch.from_numpy(value) for key, value in more.items()}
                returned = {key: value.numpy() for key, value in self.rounds.add_back(t, by_sums).items()}
                for each in back.values():
                    each.receive(returned)
        taken = self._tape(_START)
        for name, each in back.items():
            each.start(taken[name])
        seen = vjp(self.contagions.told_first, theta)
        told, pull_told = seen[0][0], seen[1]
        told_back = [each.told_first(*parts) for each, parts in zip(back.values(), told, strict=True)]
        (by_theta,) = vmap(pull_told)((told_back, after, torch.zeros_like(total)))
        return {"gradient": (total + by_theta).numpy()}

    def snapshot(self) -> dict[str, NDArray[Any]]:
        begun = {
            f"segment:{segment.first}:{name}": array
            for segment in self.segments[1:]
            for name, array in [
                *((f"carry:{key}", value.numpy()) for key, value in segment.carry.items()),
                *segment.alternatives.items(),
            ]
        }
        return super().snapshot() | self.contagions.snapshot() | self.kept.snapshot() | begun

    def restore(self, found: Mapping[str, Any]) -> None:
        super().restore(found)
        self.contagions.restore(self.loop, found)
        self.kept = Kept.restored(found)
        begun: dict[int, _Segment] = {}
        for name, value in found.items():
            if name.startswith("segment:"):
                _, first, rest = name.split(":", 2)
                segment = begun.setdefault(int(first), _Segment(int(first), tapes=None))
                if rest.startswith("carry:"):
                    segment.carry[rest[6:]] = torch.from_numpy(value.copy())
                else:
                    segment.alternatives[rest] = value
        self.segments = [_Segment(_START, tapes=None), *(begun[first] for first in sorted(begun))]
        # Tapes are not part of a checkpoint: what was underway is over, and what follows is a segment of its own.
        self._cut(len(self.kept))


class _Back:
    """What flows back through one contagion."""

    def __init__(self, contagion: Contagion, loop: Steps, frame: Frame, batch: int) -> None:
        self.contagion, self.spec, self.frame = contagion, contagion.spec, frame
        self.batch, self.lanes = batch, loop.lanes
        self.shifts, self.threads = shifts(frame), workers(self.spec.agents)
        self.linear = [k for k in range(len(self.spec.networks)) if frame.layer[k] < 0]
        self.rows = {
            k: slice(int(frame.first_linear[k]), int(frame.first_linear[k]) + n.cells) for k, n in self._each()
        }
        rows = max([place.stop for place in self.rows.values()], default=0)
        stages, classes, edges = len(self.spec.stages), self.spec.class_count, len(self.spec.edges)
        self.lane = [
            Cotangents(
                slot=np.zeros((int(frame.first_slot[-1]), batch)),
                people=np.zeros((stages, classes, batch)),
                reach=np.zeros((rows, batch)),
                flow=np.zeros((edges, classes, batch)),
                factor=np.zeros((len(self.spec.networks), batch)),
                linear=np.zeros((rows, batch)),
                exits=np.zeros((stages, frame.exit_edge.shape[1], classes, batch)),
            )
            for _ in range(self.lanes)
        ]
        self.tapes: dict[int, Tape] = {}
        self.hazards = {k: self._transposed(network, loop) for k, network in self._each()}

    def _each(self) -> list[tuple[int, Network]]:
        return [(k, self.spec.networks[k]) for k in self.linear]

    def _transposed(self, network: Network, loop: Steps) -> Any:
        """From cotangents of hazards per unit of factor to those of sums, a column each."""
        size = loop.sizes[network.name] if network.normalise == "size" else None
        one = torch.ones((), dtype=torch.float64)
        return vjp(lambda total: hazards(network, total, size, one), one.new_zeros(network.cells, self.batch))[1]

    def records(self) -> Arrays:
        """Records of a step in which nothing happened."""
        spec = self.spec
        flow = torch.zeros((len(spec.edges), spec.class_count, self.lanes), dtype=torch.float64)
        people = torch.zeros((len(spec.stages), spec.class_count, self.lanes), dtype=torch.float64)
        return {f"{self.contagion.name}.flow": flow, f"{self.contagion.name}.count": people}

    def step(self, tapes: dict[int, Tape], by_records: Arrays) -> None:
        """Take slots back over a step, of which outputs have these cotangents [B, rows, C, lanes]."""
        flow = np.moveaxis(by_records[f"{self.contagion.name}.flow"].numpy(), 0, -1)
        people = np.moveaxis(by_records[f"{self.contagion.name}.count"].numpy(), 0, -1)
        self.tapes = tapes
        for lane, back in enumerate(self.lane):
            back.flow[:] = flow[:, :, lane]
            back.people[:] += people[:, :, lane]
            for each in (back.factor, back.linear, back.exits):
                each[:] = 0.0
            pull(self.frame, self.shifts, tapes[lane], back, self.threads)

    def start(self, tapes: dict[int, Tape]) -> None:
        """Take slots back over the start."""
        self.tapes = tapes
        for lane, tape in tapes.items():
            drawn = np.zeros((*tape.reference.shape, self.batch))
            self.lane[lane] = back = self.lane[lane]._replace(exits=drawn)
            back.flow[:] = 0.0
            pull(self.frame, self.shifts, tape, back, self.threads)

    def told(self, cumulative: Mapping[int, tuple[Tensor, ...]], factors: Mapping[str, Tensor]) -> Told:
        """Cotangents of what the contagion was told in a step, with a leading axis of the batch."""
        tables = {s: self._chances(s, list(given)) for s, given in cumulative.items()}
        moved = {}
        for k, network in enumerate(self.spec.networks):
            whole = np.stack([back.factor[k] for back in self.lane], axis=-1)
            moved[network.name] = _reduced(whole, factors[network.name])
        return {s: tuple(each) for s, each in tables.items()}, moved

    def told_first(self, cumulative: Mapping[int, tuple[Tensor, ...]], factors: Mapping[str, Tensor]) -> Told:
        """Cotangents of what the contagion was told at the start."""
        given = [table for (table,) in cumulative.values()]
        moved = self._chances(0, given)
        return {s: (each,) for s, each in zip(cumulative, moved, strict=True)}, {}

    def _chances(self, stage: int, given: list[Tensor]) -> list[Tensor]:
        """From cotangents of flips' weights to those of cumulative probabilities.

        A flip's weight by a parameter is to its reference weight as the probability's derivative to the probability.
        """
        classes = self.spec.class_count
        by_chance = np.zeros((len(given), self.batch, classes, self.lanes))
        for lane, tape in self.tapes.items():
            table = np.stack([_lane(each.detach(), classes, self.lanes, lane) for each in given])
            chance = np.diff(table, axis=0, prepend=0.0)
            reference = tape.reference[stage, : len(given)]
            unit = np.divide(reference, chance, out=np.zeros_like(chance), where=chance != 0.0)
            by_chance[..., lane] = np.moveaxis(self.lane[lane].exits[stage, : len(given)] * unit[..., None], -1, 1)
        by_table = by_chance - np.concatenate([by_chance[1:], np.zeros_like(by_chance[:1])])
        return [_reduced(whole, each) for whole, each in zip(by_table, given, strict=True)]

    def sums(self) -> dict[str, Floats]:
        """Cotangents of the sums of shared networks, each [B, cells, lanes]; local ones come back at once."""
        found = {}
        for k, network in self._each():
            columns = []
            for lane, back in enumerate(self.lane):
                hazard = torch.from_numpy(back.linear[self.rows[k]] * self.tapes[lane].factor[k])
                columns.append(self.hazards[k](hazard)[0].numpy())
            if network.shared:
                found[f"{self.contagion.name}/{network.name}"] = np.moveaxis(np.stack(columns, axis=1), -1, 0)
            else:
                for lane, column in enumerate(columns):
                    self._reach(k, lane, column)
        return found

    def receive(self, opened: Mapping[str, Floats]) -> None:
        """Cotangents of shared sums come back, of all shards together [B, cells, lanes]."""
        for k, network in self._each():
            if network.shared:
                whole = opened[f"{self.contagion.name}/{network.name}"]
                for lane in range(self.lanes):
                    self._reach(k, lane, np.ascontiguousarray(whole[..., lane].T))

    def _reach(self, k: int, lane: int, returned: Floats) -> None:
        network, back = self.spec.networks[k], self.lane[lane]
        reach = back.reach[self.rows[k]]
        if isinstance(network, Edges):
            gather_edges(*network.readers_by_source, returned, reach)
            sent = self.tapes[lane].sent
            pull_sent(k, self.frame.infectivity[k], *network.readers_by_source, returned, sent, back.slot)
        else:
            reach += returned


def _lane(value: Tensor, classes: int, lanes: int, lane: int) -> Floats:
    """One lane of a table of [C or 1, lanes or 1] or a number [C]."""
    found: Floats = value.expand(classes, lanes)[:, lane].numpy()
    return found


def _reduced(whole: Floats, like: Tensor) -> Tensor:
    """[B, …] summed over the axes along which `like` was broadcast."""
    total = torch.from_numpy(whole.copy())
    while total.dim() > like.dim() + 1:
        total = total.sum(1)
    for axis, length in enumerate(like.shape):
        if length == 1 and total.shape[axis + 1] != 1:
            total = total.sum(axis + 1, keepdim=True)
    return total
