"""Small models that several tests share."""

from __future__ import annotations

import numpy as np

import lpm

BETA_HOME = lpm.Parameter("beta_home", prior="lognormal(-2, 0.5)", bounds=(0.0, 5.0), unit="1/day")
BETA_CITY = lpm.Parameter("beta_city", prior="lognormal(-2, 0.5)", bounds=(0.0, 5.0), unit="1/day")
GAMMA = lpm.Parameter("gamma", prior="lognormal(-2, 0.5)", bounds=(0.0, 1.0), unit="1/day")
INITIAL = lpm.Parameter("initial", prior="beta(1, 50)", bounds=(0.0, 0.5))
THETA = {"beta_home": 0.2, "beta_city": 0.35, "gamma": 0.2, "initial": 0.02}


def town(agents: int = 600, *, keep: np.ndarray | None = None, order: np.ndarray | None = None) -> lpm.Model:
    """Households of 1–5 and six city cells with age mixing; `keep` makes the shard of some households.

    Agents are described by their own ids, so any subset or order of them is the same people.
    """
    rng = np.random.default_rng(7)
    household = np.sort(rng.integers(0, agents // 3, agents))
    age, cell = rng.integers(0, 3, agents), rng.integers(0, 6, agents)
    chosen = np.arange(agents) if keep is None else np.flatnonzero(np.isin(household, keep))
    if order is not None:
        chosen = chosen[order]
    people = lpm.Population(
        len(chosen), ids=chosen.astype(np.uint64), attributes={"household": household[chosen], "age": age[chosen]}
    )
    mixing = 0.05 + np.diag([0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    city = lpm.Groups("city", of=cell[chosen], groups=6, shared=True, mixing=mixing)
    return lpm.Model(
        people,
        networks=[people.households, city],
        protocols=[disease()],
        outputs={"infections": lpm.flow("S -> E"), "admissions": lpm.flow("P -> I", thin=[0.01, 0.1, 0.3])},
        private_outputs={"ill": lpm.count("P A I")},
        class_counts={"age": 3},
    )


def households(agents: int = 600) -> np.ndarray:
    """The household labels of `town`."""
    return np.unique(np.sort(np.random.default_rng(7).integers(0, agents // 3, agents)))


def disease() -> lpm.Contagion:
    return lpm.Contagion(
        stages="S E*2 P A I R",
        infection="S -> E",
        classes="age",
        infectious={"P": 1.0, "A": 0.5, "I": {"household": 1.0, "city": 0.3}},
        susceptibility=[0.5, 1.0, 1.2],
        over={"household": BETA_HOME, "city": BETA_CITY},
        progression={
            "E": lpm.leave(mean_days=3.0, to={"P": [0.3, 0.5, 0.7], "A": None}),
            "P -> I": 0.5,
            "A -> R": GAMMA,
            "I -> R": GAMMA,
        },
        initial={"E": INITIAL},
        name="disease",
    )


def neighbours(agents: int = 600, *, order: np.ndarray | None = None) -> lpm.Model:
    """Households, clubs that some are in, a sparse graph and a city; like `town` in any order of agents."""
    rng = np.random.default_rng(11)
    household, club = np.sort(rng.integers(0, agents // 3, agents)), rng.integers(-1, agents // 20, agents)
    age = rng.integers(0, 2, agents)
    pairs = rng.integers(0, agents, (2 * agents, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    order = np.arange(agents) if order is None else order
    place = np.argsort(order)
    people = lpm.Population(
        agents, ids=order.astype(np.uint64), attributes={"household": household[order], "age": age[order]}
    )
    sirs = lpm.Contagion(
        stages="S I R",
        infection="S -> I",
        infectious={"I": 1.0},
        classes="age",
        susceptibility=[0.8, 1.2],
        over={"household": BETA_HOME, "club": BETA_CITY * 0.2, "graph": BETA_CITY * 0.4, "everybody": BETA_CITY * 0.3},
        progression={"I -> R": GAMMA, "R -> S": 0.05},
        initial={"I": INITIAL},
        name="sirs",
    )
    return lpm.Model(
        people,
        networks=[
            people.households,
            lpm.Groups("club", of=club[order]),
            lpm.Edges("graph", place[pairs], agents_in_all=agents),
            lpm.Groups("everybody", of=np.zeros(agents, dtype=int), layer=False),
        ],
        protocols=[sirs],
        outputs={"infections": lpm.flow("S -> I"), "ill": lpm.count("I")},
        class_counts={"age": 2},
    )


def random_graph(agents: int, degree: int, seed: int) -> lpm.Model:
    """Daily SIR on a random graph, 25 seeds: the dense case of the gradient tests."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, agents, (agents * degree // 2, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    sir = lpm.Contagion(
        stages="S I R",
        infection="S -> I",
        infectious={"I": 1.0},
        over={"graph": BETA_CITY},
        progression={"I": lpm.leave(probability=GAMMA, to={"R": None})},
        initial={"I": np.unique(np.arange(25) * (agents // 25))},
    )
    return lpm.Model(
        lpm.Population(agents),
        networks=[lpm.Edges("graph", pairs, agents_in_all=agents)],
        protocols=[sir],
        outputs={"infections": lpm.flow("S -> I")},
    )
