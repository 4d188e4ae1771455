"""What a user sees of a command: progress and errors on standard error, the summary on standard output."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lpm import ranks

__all__ = [
    "Advance",
    "checks",
    "error_line",
    "format_number",
    "note",
    "only_json_on_stdout",
    "progress",
    "set_up_logging",
    "summary",
]


_MOST_TARGETS, _MOST_PARAMETERS = 4, 12
"""Columns and rows of a sensitivity on the terminal."""


class Advance(Protocol):
    """Tells how far the work has come."""

    def __call__(self, text: str = "", by: int = 1) -> None:
        """Go on.

        Args:
            text: a few words on the present state, such as the loss.
            by: how many units were done.
        """


def stderr() -> Console:
    """The console for progress and errors, at the present standard error; silent at ranks that don't speak."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=not ranks.speaks())


def note(text: str) -> None:
    """Say one line on standard error."""
    stderr().print(Text(text))


def error_line(message: str, remedy: str = "") -> None:
    """Say on standard error, in one red line, what went wrong and what can be done."""
    line = Text(" ".join(message.split()), style="bold red")
    if remedy:
        line.append(" " + " ".join(remedy.split()), style="not bold red")
    stderr().print(line)


@contextlib.contextmanager
def progress(description: str, total: int, start: int = 0) -> Iterator[Advance]:
    """Show how far a piece of work has come: a bar on a terminal, ten lines at most elsewhere.

    Args:
        description: what is done, such as `Calibrating`.
        total: units of work.
        start: units that were done before (a resumed run).

    Yields:
        The function to call after each unit.
    """
    console = stderr()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[state]}"),
        )
        with Progress(*columns, console=console, transient=False) as bar:
            task = bar.add_task(description, total=total, completed=start, state="")
            yield lambda text="", by=1: bar.update(task, advance=by, state=text.replace("[", r"\["))
        return
    done = start

    def advance(text: str = "", by: int = 1) -> None:
        nonlocal done
        tenth = 10 * done // max(total, 1)
        done += by
        if 10 * done // max(total, 1) > tenth:
            note(f"{description}: {done} of {total}{f', {text}' if text else ''}")

    yield advance


def set_up_logging(verbose: bool = False) -> None:
    """Show warnings (or, if asked, also the course of things) on standard error."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            style = "yellow" if record.levelno >= logging.WARNING else "dim"
            stderr().print(Text(record.getMessage(), style=style))

    for name in ("lpm", "clients", "server", "simulations"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
        logger.handlers = [Handler()]
        logger.propagate = False


@contextlib.contextmanager
def only_json_on_stdout() -> Iterator[IO[str]]:
    """Keep standard output clean: whatever libraries and child processes print there goes to standard error.

    Yields:
        The real standard output, for the one JSON object.
    """
    sys.stdout.flush()
    real = sys.stdout
    try:
        kept: int | None = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # no such descriptors: embedded, or closed by the caller
        kept = None
    if kept is not None and real is sys.__stdout__:
        real = os.fdopen(os.dup(kept), "w", encoding="utf-8")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield real
    finally:
        real.flush()
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
        if real is not sys.__stdout__ and kept is not None and real is not sys.stdout:
            real.close()


def format_number(value: Any) -> str:
    """A number for people: three significant digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def summary(found: Mapping[str, Any]) -> None:
    """Show the summary of a command on standard output.

    Args:
        found: run, scenario, world, headline, sensitivities, estimators, parameters, scores, outputs, timings, report;
            what is absent is left out.
    """
    console = Console(highlight=False)
    headline = found.get("headline")
    for index, line in enumerate([headline] if isinstance(headline, str) else headline or []):
        console.print(Text(str(line), style="bold" if index == 0 else ""))
    if found.get("sensitivities"):
        console.print()
        console.print(_elasticities(found["sensitivities"], list(found.get("outputs") or {})))
    if found.get("estimators"):
        console.print()
        console.print(_estimators(found["estimators"]))
    if found.get("outputs"):
        console.print()
        console.print(_outputs(found["outputs"]))
    if found.get("parameters"):
        console.print()
        console.print(_parameters(found["parameters"]))
    if found.get("scores"):
        console.print()
        console.print(_scores(found["scores"]))
    times = found.get("timings") or {}
    console.print()
    if times:
        console.print(
            Text(
                "Time: " + ", ".join(f"{_words(k.removesuffix('_s'))} {format_number(v)} s" for k, v in times.items()),
                style="dim",
            )
        )
    for name in ("run", "report"):
        if found.get(name):
            console.print(Text(f"{name.capitalize()}: {found[name]}"), soft_wrap=True)


def checks(found: Sequence[tuple[str, str, str, str]], good: str = "Ready.", bad: str = "Not ready") -> None:
    """Show what was checked on standard output.

    Args:
        found: verdict (`ok`, `warn` or `fail`), subject, finding and remedy of each.
        good: the last line if nothing failed.
        bad: how it begins otherwise.
    """
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for verdict, subject, finding, remedy in found:
        said = Text(finding)
        if remedy:
            said.append(f"\n{remedy}", style="bold" if verdict == "fail" else "")
        table.add_row(Text(verdict, style=styles.get(verdict, "")), Text(subject), said)
    console.print(table)
    counts = {verdict: sum(row[0] == verdict for row in found) for verdict in styles}
    last = good if not counts["fail"] else f"{bad}: {counts['fail']} to put right."
    console.print(Text(last + (f" {counts['warn']} to know of." if counts["warn"] else ""), style="bold"))


def measured(found: Mapping[str, Any]) -> None:
    """Show figures by name on standard output; a list is shown on one line.

    Args:
        found: name → number, or list of numbers.
    """
    table = _table("measured", "")
    for name, value in found.items():
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        table.add_row(_words(name), "  ".join(format_number(number) for number in numbers))
    Console(highlight=False).print(table)


def _table(*columns: str) -> Table:
    table = Table(header_style="dim", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    return table


def _outputs(outputs: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("output", "peak", "on", "total", "unit")
    for name, row in outputs.items():
        table.add_row(
            _words(name),
            format_number(row.get("peak")),
            str(row.get("peak_date", "")),
            format_number(row.get("total")),
            str(row.get("unit") or ""),
        )
    return table


def _elasticities(rows: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> Table:
    """The strongest parameters of a few targets; `targets.csv` has all."""
    shown = [row for row in rows if row["output"] in outputs] or rows  # or what was asked for by its name
    targets = list(dict.fromkeys(row["target"] for row in shown))
    if len(targets) > _MOST_TARGETS:
        totals = [target for target in targets if target.endswith(":total")]
        targets = (totals or targets)[:_MOST_TARGETS]
    found = {(row["parameter"], row["target"]): row for row in rows if row["target"] in targets}
    strongest = {
        name: max(abs(found[name, target]["elasticity"] or 0.0) for target in targets)
        for name in dict.fromkeys(name for name, _ in found)
    }
    table = _table("% for 1 % of", *(target.replace(":", "\n") for target in map(_words, targets)))
    table.columns[0].no_wrap = True
    for name in sorted(strongest, key=lambda name: -strongest[name])[:_MOST_PARAMETERS]:
        table.add_row(_words(name), *(_uncertain(found[name, target], "elasticity") for target in targets))
    return table


def _estimators(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A gradient audit."""
    table = _table("estimator", "bias", "sd of a run", "time (plain 1)", "wrong signs", "ruling")
    for row in rows:
        measured = row.get("bias") is not None
        table.add_row(
            str(row["label"]),
            _uncertain(row, "bias", "bias_se"),
            _two_digits(row.get("sd")),
            _two_digits(row.get("cost")),
            f"{row['wrong_signs']} of {row['clear_signs']}" if measured else "",
            str(row["ruling"]),
        )
    return table


def _uncertain(row: Mapping[str, Any], name: str, error: str = "") -> str:
    """A number with its standard error, where it has one."""
    spread = row.get(error or f"{name}_se")
    return _two_digits(row.get(name)) + (f" ± {_two_digits(spread)}" if spread else "")


def _two_digits(value: Any) -> str:
    return "n/a" if value is None else f"{value:,.2f}"


def _parameters(rows: Sequence[Mapping[str, Any]]) -> Table:
    if not any(isinstance(row.get("posterior"), Mapping) for row in rows):
        table = _table("parameter", "value", "unit")
        for row in rows:
            value = row.get("value", row.get("prior", ""))
            text = _interval(value) if isinstance(value, Mapping) else format_number(value)
            table.add_row(_words(row.get("label") or row["name"]), text, str(row.get("unit") or ""))
        return table
    table = _table("median (90 % interval)", "prior", "posterior", "unit")
    for row in rows:
        table.add_row(
            _words(row.get("label") or row["name"]),
            _interval(row.get("prior")),
            _interval(row.get("posterior")),
            str(row.get("unit") or ""),
        )
    return table


def _interval(found: Any) -> str:
    if not isinstance(found, Mapping):
        return format_number(found)
    return (
        f"{format_number(found.get('median'))} ({format_number(found.get('low'))}–{format_number(found.get('high'))})"
    )


def _scores(scores: Any) -> Table:
    if isinstance(scores, Mapping):
        meaning = scores.get("meaning")
        table = _table(str(meaning or "log score of the held-out days"), "score")
        for name in ("posterior", "prior"):
            if name in scores:
                table.add_row(f"{name} predictive", _score(scores[name]))
        for name in scores:
            if name not in ("posterior", "prior", "meaning", "observations"):
                table.add_row(_words(name), _score(scores[name]))
        return table
    columns = list(dict.fromkeys(name for row in scores for name in row))
    table = _table(*map(_words, columns))
    for row in scores:
        table.add_row(*(format_number(row.get(name)) for name in columns))
    return table


def _score(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _words(name: object) -> str:
    return str(name).replace("_", " ")
