"""What a user asked for on the command line, checked once and frozen: the only thing commands are handed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lpm.errors import InputError

__all__ = [
    "BIASED",
    "CONTROLS",
    "GRADIENTS",
    "MODES",
    "SHARINGS",
    "Options",
    "parse_settings",
    "require_known",
]

GRADIENTS = ("none", "auto", "fd", "alternates", "tangent", "score", "st-gumbel")
"""How derivatives flow through the simulation: the one list of names. A calibration can't do with `none`."""
SHARINGS = ("crypten", "masked")
"""Engines of the secure sum."""
BIASED = ("st-gumbel",)
"""Estimators that are known to be wrong and stand here for comparison only; they say so wherever they are shown."""
MODES = ("forward", "reverse")
"""Which way derivatives go through a run: every output at every step, or a few targets by any number of parameters."""
CONTROLS = ("flower", "streams")
"""Control planes of a federation on this machine."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of one `lpm` command; None means "as the scenario says".

    Args:
        command: which one, such as `simulate`.
        scenario: the scenario's folder (None for `lpm resume`, which reads it from the run).
        steps: days to simulate.
        seed: of the agents' random numbers and of the draws.
        agents: size of the population that is made.
        iterations: optimiser steps of a calibration.
        gradient: one of `GRADIENTS`.
        settings: `--set key=value` as given: a parameter's name, or a dotted key of `scenario.toml`.
        out: the run's directory (None: a fresh `runs/<scenario>-<n>`).
        json: print one JSON object and nothing else on standard output.
        parties: how many parties the institutions of the scenario are spread over.
        processes: how many processes the parties share (None: one each, where the machine can hold them).
        simulate_only: run one federated simulation and no calibration.
        sharing: one of `SHARINGS` (None: as the scenario says).
        control: one of `CONTROLS`.
        keys: the key folder (None: local keys are made in the run's directory).
        checkpoint_every: steps between two checkpoints of a simulation.
        device: torch device that runs contagions: cpu, cuda or cuda:N (None: the fastest executor for CPUs). There
            `fd` is the only estimator: it is what "auto" means, and what a calibration or sensitivity uses.
        deadline: seconds that a rank of `torchrun` may keep the others waiting.
        time_limit: seconds after which a calibration stops and says that it has not converged.
        mode: one of `MODES`, of a sensitivity.
        targets: of a sensitivity: OUTPUT, OUTPUT:total or OUTPUT:peak (none: all).
        replicates: runs of a sensitivity with random numbers of their own.
        seeds: at most so many runs of each estimator in an audit.
        estimators: that an audit tries beside finite differences (none: all).
        unsafe: no disclosure control: small cells are allowed (for tests on invented people).
        policy: a policy.toml that every party of a federation on this machine gets a copy of.

    Raises:
        InputError: naming the flag, the value and what would be accepted.
    """

    command: str = ""
    scenario: Path | None = None
    steps: int | None = None
    seed: int | None = None
    agents: int | None = None
    iterations: int | None = None
    gradient: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    json: bool = False
    parties: int | None = None
    processes: int | None = None
    simulate_only: bool = False
    sharing: str | None = None
    control: str = "flower"
    keys: Path | None = None
    checkpoint_every: int | None = None
    device: str | None = None
    deadline: float | None = None
    time_limit: float | None = None
    mode: str = "forward"
    targets: tuple[str, ...] = ()
    replicates: int = 1
    seeds: int = 24
    estimators: tuple[str, ...] = ()
    unsafe: bool = False
    policy: Path | None = None

    def __post_init__(self) -> None:
        """Check every flag at the door."""
        for flag in ("steps", "agents", "iterations", "checkpoint_every"):
            _require_whole(flag, getattr(self, flag), 1)
        _require_whole("seed", self.seed, 0, 2**63 - 1)
        _require_whole("processes", self.processes, 1)
        if self.parties is not None:
            _require_whole("parties", self.parties, 1)
            if self.parties < 3:
                raise InputError(
                    f"`--parties` is {self.parties}: a whole number from 3.",
                    "A sum of two tells each the other's part.",
                )
        for flag, seconds in (("time-limit", self.time_limit), ("deadline", self.deadline)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise InputError(f"`--{flag}` is {seconds:g}: seconds, more than 0.")
        _require_one_of("gradient", self.gradient, GRADIENTS)
        needs = {"calibrate": "a calibration", "sensitivity": "a sensitivity"}.get(self.command)
        if self.device is not None:
            if self.gradient == "auto" or (self.gradient is None and needs):
                object.__setattr__(self, "gradient", "fd")
            elif self.gradient not in (None, "none", "fd"):
                raise InputError(
                    f"`--gradient` is {self.gradient}, which does not run on a device.",
                    "Use fd with --device, or leave --device out.",
                )
        if self.command == "federate" and not self.simulate_only:
            needs = "a calibration"
        if needs and self.gradient == "none":
            accepted = ", ".join(name for name in GRADIENTS if name != "none")
            raise InputError(f"`--gradient` is none: one of {accepted}, for {needs} needs derivatives.")
        _require_one_of("mode", self.mode, MODES)
        _require_whole("replicates", self.replicates, 1)
        _require_whole("seeds", self.seeds, 2)
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "estimators", tuple(self.estimators))
        if self.sharing is not None:
            _require_one_of("sharing", self.sharing, SHARINGS)
        _require_one_of("control", self.control, CONTROLS)
        if self.keys is not None and not self.keys.is_dir():
            raise InputError(f"`--keys` is {self.keys}: a folder made by `lpm keys local DIR --parties a,b,c`.")
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def executor(self) -> str:
        """What runs the contagions: see `simulation.choose_executor`."""
        return "auto" if self.device is None else f"device:{self.device}"

    def to_command(self) -> dict[str, Any]:
        """The options as plain values for `run.json`: paths absolute, what was not given left out."""
        plain: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Path):
                value = str(value.resolve())
            elif isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, tuple):
                value = list(value)
            if value is not None:
                plain[name] = value
        return plain

    @classmethod
    def from_command(cls, command: Mapping[str, Any]) -> Options:
        """The options a run was started with; what `to_command` does not know is ignored.

        Raises:
            InputError: if a value in the record would not be accepted as a flag.
        """
        given = {name: command[name] for name in cls.__dataclass_fields__ if name in command}
        for name in ("scenario", "out", "keys", "policy"):
            if name in given:
                given[name] = Path(given[name])
        return cls(**given)

    def with_(self, **changes: Any) -> Options:
        """A copy with some options changed."""
        return replace(self, **changes)


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """Read `--set` flags.

    Args:
        pairs: texts of the form `key=value`.

    Returns:
        key → value, both without surrounding blanks; `key=` gives the empty text.

    Raises:
        InputError: for a text without `=`, an empty key, or a key given twice.
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals):
            raise InputError(f"`--set {pair}` can't be read: key=value, as in --set calibration.draws=8.")
        if key in settings:
            raise InputError(f"`--set {key}=…` is given twice: once is enough.")
        settings[key] = value
    return settings


def require_known(settings: Iterable[str], known: Iterable[str], scenario: str = "the scenario") -> None:
    """Refuse a `--set` key that nothing answers to.

    Args:
        settings: the keys given.
        known: the keys that would be accepted.
        scenario: its name, for the message.

    Raises:
        InputError: naming the first unknown key, the nearest known one, and all the known ones.
    """
    accepted = sorted(set(known))
    for key in settings:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            guess = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"`--set {key}`: {scenario} has no such key.{guess}", f"Known: {', '.join(accepted)}.")


def _require_whole(flag: str, value: int | None, lowest: int, highest: int | None = None) -> None:
    if value is None:
        return
    accepted = f"a whole number from {lowest}" + (f" to {highest}" if highest is not None else "")
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest or (highest and value > highest):
        raise InputError(f"`--{flag.replace('_', '-')}` is {value}: {accepted}.")


def _require_one_of(flag: str, value: str | None, accepted: tuple[str, ...]) -> None:
    if value is not None and value not in accepted:
        raise InputError(f"`--{flag}` is {value}: one of {', '.join(accepted)}.")
