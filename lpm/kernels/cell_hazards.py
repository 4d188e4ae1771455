"""Hazards of cells by a compiled loop: `lpm.kernels.spec.hazards`, operation by operation, on CPUs.

A shared network has few cells, but each of them may meet all others (`Groups.mixing`), for every lane of a run. As
tensor operations that is a pass over memory and a fixed price for every term; here a cell's terms are added where they
are read. The order of additions and every rounding are the reference's, so both give the same bits (a test holds them
together), and without contraction: numba compiles this without fastmath.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.networks import Groups, Network

__all__ = ["cell_hazards"]

_NO_SOURCE, _NO_WEIGHT = np.empty((0, 0), dtype=np.int64), np.empty((0, 0))


@nb.njit(nogil=True, cache=True)
def _fill(
    total: NDArray[np.float64],
    size: NDArray[np.float64],
    source: NDArray[np.int64],
    weight: NDArray[np.float64],
    factor: NDArray[np.float64],
    closed: bool,
    pressure: NDArray[np.float64],
    felt: NDArray[np.float64],
) -> None:
    cells, lanes = total.shape
    for g in range(cells):
        if size.size:
            people = max(size[g], 1.0)
            for k in range(lanes):
                pressure[g, k] = total[g, k] / people
        else:
            for k in range(lanes):
                pressure[g, k] = total[g, k]
    if closed:
        for k in range(lanes):
            pressure[0, k] = 0.0
    mixed = np.empty(lanes)
    for g in range(cells):
        if not source.size:
            for k in range(lanes):
                felt[g, k] = factor[k] * pressure[g, k]
            continue
        for k in range(lanes):
            mixed[k] = 0.0
        for term in range(source.shape[1]):
            from_cell, share = source[g, term], weight[g, term]
            for k in range(lanes):
                mixed[k] = mixed[k] + share * pressure[from_cell, k]
        for k in range(lanes):
            felt[g, k] = factor[k] * mixed[k]


def cell_hazards(
    network: Network,
    total: NDArray[np.float64],
    size: NDArray[np.float64] | None,
    factor: NDArray[np.float64],
    out: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Hazard that a member of each cell feels, without derivatives.

    Args:
        network: groups or edges.
        total: infectivity sums [cells, lanes].
        size: people per cell, or None for undivided sums [cells].
        factor: hazard per unit of infectious pressure [lanes].
        out: where to write it, contiguous; `total` itself takes no more memory. None: a new array.

    Returns:
        [cells, lanes], 1/day.

    Guarantee: the bits of `lpm.kernels.spec.hazards`.
    """
    table = network.mixing_table if isinstance(network, Groups) else None
    source, weight = (_NO_SOURCE, _NO_WEIGHT) if table is None else table
    felt = np.empty(total.shape) if out is None else out
    _fill(
        np.ascontiguousarray(total),
        np.empty(0) if size is None else np.ascontiguousarray(size),
        source,
        weight,
        np.ascontiguousarray(factor),
        isinstance(network, Groups) and network.outsiders,
        felt if table is None else np.empty(total.shape),
        felt,
    )
    return felt
