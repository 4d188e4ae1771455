"""Large Population Models: agent-based models that are federated, private and differentiable.

`import lpm` is lazy: a name is loaded when it is first used, so that a process which only passes sealed messages never
loads a simulator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpm.analysis.audit import audit_gradients
    from lpm.analysis.sensitivity import sensitivity
    from lpm.errors import LpmError
    from lpm.flame.contagion import Attribute, Contagion, leave
    from lpm.flame.dynamics import Dynamics
    from lpm.flame.events import Event, Series, above, on_date, on_day, scale, set_driver
    from lpm.flame.learned import Learned
    from lpm.flame.model import Model, count, flow
    from lpm.flame.protocol import Change, Protocol
    from lpm.local import simulate
    from lpm.networks import Edges, Groups
    from lpm.parameters import Parameter, driver
    from lpm.population.people import Population
    from lpm.scenario import load
    from lpm.variational import calibrate

from lpm.ranks import set_threads

__version__ = "0.1.0"

set_threads()  # before anything loads numba

_PLACES = {
    "Attribute": "lpm.flame.contagion",
    "Change": "lpm.flame.protocol",
    "Contagion": "lpm.flame.contagion",
    "Dynamics": "lpm.flame.dynamics",
    "Edges": "lpm.networks",
    "Event": "lpm.flame.events",
    "Groups": "lpm.networks",
    "Learned": "lpm.flame.learned",
    "LpmError": "lpm.errors",
    "Model": "lpm.flame.model",
    "Parameter": "lpm.parameters",
    "Population": "lpm.population.people",
    "Protocol": "lpm.flame.protocol",
    "Series": "lpm.flame.events",
    "above": "lpm.flame.events",
    "audit_gradients": "lpm.analysis.audit",
    "calibrate": "lpm.variational",
    "count": "lpm.flame.model",
    "driver": "lpm.parameters",
    "flow": "lpm.flame.model",
    "leave": "lpm.flame.contagion",
    "load": "lpm.scenario",
    "on_date": "lpm.flame.events",
    "on_day": "lpm.flame.events",
    "scale": "lpm.flame.events",
    "sensitivity": "lpm.analysis.sensitivity",
    "set_driver": "lpm.flame.events",
    "simulate": "lpm.local",
}

__all__ = [
    "Attribute",
    "Change",
    "Contagion",
    "Dynamics",
    "Edges",
    "Event",
    "Groups",
    "Learned",
    "LpmError",
    "Model",
    "Parameter",
    "Population",
    "Protocol",
    "Series",
    "above",
    "audit_gradients",
    "calibrate",
    "count",
    "driver",
    "flow",
    "leave",
    "load",
    "on_date",
    "on_day",
    "scale",
    "sensitivity",
    "set_driver",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lpm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
