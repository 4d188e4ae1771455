"""Which models cluster alternates can differentiate, and where (paper, eq. 8).

Contagions of people without a state beside are run, with their alternatives, by `lpm.kernels.alternates`, in every
layer; all other protocols by `lpm.passes.alternates_general`, in one layer.
"""

from __future__ import annotations

from lpm.errors import InputError
from lpm.flame.contagion import Contagion
from lpm.flame.dynamics import Dynamics
from lpm.flame.model import Model
from lpm.kernels.alternates import layers_of
from lpm.passes.carried import unfollowed

__all__ = ["in_kernel", "surely_followed", "unfit"]


def in_kernel(model: Model) -> bool:
    """Whether the fused executor can keep a model's alternatives."""
    return unfollowed(model) is None and all(protocol.by_executor() for protocol in model.protocols)


def surely_followed(model: Model) -> bool:
    """Whether alternates need not run a model to know that they can follow it: no protocol is of the user's own."""
    return all(isinstance(protocol, Dynamics) or protocol.by_executor() for protocol in model.protocols)


def unfit(model: Model) -> str | None:
    """Why alternates can't differentiate a model, or None if nothing is against it before it runs."""
    layered = (
        [model.networks]
        if not in_kernel(model)
        else [p.spec.networks for p in model.protocols if isinstance(p, Contagion)]
    )
    for networks in layered:
        try:
            layers_of(networks)
        except InputError as error:
            return str(error).rstrip(".")
    return None
