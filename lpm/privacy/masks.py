"""Pairwise masks: random words that two parties share, one adds and the other subtracts, so that all cancel in a sum.

A pair's secret is an X25519 agreement of its ephemeral session keys; a round's mask is the ChaCha20 key stream under
HKDF-SHA256 of that secret and the round's context. Because *every* pair shares a mask, n − 2 colluders who remove
theirs still see the two honest contributions under the mask those two share (sums as in eq. 9–10; after Bonawitz
et al. 2017).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from lpm.errors import SessionRefused

__all__ = ["agree", "derive", "key_stream", "mask_key", "pair_mask", "remove_pair_mask", "zero_share", "zero_share_xor"]

_LABEL = b"lpm/mask/v1"
_NONCE = bytes(16)  # block counter 0 and a zero nonce: safe because a key is never used for a second stream


def agree(own: X25519PrivateKey, other: bytes) -> bytes:
    """The secret two parties share.

    Args:
        own: this party's ephemeral key.
        other: the other's public key, 32 bytes.

    Returns:
        32 bytes.

    Raises:
        SessionRefused: if the key is malformed or of low order (the secret would be zero; RFC 7748 section 6.1).
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise SessionRefused("A party's session key is not a valid X25519 key.") from None


def derive(secret: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 with an empty salt (RFC 5869).

    Args:
        secret: the input key material.
        info: what the key is for.
        length: bytes wanted, at most 8160.

    Returns:
        The key.
    """
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(secret)


def mask_key(secret: bytes, context: bytes) -> bytes:
    """The key of a pair's mask in one round.

    Args:
        secret: what the pair shares for the session.
        context: names session, roster, step, tensor, attempt and parameters; never the same twice.

    Returns:
        32 bytes.
    """
    return derive(secret, _LABEL + context)


def pair_mask(secret: bytes, context: bytes, count: int) -> NDArray[np.uint64]:
    """The mask two parties share in one round.

    Args:
        secret: what the pair shares for the session.
        context: of the round.
        count: number of words.

    Returns:
        [count] uniform words of Z_2^64.
    """
    return key_stream(mask_key(secret, context), count)


def key_stream(key: bytes, count: int) -> NDArray[np.uint64]:
    """The ChaCha20 key stream as words.

    Args:
        key: 32 bytes, never used for another stream.
        count: number of words.

    Returns:
        [count] uniform words of Z_2^64.
    """
    stream = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8")


def remove_pair_mask(sum_of_survivors: NDArray[np.uint64], survivor: int, lost: int, key: bytes) -> None:
    """Take the mask off a sum, in place, that a survivor shared with a party whose contribution is not in it.

    Args:
        sum_of_survivors: [count] words.
        survivor: its place in the roster.
        lost: the other's place.
        key: of the pair's mask in this round.
    """
    mask = key_stream(key, sum_of_survivors.size)
    if lost > survivor:
        sum_of_survivors -= mask
    else:
        sum_of_survivors += mask


def zero_share(me: int, secrets: Mapping[int, bytes], context: bytes, count: int) -> NDArray[np.uint64]:
    """The party's share of zero: masks shared with later parties less those shared with earlier ones.

    Args:
        me: this party's place in the roster.
        secrets: place of each other party → what the pair shares.
        context: of the round.
        count: number of words.

    Returns:
        [count] words; over all parties they add up to 0 mod 2^64.
    """
    share = np.zeros(count, dtype=np.uint64)
    for other, secret in secrets.items():
        if other > me:
            share += pair_mask(secret, context, count)
        else:
            share -= pair_mask(secret, context, count)
    return share


def zero_share_xor(secrets: Mapping[int, bytes], context: bytes, count: int) -> NDArray[np.uint64]:
    """The party's share of zero under exclusive or, for values shared bit by bit.

    Args:
        secrets: place of each other party → what the pair shares.
        context: of the round, and of no arithmetic share.
        count: number of words.

    Returns:
        [count] words; over all parties their exclusive or is 0.
    """
    share = np.zeros(count, dtype=np.uint64)
    for secret in secrets.values():
        share ^= pair_mask(secret, context, count)
    return share
