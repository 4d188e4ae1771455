"""A population is cut into whole local groups, evenly and always alike, or the network that forbids it is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lpm
from lpm.errors import InputError
from lpm.population.partition import partition
from tests import models


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_no_local_group_and_no_edge_is_cut_and_everybody_has_a_rank(seed: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    agents = int(rng.integers(40, 200))
    home = lpm.Groups("home", of=rng.integers(-1, agents // 3, agents))
    first = rng.integers(0, agents // 2, 6) * 2
    pairs = lpm.Edges("pairs", np.stack([first, first + 1], axis=1), agents_in_all=agents + 1)
    city = lpm.Groups("city", of=rng.integers(0, 5, agents), groups=5, shared=True)
    rank = partition([city, home, pairs], agents, ranks)
    assert rank.shape == (agents,) and set(rank) == set(range(ranks))
    for group in np.unique(np.asarray(home.of)):
        assert group < 0 or len(set(rank[np.asarray(home.of) == group])) == 1
    assert (rank[first] == rank[np.minimum(first + 1, agents - 1)]).all()
    assert np.bincount(rank).min() >= agents / ranks / 2
    assert np.array_equal(rank, partition([city, home, pairs], agents, ranks))


def test_shared_groups_are_cut_seldom_where_they_hold_whole_households() -> None:
    household = np.repeat(np.arange(1000), 3)
    cell = np.random.default_rng(1).permutation(1000)[household] // 50
    networks = [lpm.Groups("household", of=household), lpm.Groups("cell", of=cell, groups=20, shared=True)]
    rank = partition(networks, 3000, 4)
    assert sum(len(set(rank[cell == k])) > 1 for k in range(20)) == 0
    assert np.bincount(rank).tolist() == [750] * 4


def test_ranks_hold_runs_of_agents_where_no_order_keeps_shared_groups_whole() -> None:
    household = np.repeat(np.arange(1000), 3)
    work = np.random.default_rng(1).integers(0, 150, 3000)
    networks = [lpm.Groups("household", of=household), lpm.Groups("work", of=work, groups=150, shared=True)]
    rank = partition(networks, 3000, 4)
    assert np.array_equal(rank, np.arange(3000) // 750)


def test_a_few_large_clusters_are_packed() -> None:
    rank = partition([lpm.Groups("ward", of=np.repeat([0, 1, 2, 3], [50, 10, 30, 10]))], 100, 2)
    assert np.bincount(rank).tolist() == [50, 50]


@pytest.mark.parametrize("edges", [False, True])
def test_a_network_that_joins_everybody_is_named(edges: bool) -> None:
    rng = np.random.default_rng(3)
    household = lpm.Groups("household", of=np.arange(600) // 3)
    pairs = np.stack([np.arange(599), np.arange(1, 600)], axis=1)
    other = lpm.Edges("web", pairs) if edges else lpm.Groups("workplace", of=rng.integers(0, 30, 600))
    with pytest.raises(InputError, match="web.*one process" if edges else r"workplace.*shared=True"):
        partition([other, household], 600, 2)
    assert set(partition([household], 600, 2)) == {0, 1}


def test_more_ranks_than_agents_are_refused() -> None:
    with pytest.raises(InputError, match="2 agents can't be spread over 3 ranks"):
        partition([], 2, 3)


def test_a_shard_keeps_ids_classes_initial_agents_and_mixing_of_local_groups() -> None:
    of = np.array([4, 4, 9, 9, -1, 7, 7, -1])
    mixing = np.diag([0.0, 0.1, 0.2, 0.3])
    model = lpm.Model(
        lpm.Population(8, ids=np.arange(8) * 10, attributes={"age": np.array([0, 0, 1, 1, 0, 2, 2, 1])}),
        [lpm.Groups("home", of=of, mixing=mixing), lpm.Edges("pair", [(2, 3), (5, 6)])],
        [
            lpm.Contagion(
                "S I R",
                "S -> I",
                {"I": 1.0},
                over={"home": models.BETA_HOME, "pair": 0.1},
                classes="age",
                initial={"I": np.array([1, 2, 5])},
            )
        ],
        outputs={"infections": lpm.flow("S -> I", thin=[1.0, 2.0, 3.0])},
    )
    part = model.shard(np.array([2, 3, 4]))
    assert part.population.addresses.tolist() == [20, 30, 40]
    assert part.class_count("age") == 3
    disease = part.protocols[0]
    assert isinstance(disease, lpm.Contagion) and np.asarray(disease.initial["I"]).tolist() == [0]
    home, pair = part.networks
    assert isinstance(home, lpm.Groups) and np.asarray(home.mixing).tolist() == [[0.0, 0.0], [0.0, 0.3]]
    assert isinstance(pair, lpm.Edges) and np.asarray(pair.pairs).tolist() == [[0, 1]] and pair.agents == 3
    # The whole model is as it was.
    assert model.protocols[0].spec.classes.size == 8  # type: ignore[attr-defined]
