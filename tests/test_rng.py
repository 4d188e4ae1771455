"""Random numbers are Philox's, and depend on their address alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lpm.philox import draw, philox, word
from lpm.rng import Address, Ids, derive, uniform_words


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


@settings(deadline=None)
@given(st.permutations(list(range(20))), st.integers(0, 2**64 - 1))
def test_a_draw_depends_on_its_agent_and_not_on_its_place(order, seed):
    agents = np.array([2**63 + 7 * k for k in range(20)], dtype=np.uint64)
    words = uniform_words(seed, 3, 1, agents, 0, 4)
    assert np.array_equal(uniform_words(seed, 3, 1, agents[order], 0, 4), words[:, order])


@settings(deadline=None)  # the first one compiles
@given(st.integers(0, 2**62 - 3), st.integers(0, 2**64 - 1))
def test_one_word_a_run_and_a_list_are_the_same_draws(block, seed):
    first = 4 * block
    where = Address(seed, 5, 2, Ids.consecutive(12, first))
    words = where.words(3)[0]
    run, some = np.empty(20, dtype=np.uint32), np.empty(20, dtype=np.uint32)
    for listed in (np.empty(0, dtype=np.uint64), np.arange(first, first + 12, dtype=np.uint64)):
        begin = draw(np.uint64(first), listed, 0, 12, *where.counter(3), run)
        assert np.array_equal(run[begin : begin + 12], words)
        begin = draw(np.uint64(first), listed, 3, 7, *where.counter(3), some)
        assert np.array_equal(some[begin : begin + 7], words[3:10])
    assert [int(word(np.uint64(first + k), *where.counter(3))) for k in range(12)] == words.tolist()


def test_the_four_words_of_a_block_are_philox():
    address = Address(2**40 + 9, 7, 3, Ids.consecutive(4, 4 * (2**33 + 5)))
    answer = philox(*map(np.uint64, [5, 2, 8, 3 << 16, 9, 2**8]))
    assert address.words()[0].tolist() == [int(word) for word in answer]


def test_ids_that_follow_one_another_take_one_number():
    assert Ids.of(np.arange(7, 107, dtype=np.uint64)).listed.size == 0
    wrapped = np.array([2**64 - 1, 0], dtype=np.uint64)
    assert Ids.of(wrapped).array().tolist() == wrapped.tolist()
    assert Ids.of([3, 1, 2]).array().tolist() == [3, 1, 2]
    assert Ids.of([]).count == 0


def test_every_part_of_the_address_matters():
    agents = np.arange(2, dtype=np.uint64)
    base = uniform_words(5, 3, 1, agents, 2)
    others = [(6, 3, 1, 2), (5, 4, 1, 2), (5, 3, 2, 2), (5, 3, 1, 3), (5 + 2**40, 3, 1, 2), (5, -1, 1, 2)]
    for seed, step, protocol, variate in others:
        assert not np.array_equal(uniform_words(seed, step, protocol, agents, variate), base)


def test_words_are_uniform():
    words = uniform_words(11, 0, 0, np.arange(100_000, dtype=np.uint64), 0, 4) >> np.uint64(28)
    counts = np.stack([np.bincount(row.astype(int), minlength=16) for row in words])
    chi_square = ((counts - 6250.0) ** 2 / 6250.0).sum(1)
    # 15 degrees of freedom: beyond 44.3 with probability 1e-4 each.
    assert (chi_square < 44.3).all()


def test_derived_seeds_differ_by_path():
    seeds = {derive(1), derive(2), derive(1, 0), derive(1, "a"), derive(1, "a", 0), derive(1, 10), derive(1, 1, 0)}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**64 for seed in seeds)
