"""The figures of a run, drawn so that they can be read in print and by the colour-blind."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lpm.checkpoint import atomic_file
from lpm.report.material import Fit, Material

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["canvas", "draw_all", "draw_fit", "draw_loss", "draw_outputs", "draw_overview", "draw_posterior", "words"]

# Okabe and Ito (2008), distinguishable by all readers.
INK, MUTED, GRID = "#1b1f24", "#6b7280", "#e6e8eb"
BLUE, ORANGE, VERMILLION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
CYCLE = (BLUE, VERMILLION, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#8a7400", INK)
_HELD_OUT = "#faf2df"
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#9aa1ab",
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "text.color": INK,
}
_DPI = 150


def draw_all(material: Material, folder: Path) -> dict[str, Path]:
    """Draw every figure there is material for.

    Args:
        material: what the report shows.
        folder: an existing folder.

    Returns:
        `fit`, `fit_<institution>`, `posterior`, `loss`, `outputs` and the panels' names → the PNG file.
    """
    drawn: dict[str, Path] = {}

    def keep(name: str, draw: Callable[[Path], None]) -> None:
        path = folder / f"{name}.png"
        draw(path)
        drawn[name] = path

    if material.fits:
        keep("fit", lambda path: draw_overview(material.fits, path))
        for institution in dict.fromkeys(fit.institution for fit in material.fits):
            own = [fit for fit in material.fits if fit.institution == institution]
            keep(f"fit_{file_name(institution)}", lambda path, own=own: draw_fit(own, path))  # type: ignore[misc]
    if material.posterior is not None and len(material.posterior):
        labels = {row["name"]: _axis(row.get("label") or row["name"], row.get("unit")) for row in material.parameters}
        posterior = material.posterior
        keep("posterior", lambda path: draw_posterior(posterior, material.prior, path, labels))
    if material.history:
        keep("loss", lambda path: draw_loss(material.history, path))
    if material.outputs is not None and material.outputs.data_vars:
        outputs = material.outputs
        values = {row["name"]: row["value"] for row in material.parameters if row.get("value") is not None}
        keep("outputs", lambda path: draw_outputs(outputs, path, material.gradient, values))
    for panel in material.panels:
        if panel.draw is not None:
            keep(panel.name, panel.draw)
    return drawn


def draw_fit(fits: Sequence[Fit], path: Path) -> None:
    """Draw what one institution released: one panel per series.

    Args:
        fits: of one institution, at least one.
        path: the PNG file.
    """
    with canvas(path, (8.4, 0.9 + 2.7 * len(fits))) as figure:
        axes = figure.subplots(len(fits), 1, squeeze=False, sharex=True)[:, 0]
        for axis, fit in zip(axes, fits, strict=True):
            _draw_series(axis, fit)
            axis.set_title(f"{place(fit.institution)}: {words(fit.series)}, observed and posterior predictive")
            axis.set_ylabel(_axis(fit.series, fit.unit))
        _date_axis(axes[-1])
        _legend(figure, axes[0])


def draw_overview(fits: Sequence[Fit], path: Path) -> None:
    """Draw all released fits: one row per institution, one column per series.

    Args:
        fits: at least one.
        path: the PNG file.
    """
    institutions = list(dict.fromkeys(fit.institution for fit in fits))
    names = list(dict.fromkeys(fit.series for fit in fits))
    size = (min(4.6 * len(names) + 0.8, 14.0) if len(names) > 1 else 7.6, 1.2 + 1.75 * len(institutions))
    with canvas(path, size) as figure:
        axes = figure.subplots(len(institutions), len(names), squeeze=False, sharex=True)
        for row, institution in enumerate(institutions):
            for column, series in enumerate(names):
                axis = axes[row, column]
                found = [fit for fit in fits if (fit.institution, fit.series) == (institution, series)]
                if not found:
                    axis.set_axis_off()
                    continue
                _draw_series(axis, found[0], small=True)
                axis.set_title(place(institution) if len(names) == 1 else f"{place(institution)}: {words(series)}")
                axis.set_ylabel(found[0].unit)
        for column in axes.T:
            _date_axis(_lowest(column))
        handles = next(axis for axis in axes.flat if axis.axison)
        figure.suptitle(
            f"Observed {' and '.join(map(words, names))} and the posterior predictive",
            x=0.012,
            ha="left",
            fontsize=12.5,
            fontweight="bold",
        )
        _legend(figure, handles)


def draw_posterior(
    posterior: pd.DataFrame,
    prior: pd.DataFrame | None,
    path: Path,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Draw the posterior in pairs: marginals against the prior, joint draws below, correlations above.

    Args:
        posterior: draws, one column per parameter.
        prior: draws of the prior, the same columns.
        path: the PNG file.
        labels: parameter → axis label.
    """
    names = [str(name) for name in posterior.columns if str(name) not in ("log_q", "weight")]
    count = len(names)
    draws = posterior[names].to_numpy(np.float64)
    before = prior[names].to_numpy(np.float64) if prior is not None and len(prior) else None
    limits = [_limits(draws[:, i], None if before is None else before[:, i]) for i in range(count)]
    side = max(1.75 * count + 0.6, 4.6)
    with canvas(path, (side, side + 0.35)) as figure:
        axes = figure.subplots(count, count, squeeze=False)
        for row in range(count):
            for column in range(count):
                axis = axes[row, column]
                axis.grid(False)
                if row == column:
                    _marginal(axis, draws[:, row], None if before is None else before[:, row], limits[row])
                elif row > column:
                    pair = None if before is None else before[:, [column, row]]
                    _joint(axis, draws[:, [column, row]], pair, limits[column], limits[row])
                else:
                    _correlation(axis, draws[:, column], draws[:, row])
                if row >= column:
                    _pair_labels(axis, row, column, count, names, labels or {})
        figure.suptitle(
            "Posterior and prior" if count == 1 else "Posterior draws in pairs, with the prior",
            x=0.012,
            ha="left",
            fontsize=12.5,
            fontweight="bold",
        )
        _legend(figure, axes[0, 0])


def draw_loss(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the expected loss and the divergence from the prior over the iterations.

    Args:
        history: one mapping per iteration with `iteration`, `loss` and `kl`.
        path: the PNG file.
    """
    iteration = np.array([float(record.get("iteration", i)) for i, record in enumerate(history)])
    iteration += iteration[0] == 0  # people count from one
    panels = (
        ("loss", "Expected negative log-likelihood of all institutions", "loss (nats)", BLUE),
        ("kl", "Divergence of the posterior from the prior", "KL (nats)", VERMILLION),
    )
    with canvas(path, (8.4, 5.2)) as figure:
        axes = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        for axis, (name, title, label, colour) in zip(axes, panels, strict=True):
            values = np.array([_number(record.get(name)) for record in history])
            finite = np.isfinite(values)
            axis.plot(
                iteration, values, color=colour, alpha=0.35, linewidth=1.0, marker="o", markersize=2.2, label="each"
            )
            width = max(5, len(values) // 12 | 1)
            if finite.sum() > 2 * width:
                half = width // 2
                windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
                smooth = [np.nanmedian(part) if np.isfinite(part).any() else np.nan for part in windows]
                axis.plot(iteration, smooth, color=colour, linewidth=2.0, label=f"running median of {width}")
            _clip_outliers(axis, values)
            _thousands(axis)
            axis.set_xlim(iteration[0] - 0.5, iteration[-1] + 0.5)
            axis.set_title(title)
            axis.set_ylabel(label)
            if name == "loss":
                axis.legend(loc="upper right")
        axes[-1].set_xlabel("iteration")


def draw_outputs(
    outputs: xr.Dataset,
    path: Path,
    gradient: xr.Dataset | None = None,
    values: Mapping[str, float] | None = None,
) -> None:
    """Draw each output over time and, if there is a gradient, how it answers to each parameter.

    Args:
        outputs: dims time × …, each with `units`; a dim `draw` becomes bands, another dim becomes lines.
        path: the PNG file.
        gradient: output → time × parameter.
        values: parameter → value: the effect of 1 % more of each is shown, in the output's own unit.
    """
    names = [str(name) for name in outputs.data_vars]
    derived = [] if gradient is None else [name for name in names if name in gradient.data_vars]
    columns = 2 if derived else 1
    with canvas(path, (8.4 if columns == 1 else 13.0, 0.5 + 2.6 * len(names))) as figure:
        axes = figure.subplots(len(names), columns, squeeze=False, sharex="col")
        for row, name in enumerate(names):
            series = outputs[name]
            _draw_output(axes[row, 0], series)
            unit = str(series.attrs.get("units", ""))
            axes[row, 0].set_title(str(series.attrs.get("long_name") or _title(name)))
            axes[row, 0].set_ylabel(unit)
            if columns == 2:
                if name in derived and gradient is not None:
                    _draw_gradient(figure, axes[row, 1], gradient[name], values or {}, name, unit)
                else:
                    axes[row, 1].set_axis_off()
        for column in axes.T:
            _time_axis(_lowest(column), outputs[names[0]])


def file_name(institution: str) -> str:
    """An institution's name as part of a file's name."""
    return re.sub(r"[^\w-]+", "_", institution.lower()).strip("_") or "institution"


@contextlib.contextmanager
def canvas(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the style of all, written to `path` at the end.

    Args:
        path: the PNG file.
        size: in inches.
    """
    # No pyplot: its global registry would keep every figure of a long-lived process.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, "backend": "agg", **_STYLE}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})


def _draw_series(axis: Axes, fit: Fit, small: bool = False) -> None:
    dates = fit.dates.astype("datetime64[ns]")
    half = np.timedelta64(12, "h")
    if fit.held_out is not None and 0 <= fit.held_out < len(dates):
        axis.axvspan(
            dates[fit.held_out] - half, dates[-1] + half, color=_HELD_OUT, linewidth=0, zorder=0, label="held out"
        )
    if np.isfinite(fit.quantiles).all():
        low, lower, median, upper, high = fit.quantiles
        axis.fill_between(dates, low, high, color=BLUE, alpha=0.16, linewidth=0, label="90 % band")
        axis.fill_between(dates, lower, upper, color=BLUE, alpha=0.34, linewidth=0, label="50 % band")
        axis.plot(dates, median, color=BLUE, linewidth=1.6, label="median")
        top = float(high.max())
    else:
        axis.text(
            0.5, 0.5, "the prediction is not finite: not drawn", transform=axis.transAxes, ha="center", color=VERMILLION
        )
        top = 0.0
    seen = np.isfinite(fit.observed)
    axis.plot(
        dates[seen],
        fit.observed[seen],
        linestyle="none",
        marker="o",
        markersize=2.4 if small else 3.2,
        markerfacecolor=INK,
        markeredgecolor="white",
        markeredgewidth=0.35,
        label="observed",
    )
    # A wide band must not flatten the data: it may leave the panel at three times the largest observation.
    largest = float(fit.observed[seen].max()) if seen.any() else 0.0
    ceiling = min(top, 3.0 * largest) if largest > 0 else top
    axis.set_ylim(0, max(ceiling, largest) * 1.08 or 1.0)
    if len(dates):
        axis.set_xlim(dates[0] - half, dates[-1] + half)
    _thousands(axis)


def _marginal(
    axis: Axes, draws: NDArray[np.float64], before: NDArray[np.float64] | None, limits: tuple[float, float]
) -> None:
    grid = np.linspace(*limits, 240)
    for values, colour, label, alpha in ((before, MUTED, "prior", 0.22), (draws, BLUE, "posterior", 0.38)):
        if values is None:
            continue
        density = _density(values, grid, limits)
        axis.fill_between(grid, density, color=colour, alpha=alpha, linewidth=0, label=label)
        axis.plot(grid, density, color=colour, linewidth=1.3)
    axis.axvline(float(np.median(draws)), color=BLUE, linewidth=1.0, linestyle=(0, (3, 2)))
    axis.set_xlim(limits)
    axis.set_ylim(bottom=0)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


def _joint(
    axis: Axes,
    draws: NDArray[np.float64],
    before: NDArray[np.float64] | None,
    across: tuple[float, float],
    up: tuple[float, float],
) -> None:
    if before is not None:
        axis.plot(*before[:800].T, linestyle="none", marker=".", markersize=1.6, color=MUTED, alpha=0.35, zorder=1)
    axis.plot(*draws[:1500].T, linestyle="none", marker=".", markersize=2.2, color=BLUE, alpha=0.45, zorder=2)
    axis.set_xlim(across)
    axis.set_ylim(up)


def _correlation(axis: Axes, first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
    import matplotlib

    spread = float(np.std(first) * np.std(second))
    value = float(np.mean((first - first.mean()) * (second - second.mean())) / spread) if spread > 0 else float("nan")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    if not np.isfinite(value):
        return
    shade = matplotlib.colormaps["PuOr"](0.5 - 0.42 * value)
    axis.set_facecolor((*shade[:3], 0.85))
    axis.text(
        0.5,
        0.5,
        f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0",
        transform=axis.transAxes,
        ha="center",
        va="center",
        fontsize=11,
        color="white" if abs(value) > 0.75 else INK,
    )


def _pair_labels(
    axis: Axes, row: int, column: int, count: int, names: Sequence[str], labels: Mapping[str, str]
) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
    axis.tick_params(labelsize=7.5)
    if row == count - 1:
        axis.set_xlabel(_wrap(labels.get(names[column], words(names[column]))), fontsize=8.5)
    else:
        axis.set_xticklabels([])
    if row != column:
        axis.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
        if column == 0:
            axis.set_ylabel(_wrap(labels.get(names[row], words(names[row]))), fontsize=8.5)
        else:
            axis.set_yticklabels([])


def _draw_output(axis: Axes, series: xr.DataArray) -> None:
    time = str(series.dims[0])
    when = series[time].to_numpy()
    rest = [str(dim) for dim in series.dims[1:]]
    if "draw" in rest:
        others = [dim for dim in rest if dim != "draw"]
        draws = series.sum(others).transpose(time, "draw").to_numpy()
        low, lower, median, upper, high = np.quantile(draws, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        axis.fill_between(when, low, high, color=BLUE, alpha=0.16, linewidth=0, label="90 %")
        axis.fill_between(when, lower, upper, color=BLUE, alpha=0.34, linewidth=0, label="50 %")
        axis.plot(when, median, color=BLUE, linewidth=1.6, label="median")
        axis.legend(loc="upper right")
    elif rest:
        stacked = series.stack(line=rest) if len(rest) > 1 else series.rename({rest[0]: "line"})
        lines = stacked.transpose(time, "line").to_numpy()
        for index, key in enumerate(stacked["line"].to_numpy()[: len(CYCLE)]):
            axis.plot(when, lines[:, index], color=CYCLE[index], linewidth=1.5, label=str(key))
        if lines.shape[1] > len(CYCLE):
            axis.plot(when, lines[:, len(CYCLE) :], color=MUTED, linewidth=0.8, alpha=0.6)
        axis.legend(loc="upper right", title=", ".join(map(words, rest)), title_fontsize=8.5, fontsize=8.5)
    else:
        values = series.to_numpy()
        axis.fill_between(when, values, color=BLUE, alpha=0.12, linewidth=0)
        axis.plot(when, values, color=BLUE, linewidth=1.8)
    axis.margins(x=0)
    if float(np.nanmin(series.to_numpy(), initial=0.0)) >= 0:
        axis.set_ylim(bottom=0)
    _thousands(axis)


def _clip_outliers(axis: Axes, values: NDArray[np.float64]) -> None:
    # Iterations far from the data, most often the first, would flatten all that matters.
    finite = values[np.isfinite(values)]
    if len(finite) < 10:
        return
    low, high = float(finite.min()), float(np.quantile(finite, 0.9))
    ceiling = high + 0.25 * (high - low)
    beyond = int((finite > ceiling).sum())
    if finite.max() <= ceiling + 0.5 * (ceiling - low):
        return
    axis.set_ylim(low - 0.08 * (ceiling - low), ceiling)
    axis.text(
        0.5,
        0.97,
        f"{beyond} not shown, up to {finite.max():,.0f}",
        transform=axis.transAxes,
        ha="center",
        va="top",
        fontsize=8.5,
        color=MUTED,
    )


def _draw_gradient(
    figure: Figure, axis: Axes, gradient: xr.DataArray, values: Mapping[str, float], name: str, unit: str
) -> None:
    time, across = (str(dim) for dim in gradient.dims[:2])
    parameters = [str(key) for key in gradient[across].to_numpy()]
    table = gradient.to_numpy().T.astype(np.float64)
    known = all(parameter in values for parameter in parameters)
    if known:
        table = table * np.array([[0.01 * float(values[parameter])] for parameter in parameters])
        scale = float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 1.0
    else:
        rows = np.nanmax(np.abs(np.where(np.isfinite(table), table, 0.0)), axis=1, keepdims=True)
        table = table / np.where(rows > 0, rows, 1.0)
        scale = 1.0
    when = gradient[time].to_numpy()
    edges = np.concatenate([when, when[-1:] + (when[-1] - when[-2] if len(when) > 1 else when[-1] * 0 + 1)])
    mesh = axis.pcolormesh(
        edges, np.arange(len(parameters) + 1), table, cmap="PuOr_r", vmin=-scale or -1, vmax=scale or 1, rasterized=True
    )
    axis.set_yticks(np.arange(len(parameters)) + 0.5, [words(parameter) for parameter in parameters])
    axis.invert_yaxis()
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    bar = figure.colorbar(mesh, ax=axis, pad=0.015, aspect=14)
    bar.outline.set_visible(False)
    if known:
        axis.set_title(f"{_title(name)}: change if a parameter were 1 % larger")
        bar.set_label(unit)
    else:
        axis.set_title(f"{_title(name)}: derivative by each parameter")
        bar.set_label("relative to the row's largest")


def _time_axis(axis: Axes, series: xr.DataArray) -> None:
    if np.issubdtype(series[series.dims[0]].dtype, np.datetime64):
        _date_axis(axis)
    else:
        axis.set_xlabel(words(str(series.dims[0])) if series.dims[0] != "time" else "day")


def _date_axis(axis: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, num2date

    locator = AutoDateLocator(minticks=3, maxticks=8)  # type: ignore[no-untyped-call]
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(
        ConciseDateFormatter(locator, show_offset=False)  # type: ignore[no-untyped-call]
    )
    axis.tick_params(axis="x", labelbottom=True)
    # The ticks name a month only where it changes; the label says where the axis begins and ends.
    first, last = (num2date(end) for end in axis.get_xlim())  # type: ignore[no-untyped-call]
    begin = f"{first:%B}" if first.year == last.year else f"{first:%B %Y}"
    same = (first.year, first.month) == (last.year, last.month)
    axis.set_xlabel(f"{last:%B %Y}" if same else f"{begin} to {last:%B %Y}")


def _lowest(column: Sequence[Axes]) -> Axes:
    return [axis for axis in column if axis.axison][-1]


def _thousands(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    if axis.get_yscale() == "linear" and max(map(abs, axis.get_ylim())) >= 1000:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace("-", "−")))


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    order = ("observed", "median", "50 % band", "90 % band", "held out", "prior", "posterior")
    wanted = [name for name in order if name in labels]
    figure.legend(
        [handles[labels.index(name)] for name in wanted],
        wanted,
        loc="outside lower left",
        ncols=len(wanted),
        fontsize=9,
        markerscale=1.7,
    )


def _limits(draws: NDArray[np.float64], before: NDArray[np.float64] | None) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.001, 0.999])
    if before is not None:
        low, high = min(low, np.quantile(before, 0.02)), max(high, np.quantile(before, 0.98))
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return float(low - room), float(high + room)


def _density(
    values: NDArray[np.float64], grid: NDArray[np.float64], limits: tuple[float, float]
) -> NDArray[np.float64]:
    # A Gaussian kernel of Silverman's width, reflected at an end of the sample only where the draws pile up against a
    # bound: so a uniform prior stays upright and a bell keeps its tails.
    spread = min(float(np.std(values)), float(np.subtract(*np.quantile(values, [0.75, 0.25]))) / 1.34 or np.inf)
    width = max(1.06 * spread * len(values) ** -0.2, (limits[1] - limits[0]) / 150)
    plain = _kernel(values, grid, width)
    density = plain.copy()
    for end, outside in ((float(values.min()), grid < values.min()), (float(values.max()), grid > values.max())):
        if 2 * _kernel(values, np.array([end]), width)[0] > 0.25 * plain.max():
            density += _kernel(2 * end - values, grid, width)
            density[outside] = 0.0
    return density


def _kernel(values: NDArray[np.float64], grid: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    density = np.zeros_like(grid)
    for part in np.array_split(values, max(1, len(values) // 2000)):
        density += np.exp(-0.5 * ((grid[:, None] - part[None, :]) / width) ** 2).sum(axis=1)
    return np.asarray(density / (len(values) * width * np.sqrt(2 * np.pi)))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def words(name: str) -> str:
    """A name as people write it."""
    return str(name).replace("_", " ")


def place(name: str) -> str:
    """An institution as people call it: `staten_island`, a folder's name, is Staten Island."""
    return words(name).title() if name == name.lower() else words(name)


def _title(name: str) -> str:
    text = words(name)
    return text[:1].upper() + text[1:]


def _axis(name: str, unit: str | None) -> str:
    return f"{words(name)} ({unit})" if unit else words(name)


def _wrap(text: str, width: int = 18) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or text
