"""In which windows of the random words flips are offered that don't depend on people: of exits, and of the start.

A decision that came out one way is offered the other where its word lies in a window beside its threshold; the flip's
weight is the derivative of the probability over the window's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.kernels import clusters
from lpm.kernels.clusters import Frame
from lpm.kernels.spec import Slopes, Spec, Tables
from lpm.relax import thresholds

__all__ = ["ExitWindows", "StartWindows", "exit_windows", "start_windows"]

_STEEP = 0.95
"""Probability of leaving beyond which a flip withholds the exit rather than adds one."""

_chance = np.vectorize(clusters.chance.py_func, otypes=[np.float64])
"""`clusters.chance` of arrays."""


class ExitWindows(NamedTuple):
    """Of one step of one lane; see the fields of `clusters.Day`.

    Attributes:
        exit: thresholds [stages, branches, classes].
        window: ends of the windows, −1 where exits are withheld instead [stages, branches, classes].
        weight: derivatives and reference (last) of a flip [stages, branches, classes, P + 1].
    """

    exit: NDArray[np.int64]
    window: NDArray[np.int64]
    weight: NDArray[np.float64]


class StartWindows(NamedTuple):
    """Of the draw of who begins where, in one lane.

    Attributes:
        stage: those drawn [stages drawn].
        window: begin of the windows, then the end of each [stages drawn + 1].
        weight: as an exit from stage 0 into each stage drawn [stages, stages drawn, classes, P + 1].
        size: |reference weight| [stages drawn].
    """

    stage: NDArray[np.int64]
    window: NDArray[np.int64]
    weight: NDArray[np.float64]
    size: NDArray[np.float64]


def start_windows(
    spec: Spec, cumulative: Mapping[int, Tensor], slopes: Slopes, lane: int, lanes: int, parameters: int
) -> StartWindows | None:
    """Windows of the start; None where nobody could begin otherwise.

    Args:
        spec: of the contagion.
        cumulative: cumulative probabilities by stage drawn.
        slopes: their derivatives.
        lane: which.
        lanes: how many.
        parameters: P.
    """
    drawn = list(cumulative)
    ends = [float(cumulative[s].detach().expand(1, lanes)[0, lane]) for s in drawn]
    if not drawn or ends[-1] >= 1.0:
        return None
    begun, rest = np.diff([0.0, *ends]), 1.0 - ends[-1]
    moved = np.diff(
        np.array([np.broadcast_to(slopes.cumulative[s][0], (1, lanes, parameters))[0, lane] for s in drawn]),
        axis=0,
        prepend=0.0,
    )
    mass = begun / rest
    # Once a run: as many as may be.
    width = np.minimum(mass / clusters.SMALLEST, 1.0) * rest
    if width.sum() > rest:
        width *= rest / width.sum()
    window = np.floor(np.cumsum([ends[-1], *width]) * 2.0**32).astype(np.int64)
    weight = np.zeros((len(spec.stages), len(drawn), spec.class_count, parameters + 1))
    safe = np.where(width > 0, width, 1.0)
    weight[0, :, :, :-1] = (moved / safe[:, None])[:, None, :]
    weight[0, :, :, -1] = (begun / safe)[:, None]
    size = np.ascontiguousarray(np.abs(weight[0, :, 0, -1]))
    return StartWindows(np.array(drawn, dtype=np.int64), window, weight, size)


def exit_windows(
    spec: Spec, frame: Frame, tables: Tables, slopes: Slopes, lane: int, lanes: int, parameters: int
) -> ExitWindows:
    """Windows of the exits of a step.

    Args:
        spec: of the contagion.
        frame: of the run.
        tables: what the contagion is told.
        slopes: derivatives of that.
        lane: which.
        lanes: how many.
        parameters: P.
    """
    shape = (len(spec.stages), frame.exit_edge.shape[1], spec.class_count)
    exits, window = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weight = np.zeros((*shape, parameters + 1))
    for s, edges in spec.exits.items():
        table = np.stack([t.detach().expand(spec.class_count, lanes)[:, lane].numpy() for t in tables.cumulative[s]])
        slope = np.stack(
            [np.broadcast_to(d, (spec.class_count, lanes, parameters))[:, lane] for d in slopes.cumulative[s]]
        )
        chance, moved = np.diff(table, axis=0, prepend=0.0), np.diff(slope, axis=0, prepend=0.0)
        rest = 1.0 - table[-1]
        exits[s, : len(edges)] = thresholds(torch.from_numpy(table)).numpy()
        withheld = (frame.advance[s, : len(edges), None] == 0) | (rest < 1.0 - _STEEP)
        # Windows of the exits that may be added share the words of those who stay.
        safe = np.where(rest > 0, rest, 1.0)
        width = np.where(withheld, 0.0, np.minimum(_chance(chance / safe), 1.0) * rest)
        total = width.sum(axis=0)
        width = width * np.where(total > rest, rest / np.where(total > 0, total, 1.0), 1.0)
        ends = np.floor((table[-1] + np.cumsum(width, axis=0)) * 2.0**32).astype(np.int64)
        window[s, : len(edges)] = np.where(withheld, -1, ends)
        divisor = np.where(withheld, -chance, width)
        divisor = np.where(divisor == 0.0, np.inf, divisor)[..., None]
        weight[s, : len(edges), :, :-1] = moved / divisor
        weight[s, : len(edges), :, -1] = chance / divisor[..., 0]
    return ExitWindows(exits, window, weight)
