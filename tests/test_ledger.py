"""A ledger is only ever added to: every other change of it is found, and so is a cut-off end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import lpm.privacy.ledger
from lpm.errors import InputError
from lpm.oversight import check_ledger
from lpm.privacy.ledger import Ledger, LedgerBroken, head_file, verify
from lpm.protocol.identity import Identity, load_identity, make_local_authority, verify_certificate

PARTIES = ("north", "south", "west")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "local"
    make_local_authority(folder, PARTIES)
    return folder


@pytest.fixture(scope="module")
def north(keys: Path) -> Identity:
    return load_identity(keys / "parties" / "north")


def ledger(path: Path, identity: Identity) -> Ledger:
    """Open one as its party does."""
    return Ledger(
        path,
        identity.name,
        identity.certificate,
        identity.key.sign,
        lambda certificate, party, now: verify_certificate(certificate, party, identity.authority, now) and None,
    )


@pytest.fixture
def written(tmp_path: Path, north: Identity) -> Path:
    """A ledger of six lines."""
    path = tmp_path / "ledger.jsonl"
    book = ledger(path, north)
    for k in range(5):
        book.append("task", {"kind": "evaluate", "trajectory": k})
    return path


def test_a_ledger_as_it_was_written_is_whole_and_goes_on_after_a_restart(written: Path, north: Identity) -> None:
    book = ledger(written, north)
    assert book.lines == 6
    book.append("close", {"reason": ""})
    found = verify(written)
    assert (found.problems, found.notes) == ((), ()) and found.lines == 7 and found.head == book.head
    assert [entry.kind for entry in found.entries] == ["open", *["task"] * 5, "close"]
    assert written.stat().st_mode & 0o077 == head_file(written).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("after", ["line", "head"])
def test_a_party_told_to_stop_while_it_writes_leaves_a_whole_ledger(
    written: Path, north: Identity, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    book = ledger(written, north)
    book.append("task", {"kind": "evaluate", "trajectory": 5})
    writes = {"line": "_append", "head": "atomic_write"}[after]
    really = getattr(lpm.privacy.ledger, writes)

    def interrupted(*arguments: object) -> None:
        if after == "line":
            really(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lpm.privacy.ledger, writes, interrupted)
        with pytest.raises(KeyboardInterrupt):
            book.append("done", {"opened": {}})
    assert not verify(written).problems
    book.append("close", {"reason": "it was stopped"})
    found = verify(written)
    assert (found.problems, found.notes) == ((), ()) and found.head == book.head
    assert [entry.kind for entry in found.entries[7:]] == (["close"] if after == "line" else ["done", "close"])
    assert ledger(written, north).lines == book.lines


@pytest.mark.parametrize("number", range(6))
def test_any_removed_line_is_found(written: Path, north: Identity, number: int) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
    assert verify(written).problems
    with pytest.raises(LedgerBroken):
        ledger(written, north)


@pytest.mark.parametrize("first", range(5))
def test_any_two_lines_in_another_order_are_found(written: Path, first: int) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    for second in range(first + 1, 6):
        moved = list(lines)
        moved[first], moved[second] = moved[second], moved[first]
        written.write_bytes(b"".join(moved))
        assert verify(written).problems


def test_any_changed_byte_is_found(written: Path) -> None:
    whole = written.read_bytes()
    draw = random.Random(1)
    for place in draw.sample(range(len(whole)), 150):
        other = bytearray(whole)
        other[place] ^= 1 << draw.randrange(8)
        written.write_bytes(other)
        assert verify(written).problems, place


@pytest.mark.parametrize("kept", range(1, 6))
def test_a_cut_off_end_is_found(written: Path, kept: int) -> None:
    written.write_bytes(b"".join(written.read_bytes().splitlines(keepends=True)[:kept]))
    assert any("cut off" in problem for problem in verify(written).problems)


def test_a_ledger_without_its_head_or_with_another_is_not_believed(written: Path, north: Identity) -> None:
    head = head_file(written)
    kept = head.read_bytes()
    head.unlink()
    assert any("missing" in problem for problem in verify(written).problems)
    head.write_bytes(kept.replace(b'"lines":6', b'"lines":5'))
    assert any("not one that the party signed" in problem for problem in verify(written).problems)
    head.write_bytes(kept)
    book = ledger(written, north)
    for _ in range(3):
        book.append("task", {})
    head.write_bytes(kept)
    assert any("old one" in problem for problem in verify(written).problems)


def test_a_ledger_that_was_set_back_with_its_head_is_found_by_whoever_kept_a_later_head(
    written: Path, north: Identity
) -> None:
    old = written.read_bytes(), head_file(written).read_bytes()
    book = ledger(written, north)
    book.append("refused", {"line": "limits.losses = 10"})
    noted = book.head
    written.write_bytes(old[0])
    head_file(written).write_bytes(old[1])
    assert not verify(written).problems
    assert any("set back" in problem for problem in verify(written, kept_head=noted).problems)


def test_a_foreign_line_is_found_and_a_foreign_ledger_too(
    written: Path, keys: Path, tmp_path: Path, north: Identity
) -> None:
    # South signs a line that fits the chain.
    other = tmp_path / "other.jsonl"
    other.write_bytes(written.read_bytes())
    head_file(other).write_bytes(head_file(written).read_bytes())
    chain = ledger(other, north)
    chain._sign = load_identity(keys / "parties" / "south").key.sign
    chain.append("task", {})
    assert any("not signed by north" in problem for problem in verify(other).problems)
    # Somebody writes a whole ledger in north's name, under an authority of their own.
    make_local_authority(tmp_path / "foreign", PARTIES)
    fake = tmp_path / "fake.jsonl"
    ledger(fake, load_identity(tmp_path / "foreign" / "parties" / "north"))
    assert not check_ledger(fake)[0].problems  # by its own word
    assert check_ledger(fake, keys / "authority" / "authority.pem")[0].problems
    assert not check_ledger(written, keys / "authority" / "authority.pem")[0].problems


def test_a_key_that_nobody_vouches_for_does_not_take_over(written: Path, keys: Path, tmp_path: Path) -> None:
    south = load_identity(keys / "parties" / "south")
    with pytest.raises(LedgerBroken, match=r"north's, not south's"):
        ledger(written, south)
    make_local_authority(tmp_path / "foreign", PARTIES)
    foreign = load_identity(tmp_path / "foreign" / "parties" / "north")
    with pytest.raises(LedgerBroken):
        ledger(written, foreign)
    chain = ledger(written, load_identity(keys / "parties" / "north"))
    chain._sign = foreign.key.sign
    chain.append("key", {"certificate": json.loads(_first(foreign, tmp_path))["body"]["certificate"]})
    assert any("without the old key" in problem for problem in verify(written).problems)
    found, _ = check_ledger(written, keys / "authority" / "authority.pem")
    assert any("authority" in problem for problem in found.problems)


def _first(identity: Identity, folder: Path) -> bytes:
    ledger(folder / "first.jsonl", identity)
    return (folder / "first.jsonl").read_bytes().splitlines()[0]


@pytest.mark.parametrize("left", [1, 40, 200])
def test_a_line_that_a_crash_tore_is_cut_off_and_told(written: Path, north: Identity, left: int) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole + whole.splitlines()[-1][:left])
    assert any("torn" in problem for problem in verify(written).problems)
    ledger(written, north)
    found = verify(written)
    assert not found.problems and found.entries[-1].kind == "recovered" and found.entries[-1].body == {"bytes": left}


def test_a_crash_between_a_line_and_its_head_costs_nothing(written: Path, north: Identity) -> None:
    before = head_file(written).read_bytes()
    ledger(written, north).append("task", {})
    head_file(written).write_bytes(before)
    found = verify(written)
    assert not found.problems and any("one line behind" in note for note in found.notes)
    ledger(written, north).append("task", {})
    assert verify(written).notes == ()


def test_a_ledger_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        check_ledger(tmp_path / "none.jsonl")
