"""The `crypten` engine: every institution is a CrypTen party, sums are local additions of shares, only totals open.

Two parts of CrypTen 0.4.1 are replaced. Its communicator, by one over the federation's own channel, since it relies
on `torch.distributed` and would let everybody connect to everybody. And its zero sharing, a ring with a
32-bit-seeded generator, in which two colluding neighbours unmask the party between them, by one over all pairs
(`masks`). Each private tensor is already an additive share of the total, so no message precedes the opening.
Everything stays integer (precision 0): the default precision would pass through float32.

Beyond sums it computes on shares for one purpose, the **threshold opening**: a cell is opened if enough people and
enough institutions stand behind it, by (count ≥ k)·sum, so that a small cell is never opened to anybody. Its triples
come from the coordinator as dealer, which is a weaker trust than that of a sum (`dealer`).

Source: Knott et al. 2021, CrypTen; eq. 9–10 of the paper for the sums.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpm.errors import InputError, LpmError
from lpm.privacy.dealer import Deal, read_dealt, request
from lpm.privacy.masks import zero_share, zero_share_xor
from lpm.privacy.sealing import SealedRounds, SessionKeys
from lpm.privacy.secure_sum import Channel, Consent, Flags, Header, Opening, Round, SecureSum, require_enough
from lpm.ring import words_to_bytes

__all__ = ["CrypTenSum", "load_crypten"]


@dataclass(repr=False)
class _Scope:
    """One party's round as CrypTen's static functions find it: they are passed neither party nor step."""

    keys: SessionKeys
    rounds: SealedRounds
    header: Header
    zero_shares: int = 0
    flags: Flags | None = None
    openings: int = 0

    def context(self, purpose: bytes) -> bytes:
        """A context no other zero share has: rounds differ, and calls within a round are numbered."""
        context = self.rounds.context(self.header.round) + purpose + self.zero_shares.to_bytes(4, "little")
        self.zero_shares += 1
        return context

    def advance(self, opening: Opening) -> None:
        """Where shares are computed on, each opening is a round of its own, numbered in the tensor's name."""
        if self.flags is None:
            return
        base = self.header.round.tensor.partition("~")[0]
        round = replace(self.header.round, tensor=f"{base}~{self.openings}")
        self.header = self.rounds.begin(round, opening, self.flags)
        self.openings += 1

    def dealt(self, what: Deal, shape: tuple[int, ...]) -> list[torch.Tensor]:
        """The party's shares of what the coordinator deals, in a shape."""
        self.advance(Opening.DEALT)
        count = int(np.prod(shape, dtype=np.int64))
        answer = self.rounds.ask(self.header, request(what, count))
        return [torch.from_numpy(part).reshape(shape) for part in read_dealt(what, count, answer)]

    # The calls CrypTen makes on its communicator, under its names.

    def get_rank(self) -> int:
        return self.keys.me

    def get_world_size(self) -> int:
        return self.keys.parties

    def all_reduce(self, share: torch.Tensor | list[torch.Tensor], op: Any = None, batched: bool = False) -> Any:
        if batched:
            flat = self.all_reduce(torch.cat([each.reshape(-1) for each in share]), op)
            parts = torch.split(flat, [each.numel() for each in share])
            return [part.reshape(each.shape) for part, each in zip(parts, share, strict=True)]
        assert isinstance(share, torch.Tensor)
        self.advance(Opening.PARTIES)
        total = share.contiguous().numpy().view(np.uint64).copy()
        add = np.bitwise_xor if op == torch.distributed.ReduceOp.BXOR else np.add
        for payload in self.rounds.to_parties(self.header, words_to_bytes(total.view(np.int64))):
            add(total, np.frombuffer(payload, dtype="<u8").reshape(total.shape), out=total)
        return torch.from_numpy(total.view(np.int64))

    def reduce(self, share: torch.Tensor, dst: int, batched: bool = False) -> None:
        if batched or dst != self.keys.parties:
            raise LpmError(f"A tensor is opened to all parties or to the coordinator, not to party {dst}.")
        self.rounds.to_coordinator(self.header, words_to_bytes(share.contiguous().numpy()))


_SCOPE: ContextVar[_Scope] = ContextVar("lpm_crypten_scope")
_LOADING = threading.Lock()


def _scope() -> _Scope:
    scope = _SCOPE.get(None)
    if scope is None:
        raise LpmError("CrypTen was used outside a round of the federation: it would share without masks.")
    return scope


@contextmanager
def _within(scope: _Scope) -> Iterator[None]:
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)


def _size(size: tuple[Any, ...]) -> tuple[int, ...]:
    # CrypTen calls it with one torch.Size, or with the dimensions one by one.
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)


def load_crypten() -> Any:
    """CrypTen's arithmetic tensor, with its communicator and zero sharing replaced.

    Returns:
        The class `ArithmeticSharedTensor`.

    Raises:
        LpmError: if CrypTen is not installed, naming the extra.
    """
    with _LOADING:
        return _load()


@functools.cache
def _load() -> Any:
    # Newer releases of torch have dropped this module; CrypTen only reads the name when it is imported.
    if "torch.onnx.symbolic_registry" not in sys.modules:
        registry = types.ModuleType("torch.onnx.symbolic_registry")
        registry.__dict__["_registry"] = {}
        sys.modules["torch.onnx.symbolic_registry"] = registry
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its syntax, when it is first compiled; nothing a user can act on
            import crypten.communicator
            import crypten.mpc
            from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor
    except ModuleNotFoundError as missing:
        raise LpmError(
            f"The engine crypten can't be loaded: {missing.name} is not installed.",
            'Install the extra `mpc`: pip install "lpm[mpc]".',
        ) from None

    def arithmetic_zero(*size: Any, device: Any = None) -> Any:
        scope, shape = _scope(), _size(size)
        context = scope.context(b"\x00add")
        words = zero_share(scope.keys.me, scope.keys.pair_secrets, context, int(np.prod(shape, dtype=np.int64)))
        return ArithmeticSharedTensor.from_shares(torch.from_numpy(words.view(np.int64)).reshape(shape), precision=0)

    def binary_zero(*size: Any, device: Any = None) -> Any:
        scope, shape = _scope(), _size(size)
        context = scope.context(b"\x00xor")
        words = zero_share_xor(scope.keys.pair_secrets, context, int(np.prod(shape, dtype=np.int64)))
        return BinarySharedTensor.from_shares(torch.from_numpy(words.view(np.int64)).reshape(shape), precision=0)

    # `crypten.init` is never called: it would set up torch.distributed and generators with default seeds, whose zero
    # shares are all zero.
    class Dealt:
        """Triples from the coordinator; CrypTen's own default lets the first party make, and so know, all of them."""

        def generate_additive_triple(self, size0: Any, size1: Any, op: str, device: Any = None) -> Any:
            if op != "mul" or size0 != size1:
                raise LpmError(f"The dealer deals products of equal shapes, not {op} of {size0} and {size1}.")
            parts = _scope().dealt(Deal.PRODUCT, tuple(size0))
            return [ArithmeticSharedTensor.from_shares(part, precision=0) for part in parts]

        def generate_binary_triple(self, size0: Any, size1: Any, device: Any = None) -> Any:
            if size0 != size1:
                raise LpmError(f"The dealer deals conjunctions of equal shapes, not of {size0} and {size1}.")
            parts = _scope().dealt(Deal.CONJUNCTION, tuple(size0))
            return [BinarySharedTensor.from_shares(part, precision=0) for part in parts]

        def B2A_rng(self, size: Any, device: Any = None) -> Any:
            added, exclusive = _scope().dealt(Deal.BIT, tuple(size))
            return (
                ArithmeticSharedTensor.from_shares(added, precision=0),
                BinarySharedTensor.from_shares(exclusive, precision=0),
            )

    crypten.mpc.get_default_provider = Dealt
    crypten.communicator.get = _scope
    crypten.communicator.is_initialized = lambda: _SCOPE.get(None) is not None
    ArithmeticSharedTensor.PRZS = staticmethod(arithmetic_zero)
    BinarySharedTensor.PRZS = staticmethod(binary_zero)
    return ArithmeticSharedTensor


class CrypTenSum(SecureSum):
    """One party's secure sum by CrypTen; see `SecureSum` for the contract and its guarantee.

    Args:
        keys: the party's keys of this session.
        channel: its way to the others.
        thresholds: tensors whose cells are opened above a threshold only, as the manifest lists them.

    Raises:
        InputError: for fewer than three parties.
        LpmError: if CrypTen is not installed.
    """

    def __init__(self, keys: SessionKeys, channel: Channel, thresholds: Collection[str] = ()) -> None:
        require_enough(keys.parties)
        self.parties = keys.parties
        self.me = keys.me
        self._keys = keys
        self._thresholds = frozenset(thresholds)
        self._rounds = SealedRounds(keys, channel)
        self._tensor = load_crypten()

    def __repr__(self) -> str:
        return f"CrypTenSum(party {self.me} of {self.parties})"

    def open_to_parties(self, round: Round, words: NDArray[np.int64], flags: Flags) -> NDArray[np.int64]:
        """See `SecureSum.open_to_parties`."""
        scope = _Scope(self._keys, self._rounds, self._rounds.begin(round, Opening.PARTIES, flags))
        with _within(scope):
            total: NDArray[np.int64] = self._share(words, flags).reveal().numpy().reshape(words.shape)
        return total

    def open_to_coordinator(
        self, round: Round, words: NDArray[np.int64], flags: Flags, consent: Consent | None = None
    ) -> None:
        """See `SecureSum.open_to_coordinator`; nobody is ever left out."""
        if consent is not None:
            consent(tuple(range(self.parties)))
        scope = _Scope(self._keys, self._rounds, self._rounds.begin(round, Opening.COORDINATOR, flags))
        with _within(scope):
            self._share(words, flags).reveal(dst=self.parties)

    def open_if_enough(
        self,
        round: Round,
        words: NDArray[np.int64],
        people: NDArray[np.int64],
        flags: Flags,
        *,
        fewest_people: int,
        fewest_institutions: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See `SecureSum.open_if_enough`.

        Source: DESIGN's (count ≥ k)·sum: the signs of count − k by a binary addition on shares, exact at precision 0.
        """
        if round.tensor not in self._thresholds:
            raise InputError(f"The manifest does not list {round.tensor!r} among the cells opened above a threshold.")
        if words.ndim != 2 or people.shape != words.shape[:1]:
            raise InputError(f"Cells have the shape {words.shape}, people {people.shape}: cells × words, and cells.")
        self.open_to_parties(
            round, words[:0], flags
        )  # nothing yet but flags and digests: here it is called off for all
        shared = replace(round, tensor=f"{round.tensor}~shared")
        scope = _Scope(self._keys, self._rounds, self._rounds.begin(shared, Opening.PARTIES, flags), flags=flags)
        from crypten.mpc.primitives.beaver import mul

        with _within(scope):
            gate = self._enough(people, fewest_people, fewest_institutions)
            sums = self._share(words, flags)
            gated = mul(gate.reshape(-1, 1).expand(*words.shape), sums)
            both = self._tensor.reveal_batch([gate, gated])
        return both[1].numpy(), both[0].numpy().astype(bool)

    def _enough(self, people: NDArray[np.int64], fewest_people: int, fewest_institutions: int) -> Any:
        """1 for each cell that enough people and institutions stand behind, else 0, shared by addition [cells]."""
        from crypten.mpc.primitives.beaver import B2A_single_bit
        from crypten.mpc.primitives.converters import _A2B

        flags = Flags()
        short = torch.stack(
            [
                self._share(people, flags).share - (fewest_people if self.me == 0 else 0),
                self._share((people > 0).astype(np.int64), flags).share - (fewest_institutions if self.me == 0 else 0),
            ]
        )
        sign = _A2B(self._tensor.from_shares(short, precision=0))
        sign.share = (sign.share >> 63) & 1
        enough = sign ^ 1
        return B2A_single_bit(enough[0] & enough[1])

    def _share(self, words: NDArray[np.int64], flags: Flags) -> Any:
        if words.dtype != np.int64:
            raise InputError(f"A contribution has the type {words.dtype}: words are int64 (see lpm.ring).")
        share = self._tensor.from_shares(torch.from_numpy(np.ascontiguousarray(words)), precision=0)
        # A party that calls the round off sends no share, so it needs no mask either.
        return share if flags.raised else share + self._tensor.PRZS(words.shape)
