"""Random numbers are Philox's, and depend on their address alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lpm.philox import philox
from lpm.rng import derive, uniform_words


def test_philox_known_answers():
    # Salmon et al. 2011, known-answer file of Random123, philox4x32 with 10 rounds.
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    cases = [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, answer in cases:
        words = philox(*map(np.uint64, [*counter, *key]))
        assert [int(word) for word in words] == answer


@given(st.permutations(list(range(20))), st.integers(0, 2**64 - 1))
def test_a_draw_depends_on_its_agent_and_not_on_its_place(order, seed):
    agents = np.array([2**63 + 7 * k for k in range(20)], dtype=np.uint64)
    words = uniform_words(seed, 3, 1, agents)
    assert np.array_equal(uniform_words(seed, 3, 1, agents[order]), words[:, order])


def test_every_part_of_the_address_matters():
    agents = np.arange(2, dtype=np.uint64)
    base = uniform_words(5, 3, 1, agents, 2)
    others = [(6, 3, 1, 2), (5, 4, 1, 2), (5, 3, 2, 2), (5, 3, 1, 3), (5 + 2**40, 3, 1, 2), (5, -1, 1, 2)]
    for seed, step, protocol, block in others:
        assert not np.array_equal(uniform_words(seed, step, protocol, agents, block), base)


def test_words_are_uniform():
    words = uniform_words(11, 0, 0, np.arange(100_000, dtype=np.uint64)) >> np.uint64(28)
    counts = np.stack([np.bincount(row.astype(int), minlength=16) for row in words])
    chi_square = ((counts - 6250.0) ** 2 / 6250.0).sum(1)
    # 15 degrees of freedom: beyond 44.3 with probability 1e-4 each.
    assert (chi_square < 44.3).all()


def test_derived_seeds_differ_by_path():
    seeds = {derive(1), derive(2), derive(1, 0), derive(1, "a"), derive(1, "a", 0), derive(1, 10), derive(1, 1, 0)}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**64 for seed in seeds)
