"""Commands with which a steward looks at what a federation has left: a thin shell over `lpm.oversight`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

_policy = typer.Typer(help="An institution's policy: write one, and see what it would answer.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `lpm`.

    Args:
        app: the command line.
    """
    app.command("verify-log")(verify_log)
    app.command("leakage")(leakage)
    app.add_typer(_policy, name="policy")


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


def leakage(
    place: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's directory, or a party's folder in it.", show_default=False)
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as a page too.")] = None,
    json: Json = False,
) -> None:
    """Say who could see what, how many sums, of how many people, and the ε spent, from the signed ledgers."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from lpm.leakage import find_ledgers, read_leakage, write_page

    found = [read_leakage(path) for path in find_ledgers(place)]
    if html is not None:
        write_page(html, found)
    console = Console(highlight=False)
    for each in found:
        if json:
            continue
        whole = f"ledger whole, {each.verdict.lines} lines"
        console.print(f"[bold]{each.party}[/bold]: {each.verdict.problems[0] if each.verdict.problems else whole}")
        table = Table(header_style="dim", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("opened", "to", "sums", "numbers", "each over", "days"):
            table.add_column(column, justify="right" if column in ("sums", "numbers") else "left")
        for row in each.seen:
            table.add_row(row.what, row.who, f"{row.sums:,}", f"{row.numbers:,}", row.of, row.steps)
        console.print(table)
        for what, value in each.facts:
            console.print(f"{what}: {value}", markup=False)
        for label in each.weaker:
            console.print(f"weaker than the default: {label}", style="yellow", markup=False)
        for line in each.refused:
            console.print(f"refused: {line}", style="bold", markup=False)
        console.print()
    if json:
        plain = [
            {
                "party": each.party,
                "whole": not each.verdict.problems,
                "head": each.verdict.head,
                "seen": [dataclasses.asdict(row) for row in each.seen],
                "facts": dict(each.facts),
                "weaker": list(each.weaker),
                "refused": list(each.refused),
            }
            for each in found
        ]
        typer.echo(json_module.dumps(plain))
    if any(each.verdict.problems for each in found):
        raise typer.Exit(1)


@_policy.command("new")
def policy_new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.", show_default=False)],
    scenario: Annotated[Path, typer.Option(metavar="DIR", help="The scenario to allow.", show_default=False)],
) -> None:
    """Write a strict policy that allows one scenario as it is installed here, to be edited."""
    from lpm import console
    from lpm.errors import InputError
    from lpm.oversight import policy_template
    from lpm.scenario import load

    text = policy_template(load(scenario))
    if file.exists():
        raise InputError(f"{file} is there already: a policy is never overwritten.", "Name another file.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    console.note(f"{file} allows {scenario.name} and nothing else. Read it, edit it, then `lpm policy check`.")


@_policy.command("check")
def policy_check(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="The scenario's folder.", show_default=False)],
    policy: Annotated[Path, typer.Option(metavar="FILE", help="The policy.toml.", show_default=False)],
    party: Annotated[str, typer.Option(metavar="NAME", help="Whose budget beside the policy counts.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter, or a key of scenario.toml.")
    ] = None,
    simulate_only: Annotated[bool, typer.Option("--simulate-only", help="One simulation, no calibration.")] = False,
    release_fit: Annotated[bool, typer.Option("--release-fit", help="The party shows its fit.")] = False,
    json: Json = False,
) -> None:
    """Say what a policy would answer and what it would refuse; nothing is asked or charged."""
    from datetime import datetime

    from lpm import console
    from lpm.options import parse_settings
    from lpm.oversight import rehearse
    from lpm.privacy.budget import Budget
    from lpm.privacy.policy import Charge, read_policy
    from lpm.scenario import load

    rules = read_policy(policy)
    spent = Budget(policy.with_name(f"budget-{party}.jsonl")).spent if party else Charge()
    changed = load(scenario).with_options(settings=parse_settings(settings or ()))
    rows = rehearse(rules, changed, spent, now=datetime.now(), simulate_only=simulate_only, release_fit=release_fit)
    if policy.with_name("stop").exists():
        rows.insert(0, ("fail", "stop", "The kill switch is on: nothing is answered.", "Remove the file `stop`."))
    refused = any(verdict == "fail" for verdict, *_ in rows)
    if json:
        typer.echo(json_module.dumps({"refused": refused, "checks": [list(row) for row in rows]}))
    else:
        console.checks(rows)
    if refused:
        raise typer.Exit(1)
