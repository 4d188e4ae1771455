"""The ranks of one owner: how they meet, exchange words and bytes, and find out which of them is lost.

`torchrun` starts them and holds the store in which they leave their addresses, a heartbeat each, and a last word.
Words go through shared memory where all ranks are on one machine, else by gloo, or NCCL between GPUs; all else goes by
gloo. These are collective operations: all ranks call them in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from lpm import ranks
from lpm.checkpoint import pack, unpack
from lpm.errors import InputError, PeerLost
from lpm.worlds.neighbours import meet

__all__ = ["DEADLINE", "Ranks", "agreed", "join"]

DEADLINE = 300.0
"""Seconds that a rank may keep the others waiting."""
_BEAT = 0.5
_LISTEN = 3.0
_PIECE = 1 << 28
_RESUME = "Continue with `lpm resume RUN`."


class Ranks:
    """The connections between the ranks: made once in a process by `join`.

    Args:
        deadline: seconds that a rank may keep the others waiting; then it counts as lost.
        device: where words are added up: by gloo on "cpu", by NCCL on a GPU.

    Raises:
        PeerLost: if not all ranks appear in time.
    """

    def __init__(self, deadline: float, device: str = "cpu") -> None:
        place = ranks.place()
        self.rank, self.ranks, self.deadline = place.rank, place.ranks, deadline
        self._device = torch.device(device)
        patience = datetime.timedelta(seconds=deadline)
        try:
            self._store, _, _ = next(iter(rendezvous("env://", timeout=patience)))
            dist.init_process_group(
                "gloo" if self._device.type == "cpu" else "cpu:gloo,cuda:nccl",
                store=c10d.PrefixStore("lpm/group", self._store),
                rank=self.rank,
                world_size=self.ranks,
                timeout=patience,
            )
            able = self._device.type == "cpu" and place.local_ranks == self.ranks
            store = c10d.PrefixStore("lpm/neighbours", self._store)
            self._neighbours = meet(store, self.rank, self.ranks, deadline, able)
        except (RuntimeError, ValueError, OSError) as error:
            raise PeerLost(
                f"A rank of {self.ranks}",
                f"rank {self.rank} could not join the others ({type(error).__name__})",
                _RESUME,
            ) from None
        self._said = False
        self._found: PeerLost | None = None
        self._last: dist.Work | None = None
        atexit.register(self._leave)
        self._leaving = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(self._store.clone(),), name="heart", daemon=True)
        self._heart.start()
        ranks.link(self)

    # ---- who is there

    def _beat(self, store: c10d.Store) -> None:
        """Tell the others, again and again, that this process lives."""
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: so is the job
            while not self._leaving.wait(_BEAT):
                store.set(f"lpm/beat/{self.rank}", str(count))
                count += 1

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _leave(self) -> None:
        if not self._said:
            self.say_end("")
        # A thread that calls the store while the interpreter ends would end the process with SIGABRT.
        self._leaving.set()
        self._heart.join(_LISTEN)
        if self._neighbours is not None:
            self._neighbours.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def say_end(self, reason: str) -> None:
        """See `ranks.Links`."""
        self._said = True
        with contextlib.suppress(RuntimeError):
            self._store.set(f"lpm/end/{self.rank}", reason)

    def lost(self) -> PeerLost | None:
        """The rank that is lost: it ended with a reason, or its heart no longer beats."""
        if self._found is None:
            with _undisturbed():
                self._found = self._listen()
        return self._found

    def _listen(self) -> PeerLost | None:
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        try:
            first = {rank: self._read(f"lpm/beat/{rank}") for rank in others}
            blamed: dict[int, str] = {}
            silent = set(others)
            until = time.monotonic() + _LISTEN
            while silent and time.monotonic() < until:
                for rank in sorted(silent):
                    end = self._read(f"lpm/end/{rank}")
                    if end:
                        blamed[rank] = end.rstrip(".")
                    if end is not None or self._read(f"lpm/beat/{rank}") != first[rank]:
                        silent.discard(rank)
                threading.Event().wait(0.1)
        except RuntimeError:  # the store went with rank 0, or with the torchrun that holds it
            blamed, silent = {}, {0}
        blamed |= dict.fromkeys(silent, "it was killed, or it is frozen or its machine gone")
        if not blamed:
            return None
        if 0 in blamed and 0 not in silent:
            ranks.speak(False)  # rank 0 has said it itself
        elif 0 in blamed:
            ranks.speak(self.rank == min(set(range(self.ranks)) - set(blamed)))
        return PeerLost(f"Rank {min(blamed)} of {self.ranks}", blamed[min(blamed)], _RESUME)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A piece of work that needs all ranks.

        Raises:
            PeerLost: naming the rank that is gone.
        """
        try:
            yield
        except (RuntimeError, OSError) as error:
            found = self.lost()
            if found is None:
                late = "did not answer" if "imeout" in str(error) or "imed out" in str(error) else "broke off"
                found = PeerLost("A rank", f"the others {late} (waited at most {self.deadline:g} s)", _RESUME)
            raise found from None

    # ---- what they exchange

    def _done(self, work: dist.Work | None) -> None:
        """Wait for a collective operation.

        It stays referenced until the next one. Otherwise gloo's thread would be the last to let go of its tensors, for
        which it needs the interpreter; and where that is just ending, the process would end with SIGABRT.
        """
        assert work is not None
        work.wait()
        self._last = work

    def add(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Σ over ranks, modulo 2^64; at every rank."""
        if self._neighbours is not None:
            with self.together():
                return self._neighbours.add(words)
        total = torch.from_numpy(np.ascontiguousarray(words).reshape(-1).copy()).to(self._device)
        with self.together():
            self._done(dist.all_reduce(total, async_op=True))
            total = total.cpu()
        return total.numpy().reshape(words.shape)

    def all(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Everybody's array of this shape, by rank; at every rank."""
        mine = torch.from_numpy(np.ascontiguousarray(values))
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        with self.together():
            self._done(dist.all_gather(found, mine, async_op=True))
        return [each.numpy() for each in found]

    def require_same(self, **values: object) -> None:
        """Refuse to go on if the ranks were not started alike.

        Args:
            values: what must be the same at each rank: name → plain value.

        Raises:
            InputError: naming the first that differs, and a rank that differs from rank 0.
        """
        digests = [hashlib.sha256(repr(value).encode()).digest() for value in values.values()]
        found = self.all(np.frombuffer(b"".join(digests), dtype=np.int64).copy().reshape(len(values), -1))
        for k, name in enumerate(values):
            for rank, theirs in enumerate(found):
                if not np.array_equal(theirs[k], found[0][k]):
                    raise InputError(
                        f"Rank {rank} was started with another {name} than rank 0.",
                        "Start all ranks with the same command, scenario folder and version of lpm.",
                    )

    def share(self, content: object = None) -> Any:
        """Rank 0's content, at every rank: what `checkpoint.pack` accepts."""
        payload = b"".join(pack({"content": content})) if self.rank == 0 else b""
        size = int(self.add(np.array([len(payload)]))[0])
        data = torch.frombuffer(bytearray(payload or bytes(size)), dtype=torch.uint8)
        with self.together():
            for piece in _pieces(data):
                self._done(dist.broadcast(piece, 0, async_op=True))
        return unpack(data.numpy().tobytes())["content"]

    def collect(self, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Everybody's content by rank, at rank 0; nothing at the others."""
        payload = b"".join(pack(content))
        sizes = [int(size[0]) for size in self.all(np.array([len(payload)]))]
        if self.rank > 0:
            self._send(payload, 0)
            return []
        return [dict(content), *(unpack(self._receive(sizes[rank], rank)) for rank in range(1, self.ranks))]

    def deal(self, contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Each rank's own part of what rank 0 holds for all (nothing at the others) [ranks]."""
        payloads = [b"".join(pack(content)) for content in contents]
        sizes = self.add(np.array([len(payload) for payload in payloads] or [0] * self.ranks))
        if self.rank > 0:
            return dict(unpack(self._receive(int(sizes[self.rank]), 0)))
        for rank in range(1, self.ranks):
            self._send(payloads[rank], rank)
        return dict(contents[0])

    def _send(self, payload: bytes, to: int) -> None:
        with self.together():
            for piece in _pieces(torch.frombuffer(bytearray(payload), dtype=torch.uint8)):
                self._done(dist.isend(piece, to))

    def _receive(self, size: int, source: int) -> bytes:
        data = torch.empty(size, dtype=torch.uint8)
        with self.together():
            for piece in _pieces(data):
                self._done(dist.irecv(piece, source))
        return data.numpy().tobytes()


Value = TypeVar("Value")

_joined: list[Ranks] = []


def join(deadline: float = DEADLINE, device: str = "cpu") -> Ranks | None:
    """The ranks of this job, joined when first asked for; None for a process that is alone.

    Args:
        deadline: seconds that a rank may keep the others waiting; of the first call.
        device: where words are added up; of the first call.

    Raises:
        InputError: for an environment that doesn't fit together.
        PeerLost: if not all ranks appear in time.
    """
    if ranks.place().ranks == 1:
        return None
    if not _joined:
        _joined.append(Ranks(deadline, device))
    return _joined[0]


def agreed(value: Value) -> Value:
    """What rank 0 has of something that may differ between ranks, such as a measured time; itself in one process."""
    group = join()
    return value if group is None else group.share(value)


def _pieces(data: torch.Tensor) -> list[torch.Tensor]:
    return [data[k : k + _PIECE] for k in range(0, data.numel(), _PIECE)]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back what torchrun sends to survivors until they have found out who is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
