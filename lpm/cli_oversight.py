"""Commands with which a steward looks at what a federation has left: a thin shell over `lpm.oversight`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `lpm`.

    Args:
        app: the command line.
    """
    app.command("verify-log")(verify_log)


def verify_log(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A party's ledger.jsonl.", show_default=False)],
    authority: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The authority that certified the party.")
    ] = None,
    head: Annotated[str, typer.Option(metavar="HEX", help="Digest of a line that was noted elsewhere.")] = "",
    json: Json = False,
) -> None:
    """Find any removed, changed, reordered or foreign line of a ledger, and a cut-off end."""
    from lpm import console
    from lpm.oversight import check_ledger

    found, whose = check_ledger(file, authority, head)
    if json:
        answer = {
            "party": found.party,
            "whole": not found.problems,
            "lines": found.lines,
            "head": found.head,
            "problems": list(found.problems),
            "notes": [*found.notes, whose],
        }
        typer.echo(json_module.dumps(answer))
    else:
        rows = [("fail", file.name, problem, "") for problem in found.problems]
        rows += [("warn", file.name, note, "") for note in found.notes]
        if not found.problems:
            rows.append(("ok", found.party, f"All {found.lines} lines are whole and in order; head {found.head}.", ""))
        console.checks([*rows, ("ok" if authority else "warn", "key", whose, "")])
    if found.problems:
        raise typer.Exit(1)
