"""Ranks as threads of one process: the exchanges of `lpm.worlds.process_group.Ranks`, in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import lpm
from lpm.population.partition import partition
from lpm.worlds.distributed import DistributedWorld


class Table:
    """Where all meet: everybody lays something down and sees what the others laid."""

    def __init__(self, ranks: int) -> None:
        self.slots: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        seen = list(self.slots)
        self.barrier.wait()
        return seen


class Fellow:
    """One rank."""

    def __init__(self, table: Table, rank: int, ranks: int) -> None:
        self.table, self.rank, self.ranks = table, rank, ranks

    def add(self, words: np.ndarray) -> np.ndarray:
        return np.sum(self.table.exchange(self.rank, words.copy()), axis=0, dtype=np.int64)

    def all(self, values: np.ndarray) -> list[np.ndarray]:
        return [each.copy() for each in self.table.exchange(self.rank, values)]

    def require_same(self, **values: object) -> None:
        seen = self.table.exchange(self.rank, values)
        assert all(each == seen[0] for each in seen)

    def share(self, content: object = None) -> Any:
        return self.table.exchange(self.rank, content)[0]

    def collect(self, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        seen = self.table.exchange(self.rank, dict(content))
        return seen if self.rank == 0 else []

    def deal(self, contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return dict(self.table.exchange(self.rank, contents)[0][self.rank])


def spread_out(model: lpm.Model, ranks: int, work: Callable[[lpm.Model, DistributedWorld], Any]) -> list[Any]:
    """Let ranks do some work on their shards of a model at the same time; what each returned.

    Args:
        model: of the whole population.
        ranks: how many.
        work: gets a rank's shard and world.
    """
    table = Table(ranks)
    rank_of = partition(model.networks, model.population.agents, ranks)

    def one(rank: int) -> Any:
        try:
            world = DistributedWorld(Fellow(table, rank, ranks), rank_of, "the model")  # type: ignore[arg-type]
            return work(model.shard(np.flatnonzero(rank_of == rank)), world)
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(one, rank) for rank in range(ranks)]
        problems = [future.exception() for future in futures]
    real = [problem for problem in problems if not isinstance(problem, threading.BrokenBarrierError | None)]
    if real:
        raise real[0]
    return [future.result() for future in futures]
