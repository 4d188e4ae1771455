"""Arrays as they come out of a run, labelled by time, output and parameter, with units."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lpm.flame.model import Model

__all__ = ["to_dataset"]


def _times(model: Model, steps: int) -> tuple[str, NDArray[Any]]:
    if model.start is None:
        return "time", np.arange(steps)
    first = np.datetime64(model.start, "D")
    return "time", (first + np.arange(steps)).astype("datetime64[ns]")


def to_dataset(
    model: Model, values: NDArray[np.float64], *, draws: bool, names: list[str] | None = None, parameters: bool = False
) -> xr.Dataset:
    """Label outputs [T, O, K] or derivatives [T, O, K, P].

    Args:
        model: whose outputs they are.
        values: in the order of `names`.
        draws: whether to keep the draw axis (else K must be 1).
        names: outputs; all that the model records by default.
        parameters: whether the last axis is that of parameters.
    """
    names = list(model.recorded) if names is None else names
    dims = ["time", *(["draw"] if draws else []), *(["parameter"] if parameters else [])]
    coords: dict[str, Any] = {"time": _times(model, values.shape[0])}
    if parameters:
        coords["parameter"] = [parameter.name for parameter in model.parameters]
    variables = {}
    for k, name in enumerate(names):
        array = values[:, k] if draws else values[:, k, 0]
        unit = model.recorded[name].unit
        variables[name] = (dims, array, {"units": f"{unit} per unit of the parameter" if parameters else unit})
    return xr.Dataset(variables, coords=coords)
