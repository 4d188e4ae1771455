"""What one institution decides for itself before it joins: read once, checked once, then frozen.

Everything here comes from the institution's own command line or its own machine. The coordinator's message only adds
the name of the session: it can choose neither code nor scenario nor keys nor people.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lpm.errors import InputError
from lpm.protocol.identity import require_party_name

__all__ = ["CONFIG_FILE", "CONFIG_VARIABLE", "ClientConfig", "own_folder"]

CONFIG_FILE = "client.json"
"""A party's configuration, in its part of the run."""

CONFIG_VARIABLE = "LPM_CLIENT_CONFIG"
"""Names the file through which `lpm client` tells the ClientApp (a process of Flower's making) what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """All that `clients.party.serve` needs to know.

    Args:
        scenario: the scenario's folder in the institution's own installation.
        party: this party's name, as its certificate says.
        keys: the party's own key folder (tls.pem, tls.key, identity.pem, identity.key, storage.key, authority.pem).
        out: the run folder; the party writes only `out/parties/<party>/` (see `folder`).
        coordinator: HOST:PORT of the coordinator's data plane.
        institutions: the scenario's institutions this party holds; its own name if empty.
        session: the session's name; "" until the coordinator has named it.
        sharing: how sums are shared ("crypten" or "masked").
        agents: agents of the whole population, all parties together; None: as the scenario says.
        seed: the public seed for repeatable tests; None: the party's own secret one.
        settings: `--set key=value` as given: scenario keys the coordinator's side changes too.
        data: a folder of private or full public series; None: as the scenario ships.
        checkpoint_every: steps between two checkpoints of a simulation; None: the party's own choice.
        resume: go on from the party's checkpoint.
        release_fit: consent to releasing this party's own fit, its series beside the bands, to the coordinator.
        unsafe: small cells are allowed (`--unsafe-no-disclosure-control`).
        policy: the steward's policy.toml, whose folder holds the budget too; None: `steward/policy.toml` in the party's
            part of the run, which is written, permissive and labelled so, if it is not there.
    """

    scenario: Path
    party: str
    keys: Path
    out: Path
    coordinator: str = ""
    institutions: tuple[str, ...] = ()
    session: str = ""
    sharing: str = "crypten"
    agents: int | None = None
    seed: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    release_fit: bool = False
    unsafe: bool = False
    policy: Path | None = None

    def __post_init__(self) -> None:
        """Check every field at the door."""
        require_party_name(self.party)
        for flag, number in {"agents": self.agents, "checkpoint-every": self.checkpoint_every}.items():
            if number is not None and number < 1:
                raise InputError(f"`--{flag}` is {number}: a whole number from 1.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"`--seed` is {self.seed}: a whole number from 0 and below 2^63.")
        if not self.institutions:
            object.__setattr__(self, "institutions", (self.party,))

    @property
    def folder(self) -> Path:
        """The party's private part of the run folder, the only place it writes to."""
        return self.out / "parties" / self.party

    @property
    def policy_file(self) -> Path:
        """The policy in force."""
        return self.folder / "steward" / "policy.toml" if self.policy is None else self.policy

    def write(self, path: Path) -> None:
        """Write the configuration as JSON (it holds paths and numbers, no secret but the public test seed).

        Args:
            path: the file to write.
        """
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        path.touch(mode=0o600)
        path.write_text(json.dumps(values | {"settings": dict(self.settings)}, default=str, indent=1))

    @classmethod
    def read(cls, path: Path) -> ClientConfig:
        """Read what `write` wrote.

        Args:
            path: the file.

        Returns:
            The same configuration.
        """
        values = json.loads(path.read_text())
        for name in ("scenario", "keys", "out", "data", "policy"):
            values[name] = None if values[name] is None else Path(values[name])
        values["institutions"] = tuple(values["institutions"])
        return cls(**values)


def own_folder(keys: Path, name: str) -> Path:
    """The key folder of one party, given that folder itself or the folder of `lpm keys local`.

    Args:
        keys: what the user gave with `--keys`.
        name: the party.

    Returns:
        The folder that holds the party's tls.pem.

    Raises:
        InputError: there is no such folder.
    """
    for folder in (keys, keys / "parties" / name):
        if (folder / "tls.pem").is_file():
            return folder
    raise InputError(
        f"`--keys` is {keys}: it holds no keys of {name}.",
        f"Make some with `lpm keys local {keys} --parties {name},…`.",
    )
