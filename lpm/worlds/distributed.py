"""The Distributed world: ranks of one owner, started by `torchrun`, for populations beyond one device.

⊕ is an all-reduce of 64-bit words, which wraps modulo 2^64, so a trajectory has the same bits on any number of ranks.
Each rank runs the whole loop on its shard (`lpm.population.partition`); outputs and derivatives are added up at the
end, and every rank has them. Flags travel with the words: that all digests are alike is seen from their sum.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError, RoundRefused
from lpm.flame.model import Model
from lpm.population.partition import partition
from lpm.worlds.local import LocalWorld
from lpm.worlds.process_group import Ranks, join
from lpm.worlds.world import Disclosure, Number, Spread, World

__all__ = ["DistributedWorld", "agents_of_all", "here"]


class DistributedWorld:
    """One rank's view of the job.

    Args:
        group: the joined ranks.
        rank_of: the rank of each agent of the whole population [agents].
        description: of the whole model, which must be the same at every rank.
    """

    name = "distributed"
    one_owner = True
    disclosure: Disclosure | None = None

    def __init__(self, group: Ranks, rank_of: NDArray[np.int32], description: str) -> None:
        self.group, self.parties = group, group.ranks
        self._rank_of, self._description = rank_of, description
        self.agents = int(rank_of.size)

    def begin(self, trajectory: int, parameters: bytes) -> None:
        """See `World.begin`; here the ranks make sure that they are about to do the same."""
        self.group.require_same(model=self._description, trajectory=(trajectory, parameters))

    def add(
        self, tensor: str, step: int, words: NDArray[np.int64], *, digest: bytes, rescale: bool
    ) -> NDArray[np.int64]:
        """See `World.add`."""
        address = hashlib.sha256(f"{tensor} {step} {words.size} ".encode() + digest).digest()
        own = np.frombuffer(address, dtype=np.int64)
        total = self.group.add(np.concatenate([words, own, np.array([int(rescale)])]))
        if not np.array_equal(total[words.size : -1], own * self.parties):  # modulo 2^64 on both sides
            raise RoundRefused(diverged=True)
        if total[-1]:
            raise RoundRefused(rescale=True)
        return total[: words.size]

    def whole(self, values: NDArray[Number]) -> NDArray[Number]:
        """See `World.whole`; ranks are added in their order."""
        if values.dtype == np.int64:
            return self.group.add(values)  # type: ignore[arg-type, return-value]
        return sum(self.group.all(values), start=np.zeros_like(values))

    # ---- checkpoints, which rank 0 keeps for all: of the whole population, so that any number of ranks can go on

    def gathered(self, state: Mapping[str, Any], spread: Spread) -> dict[str, Any] | None:
        """See `World.gathered`."""
        rank = self.group.rank
        agents = int(np.count_nonzero(self._rank_of == rank))
        mine = {}
        for name, value in state.items():
            kind, axis = _kind(spread, name, value, agents)
            if rank == 0 or kind != "same":
                mine[name] = {"kind": kind, "axis": axis, "value": value}
        parts = self.group.collect(mine)
        if not parts:
            return None
        places = [np.flatnonzero(self._rank_of == each) for each in range(self.parties)]
        found: dict[str, Any] = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            # What is of a shard alone need not be there at every rank.
            held = {rank: part[name] for rank, part in enumerate(parts) if name in part}
            first, pieces = next(iter(held.values())), [each["value"] for each in held.values()]
            if first["kind"] == "sum":
                found[name] = sum(pieces[1:], start=pieces[0])
            elif first["kind"] == "agents":
                found[name] = _join(pieces, places, first["axis"])
            elif first["kind"] == "same":
                found[name] = first["value"]
            else:
                found |= {f"own:{rank}/{self.parties}:{name}": each["value"] for rank, each in held.items()}
        return found

    def parted(self, found: Mapping[str, Any] | None, spread: Spread) -> Mapping[str, Any] | None:
        """See `World.parted`."""
        if not self.group.share(found is not None):
            return None
        if found is None:
            return self.group.deal([])
        parts: list[dict[str, Any]] = [{} for _ in range(self.parties)]
        for name, value in found.items():
            if name.startswith("own:"):
                _, place, plain = name.split(":", 2)
                rank, of = map(int, place.split("/"))
                if of != self.parties:
                    raise InputError(
                        f"This checkpoint was written by {of} ranks, and {self.parties} can't go on from it.",
                        f"Resume with torchrun --nproc-per-node {of} -m lpm resume RUN.",
                    )
                parts[rank][plain] = value
                continue
            kind, axis = _kind(spread, name, value, self.agents)
            if kind == "own":
                raise InputError(
                    "This checkpoint was written by one process, and ranks can't go on from it.",
                    "Resume without torchrun.",
                )
            for rank, part in enumerate(parts):
                if kind == "agents":
                    part[name] = np.compress(self._rank_of == rank, value, axis=axis)
                else:
                    part[name] = value if kind == "same" or rank == 0 else np.zeros_like(value)
        return self.group.deal(parts)


def _kind(spread: Spread, name: str, value: Any, agents: int) -> tuple[str, int]:
    """How a value is spread; what has no axis of agents where one is expected is a shard's own."""
    kind, axis = spread(name)
    if kind == "agents" and (not isinstance(value, np.ndarray) or value.ndim <= axis or value.shape[axis] != agents):
        return "own", 0
    return kind, axis


def _join(pieces: list[NDArray[Any]], places: list[NDArray[np.int64]], axis: int) -> NDArray[Any]:
    shape = list(pieces[0].shape)
    shape[axis] = sum(place.size for place in places)
    whole = np.empty(shape, dtype=pieces[0].dtype)
    for piece, place in zip(pieces, places, strict=True):
        np.moveaxis(whole, axis, 0)[place] = np.moveaxis(piece, axis, 0)
    return whole


_PLACED: weakref.WeakKeyDictionary[Model, tuple[DistributedWorld, Model | None]] = weakref.WeakKeyDictionary()


def here(model: Model) -> tuple[World, Model]:
    """The world this process is in, and the part of a model that it runs.

    Args:
        model: of the whole population, the same at every rank; or a shard that was handed out before.

    Returns:
        The Local world and the model itself for a process that is alone; else the Distributed world and this rank's
        shard, which stays the same as long as the model lives.

    Raises:
        InputError: for a population that can't be spread over the ranks.
    """
    group = join()
    if group is None:
        return LocalWorld(), model
    if model not in _PLACED:
        rank_of = partition(model.networks, model.population.agents, group.ranks)
        shared = [(network.name, network.cells) for network in model.networks if network.shared]
        description = repr((model.population.agents, shared, list(model.recorded), [p.name for p in model.protocols]))
        world = DistributedWorld(group, rank_of, description)
        shard = model.shard(np.flatnonzero(rank_of == group.rank))
        if shard.population.agents == 0:
            raise InputError(f"Rank {group.rank} has no agents.", "Use fewer ranks.")
        _PLACED[model] = world, shard
        _PLACED[shard] = world, None
    placed, part = _PLACED[model]
    return placed, model if part is None else part


def agents_of_all(model: Model) -> int:
    """How many agents the population has that a model is of, or, on a rank, a part of."""
    return _PLACED[model][0].agents if model in _PLACED else model.population.agents
