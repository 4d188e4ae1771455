"""What can't fit is refused before work begins: people, parameter vectors, derivatives; here, on ranks, on a GPU."""

import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import lpm
from lpm import memory, ranks, simulation
from lpm import scenario as scenarios
from lpm.bench.workload import default_values, workload
from lpm.cli import main
from lpm.errors import InputError
from lpm.estimators import evaluate
from lpm.simulation import run
from tests import models
from tests.test_alternates_general import WORKING, _theta, _working

CITY = Path(__file__).parent.parent / "simulations" / "nyc_boroughs"


@pytest.fixture
def leave(monkeypatch):
    """Say how many bytes this machine has left."""

    def say(available: int) -> None:
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))

    return say


def test_more_agents_than_memory_are_refused_before_work(capsys, leave, tmp_path):
    out = tmp_path / "run"
    assert main(["simulate", str(CITY), "--agents", "10000000000", "--out", str(out)]) == 2
    assert not out.exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "10,000,000,000 agents need at least 372.5 GiB" in said and "GiB are available" in said
    assert "--agents" in said
    leave(4000)
    memory.require_memory(100)
    with pytest.raises(InputError, match="101 agents"):
        memory.require_memory(101)
    memory.require_memory(200, share=0.5)


def test_what_a_scenario_takes_is_measured_where_room_is_short(leave):
    city = scenarios.load(CITY)
    build = city.module().build
    build(city, city.institutions, agents=1000, seed=0)
    tracemalloc.start()
    try:
        build(city, city.institutions, agents=300_000, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    leave(300_000 * 100)
    with pytest.raises(
        InputError, match=r"300,000 agents need at least .* GiB of memory \(1[0-9]{2} bytes each\)"
    ) as no:
        city.with_options(agents=300_000).build()
    (most,) = (int(number.replace(",", "")) for number in re.findall(r"at most ([\d,]+)", no.value.remedy))
    assert most * peak / 300_000 == pytest.approx(300_000 * 100, rel=0.05)
    # One of five institutions has less to make.
    city.with_options(agents=300_000).require_memory(["bronx"])


def test_a_model_that_refuses_to_be_small_is_held_to_the_least(leave, monkeypatch):
    city = scenarios.load(CITY).with_options(agents=1000)

    def build(scenario, institutions, *, agents, seed):
        raise InputError("Too few agents.")

    monkeypatch.setattr(city.module(), "build", build)
    leave(100_000)
    city.require_memory()
    leave(30_000)
    with pytest.raises(InputError, match=r"40 bytes each"):
        city.require_memory()


@pytest.mark.parametrize(
    ("estimator", "mode", "executor", "each"),
    [
        ("none", "forward", "auto", 5),
        ("none", "forward", "reference", 70 * 4),
        ("fd", "forward", "auto", 5 * 5),
        ("tangent", "forward", "auto", 32 * 3),
        ("tangent", "forward", "reference", 3 * 70 * 4),
        ("tangent", "reverse", "auto", 6 * 70 * 4),
        ("score", "forward", "auto", 4 * 70 * 4),
        ("st-gumbel", "forward", "auto", 3 * 70 * 4),
        ("alternates", "forward", "auto", 50),
        ("alternates", "forward", "reference", 6 * 70 * 4),
        ("alternates", "reverse", "auto", 280),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_work(leave, estimator, mode, executor, each):
    model, theta = workload(2000, layers=("household",), parameters=2), default_values(2)
    asked = {"estimator": estimator, "mode": mode, "executor": executor, "steps": 1, "seed": 1}
    asked["cotangent"] = (lambda outputs: np.ones((1, *outputs.shape))) if mode == "reverse" else None
    leave(2000 * each)
    evaluate(model, theta, **asked)
    leave(2000 * each - 1)
    with pytest.raises(InputError, match=r"2,000 agents need at least .* parameter vector"):
        evaluate(model, theta, progress=lambda done, of: pytest.fail("it has begun"), **asked)


def test_alternates_of_protocols_of_ones_own_are_held_against_the_memory_too(leave):
    model = _working(400)
    asked = {"estimator": "alternates", "steps": 1, "seed": 1}
    leave(400 * 1_500)
    evaluate(model, _theta(model, **WORKING), **asked)
    leave(400 * 1_500 - 1)
    with pytest.raises(InputError, match=r"400 agents .* with derivatives \(alternates\) \(1,500 bytes each\)"):
        evaluate(model, _theta(model, **WORKING), **asked)


def test_tangents_take_what_is_predicted_of_them(leave):
    model, theta = workload(100_000, parameters=4), default_values(4)
    asked = {"steps": 2, "seed": 1, "derivative": "forward"}
    run(model, theta, **asked)
    tracemalloc.start()
    try:
        run(model, theta, **asked)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    leave(int(0.6 * peak))
    with pytest.raises(InputError, match=r"1 parameter vector with derivatives \(forward\)"):
        run(model, theta, **asked)
    leave(peak)
    run(model, theta, **asked)


def test_ranks_on_one_machine_share_its_memory(leave, monkeypatch):
    leave(8000)
    memory.require_memory(200)
    monkeypatch.setattr(memory.ranks, "place", lambda: ranks.Place(rank=5, ranks=8, local_rank=1, local_ranks=2))
    memory.require_memory(100)
    with pytest.raises(InputError, match="to each rank on this machine"):
        memory.require_memory(101)


def test_a_container_or_job_that_limits_memory_counts(leave, monkeypatch, tmp_path):
    group, own = tmp_path / "groups" / "job" / "step", tmp_path / "own"
    group.mkdir(parents=True)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN_GROUP", own)
    leave(9000)
    assert memory.available() == 9000  # no groups on this system
    own.write_text("4:memory:/old\n0::/job/step\n")
    assert memory.available() == 9000  # none limits
    for folder, limit in ((group, "max"), (group.parent, "8000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("5000\n")
        (folder / "memory.stat").write_text("anon 4000\ninactive_file 1000\n")
    assert memory.available() == 4000
    (group / "memory.max").write_text("4500\n")
    assert memory.available() == 500
    own.write_text("0::/\n")  # a container sees its own group as the root
    (tmp_path / "groups" / "memory.max").write_text("7000\n")
    (tmp_path / "groups" / "memory.current").write_text("5000\n")
    (tmp_path / "groups" / "memory.stat").write_text("anon 4000\n")
    assert memory.available() == 2000


def test_what_lies_on_a_gpu_is_held_against_its_memory(leave, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 8000))
    monkeypatch.setattr(memory.ranks, "place", lambda: ranks.Place(rank=1, ranks=2, local_rank=1, local_ranks=2))
    leave(0)
    memory.require_memory(100, device="cuda:1")
    with pytest.raises(InputError, match="101 agents") as no:
        memory.require_memory(101, device="cuda:1")
    assert "to each rank" not in no.value.message and "larger GPU" in no.value.remedy


def test_the_workload_is_held_against_the_memory(leave):
    leave(39 * 2000)
    with pytest.raises(InputError, match="2,000 agents need at least"):
        workload(2000)


def test_a_part_of_a_population_is_refused_in_the_words_of_the_whole(leave, monkeypatch):
    model = workload(1000, shared=("household", "workplace", "community"))
    monkeypatch.setattr(simulation, "agents_of_all", lambda part: 4000)
    leave(2500)
    with pytest.raises(InputError, match="4,000 agents need at least") as no:
        run(model, default_values(0), steps=1, seed=1)
    assert "at most 2,000 with" in no.value.remedy


def test_nobody_needs_nothing(leave):
    leave(0)
    empty = lpm.Model(
        lpm.Population(0),
        networks=[lpm.Groups("town", of=np.zeros(0, dtype=int), groups=1, shared=True)],
        protocols=[lpm.Contagion("S I", "S -> I", {"I": 1.0}, {"town": 0.1})],
        outputs={"ill": lpm.count("I")},
    )
    assert run(empty, default_values(0), steps=2, seed=1).words.sum() == 0


def test_what_is_made_is_measured_once_and_by_one_thread_at_a_time():
    made = []

    def make(agents: int) -> None:
        made.append(np.ones(100 * agents))  # much, beside what other threads hold
        made.pop()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: memory.making_bytes(make, 80_000, ("test", k % 2)), range(4)))
    assert found == pytest.approx([800.0] * 4, rel=0.01)
    assert memory.making_bytes(lambda agents: pytest.fail("again"), 80_000, ("test", 0)) == found[0]


def test_finite_differences_of_every_draw_count(leave):
    model = models.random_graph(100, 4, 1)
    leave(100 * 5 * 5 * 2 - 1)
    with pytest.raises(InputError, match="10 parameter vectors"):
        evaluate(model, np.array([[0.1, 0.2]] * 2), estimator="fd", steps=1, seed=1)
