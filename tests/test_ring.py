"""Fixed-point words: published encodings bit for bit, and everything unsafe refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpm import ring
from lpm.errors import InputError


def test_encodings_are_the_published_ones(vectors):
    known = json.loads((vectors / "masked_sum" / "encoding.json").read_text())
    for case in known["accept"]:
        word = ring.encode(float.fromhex(case["x_hex"]))
        assert int(word) % 2**64 == int(case["enc"], 16), case
        assert float(ring.decode(word)).hex() == float.fromhex(case["decoded_hex"]).hex(), case
    for case in known["refuse"]:
        with pytest.raises(InputError):
            ring.encode(float(case["x"]))


def test_sums_are_the_published_ones_and_bounds_are_checked_before(vectors):
    known = json.loads((vectors / "masked_sum" / "sums.json").read_text())
    for case in known["cases"]:
        words = [int(word, 16) for word in case["enc"]]
        total = np.array([word - 2**64 if word >= 2**63 else word for word in words], dtype=np.int64).sum()
        assert int(total) % 2**64 == int(case["wrapped_sum"], 16), case["name"]
    for case in known["declared_bounds"]["cases"]:
        if case["expect"] == "accept":
            ring.require_headroom("a network", case["parties"], float(case["abs_bound"]))
        else:
            with pytest.raises(InputError, match="a network could overflow"):
                ring.require_headroom("a network", case["parties"], float(case["abs_bound"]))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_sums_of_words_do_not_depend_on_the_order(values, shuffler):
    words = ring.encode(values)
    mixed = list(words)
    shuffler.shuffle(mixed)
    assert int(words.sum()) == sum(map(int, mixed))
    assert ring.words_from_bytes(ring.words_to_bytes(words)).tolist() == words.tolist()


def test_bytes_that_are_not_words_are_refused():
    with pytest.raises(InputError, match="7 bytes"):
        ring.words_from_bytes(b"1234567")
