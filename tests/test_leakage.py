"""The leakage report counts what ledgers record, and nothing in it is computed from anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpm.errors import InputError
from lpm.leakage import find_ledgers, read_leakage, write_page
from lpm.privacy.ledger import Ledger
from lpm.protocol.identity import load_identity, make_local_authority

PARTIES = ("north", "south", "west")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two sessions at one party."""
    folder = tmp_path_factory.mktemp("run")
    make_local_authority(folder / "keys", PARTIES)
    identity = load_identity(folder / "keys" / "parties" / "north")
    path = folder / "parties" / "north" / "ledger.jsonl"
    book = Ledger(path, "north", identity.certificate, identity.key.sign, lambda *_: None)
    session = {"roster": list(PARTIES), "agents": 1234, "scenario": "town", "smallest_cell": 12, "sharing": "crypten"}
    for number in range(2):
        book.append("session", session | {"weaker": [f"label {number}", "<b>same</b>"], "policy": "strict"})
        charged = {"trajectories": 4, "losses": 4, "gradients": 12}
        book.append("task", {"charged": charged, "answered_before": False, "epsilon": 1.5 + number, "delta": 1e-6})
        opened = [
            {"tensor": "emit", "to": "parties", "first": 0, "last": 9 + number, "sums": 10, "words": 40},
            {"tensor": "decisions", "to": "parties", "first": 17, "last": 17, "sums": 8, "words": 96},
            {"tensor": "loss", "to": "coordinator", "first": -2, "last": -2, "sums": 1, "words": 4},
        ]
        book.append("done" if number else "broken", {"opened": opened, "rescaled": 1})
    book.append("refused", {"asked": "evaluate 3", "why": "limits.losses = 8"})
    return folder


def test_the_table_is_the_sum_of_what_the_ledger_records(run: Path) -> None:
    found = read_leakage(find_ledgers(run)[0])
    decisions, emit, loss = sorted(found.seen, key=lambda row: row.what)
    assert (decisions.who, decisions.sums, decisions.numbers) == ("the 3 institutions", 16, 192)
    assert decisions.of == "1,234 agents of 3 institutions" and "likelihood" in decisions.meaning
    assert (emit.who, emit.sums, emit.numbers, emit.steps) == ("the 3 institutions", 20, 80, "0…10")
    assert emit.of == "groups of at least 12 agents, of 1,234 agents of 3 institutions"
    assert (loss.who, loss.sums, loss.numbers, loss.steps) == ("the coordinator", 2, 8, "")
    facts = dict(found.facts)
    assert facts["opened losses and scores that hold this series"] == "8"
    assert facts["opened gradient components that hold it"] == "24"
    assert facts["bits that asked for another scale"] == "2"
    assert "ε = 2.5" in facts["differential privacy"] and facts["policy"] == "strict"
    assert found.weaker == ("label 0", "<b>same</b>", "label 1")
    assert len(found.refused) == 1 and "limits.losses = 8" in found.refused[0]


def test_the_page_stands_alone_and_escapes_what_others_wrote(run: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", [read_leakage(path) for path in find_ledgers(run)])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;same" in page and "<b>same" not in page
    assert "http" not in page and "1,234 agents" in page and "limits.losses = 8" in page


def test_a_ledger_that_is_not_whole_is_said_first(run: Path, tmp_path: Path) -> None:
    ledger = find_ledgers(run)[0]
    copy = tmp_path / "ledger.jsonl"
    copy.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:3]))
    copy.with_suffix(".head").write_bytes(ledger.with_suffix(".head").read_bytes())
    found = read_leakage(copy)
    assert found.verdict.problems
    write_page(tmp_path / "page.html", [found])
    assert "The ledger is not whole" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match="holds no ledger"):
        find_ledgers(tmp_path / "nowhere")
