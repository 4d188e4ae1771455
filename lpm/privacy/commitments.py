"""Commitments: to one value by a hash, to a growing list of them by a Merkle tree (RFC 6962 section 2.1).

A party commits to the shares and keys of a round before they are needed, so that a wrong one is traced to who sent it;
and to each step's contribution, whose hashes are leaves of a tree with one root for a session, opened only in an agreed
audit. A commitment hides what is long and random; anything else needs a random opening beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lpm.errors import InputError, SessionRefused

__all__ = [
    "DIGEST_BYTES",
    "commit",
    "consistency_proof",
    "inclusion_proof",
    "leaf_hash",
    "merkle_root",
    "require_consistency",
    "require_inclusion",
]

DIGEST_BYTES = 32


def commit(purpose: bytes, context: bytes, value: bytes) -> bytes:
    """A hash that binds to a value.

    Args:
        purpose: what kind of value, so that one kind can't stand for another.
        context: of the round and the parties.
        value: at least 32 random bytes; they are the commitment's opening.

    Returns:
        32 bytes.
    """
    head = len(purpose).to_bytes(4, "little") + purpose + len(context).to_bytes(4, "little") + context
    return hashlib.sha256(b"lpm/commitment/v1" + head + value).digest()


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf; its prefix keeps it apart from a node."""
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """The largest power of two below a size of at least 2."""
    return 1 << (size - 1).bit_length() - 1


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The root of a tree.

    Args:
        leaves: hashes by `leaf_hash`, in order.

    Returns:
        32 bytes; of an empty tree the hash of nothing.
    """
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    k = _split(len(leaves))
    return _node(merkle_root(leaves[:k]), merkle_root(leaves[k:]))


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that lead from a leaf to the root.

    Args:
        leaves: hashes by `leaf_hash`, in order.
        index: of the leaf.

    Returns:
        Hashes from the leaf's neighbour up.

    Raises:
        InputError: if there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise InputError(f"A tree of {len(leaves)} leaves has no leaf {index}.")
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    if index < k:
        return [*inclusion_proof(leaves[:k], index), merkle_root(leaves[k:])]
    return [*inclusion_proof(leaves[k:], index - k), merkle_root(leaves[:k])]


def consistency_proof(leaves: Sequence[bytes], earlier: int) -> list[bytes]:
    """The hashes that show that a tree only grew.

    Args:
        leaves: hashes of the later tree.
        earlier: size of the earlier one, from 1.

    Returns:
        Hashes, none if the sizes are equal.

    Raises:
        InputError: if the earlier tree is empty or larger.
    """
    if not 0 < earlier <= len(leaves):
        raise InputError(f"A tree of {len(leaves)} leaves did not grow from one of {earlier}.")
    return _consistency(leaves, earlier, whole=True)


def _consistency(leaves: Sequence[bytes], earlier: int, *, whole: bool) -> list[bytes]:
    if earlier == len(leaves):
        return [] if whole else [merkle_root(leaves)]
    k = _split(len(leaves))
    if earlier <= k:
        return [*_consistency(leaves[:k], earlier, whole=whole), merkle_root(leaves[k:])]
    return [*_consistency(leaves[k:], earlier - k, whole=False), merkle_root(leaves[:k])]


def _refuse(what: str) -> SessionRefused:
    return SessionRefused(f"A proof does not hold: {what}.")


def _well_formed(*hashes: bytes) -> None:
    if any(len(each) != DIGEST_BYTES for each in hashes):
        raise _refuse(f"a hash has not {DIGEST_BYTES} bytes")


def require_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Refuse a leaf that is not where it is said to be.

    Args:
        leaf: its hash.
        index: its place.
        size: of the tree.
        proof: of `inclusion_proof`.
        root: of the tree.

    Raises:
        SessionRefused: if the proof does not lead from the leaf to the root.

    Source: RFC 9162 section 2.1.3.2.
    """
    _well_formed(leaf, root, *proof)
    if not 0 <= index < size:
        raise _refuse("there is no such leaf")
    place, last, found = index, size - 1, leaf
    for each in proof:
        if last == 0:
            raise _refuse("it is too long")
        if place & 1 or place == last:
            found = _node(each, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = _node(found, each)
        place, last = place >> 1, last >> 1
    if last or found != root:
        raise _refuse("it leads to another root")


def require_consistency(earlier: int, size: int, proof: Sequence[bytes], before: bytes, root: bytes) -> None:
    """Refuse a tree that did not grow from an earlier one by adding leaves alone.

    Args:
        earlier: size of the earlier tree.
        size: of the later one.
        proof: of `consistency_proof`.
        before: root of the earlier tree.
        root: of the later one.

    Raises:
        SessionRefused: if the proof does not lead to both roots.

    Source: RFC 9162 section 2.1.4.2.
    """
    if not 0 < earlier <= size:
        raise _refuse("the earlier tree is empty or larger")
    if earlier == size:
        if proof or before != root:
            raise _refuse("trees of one size have one root and need no proof")
        return
    _well_formed(before, root, *proof)
    if not proof:
        raise _refuse("it is empty")
    path = list(proof) if earlier & (earlier - 1) else [before, *proof]
    place, last = earlier - 1, size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = path[0]
    for each in path[1:]:
        if last == 0:
            raise _refuse("it is too long")
        if place & 1 or place == last:
            old, new = _node(each, old), _node(each, new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new = _node(new, each)
        place, last = place >> 1, last >> 1
    if last or old != before or new != root:
        raise _refuse("it leads to another root")
