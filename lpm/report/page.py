"""`report.html`: one file with the figures inside, readable without a network, the verdict first."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpm.checkpoint import atomic_write
from lpm.report import figures
from lpm.report.material import Material, Score, summarise_outputs
from lpm.runs import Run

__all__ = ["write_report"]

_FACTS = {
    "world": "World",
    "institutions": "Institutions",
    "parties": "Parties",
    "agents": "Agents",
    "steps": "Days",
    "seed": "Seed",
    "gradient": "Gradient estimator",
    "estimator": "Gradient estimator",
    "executor": "Executor",
    "sharing": "Secure sum",
    "control": "Control plane",
    "iterations": "Optimiser steps",
    "rounds": "Rounds",
    "bytes": "Bytes",
    "resumed": "Times resumed",
    "started": "Started",
}
_PROCESS_COLUMNS = ("role", "party", "pid", "address", "peak_memory")
_TOGETHER = ("all", "all together", "together", "total")
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SCORED = ("posterior", "prior", "persistence")


def write_report(run: Run, material: Material) -> Path:
    """Draw the figures of a run and write its page.

    Args:
        run: its directory gets `figures/*.png` and `report.html`; `run.json` and `processes.json` are read.
        material: what was found.

    Returns:
        The path of `report.html`.

    Raises:
        DiskFull: if there is no room.
    """
    drawn = figures.draw_all(material, run.figures)
    path = run.path / "report.html"
    atomic_write(path, render(run.record(), run.processes(), material, drawn).encode())
    return path


def render(
    record: Mapping[str, Any],
    processes: Sequence[Mapping[str, Any]],
    material: Material,
    drawn: Mapping[str, Path],
) -> str:
    """The page as text.

    Args:
        record: as in `run.json`.
        processes: as in `processes.json`.
        material: what was found.
        drawn: figure → PNG file; each is put into the page.

    Returns:
        HTML that loads nothing from outside itself.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lpm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["score"] = lambda value: number(f"{value:,.1f}".replace("-", "−") if value == value else None)
    scenario = record.get("scenario")
    scenario = scenario if isinstance(scenario, Mapping) else {"name": scenario or "run"}
    return environment.get_template("page.html").render(
        title=scenario.get("title") or str(scenario.get("name", "run")).replace("_", " "),
        scenario=scenario,
        verdict={True: "passed", False: "failed", None: "plain"}[material.passed],
        headline=list(material.headline) or ["No headline was given."],
        checks=material.checks,
        facts=_facts(record),
        timings=_timings(record.get("timings")),
        parameters=_parameters(material.parameters),
        calibrated=any("posterior" in row for row in material.parameters),
        outputs=summarise_outputs(material.outputs) if material.outputs is not None else {},
        fits=_fit_figures(material, drawn),
        withheld=material.withheld,
        overview=_embed(drawn.get("fit")),
        figures={name: _embed(drawn.get(name)) for name in ("posterior", "loss", "outputs")},
        panels=[(panel, _embed(drawn.get(panel.name))) for panel in material.panels],
        scores=_scores(material.scores),
        score_names=_SCORED,
        verdict_on_scores=_compare(material.scores),
        privacy=material.privacy,
        leakage=record.get("leakage", ""),
        processes=_processes(processes, _peaks(record)),
        versions=record.get("versions", {}),
        platform=record.get("platform", {}),
        # The page is the last thing a run writes: it would say `running` for ever.
        status="" if record.get("status") == "running" else record.get("status", ""),
        command=_command(record.get("command")),
    )


def number(value: Any) -> str:
    """A number for people: three significant digits, thousands apart, a true minus; nothing for None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000 or value == 0:
        text = f"{value:,.0f}"
    elif value != 0 and abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def _embed(path: Path | None) -> str:
    if path is None or not path.is_file():
        return ""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _fit_figures(material: Material, drawn: Mapping[str, Path]) -> list[dict[str, str]]:
    institutions = dict.fromkeys(fit.institution for fit in material.fits)
    return [
        {"name": figures.place(name), "image": _embed(drawn.get(f"fit_{figures.file_name(name)}"))}
        for name in institutions
    ]


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, label in _FACTS.items():
        value = record.get(key)
        if value is None or value == "" or value == []:
            continue
        if key == "bytes":
            parts = value.items() if isinstance(value, Mapping) else [("", value)]
            value = ", ".join(f"{_size(count)} {name}".strip() for name, count in parts)
        elif key == "gradient" and isinstance(value, Mapping):
            reason = value.get("reason")
            value = f"{value.get('estimator', '')}{f' ({reason})' if reason else ''}"
        elif key == "started":
            value = str(value).replace("T", " ").replace("+00:00", " UTC")
        elif key == "seed":
            value = str(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{name} {number(item)}" for name, item in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(str(item).replace("_", " ") for item in value)
        found.append((label, number(value)))
    return found


def _timings(timings: Any) -> list[tuple[str, str]]:
    if not isinstance(timings, Mapping):
        return []
    return [
        (str(name).removesuffix("_s").replace("_", " "), f"{number(value)} s")
        for name, value in timings.items()
        if isinstance(value, (int, float))
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return ""


def _parameters(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for row in rows:
        plain = dict(row)
        plain["label"] = row.get("label") or str(row["name"]).replace("_", " ")
        plain["unit"] = row.get("unit") or ""
        plain["bars"] = _bars(row.get("prior"), row.get("posterior"))
        shown.append(plain)
    return shown


def _bars(prior: Any, posterior: Any) -> list[dict[str, Any]]:
    """Where the two intervals lie on one scale, in per cent of its width."""
    intervals = [(name, x) for name, x in (("prior", prior), ("posterior", posterior)) if isinstance(x, Mapping)]
    ends = [float(x[end]) for _, x in intervals for end in ("low", "high") if x.get(end) is not None]
    if not ends or not all(map(math.isfinite, ends)) or max(ends) <= min(ends):
        return []
    low, width = min(ends), max(ends) - min(ends)

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / width, 2)

    return [
        {
            "kind": name,
            "from": place(x["low"]),
            "width": max(round(place(x["high"]) - place(x["low"]), 2), 0.8),
            "median": place(x["median"]),
        }
        for name, x in intervals
    ]


def _scores(scores: Sequence[Score]) -> list[dict[str, Any]]:
    shown = []
    for score in scores:
        values = {name: getattr(score, name) for name in _SCORED}
        finite = [value for value in values.values() if math.isfinite(value)]
        shown.append(
            {
                "institution": _called(score.institution),
                "days": score.days or "",
                "values": values,
                "best": max(finite) if finite else None,
            }
        )
    return shown


def _called(institution: str) -> str:
    return "All together" if institution.lower() in _TOGETHER else figures.place(institution)


def _compare(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    whole = [score for score in scores if score.institution.lower() in _TOGETHER]
    counted = whole or list(scores)
    sums = {name: sum(getattr(score, name) for score in counted) for name in _SCORED}
    words = []
    for name, called in (("prior", "the prior predictive"), ("persistence", "persistence")):
        gain = sums["posterior"] - sums[name]
        if math.isfinite(gain):
            verb = "beats" if gain > 0 else "falls behind"
            words.append(f"{verb} {called} by {abs(gain):,.1f}")
    return f"In all, the posterior predictive {' and '.join(words)} nats." if words else ""


def _processes(processes: Sequence[Mapping[str, Any]], memory: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for process in processes:
        row = dict(process)
        names = [str(row.get(key) or "") for key in ("party", "role", "name")]
        used = next((memory[name] for name in names if name in memory), None)
        if used is not None:
            row["peak_memory"] = _memory(used)
        rows.append(row)
    if not rows:
        rows = [{"role": str(name).replace("_", " "), "peak_memory": _memory(used)} for name, used in memory.items()]
    columns = [name for name in _PROCESS_COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    return {
        "columns": [name.replace("_", " ") for name in columns],
        "rows": [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows],
    }


def _peaks(record: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory per process, bytes."""
    peaks = record.get("peak_memory")
    megabytes = record.get("peak_memory_mb")
    found = dict(peaks) if isinstance(peaks, Mapping) else {}
    for name, used in (megabytes if isinstance(megabytes, Mapping) else {}).items():
        found.setdefault(name, used * 2**20 if isinstance(used, (int, float)) else used)
    return found


def _memory(used: Any) -> str:
    return _size(used) if isinstance(used, (int, float)) else str(used)


def _command(command: Any) -> str:
    if not isinstance(command, Mapping):
        return str(command or "")
    words = ["lpm", str(command.get("command", ""))]
    if command.get("scenario"):
        scenario = Path(str(command["scenario"]))
        here = Path.cwd()
        words.append(str(scenario.relative_to(here) if scenario.is_relative_to(here) else scenario))
    unsaid = {"command", "scenario", "json", "out"}
    if command.get("command") != "federate":
        unsaid |= {"sharing", "control"}
    for name, value in command.items():
        if name in unsaid or value in (None, False, "", {}):
            continue
        if name == "settings" and isinstance(value, Mapping):
            words += [f"--set {key}={item}" for key, item in value.items()]
        elif name == "unsafe":
            words.append("--unsafe-no-disclosure-control")
        else:
            flag = f"--{str(name).replace('_', '-')}"
            words.append(flag if value is True else f"{flag} {value}")
    return " ".join(word for word in words if word)
