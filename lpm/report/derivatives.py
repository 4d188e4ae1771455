"""Figures on derivatives: which parameter each output answers to, and how true each estimator is for what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lpm.report.figures import BLUE, CYCLE, INK, MUTED, VERMILLION, canvas, words

__all__ = ["draw_audit", "draw_elasticities", "plain_rows", "rows_of"]

_MOST = 30
"""Parameters that a heat map shows: those with the largest elasticities."""


def draw_elasticities(targets: pd.DataFrame, path: Path) -> None:
    """Draw the elasticity of each target by each parameter as a heat map.

    Args:
        targets: rows with target, parameter and elasticity (`Sensitivity.targets`).
        path: the PNG file.
    """
    table = targets.pivot(index="parameter", columns="target", values="elasticity")
    table = table[list(dict.fromkeys(targets["target"]))]
    strength = table.abs().max(axis=1).fillna(0.0)
    chosen = table.loc[strength.sort_values(ascending=False, kind="stable").index[:_MOST]]
    values = chosen.to_numpy(np.float64)
    finite = np.abs(values[np.isfinite(values)])
    scale = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    rows, columns = values.shape
    with canvas(path, (max(5.2, 2.6 + 1.25 * columns), 1.9 + 0.42 * rows)) as figure:
        axis = figure.subplots()
        mesh = axis.pcolormesh(values, cmap="PuOr_r", vmin=-scale, vmax=scale, edgecolors="white", linewidth=1.5)
        for row in range(rows):
            for column in range(columns):
                value = values[row, column]
                text = f"{value:+.2f}".replace("-", "−") if np.isfinite(value) else "n/a"
                axis.text(
                    column + 0.5,
                    row + 0.5,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if np.isfinite(value) and abs(value) > 0.7 * scale else INK,
                )
        axis.set_xticks(
            np.arange(columns) + 0.5,
            [f"{words(str(name).partition(':')[0])}\n{str(name).partition(':')[2]}" for name in chosen.columns],
            fontsize=8.5,
        )
        axis.set_yticks(np.arange(rows) + 0.5, [words(str(name)) for name in chosen.index])
        axis.invert_yaxis()
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(mesh, ax=axis, pad=0.015, aspect=24)
        bar.outline.set_visible(False)
        bar.set_label("% for 1 %")
        left = f" (the {rows} strongest of {len(table)})" if rows < len(table) else ""
        axis.set_title(f"Elasticity of each output by each parameter{left}")


def draw_audit(table: pd.DataFrame, limit: float, path: Path) -> None:
    """Draw error against cost, one point per estimator.

    Args:
        table: as `Audit.table` gives it.
        limit: bias beyond which an estimator is not used.
        path: the PNG file.
    """
    known = table[table["cost"].notna() & (table["sd"].notna() | table["bias"].notna())]
    floor = _floor(known, limit)
    with canvas(path, (8.4, 4.6)) as figure:
        axis = figure.subplots()
        axis.axhspan(floor / 3, limit, color=BLUE, alpha=0.06, linewidth=0)
        axis.axhline(limit, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        axis.annotate(
            f"limit of the bias, {limit:.0%}",
            (1.0, limit),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=MUTED,
        )
        for index, (_, row) in enumerate(known.iterrows()):
            colour = CYCLE[index % len(CYCLE)]
            if np.isfinite(row["sd"]):
                axis.plot(row["cost"], max(row["sd"], floor), marker="o", color=colour, markersize=7, linestyle="none")
            if row["ruling"] != "reference" and np.isfinite(row["bias"]):
                bias = max(float(row["bias"]), floor)
                spread = float(row["bias_se"]) if np.isfinite(row["bias_se"]) else 0.0
                axis.errorbar(
                    row["cost"],
                    bias,
                    yerr=[[min(2 * spread, bias - floor / 2)], [2 * spread]],
                    marker="D",
                    color=colour,
                    markersize=7,
                    capsize=3,
                    linewidth=1.3,
                )
            top = max(x for x in (row["sd"], row["bias"], floor) if np.isfinite(x))
            axis.annotate(
                row["label"] + (", recommended" if row["chosen"] else ""),
                (row["cost"], top),
                xytext=(0, 10),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=VERMILLION if "biased" in str(row["label"]) else INK,
                fontweight="bold" if row["chosen"] else "normal",
            )
        axis.plot([], [], marker="D", color=MUTED, linestyle="none", label="bias (± 2 standard errors)")
        axis.plot([], [], marker="o", color=MUTED, linestyle="none", label="standard deviation of one run")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(bottom=floor / 2)
        axis.margins(x=0.15, y=0.2)
        axis.set_xlabel("time of a run (plain run = 1)")
        axis.set_ylabel("relative to the derivative")
        axis.set_title("Error against cost of each estimator")
        axis.legend(loc="best", fontsize=8.5)


def _floor(known: pd.DataFrame, limit: float) -> float:
    """Where zero is drawn on a logarithmic axis."""
    values = [float(x) for name in ("sd", "bias") for x in known[name] if np.isfinite(x) and x > 0]
    return min([limit / 10, *(x for x in values if x > limit / 100)])


def rows_of(table: pd.DataFrame, columns: Sequence[str]) -> list[list[Any]]:
    """A table's rows as plain values for the page; None for what is not a number."""
    return [[_plain(row[name]) for name in columns] for row in table.to_dict("records")]


def plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as plain mappings for JSON."""
    return [{str(name): _plain(cell) for name, cell in row.items()} for row in table.to_dict("records")]


def _plain(cell: Any) -> Any:
    value = cell.item() if hasattr(cell, "item") else cell
    return None if isinstance(value, float) and not np.isfinite(value) else value
