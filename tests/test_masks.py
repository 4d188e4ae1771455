"""Masks against known answers: X25519, HKDF, ChaCha20, encodings, pair masks and masked sums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lpm.errors import InputError, SessionRefused
from lpm.privacy.masks import agree, derive, mask_key, pair_mask, remove_pair_mask, zero_share, zero_share_xor
from lpm.privacy.secure_sum import require_enough
from lpm.ring import decode, encode, require_headroom


def _read(vectors: Path, name: str) -> Any:
    return json.loads((vectors / name).read_text())


def _words(texts: list[str]) -> np.ndarray:
    return np.array([int(text, 16) for text in texts], dtype=np.uint64)


def test_x25519_known_answers(vectors: Path) -> None:
    known = _read(vectors, "rfc/x25519_rfc7748.json")
    for case in known["scalar_mult"]:
        key = X25519PrivateKey.from_private_bytes(bytes.fromhex(case["scalar"]))
        assert agree(key, bytes.fromhex(case["u"])).hex() == case["out"]
    pair = known["diffie_hellman"]
    alice = X25519PrivateKey.from_private_bytes(bytes.fromhex(pair["alice_private"]))
    assert agree(alice, bytes.fromhex(pair["bob_public"])).hex() == pair["shared"]


def test_x25519_edge_cases(vectors: Path) -> None:
    for group in _read(vectors, "wycheproof/x25519_test.json")["testGroups"]:
        for case in group["tests"]:
            key = X25519PrivateKey.from_private_bytes(bytes.fromhex(case["private"]))
            public = bytes.fromhex(case["public"])
            if "ZeroSharedSecret" in case["flags"]:
                with pytest.raises(SessionRefused):
                    agree(key, public)
            else:
                assert agree(key, public).hex() == case["shared"], case["tcId"]


def test_low_order_keys_are_refused(vectors: Path) -> None:
    own = X25519PrivateKey.generate()
    for public in _read(vectors, "rfc/x25519_rfc7748.json")["low_order_inputs"]["public"]:
        with pytest.raises(SessionRefused):
            agree(own, bytes.fromhex(public))
    for length in (0, 31, 33):
        with pytest.raises(SessionRefused):
            agree(own, bytes(length))


def test_hkdf_known_answers(vectors: Path) -> None:
    known = _read(vectors, "rfc/hkdf_sha256_rfc5869.json")
    for case in known["cases"]:
        secret, salt, info = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "info"))
        okm = HKDF(algorithm=SHA256(), length=case["length"], salt=salt or None, info=info).derive(secret)
        assert okm.hex() == case["okm"]
        if not salt:
            assert derive(secret, info, case["length"]).hex() == case["okm"]
    derive(b"secret", b"", known["max_length"])
    with pytest.raises(ValueError):
        derive(b"secret", b"", known["refuse_length"])


def test_chacha20_known_answers(vectors: Path) -> None:
    for case in _read(vectors, "rfc/chacha20_rfc8439.json")["block"]:
        nonce = case["counter"].to_bytes(4, "little") + bytes.fromhex(case["nonce"])
        stream = Cipher(ChaCha20(bytes.fromhex(case["key"]), nonce), mode=None).encryptor().update(bytes(64))
        assert stream.hex() == case["keystream"]


def test_ed25519_known_answers(vectors: Path) -> None:
    known = _read(vectors, "rfc/ed25519_rfc8032.json")
    for case in known["valid"]:
        key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(case["seed"]))
        assert key.public_key().public_bytes_raw().hex() == case["public"]
        assert key.sign(bytes.fromhex(case["message"])).hex() == case["signature"]
    assert known["invalid"]
    for case in known["invalid"]:
        with pytest.raises((InvalidSignature, ValueError)):
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(case["public"])).verify(
                bytes.fromhex(case["signature"]), bytes.fromhex(case["message"])
            )


def test_ed25519_edge_cases(vectors: Path) -> None:
    for group in _read(vectors, "wycheproof/ed25519_test.json")["testGroups"]:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(group["publicKey"]["pk"]))
        for case in group["tests"]:
            signature, message = bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"])
            if case["result"] == "valid":
                key.verify(signature, message)
            else:
                with pytest.raises(InvalidSignature):
                    key.verify(signature, message)


def test_hkdf_edge_cases(vectors: Path) -> None:
    for group in _read(vectors, "wycheproof/hkdf_sha256_test.json")["testGroups"]:
        for case in group["tests"]:
            secret, salt, info = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "info"))
            if case["result"] == "valid":
                okm = HKDF(algorithm=SHA256(), length=case["size"], salt=salt, info=info).derive(secret)
                assert okm.hex() == case["okm"]
                if not salt:
                    assert derive(secret, info, case["size"]).hex() == case["okm"]
            else:
                with pytest.raises(ValueError):
                    derive(secret, info, case["size"])


def test_chacha20_poly1305_edge_cases(vectors: Path) -> None:
    for group in _read(vectors, "wycheproof/chacha20_poly1305_test.json")["testGroups"]:
        for case in group["tests"]:
            key, nonce, about, text, sealed = (bytes.fromhex(case[name]) for name in ("key", "iv", "aad", "msg", "ct"))
            sealed += bytes.fromhex(case["tag"])
            if case["result"] == "valid":
                assert ChaCha20Poly1305(key).decrypt(nonce, sealed, about) == text
                assert ChaCha20Poly1305(key).encrypt(nonce, text, about) == sealed
            else:
                with pytest.raises((InvalidTag, ValueError)):
                    ChaCha20Poly1305(key).decrypt(nonce, sealed, about)


def test_pair_masks_known_answers(vectors: Path) -> None:
    known = _read(vectors, "masked_sum/mask_prg.json")
    private = {
        int(name): X25519PrivateKey.from_private_bytes(bytes.fromhex(key))
        for name, key in known["private_keys"].items()
    }
    for name, public in known["public_keys"].items():
        assert private[int(name)].public_key().public_bytes_raw().hex() == public
    for case in known["pairwise"]:
        one, other = case["parties"]
        context = bytes.fromhex(case["context"])
        secret = agree(private[one], bytes.fromhex(known["public_keys"][str(other)]))
        assert secret == agree(private[other], bytes.fromhex(known["public_keys"][str(one)]))
        assert secret.hex() == case["ikm_shared_secret"]
        assert mask_key(secret, context).hex() == case["key"]
        mask = pair_mask(secret, context, 4096)
        assert (mask[:8] == _words(case["first_8_words"])).all()
        assert (mask[8:20] == _words(case["words_8_to_19"])).all()
        assert mask[4095] == int(case["word_4095"], 16)
        assert hashlib.sha256(mask.tobytes()).hexdigest() == case["sha256_of_first_4096_words_le"]
    for case in known["fixed_ikm"]:
        mask = pair_mask(bytes.fromhex(case["ikm"]), bytes.fromhex(case["context"]), 4096)
        assert (mask[:8] == _words(case["first_8_words"])).all()
        assert hashlib.sha256(mask.tobytes()).hexdigest() == case["sha256_of_first_4096_words_le"]


def test_masked_sums_known_answers(vectors: Path) -> None:
    keys = _read(vectors, "masked_sum/mask_prg.json")
    private = {
        name: X25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for name, key in keys["private_keys"].items()
    }
    for run in _read(vectors, "masked_sum/pairwise_masking.json")["runs"]:
        roster = [str(place + 1) for place in range(run["parties"])]
        context, total = bytes.fromhex(run["context"]), np.zeros(run["dimension"], dtype=np.uint64)
        for me, name in enumerate(roster):
            secrets = {
                place: agree(private[name], bytes.fromhex(keys["public_keys"][other]))
                for place, other in enumerate(roster)
                if other != name
            }
            share = zero_share(me, secrets, context, run["dimension"])
            assert (share == _words(run["total_mask"][name])).all()
            encoded = encode([float(x) for x in run["x"][name]])
            assert (encoded.view(np.uint64) == _words(run["enc"][name])).all()
            masked = encoded.view(np.uint64) + share
            assert (masked == _words(run["masked"][name])).all()
            total += masked
        assert (total == _words(run["sum"])).all()
        assert (decode(total.view(np.int64)) == [float(x) for x in run["decoded"]]).all()
        if dropout := run.get("dropout"):
            lost = str(dropout["dropped"])
            raw = np.sum([_words(run["masked"][name]) for name in roster if name != lost], axis=0, dtype=np.uint64)
            assert (raw == _words(dropout["raw_sum_of_masked_survivors"])).all()
            for name in roster:
                if name != lost:
                    secret = agree(private[name], bytes.fromhex(keys["public_keys"][lost]))
                    remove_pair_mask(raw, int(name), int(lost), mask_key(secret, context))
            assert (raw == _words(dropout["corrected_sum"])).all()
            assert (decode(raw.view(np.int64)) == [float(x) for x in dropout["decoded"]]).all()


def test_encodings_known_answers(vectors: Path) -> None:
    known = _read(vectors, "masked_sum/encoding.json")
    for case in known["accept"]:
        word = encode([float.fromhex(case["x_hex"])])
        assert word.view(np.uint64)[0] == int(case["enc"], 16), case["x"]
        assert decode(word)[0] == float.fromhex(case["decoded_hex"])
    for case in known["refuse"]:
        with pytest.raises(InputError):
            encode([float.fromhex(case["x_hex"])])


def test_sums_known_answers(vectors: Path) -> None:
    known = _read(vectors, "masked_sum/sums.json")
    for case in known["cases"]:
        words = encode([float(x) for x in case["x"]])
        assert (words.view(np.uint64) == _words(case["enc"])).all()
        assert words.view(np.uint64).sum(dtype=np.uint64) == int(case["wrapped_sum"], 16)
        if case["expect"] == "accept":
            total = words.view(np.uint64).sum(dtype=np.uint64, keepdims=True).view(np.int64)
            assert decode(total)[0] == float.fromhex(case["decoded_hex"])
    for case in known["declared_bounds"]["cases"]:
        if case["expect"] == "accept":
            require_headroom("tensor", case["parties"], float(case["abs_bound"]))
        else:
            with pytest.raises(InputError, match="tensor"):
                require_headroom("tensor", case["parties"], float(case["abs_bound"]))
    for case in known["refuse_inputs"]:
        with pytest.raises(InputError):
            encode([float(x) for x in case["x"]])
            require_enough(len(case["x"]))


@pytest.mark.parametrize("parties", [2, 3, 7])
def test_zero_shares_cancel(parties: int) -> None:
    secrets = {frozenset((i, j)): hashlib.sha256(bytes((i, j))).digest() for i in range(parties) for j in range(i)}
    mine = [{j: secrets[frozenset((i, j))] for j in range(parties) if j != i} for i in range(parties)]
    shares = [zero_share(i, mine[i], b"round", 33) for i in range(parties)]
    assert not np.sum(shares, axis=0, dtype=np.uint64).any()
    assert all(share.any() for share in shares)
    assert not np.bitwise_xor.reduce([zero_share_xor(mine[i], b"round", 33) for i in range(parties)]).any()
    assert (shares[0] != zero_share(0, mine[0], b"another round", 33)).all()
