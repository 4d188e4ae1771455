"""Ranks on one machine add words up in memory that they share: an exchange takes a tenth of what sockets cost.

Each rank writes its words where the others can read them and tells each in a message of a few bytes, over a socket
between the two, that they are there; the operating system makes what was written before a message visible after it.
The memory has no name (its descriptor travels over the sockets), so nothing is left of a rank that is killed.

With two ranks each adds up everything. With more, each adds up its own part of the words, where it wrote them, tells
the others once more, and takes theirs over. Rounds use two halves of the memory in turn: who writes a half anew has
heard in the round between that all others are done with it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import Store

__all__ = ["Neighbours", "meet"]

_MESSAGE = struct.Struct("<qq")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Neighbours:
    """One rank's connections with all others: made by `meet`.

    Args:
        rank: of this process.
        peers: a connected socket for each other rank, by rank; they keep their messages apart.
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket]) -> None:
        self._rank, self._peers = rank, peers
        self._half = self._told = 0
        self._room = dict.fromkeys([rank, *peers], np.empty((2, 0), dtype=np.int64))

    def add(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Σ over ranks, modulo 2^64; all ranks call it, with arrays of the same shape.

        Raises:
            OSError: if a rank is gone, doesn't answer in time, or adds up something else.
        """
        size, self._half = words.size, 1 - self._half
        grown = self._grow(size) if self._room[self._rank].shape[1] < size else None
        mine = self._room[self._rank][self._half, :size]
        mine[:] = words.reshape(-1)
        self._tell(size, grown)
        if grown is not None:
            os.close(grown)
        by_rank = [self._room[rank][self._half, :size] for rank in sorted(self._room)]
        if len(by_rank) == 2:
            total: NDArray[np.int64] = by_rank[0] + by_rank[1]
            return total.reshape(words.shape)
        cuts = [size * k // len(by_rank) for k in range(len(by_rank) + 1)]
        parts = [slice(low, high) for low, high in pairwise(cuts)]
        own = parts[self._rank]
        for rank in self._peers:
            mine[own] += by_rank[rank][own]
        self._tell(size)
        return np.concatenate([each[part] for each, part in zip(by_rank, parts, strict=True)]).reshape(words.shape)

    def _grow(self, size: int) -> int:
        """Make more room for this rank's words; returns the descriptor of it that the others need."""
        descriptor = os.memfd_create("lpm-words")
        os.ftruncate(descriptor, 2 * 8 * size)
        self._room[self._rank] = _mapped(descriptor)
        return descriptor

    def _tell(self, size: int, descriptor: int | None = None) -> None:
        """Say that this rank's words are there, and wait until all others have said so."""
        said = _MESSAGE.pack(self._told, size)
        for peer in self._peers.values():
            socket.send_fds(peer, [said], [] if descriptor is None else [descriptor])
        for rank, peer in self._peers.items():
            heard, descriptors, _, _ = socket.recv_fds(peer, _MESSAGE.size, 1)
            for each in descriptors:
                self._room[rank] = _mapped(each)
                os.close(each)
            if not heard:
                raise ConnectionResetError(f"rank {rank} is gone")
            if heard != said:
                raise ConnectionAbortedError(f"rank {rank} adds up something else")
        self._told += 1

    def close(self) -> None:
        """Leave: the others find out when they next exchange."""
        for peer in self._peers.values():
            peer.close()


def _mapped(descriptor: int) -> NDArray[np.int64]:
    """The two halves of a rank's memory [2, words]."""
    return np.frombuffer(mmap.mmap(descriptor, os.fstat(descriptor).st_size), dtype=np.int64).reshape(2, -1)


def meet(store: Store, rank: int, ranks: int, deadline: float, able: bool = True) -> Neighbours | None:
    """Connect all ranks of a job with one another, if all of them are on one machine; all ranks call it.

    Args:
        store: where they leave their addresses.
        rank: of this process.
        ranks: how many there are.
        deadline: seconds that a rank may keep the others waiting, here and later.
        able: whether this rank wants to.

    Returns:
        None, at every rank, if any can't reach another or doesn't want to.

    Raises:
        OSError: if a rank is gone or doesn't answer in time; RuntimeError: if the store is.
    """

    def everybody(what: str, mine: str) -> list[str]:
        store.set(f"{what}/{rank}", mine)
        return [store.get(f"{what}/{each}").decode() for each in range(ranks)]

    with tempfile.TemporaryDirectory(prefix="lpm-") as folder, contextlib.ExitStack() as stack:  # ours alone
        address, listener = f"{folder}/rank", None
        if able:
            with contextlib.suppress(OSError, AttributeError):  # a path too long; a system without what this takes
                listener = stack.enter_context(_listener(address, ranks))
        machine = _BOOT.read_text().strip() if listener is not None else ""
        found = [each.split("\n") for each in everybody("address", f"{machine}\n{address}")]
        near = machine and all(there == machine and Path(path).is_socket() for there, path in found)
        if "no" in everybody("near", "yes" if near else "no") or listener is None:
            return None
        listener.settimeout(deadline)
        peers = {}
        for each in range(rank):
            peers[each] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peers[each].settimeout(deadline)
            peers[each].connect(found[each][1])
            peers[each].send(rank.to_bytes(8, "little"))
        for _ in range(rank + 1, ranks):
            peer, _ = listener.accept()
            peer.settimeout(deadline)
            peers[int.from_bytes(peer.recv(8), "little")] = peer
        return Neighbours(rank, peers)


def _listener(address: str, ranks: int) -> socket.socket:
    """A socket to which the ranks that come after this one connect.

    Raises:
        OSError, AttributeError: on a system that has no such sockets or no memory without a name.
    """
    os.close(os.memfd_create("lpm"))
    _BOOT.stat()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address)
        listener.listen(ranks)
    except OSError:
        listener.close()
        raise
    return listener
