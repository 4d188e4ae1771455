"""Which models cluster alternates can differentiate (`lpm.kernels.alternates`; paper, eq. 8)."""

from __future__ import annotations

from lpm.errors import InputError
from lpm.flame.contagion import Contagion
from lpm.flame.model import Model
from lpm.kernels.alternates import layers_of
from lpm.passes.carried import unfollowed

__all__ = ["unfit"]


def unfit(model: Model) -> str | None:
    """Why alternates can't differentiate a model, or None if they can."""
    reason = unfollowed(model)
    for protocol in model.protocols:
        if reason is None and isinstance(protocol, Contagion):
            try:
                layers_of(protocol.spec.networks)
            except InputError as error:
                return str(error).rstrip(".")
    return reason
