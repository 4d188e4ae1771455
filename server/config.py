"""What the coordinator is asked to do: read once, checked once, then frozen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lpm.errors import InputError
from lpm.protocol.identity import require_party_name

__all__ = ["CONFIG_VARIABLE", "CoordinatorConfig", "own_folder"]

CONFIG_VARIABLE = "LPM_COORDINATOR_CONFIG"
"""Names the file through which `lpm coordinator` tells the ServerApp (a process of Flower's making) what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoordinatorConfig:
    """All that `server.coordinator.run` needs to know.

    Args:
        scenario: the scenario's folder; only its public scenario.toml is read.
        keys: the coordinator's own key folder (tls.pem, tls.key, identity.pem, identity.key, authority.pem).
        out: the run folder.
        parties: the roster, in the order of the session; at least 3.
        data_address: HOST:PORT where the data plane listens.
        session: the session's name; a new one for every start, also when a run is resumed.
        sharing: how sums are shared ("crypten" or "masked").
        agents: agents of the whole population; None: as the scenario says.
        steps: time steps; None: as the scenario says.
        iterations: optimiser steps; None: as the scenario says.
        draws: parameter draws per iteration; None: as the scenario says.
        gradient: the estimator; "" as the scenario says.
        seed: the seed of the coordinator's own draws; None: a fresh one, noted in run.json.
        simulate_only: one simulation at given parameters, no calibration.
        settings: `--set key=value` as given: a parameter's name, or a dotted key of scenario.toml.
        checkpoint_every: steps between two checkpoints of a simulation; None: as the session chooses.
        resume: go on from the checkpoint in `out`.
        unsafe: small cells are allowed (`--unsafe-no-disclosure-control`).
        labels: of what is weaker in this session than by default, for the manifest.
        deadline_seconds: how long one step of a round may take before its party counts as lost; None: as the scenario
            says.
        join_seconds: how long the coordinator waits for all parties to join.
        time_limit_seconds: the calibration stops there and says that it has not converged; None: no limit.
    """

    scenario: Path
    keys: Path
    out: Path
    parties: tuple[str, ...]
    data_address: str
    session: str = ""
    sharing: str = "crypten"
    agents: int | None = None
    steps: int | None = None
    iterations: int | None = None
    draws: int | None = None
    gradient: str = ""
    seed: int | None = None
    simulate_only: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    checkpoint_every: int | None = None
    resume: bool = False
    unsafe: bool = False
    labels: tuple[str, ...] = ()
    deadline_seconds: float | None = None
    join_seconds: float = 120.0
    time_limit_seconds: float | None = None

    def __post_init__(self) -> None:
        """Check every field at the door."""
        for name in ("agents", "steps", "iterations", "draws", "checkpoint_every"):
            flag, number = name.replace("_", "-"), getattr(self, name)
            if number is not None and number < 1:
                raise InputError(f"`--{flag}` is {number}: a whole number from 1.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"`--seed` is {self.seed}: a whole number from 0 and below 2^63.")
        for party in self.parties:
            require_party_name(party)
            if self.parties.count(party) > 1:
                raise InputError(f"`--parties` names {party} twice: each party once.")
        if len(self.parties) < 3:
            raise InputError(
                f"`--parties` names {len(self.parties)}: at least 3.",
                "A sum over two parties tells each the other's part.",
            )
        for flag, seconds in {"deadline": self.deadline_seconds, "join-limit": self.join_seconds}.items():
            if seconds is not None and not seconds > 0:
                raise InputError(f"`--{flag}` is {seconds}: seconds, more than 0.")

    def write(self, path: Path) -> None:
        """Write the configuration as JSON (it holds no secret).

        Args:
            path: the file to write.
        """
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        path.write_text(json.dumps(values | {"settings": dict(self.settings)}, default=str, indent=1))

    @classmethod
    def read(cls, path: Path) -> CoordinatorConfig:
        """Read what `write` wrote.

        Args:
            path: the file.

        Returns:
            The same configuration.
        """
        values = json.loads(path.read_text())
        for name in ("scenario", "keys", "out"):
            values[name] = Path(values[name])
        for name in ("parties", "labels"):
            values[name] = tuple(values[name])
        return cls(**values)


def own_folder(keys: Path) -> Path:
    """The coordinator's key folder, given that folder itself or the folder of `lpm keys local`.

    Args:
        keys: what the user gave with `--keys`.

    Returns:
        The folder that holds the coordinator's tls.pem.

    Raises:
        InputError: there is no such folder.
    """
    for folder in (keys, keys / "coordinator"):
        if (folder / "tls.pem").is_file():
            return folder
    raise InputError(
        f"`--keys` is {keys}: it holds no keys of the coordinator.",
        f"Make some with `lpm keys local {keys} --parties NAME,NAME,NAME`.",
    )
