"""The manifest: what all parties of a session sign before anything is computed.

It names the session, the roster with everybody's certified identity and ephemeral key, and the terms: scenario by
hash, engine, bounds, exponents, outputs. Its digest is bound into every key of the session, so parties that signed
different manifests can't even open each other's messages.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lpm.errors import SessionRefused

__all__ = ["MANIFEST_LIMIT", "Entry", "Manifest", "Terms", "hello_message"]

MANIFEST_LIMIT = 4 << 20
"""Most bytes of a manifest."""

_VERSION = 1
_LISTS = ("droppable", "outputs", "thresholds", "weaker")
_NUMBERS = ("bounds", "exponents")


@dataclass(frozen=True)
class Terms:
    """The public part of the agreement.

    Args:
        scenario: its name.
        scenario_hash: hex SHA-256 of its public part.
        session: the name the control plane gave the session; "" if none.
        sharing: the engine of the secure sums.
        droppable: tensors whose rounds are opened though parties are lost.
        thresholds: tensors of cells that are opened only if enough people and institutions stand behind them.
        fraction_bits: of fixed-point words where no exponent says otherwise.
        bounds: network → largest contribution of one party, in the network's unit.
        exponents: tensor → fraction bits at step 0.
        outputs: what is opened to the coordinator.
        resolution_days: days of an output that are opened as one sum.
        privacy: the mode of differential privacy, and its noise in words.
        gradient: the estimator, as the audit chose it.
        audit: what the gradient audit found before the session; "" if there was none.
        steps: time steps.
        agents: of the whole population.
        deadline_seconds: how long a round waits for its last party.
        weaker: labels of everything that is weaker than the default; shown in log and report.
    """

    scenario: str
    scenario_hash: str
    session: str = ""
    sharing: str = "crypten"
    droppable: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()
    fraction_bits: int = 32
    bounds: Mapping[str, float] = field(default_factory=dict)
    exponents: Mapping[str, int] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    resolution_days: int = 1
    privacy: str = "none"
    gradient: str = "none"
    audit: str = ""
    steps: int = 0
    agents: int = 0
    deadline_seconds: float = 30.0
    weaker: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One party in the roster.

    Args:
        party: its name.
        certificate: DER of its identity certificate.
        ephemeral: its X25519 key of this session, 32 bytes.
        signature: 64 bytes over `hello_message`.
    """

    party: str
    certificate: bytes
    ephemeral: bytes
    signature: bytes


def hello_message(session: bytes, party: str, ephemeral: bytes, scenario_hash: str) -> bytes:
    """What a party signs when it says hello.

    Args:
        session: 16 bytes.
        party: its name.
        ephemeral: its X25519 key of this session.
        scenario_hash: hex digest of the scenario it has itself.

    Returns:
        Canonical bytes.
    """
    return _canonical([session.hex(), party, ephemeral.hex(), scenario_hash])


@dataclass(frozen=True)
class Manifest:
    """Session, roster and terms.

    Args:
        session: 16 random bytes, new for every session, also a resumed one.
        roster: the parties, in the order of the session.
        terms: what they agree on.
    """

    session: bytes
    roster: tuple[Entry, ...]
    terms: Terms

    @property
    def parties(self) -> tuple[str, ...]:
        """Names in the order of the session."""
        return tuple(entry.party for entry in self.roster)

    def plain_terms(self) -> dict[str, Any]:
        """The terms as plain JSON values."""
        terms = {name: getattr(self.terms, name) for name in Terms.__dataclass_fields__}
        for name in _LISTS:
            terms[name] = list(terms[name])
        for name in _NUMBERS:
            terms[name] = dict(terms[name])
        return terms

    @functools.cached_property
    def agreement(self) -> bytes:
        """32 bytes for what stays the same when a session is repeated: who, by which keys, on which terms."""
        terms = self.plain_terms()
        del terms["session"]
        roster = [[entry.party, hashlib.sha256(entry.certificate).hexdigest()] for entry in self.roster]
        return hashlib.sha256(b"lpm/agreement/v1" + _canonical([roster, terms])).digest()

    def encode(self) -> bytes:
        """Canonical bytes: the same for equal manifests, whoever writes them."""
        terms = self.plain_terms()
        roster = [
            {
                "party": entry.party,
                "certificate": base64.b64encode(entry.certificate).decode(),
                "ephemeral": entry.ephemeral.hex(),
                "signature": entry.signature.hex(),
            }
            for entry in self.roster
        ]
        return _canonical({"version": _VERSION, "session": self.session.hex(), "roster": roster, "terms": terms})

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for the manifest in every key of the session."""
        return hashlib.sha256(b"lpm/manifest/v1" + self.encode()).digest()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read a manifest strictly.

        Args:
            data: canonical bytes.

        Returns:
            The manifest.

        Raises:
            SessionRefused: for anything but the canonical bytes of a manifest.
        """
        if len(data) > MANIFEST_LIMIT:
            raise SessionRefused(f"The manifest has {len(data)} bytes: at most {MANIFEST_LIMIT}.")
        try:
            manifest = cls._from_plain(json.loads(data))
            canonical = manifest.encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error):
            raise SessionRefused("The manifest can't be read: it is malformed or of another version.") from None
        if canonical != data:
            raise SessionRefused("The manifest is not in its canonical form.")
        return manifest

    @classmethod
    def _from_plain(cls, plain: dict[str, Any]) -> Manifest:
        if plain["version"] != _VERSION:
            raise ValueError
        terms = dict(plain["terms"])
        if set(terms) != set(Terms.__dataclass_fields__):
            raise ValueError
        for name, known in Terms.__dataclass_fields__.items():
            value = terms[name]
            if name in _LISTS:
                terms[name] = tuple(_typed(each, str) for each in _typed(value, list))
            elif name in _NUMBERS:
                kind = float if name == "bounds" else int
                terms[name] = {key: _typed(each, kind) for key, each in _typed(value, dict).items()}
            else:
                _typed(value, {"int": int, "float": float, "str": str}[str(known.type)])
        roster = tuple(
            Entry(
                _typed(entry["party"], str),
                base64.b64decode(entry["certificate"], validate=True),
                bytes.fromhex(entry["ephemeral"]),
                bytes.fromhex(entry["signature"]),
            )
            for entry in _typed(plain["roster"], list)
        )
        return cls(bytes.fromhex(plain["session"]), roster, Terms(**terms))


def _typed(value: Any, kind: type) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise TypeError
    return value


def _canonical(plain: object) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
