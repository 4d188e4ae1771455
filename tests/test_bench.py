"""`lpm bench`: the reference workload is what it says, and its figures come in the promised form."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lpm import cli, simulation
from lpm.bench.workload import PARAMETERS, default_values, places, workload
from lpm.errors import InputError

AGENTS = 20_000


def test_the_workload_has_the_groups_it_says():
    where = places(AGENTS, seed=3)
    household = np.bincount(where["household"])
    assert np.all(np.diff(where["household"]) >= 0)
    assert household.max() <= 6
    assert household.mean() == pytest.approx(2.5, abs=0.05)
    assert np.bincount(where["workplace"]).mean() == pytest.approx(20, abs=0.5)
    assert np.bincount(where["community"])[:-1].mean() == pytest.approx(1000, rel=0.02)
    # A household lives in one community cell; a workplace draws from the whole population.
    assert all(np.unique(where["community"][where["household"] == h]).size == 1 for h in range(0, 8000, 97))
    assert np.corrcoef(where["workplace"], np.arange(AGENTS))[0, 1] == pytest.approx(0, abs=0.03)


def test_the_epidemic_takes_more_than_half_of_the_people():
    found = simulation.run(workload(AGENTS), default_values(0), steps=180, seed=1)
    last = found.outputs[-1, 1:, 0]
    assert last.sum() == AGENTS
    assert last[0] < AGENTS / 2


@pytest.mark.parametrize("parameters", [4, 6])
def test_parameters_change_no_bit_of_the_workload(parameters):
    model = workload(2_000, parameters=parameters)
    assert [parameter.name for parameter in model.parameters] == list(PARAMETERS)[:parameters]
    varied = simulation.run(model, default_values(parameters), steps=20, seed=1)
    fixed = simulation.run(workload(2_000), default_values(0), steps=20, seed=1)
    assert np.array_equal(varied.words, fixed.words)


def test_the_command_prints_one_object_with_the_promised_keys(capsys):
    assert cli.main(["bench", "W", "--agents", "2000", "--days", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"agents", "days", "median_day_ms", "agent_steps_per_s", "peak_rss_mb", "final_counts"}
    assert sum(found["final_counts"]) == found["agents"] == 2000
    assert cli.main(["bench", "W", "--agents", "2000", "--days", "10"]) == 0
    assert "median day ms" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "named"), [(["--days", "1"], "days"), (["--agents", "5"], "5 agents")])
def test_a_workload_that_can_not_be_is_refused(arguments, named, capsys):
    assert cli.main(["bench", "W", "--agents", "2000", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_there_are_six_parameters():
    with pytest.raises(InputError, match="from 0 to 6"):
        workload(2_000, parameters=7)


def test_gradients_are_timed_beside_a_plain_run(capsys):
    arguments = ["--agents", "2000", "--days", "6", "--parameters", "2", "--layers", "2", "--json"]
    assert cli.main(["bench", "gradients", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"plain_day_ms", "forward_day_ms", "reverse_day_ms", "peak_rss_mb"} <= set(found)
    assert min(found["plain_day_ms"], found["forward_day_ms"], found["reverse_day_ms"]) > 0
    assert cli.main(["bench", "gradients", *arguments, "--gradient", "tangent"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimator"] == "tangent" and found["forward_day_ms"] > 0 and found["reverse_day_ms"] is None
    assert cli.main(["bench", "gradients", *arguments, "--gradient", "fd"]) == 2
    assert "alternates, tangent" in capsys.readouterr().err
