"""Whatever test a document on security names is there, and every command is in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from lpm.cli import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["threat-model.md", "security.md"])
def test_every_test_that_a_document_names_exists(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    there = set(re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named and not named - there
    files = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert files and not [file for file in files if not (ROOT / file).is_file()]


def test_every_threat_has_an_answer_and_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "threat-model.md").read_text().splitlines() if line.startswith("| ")]
    threats = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]
    assert len(threats) > 20
    for threat, answer, test, _ in threats:
        assert threat and answer and "`test" in test, threat


def test_the_readme_names_every_command() -> None:
    commands = typer.main.get_command(app)
    there = set(commands.list_commands(typer.Context(commands)))
    assert set(re.findall(r"^\| `lpm ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)) == there
