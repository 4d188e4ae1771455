"""Words through the memory that ranks of one machine share: sums of any size, and whoever is gone is missed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore

from lpm.worlds import neighbours
from lpm.worlds.neighbours import Neighbours, meet

ANYTHING = np.iinfo(np.int64)


def together(ranks: int, work: Callable[[int, Neighbours], Any], deadline: float = 20.0) -> list[Any]:
    """What each of so many ranks, threads of this process, makes of its connections."""
    store = HashStore()

    def one(rank: int) -> Any:
        met = meet(store, rank, ranks, deadline)
        assert met is not None
        try:
            return work(rank, met)
        finally:
            met.close()

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_sums_of_any_shape_wrap_and_are_alike_at_every_rank(ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    # Longer and shorter in turn: the memory grows, and some ranks have no part of the shortest to add up.
    shapes = [(3,), (700,), (1,), (), (0,), (40, 2), (5000,), (5000,), (2,), (9000,), *[(60,)] * 30]
    words = [rng.integers(ANYTHING.min, ANYTHING.max, (ranks, *shape), endpoint=True) for shape in shapes]
    found = together(ranks, lambda rank, met: [met.add(each[rank]) for each in words])
    for of_rank in found:
        for total, each in zip(of_rank, words, strict=True):
            assert total.shape == each.shape[1:] and np.array_equal(total, each.sum(axis=0))


def test_a_sum_stays_as_it_is_while_the_next_ones_are_made() -> None:
    first, *later = together(2, lambda rank, met: [met.add(np.full(4, 10 * k + rank)) for k in range(6)])
    assert [each.tolist() for each in first] == [[20 * k + 1] * 4 for k in range(6)]
    assert all(np.array_equal(one, other) for one, other in zip(first, later[0], strict=True))


def test_who_is_gone_late_or_adds_something_else_is_missed() -> None:
    def gone(rank: int, met: Neighbours) -> None:
        met.add(np.arange(3))
        if rank != 1:
            met.add(np.arange(3))

    with pytest.raises(OSError, match=r"rank 1 is gone|Broken pipe|reset"):
        together(3, gone)
    with pytest.raises(OSError, match="something else"):
        together(2, lambda rank, met: met.add(np.arange(3 + rank)))
    over = threading.Event()

    def late(rank: int, met: Neighbours) -> None:
        if rank == 1:
            over.wait(10)
            return
        try:
            met.add(np.arange(3))
        finally:
            over.set()

    with pytest.raises(TimeoutError):
        together(2, late, 0.3)


def test_all_ranks_do_without_if_one_has_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def met(unable: int | None = None) -> list[Neighbours | None]:
        store = HashStore()
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda rank: meet(store, rank, 3, 20.0, able=rank != unable), range(3)))

    for each in met():
        assert each is not None
        each.close()
    assert met(unable=1) == [None] * 3
    # Another machine, as its boot tells.
    boots = iter(["a", "a", "b"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(boots))
    assert met() == [None] * 3
    monkeypatch.undo()
    monkeypatch.delattr(os, "memfd_create")
    assert met() == [None] * 3
    monkeypatch.undo()
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(neighbours.tempfile, "tempdir", str(long))
    assert met() == [None] * 3
