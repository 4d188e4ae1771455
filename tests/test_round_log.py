"""A step that is repeated after a resumption must be the same step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lpm.errors import SessionRefused
from lpm.privacy.secure_sum import Round
from lpm.worlds.round_log import RoundLog

KEY = bytes(range(32))
WORDS, TOTAL = np.array([3, -1], dtype=np.int64), np.array([9, 2**62], dtype=np.int64)


def address(step: int, attempt: int = 0) -> Round:
    """A round of the contacts."""
    return Round(trajectory=4, step=step, tensor="emit/1", attempt=attempt, parameters=b"\1" * 32)


def test_the_same_rounds_pass_in_any_session_and_later_ones_are_added(tmp_path: Path) -> None:
    path = tmp_path / "task" / "rounds.log"
    first = RoundLog(path, KEY)
    for step in range(5):
        first.compare(address(step), WORDS + step, TOTAL + step)
    size = path.stat().st_size
    assert path.stat().st_mode & 0o077 == 0
    again = RoundLog(path, KEY)
    for step in range(2, 7):
        again.compare(address(step), WORDS + step, TOTAL + step)
    assert path.stat().st_size == size // 5 * 7
    again.compare(address(1, attempt=1), WORDS, TOTAL)


@pytest.mark.parametrize(("words", "total"), [(WORDS, TOTAL + 1), (WORDS + 1, TOTAL), (WORDS + 1, TOTAL + 1)])
def test_a_repeated_round_with_another_number_is_refused_without_telling_it(
    tmp_path: Path, words: np.ndarray, total: np.ndarray
) -> None:
    RoundLog(tmp_path / "rounds.log", KEY).compare(address(3), WORDS, TOTAL)
    with pytest.raises(SessionRefused, match="The sum emit/1 of step 3 is not the one") as caught:
        RoundLog(tmp_path / "rounds.log", KEY).compare(address(3), words, total)
    assert not any(str(number) in str(caught.value) for number in (9, 2**62))
    raw = (tmp_path / "rounds.log").read_bytes()
    assert TOTAL.tobytes() not in raw and WORDS.tobytes() not in raw


def test_what_a_crash_cut_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rounds.log"
    log = RoundLog(path, KEY)
    log.compare(address(0), WORDS, TOTAL)
    log.compare(address(1), WORDS, TOTAL)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    RoundLog(path, KEY).compare(address(1), WORDS, TOTAL)
    assert path.read_bytes() == whole
    with pytest.raises(SessionRefused):
        RoundLog(path, KEY).compare(address(0), WORDS, TOTAL + 1)


def test_a_sum_is_never_opened_for_another_set_of_parties(tmp_path: Path) -> None:
    """Also after a resumption: the difference of the two sums would be the loss of who is in one of them alone."""
    question = Round(0, -2, "loss", 0, bytes(32))
    log = RoundLog(tmp_path / "openings.log", b"key")
    log.require_same_parties(question, (0, 1, 2, 4))
    log.require_same_parties(replace(question, tensor="gradient"), (0, 1, 2, 3, 4))
    later = RoundLog(tmp_path / "openings.log", b"key")
    later.require_same_parties(question, (0, 1, 2, 4))
    for places in ((0, 1, 2, 3, 4), (0, 1, 2, 3), ()):
        with pytest.raises(SessionRefused, match="somebody's own"):
            later.require_same_parties(question, places)
