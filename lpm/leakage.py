"""The leakage report: who could see what of an institution, counted from its own ledger, in one table.

It is written by machine from what parties signed while it happened; a ledger that is not whole says so in the first
line. The same table is shown on the terminal (`lpm leakage RUN`) and as a page for the steward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpm.checkpoint import atomic_write
from lpm.errors import InputError
from lpm.privacy.ledger import LEDGER_FILE, Line, Verdict, verify

__all__ = ["LEAKAGE_PAGE", "Leakage", "Seen", "find_ledgers", "read_leakage", "write_page"]

LEAKAGE_PAGE = "leakage.html"
"""The page's name, beside the ledger and in the run's directory."""

_MEANING = {
    "answered": "whether all parties keep this answer already",
    "held": "which checkpoints all parties hold",
    "census": "how many agents and institutions are in each group",
    "emit": "what the agents of each group send each other, that day",
    "adjoint": "how the target changes with what each group sends, that day",
    "decisions": "how all people's decisions together change in likelihood with each parameter",
    "loss": "how badly the parameters fit all series together",
    "gradient": "how that changes with each parameter",
    "score": "how well held-out days were forecast",
    "outputs": "the public outputs",
    "cells": "cells of an output that enough people stand behind",
}


_OF_EVERYBODY = ("answered", "held", "decisions")
"""What parties open that is not by group."""


@dataclass(frozen=True)
class Seen:
    """One row: a kind of opened sum.

    Attributes:
        what: the tensor.
        meaning: in words.
        who: could see it.
        sums: how many were opened.
        numbers: how many numbers they held together.
        of: how many people and institutions each sum is over.
        steps: first and last step of a trajectory; "" if not of a step.
    """

    what: str
    meaning: str
    who: str
    sums: int
    numbers: int
    of: str
    steps: str


@dataclass(frozen=True)
class Leakage:
    """What could be learnt of one institution.

    Attributes:
        party: whose ledger it is.
        verdict: of the ledger.
        seen: rows of the table.
        facts: (what, value) of everything that is not a sum.
        weaker: labels of whatever was weaker than the default.
        refused: what was refused, and why.
    """

    party: str
    verdict: Verdict
    seen: tuple[Seen, ...]
    facts: tuple[tuple[str, str], ...]
    weaker: tuple[str, ...]
    refused: tuple[str, ...]


def find_ledgers(place: Path) -> list[Path]:
    """The ledgers of a run's directory, of one party's folder, or the file itself.

    Raises:
        InputError: if there is none.
    """
    if place.is_file():
        return [place]
    found = sorted(place.glob(f"parties/*/{LEDGER_FILE}")) or sorted(place.glob(LEDGER_FILE))
    if not found:
        raise InputError(
            f"{place} holds no ledger.", "Name a run's directory, a party's folder in it, or its ledger.jsonl."
        )
    return found


def read_leakage(path: Path) -> Leakage:
    """Count what one ledger records.

    Args:
        path: of the ledger.

    Raises:
        InputError: if it can't be read.
    """
    verdict = verify(path)
    sessions = [each for each in verdict.entries if each.kind == "session"]
    roster: dict[str, Any] = dict(sessions[-1].body) if sessions else {}
    institutions, agents = len(roster.get("roster", ())), int(roster.get("agents", 0))
    counted: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 2**62, -(2**62)])
    rescaled = 0
    for line in verdict.entries:
        if line.kind in ("done", "broken"):
            rescaled += int(line.body.get("rescaled", 0))
            for each in line.body.get("opened", ()):
                row = counted[str(each["tensor"]), str(each["to"])]
                row[0] += each["sums"]
                row[1] += each["words"]
                row[2], row[3] = min(row[2], each["first"]), max(row[3], each["last"])
    over = f"{agents:,} agents of {institutions} institutions"
    cell = roster.get("smallest_cell")
    seen = []
    for (tensor, to), (sums, words, first, last) in sorted(counted.items(), key=lambda item: (item[0][1], item[0][0])):
        base = tensor.partition("/")[0].partition(":")[0]
        grouped = to == "parties" and base not in _OF_EVERYBODY
        of = f"groups of at least {cell} agents, of {over}" if grouped and cell else over
        steps = f"{first}…{last}" if last >= 0 else ""
        who = f"the {institutions} institutions" if to == "parties" else "the coordinator"
        seen.append(Seen(tensor, _MEANING.get(base, "a derivative of the sums above"), who, sums, words, of, steps))
    return Leakage(
        verdict.party,
        verdict,
        tuple(seen),
        tuple(_facts(verdict.entries, roster, len(sessions), rescaled)),
        tuple(dict.fromkeys(str(label) for each in sessions for label in each.body.get("weaker", ()))),
        tuple(
            f"{each.time[:19]} {each.body['asked']}: {each.body['why']}"
            for each in verdict.entries
            if each.kind == "refused"
        ),
    )


def _facts(entries: Sequence[Line], last: dict[str, Any], sessions: int, rescaled: int) -> list[tuple[str, str]]:
    tasks = [each.body for each in entries if each.kind == "task"]
    charged = [body.get("charged", {}) for body in tasks]
    total = {name: sum(int(each.get(name, 0)) for each in charged) for name in ("trajectories", "losses", "gradients")}
    noisy = [body for body in tasks if "epsilon" in body]
    epsilon = (
        f"ε = {max(body['epsilon'] for body in noisy):.4g} at δ = {noisy[-1]['delta']:g}, over all sessions"
        if noisy
        else "no noise was added: ε is not bounded"
    )
    released = sum("released" in each.body for each in entries if each.kind in ("done", "broken"))
    return [
        ("sessions", str(sessions)),
        ("scenario", f"{last.get('scenario', '')} (code {str(last.get('code', ''))[:16]}…)"),
        ("policy", str(last.get("policy", ""))),
        ("engine", str(last.get("sharing", ""))),
        ("differential privacy", f"{last.get('privacy', 'none')}; {epsilon}"),
        ("answered draws of parameters", f"{total['trajectories']:,}"),
        ("opened losses and scores that hold this series", f"{total['losses']:,}"),
        ("opened gradient components that hold it", f"{total['gradients']:,}"),
        ("answers given again, at no cost", str(sum(bool(body.get("answered_before")) for body in tasks))),
        ("bits that asked for another scale", str(rescaled)),
        ("own fit and series shown in the clear", f"{released} times" if released else "never"),
        ("people left out at their wish", "yes" if last.get("people_left_out") else "nobody"),
    ]


_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Who could see what</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 } td, th { padding: .35rem .6rem; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top } th { font-weight: 600; color: #555 } td.n { text-align: right }
.bad { color: #a40000; font-weight: 600 } .weak { color: #8a5a00 } h2 { margin-top: 2.5rem }
</style></head><body>
<h1>Who could see what</h1>
<p>Written by machine from what each institution signed while it happened. Nothing else left an institution in a way
that anybody could read; n−2 institutions that collude, with the coordinator or without, know the sum of the other two.
</p>
{% for each in all %}
<h2>{{ each.party }}</h2>
{% if each.verdict.problems %}<p class="bad">The ledger is not whole: {{ each.verdict.problems[0] }}</p>
{% else %}<p>The ledger is whole: {{ each.verdict.lines }} lines, head {{ each.verdict.head[:16] }}….</p>{% endif %}
{% for label in each.weaker %}<p class="weak">Weaker than the default: {{ label }}</p>{% endfor %}
<table><tr><th>opened</th><th>what it says</th><th>to whom</th><th>sums</th><th>numbers</th><th>each over</th>
<th>days</th></tr>
{% for row in each.seen %}<tr><td>{{ row.what }}</td><td>{{ row.meaning }}</td><td>{{ row.who }}</td>
<td class="n">{{ "{:,}".format(row.sums) }}</td><td class="n">{{ "{:,}".format(row.numbers) }}</td><td>{{ row.of }}</td>
<td>{{ row.steps }}</td></tr>
{% endfor %}</table>
<table>{% for what, value in each.facts %}<tr><th>{{ what }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
{% if each.refused %}<p>Refused:</p><ul>{% for line in each.refused %}<li>{{ line }}</li>{% endfor %}</ul>
{% else %}<p>Nothing was refused.</p>{% endif %}
{% endfor %}
</body></html>
"""


def write_page(path: Path, all_of_them: Sequence[Leakage]) -> None:
    """Write the table as a page that stands alone.

    Args:
        path: of the page.
        all_of_them: one for each institution.
    """
    import jinja2

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    atomic_write(path, template.render(all=all_of_them).encode())
