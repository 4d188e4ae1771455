"""Secure sums: the contract, its engines, and the masks and seals they are made of.

An engine is chosen by name when a session is formed; the name stands in the signed manifest.
"""

from __future__ import annotations

from collections.abc import Collection

from lpm.errors import InputError
from lpm.privacy.dropout import Witness
from lpm.privacy.sealing import SessionKeys
from lpm.privacy.secure_sum import Channel, SecureSum

__all__ = ["DROPPABLE", "ENGINES", "load_engine", "make_engine", "require_engine"]

DROPPABLE: tuple[str, ...] = ("gradient", "loss")
"""Tensors whose rounds may lose parties, in the engine `masked`: nothing that a simulation goes on from."""

ENGINES: tuple[str, ...] = ("crypten", "masked")
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
    if name == "crypten":
        from lpm.privacy.crypten_engine import load_crypten

        load_crypten()


def make_engine(
    name: str,
    keys: SessionKeys,
    channel: Channel,
    droppable: Collection[str] = (),
    witness: Witness | None = None,
    thresholds: Collection[str] = (),
) -> SecureSum:
    """The engine of that name, for one party of one session.

    Args:
        name: one of `ENGINES`.
        keys: the party's keys of this session.
        channel: its way to the others.
        droppable: tensors whose rounds can lose parties, as the manifest marks them.
        witness: the identities behind the roster, for those rounds.
        thresholds: tensors whose cells are opened above a threshold only, as the manifest lists them.

    Returns:
        The party's secure sum.

    Raises:
        InputError: for an unknown name, or droppable rounds in an engine that has none.
        LpmError: if the engine's library is not installed, naming the extra.
    """
    require_engine(name)
    if name == "masked":
        from lpm.privacy.masked_engine import MaskedSum

        return MaskedSum(keys, channel, droppable, witness)
    if droppable:
        raise InputError(
            f"The engine {name} needs every party in every round: {', '.join(sorted(droppable))} can't be droppable.",
            "Use --sharing masked.",
        )
    from lpm.privacy.crypten_engine import CrypTenSum  # CrypTen costs a second and 200 MB: only who sums pays

    return CrypTenSum(keys, channel, thresholds)
