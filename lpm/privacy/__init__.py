"""Secure sums: the contract, its engines, and the masks and seals they are made of.

An engine is chosen by name when a session is formed; the name stands in the signed manifest.
"""

from __future__ import annotations

from lpm.errors import InputError
from lpm.privacy.sealing import SessionKeys
from lpm.privacy.secure_sum import Channel, SecureSum

__all__ = ["ENGINES", "load_engine", "make_engine", "require_engine"]

ENGINES: tuple[str, ...] = ("crypten",)
"""Names of the engines of the secure sum."""


def require_engine(name: str) -> None:
    """Refuse an engine that there is not.

    Args:
        name: as given with `--sharing` or in a manifest.

    Raises:
        InputError: naming the engines there are.
    """
    if name not in ENGINES:
        raise InputError(f"`--sharing` is {name!r}: one of {', '.join(ENGINES)}.")


def load_engine(name: str) -> None:
    """Load an engine's library now, which may take seconds, rather than in the first round.

    Args:
        name: one of `ENGINES`.

    Raises:
        InputError: for an unknown name.
        LpmError: if the library is not installed, naming the extra.
    """
    require_engine(name)
    from lpm.privacy.crypten_engine import load_crypten

    load_crypten()


def make_engine(name: str, keys: SessionKeys, channel: Channel) -> SecureSum:
    """The engine of that name, for one party of one session.

    Args:
        name: one of `ENGINES`.
        keys: the party's keys of this session.
        channel: its way to the others.

    Returns:
        The party's secure sum.

    Raises:
        InputError: for an unknown name.
        LpmError: if the engine's library is not installed, naming the extra.
    """
    require_engine(name)
    from lpm.privacy.crypten_engine import CrypTenSum  # CrypTen costs a second and 200 MB: only who sums pays

    return CrypTenSum(keys, channel)
