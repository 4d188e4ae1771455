"""Shamir's and additive sharing, commitments and Merkle trees against known answers, and against those who cheat."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lpm.errors import InputError, SessionRefused
from lpm.privacy import commitments as tree
from lpm.privacy.shamir import PRIME, Share, combine, evaluate, split
from lpm.privacy.sharing import WEAKNESSES, add_shares, open_sum, split_additively


def _read(vectors: Path, name: str) -> Any:
    return json.loads((vectors / name).read_text())


def _shares(plain: list[dict[str, str]]) -> list[Share]:
    return [Share(int(each["x"], 16), int(each["y"], 16)) for each in plain]


def test_shamir_known_answers(vectors: Path) -> None:
    for case in _read(vectors, "shamir/shamir_prime_field.json")["valid"]:
        prime, threshold = int(case["p"], 16), case["threshold"]
        coefficients = [int(each, 16) for each in case["coefficients"]]
        shares = {share.x: share for share in _shares(case["shares"])}
        assert all(evaluate(coefficients, x, prime) == share.y for x, share in shares.items())
        for rebuilt in case["reconstructions"]:
            some = [shares[int(x, 16)] for x in rebuilt["x"]]
            assert combine(some, threshold, prime) == int(rebuilt["secret"], 16), case["id"]
        for some in itertools.islice(itertools.combinations(shares.values(), threshold), 20):
            assert combine(some, threshold, prime) == coefficients[0]
        assert combine(list(shares.values()), threshold, prime) == coefficients[0]


def test_shamir_refuses_what_can_not_be(vectors: Path) -> None:
    seen = set()
    for case in _read(vectors, "shamir/shamir_prime_field.json")["invalid"]:
        prime, threshold, shares = int(case["p"], 16), case["threshold"], _shares(case["shares"])
        seen.add(case["expect"])
        if case["expect"] in ("refuse", "inconsistent"):
            with pytest.raises(SessionRefused):
                combine(shares, threshold, prime)
        else:
            # Exactly t shares: plain sharing can't see it, the engine's commitments do (test_dropout.py).
            assert combine(shares, threshold, prime) == int(case["reconstructs_to"], 16)
        if case["expect"] == "inconsistent":
            by_x = {share.x: share for share in shares}
            for names, secret in case["by_subset"].items():
                assert combine([by_x[int(x)] for x in names.split(",")], threshold, prime) == int(secret, 16)
    assert seen == {"refuse", "inconsistent", "wrong_secret"}


def test_sums_of_shares_are_shares_of_the_sum(vectors: Path) -> None:
    file = _read(vectors, "shamir/shamir_prime_field.json")
    case, prime = file["linearity"], int(file["fields"][file["linearity"]["field"]], 16)
    points, total = [int(x, 16) for x in case["x"]], [0] * len(case["x"])
    for dealer in case["dealers"]:
        ys = [evaluate([int(c, 16) for c in dealer["coefficients"]], x, prime) for x in points]
        assert ys == [int(y, 16) for y in dealer["y"]]
        total = [(a + b) % prime for a, b in zip(total, ys, strict=True)]
    assert total == [int(y, 16) for y in case["sum_y"]]
    shares = [Share(x, y) for x, y in zip(points, total, strict=True)]
    assert combine(shares, case["threshold"], prime) == int(case["sum_secret"], 16)


@given(st.integers(0, PRIME - 1), st.integers(1, 9), st.integers(0, 4), st.randoms(use_true_random=False))
def test_any_t_of_n_rebuild_a_secret(secret: int, threshold: int, more: int, order: Any) -> None:
    shares = split(secret, threshold, range(1, threshold + more + 1))
    order.shuffle(shares)
    assert combine(shares[:threshold], threshold) == secret


def test_fewer_than_t_shares_are_uniform() -> None:
    """Two of three needed shares of a fixed secret, low bytes: chi-square, false alarms in 1 of 10,000 runs."""
    low = [share.y & 0xFF for _ in range(4000) for share in split(7, 3, range(1, 4))[:2]]
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-4
    # And for the field of 257, exactly: each pair of shares is as likely under any secret, so none is excluded.
    pairs = {(a, b) for a in range(17) for b in range(17)}
    for secret in (0, 5):
        found = {tuple(evaluate([secret, c, d], x, 17) for x in (1, 2)) for c in range(17) for d in range(17)}
        assert found == pairs


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [(-1, 2, (1, 2)), (PRIME, 2, (1, 2)), (1, 3, (1, 2)), (1, 0, (1, 2)), (1, 2, (0, 1)), (1, 2, (1, 1 + PRIME))],
)
def test_what_can_not_be_shared(secret: int, threshold: int, points: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        split(secret, threshold, points)


def test_a_share_can_not_be_printed() -> None:
    share = split(123456789, 2, (1, 2))[0]
    assert str(share.y) not in repr(share) and hex(share.y)[2:] not in f"{share}"


def test_the_papers_sum() -> None:
    generator = np.random.default_rng(1)
    secret = generator.integers(-(2**63), 2**63 - 1, (4, 20), endpoint=True)
    dealt = [split_additively(each, 4) for each in secret]
    sums = [add_shares([shares[place] for shares in dealt]) for place in range(4)]
    assert (open_sum(sums) == secret.view(np.uint64).sum(axis=0, dtype=np.uint64).view(np.int64)).all()
    with pytest.raises(InputError):
        split_additively(secret[0], 1)


def test_the_papers_shares_are_uniform_and_its_weaknesses_are_real() -> None:
    """Chi-square over bytes of every share of a constant; false alarms in 1 of 10,000 runs of all three."""
    shares = split_additively(np.full(8000, 1, dtype=np.int64), 3)
    for share in shares:
        assert stats.chisquare(np.bincount(share.view(np.uint8), minlength=256)).pvalue > 1e-4 / 3
    # A lone neighbour's sum is the neighbour; yes from everybody shows; one lost share leaves noise.
    lone = split_additively(np.array([1], dtype=np.int64), 2)
    assert open_sum([add_shares([lone[0]]), add_shares([lone[1]])]) == 1
    everybody = [split_additively(np.array([1], dtype=np.int64), 3) for _ in range(3)]
    sums = [add_shares([each[place] for each in everybody]) for place in range(3)]
    assert open_sum(sums) == 3 and open_sum(sums[:2]) != 3
    assert len(WEAKNESSES) == 5


def test_merkle_known_answers(vectors: Path) -> None:
    known = _read(vectors, "merkle/rfc6962_self.json")
    assert tree.merkle_root([]).hex() == known["empty_root"]
    for case in known["trees"]:
        leaves = [tree.leaf_hash(bytes.fromhex(each)) for each in case["leaves"]]
        assert [leaf.hex() for leaf in leaves] == case["leaf_hashes"]
        roots = [tree.merkle_root(leaves[:size]) for size in range(len(leaves) + 1)]
        assert [root.hex() for root in roots] == case["roots_by_size"] and roots[-1].hex() == case["root"]
        for each in case["inclusion"]:
            size, proof = each["size"], tree.inclusion_proof(leaves[: each["size"]], each["index"])
            assert [step.hex() for step in proof] == each["proof"]
            tree.require_inclusion(leaves[each["index"]], each["index"], size, proof, roots[size])
            for other in range(size):
                if leaves[other] != leaves[each["index"]]:
                    with pytest.raises(SessionRefused):
                        tree.require_inclusion(leaves[each["index"]], other, size, proof, roots[size])
        for each in case["consistency"]:
            proof = tree.consistency_proof(leaves[: each["size2"]], each["size1"])
            assert [step.hex() for step in proof] == each["proof"]
            tree.require_consistency(each["size1"], each["size2"], proof, roots[each["size1"]], roots[each["size2"]])
    for case in known["invalid_inclusion"]:
        if case["expect"] == "different":
            assert tree.leaf_hash(bytes.fromhex(case["leaf_data"])).hex() == case["leaf_hash"] != case["interior_node"]
            continue
        if case["expect"] == "rfc6962_root":
            leaves = [tree.leaf_hash(bytes.fromhex(each)) for each in case["leaves"]]
            assert tree.merkle_root(leaves).hex() == case["rfc6962_root"] != case["duplicated_style_root"]
            continue
        with pytest.raises(SessionRefused):
            tree.require_inclusion(
                bytes.fromhex(case["leaf_hash"]),
                case["index"],
                case["size"],
                [bytes.fromhex(step) for step in case["proof"]],
                bytes.fromhex(case["root"]),
            )


def _bytes(text: str | None) -> bytes:
    return base64.b64decode(text or "")


def test_public_merkle_proofs(vectors: Path) -> None:
    wanted = {True: 0, False: 0}
    for case in _read(vectors, "merkle/transparency_dev_inclusion.json")["cases"]:
        proof, place = [_bytes(step) for step in case["proof"] or []], (case["leafIdx"], case["treeSize"])
        wanted[case["wantErr"]] += 1
        if case["wantErr"]:
            with pytest.raises(SessionRefused):
                tree.require_inclusion(_bytes(case["leafHash"]), *place, proof, _bytes(case["root"]))
        else:
            tree.require_inclusion(_bytes(case["leafHash"]), *place, proof, _bytes(case["root"]))
    for case in _read(vectors, "merkle/transparency_dev_consistency.json")["cases"]:
        proof, roots = [_bytes(step) for step in case["proof"] or []], (_bytes(case["root1"]), _bytes(case["root2"]))
        wanted[case["wantErr"]] += 1
        if case["wantErr"]:
            with pytest.raises(SessionRefused):
                tree.require_consistency(case["size1"], case["size2"], proof, *roots)
        elif case["size1"]:  # that everything grew from nothing proves nothing, and is refused here
            tree.require_consistency(case["size1"], case["size2"], proof, *roots)
    assert min(wanted.values()) > 10


def test_commitments_bind_to_purpose_context_and_value() -> None:
    value = bytes(range(32))
    found = {tree.commit(p, c, v) for p in (b"a", b"ab") for c in (b"", b"b") for v in (value, value[::-1])}
    assert len(found) == 8 and tree.commit(b"a", b"b", value) != tree.commit(b"ab", b"", value)
    with pytest.raises(InputError):
        tree.inclusion_proof([value], 1)
    with pytest.raises(InputError):
        tree.consistency_proof([value], 2)
