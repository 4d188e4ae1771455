"""Which models cluster alternates can differentiate, and where (paper, eq. 8).

Contagions of people without a state beside are run, with their alternatives, by `lpm.kernels.alternates`, in every
layer and in both modes; all other protocols by `lpm.passes.alternates_general`, in one layer and forwards.
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
    return _beyond_kernel(model) is None


def surely_followed(model: Model) -> bool:
    """Whether alternates need not run a model to know that they can follow it: no protocol is of the user's own."""
    return all(isinstance(protocol, Dynamics) or protocol.by_executor() for protocol in model.protocols)


def unfit(model: Model, mode: str = "forward") -> str | None:
    """Why alternates can't differentiate a model, or None if nothing is against it before it runs.

    Args:
        model: what is to be differentiated.
        mode: "forward" or "reverse".
    """
    beyond = _beyond_kernel(model)
    if beyond is not None and mode == "reverse":
        return f"backwards they follow contagions alone, and {beyond}"
    layered = (
        [model.networks]
        if beyond is not None
        else [p.spec.networks for p in model.protocols if isinstance(p, Contagion)]
    )
    for networks in layered:
        try:
            layers_of(networks)
        except InputError as error:
            return str(error).rstrip(".")
    return None


def _beyond_kernel(model: Model) -> str | None:
    reason = unfollowed(model)
    for protocol in model.protocols:
        if reason is None and not protocol.by_executor():
            reason = f"{protocol.name} touches agents by itself"
    return reason
