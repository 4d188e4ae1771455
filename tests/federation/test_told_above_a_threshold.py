"""Outputs of which a cell is told only if enough people of enough institutions stand behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from clients.audit import audit
from clients.shard import Shard
from lpm.cli import main
from lpm.errors import InputError
from lpm.leakage import read_leakage
from lpm.privacy.withheld import WITHHELD, tensor_of
from lpm.protocol.messages import Task
from lpm.scenario import Scenario, load
from lpm.worlds.world import Disclosure
from tests.e2e.processes import CLINICS, ROOT, ended
from tests.federation.harness import federate

PARTIES = ("north", "south", "west")
THETA = np.array([[0.5, 0.05, 0.6], [0.4, 0.02, 0.6]])


def scenario(**settings: str) -> Scenario:
    return load(CLINICS).with_options(
        agents=480, settings={name.replace("__", "."): value for name, value in settings.items()}
    )


class Watched(Shard):
    """Keeps what it is about to tell."""

    own: np.ndarray

    def _told(self, words: np.ndarray, world: Any) -> np.ndarray:
        self.own = words
        return super()._told(words, world)


def simulate(folder: Path, which: Scenario, rule: Disclosure) -> tuple[list[np.ndarray], np.ndarray]:
    """Each party's own outputs, and what the coordinator was told [days, outputs, draws]."""
    shards = [
        Watched(which, [p], seed=5, folder=folder / p, key=b"k" * 32, data=None, every=0, calibrates=False)
        for p in PARTIES
    ]
    task = Task("simulate", 3, THETA)
    work = [lambda world, each=each: each.perform(task, world, consents=False) for each in shards]
    _, hub = federate(work, disclosure=rule, thresholds=[tensor_of(name) for name in which.thresholds])
    told = next(total for round, total in hub.totals.items() if round.tensor == "outputs")
    return [each.own for each in shards], told.reshape(-1, 2, len(THETA))


@pytest.mark.parametrize(("days", "people"), [(1, 12), (7, 30)])
def test_the_coordinator_is_told_what_enough_stand_behind_and_of_the_rest_that_it_is_withheld(
    tmp_path: Path, days: int, people: int
) -> None:
    rule = Disclosure(people, institutions=3)
    which = scenario(federation__thresholds="cases", federation__resolution_days=str(days))
    own, told = simulate(tmp_path, which, rule)
    starts = np.arange(0, which.steps, days)
    totals = np.add.reduceat(np.sum(own, axis=0), starts, axis=0)
    assert (told[:, 1] == totals[:, 1]).all()  # not listed: as ever
    behind = np.maximum.reduceat(np.stack(own)[:, :, 0], starts, axis=1) >> 32
    enough = (behind.sum(axis=0) >= rule.people) & ((behind > 0).sum(axis=0) >= rule.institutions)
    assert enough.any() and not enough.all()
    assert (told[:, 0] == np.where(enough, totals[:, 0], WITHHELD)).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"federation.thresholds": "deaths"}, "no output of three_clinics: there are cases, infectious"),
        ({"federation.thresholds": "cases", "privacy.mode": "outputs"}, "exclude each other"),
    ],
)
def test_what_can_not_be_told_so_is_refused_with_the_reason(settings: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(CLINICS).with_options(settings=settings)


def test_an_output_that_weighs_people_has_no_threshold() -> None:
    city = load(ROOT / "simulations" / "nyc_boroughs")
    with pytest.raises(InputError, match="The output admissions weighs people by class"):
        city.with_options(agents=20_000, settings={"federation.thresholds": "admissions"}).build()


def test_an_engine_that_only_adds_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--simulate-only", "--sharing", "masked", "--set", "federation.thresholds=cases"]
    assert main(["federate", str(CLINICS), *asked, "--out", str(tmp_path / "run")]) == 2
    assert "--sharing crypten" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_of_processes_withholds_says_so_and_passes_the_audit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"federation.thresholds": "cases", "scenario.minimum_people": "12"}
    asked = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    command = ["federate", CLINICS, "--simulate-only", "--control", "streams", "--seed", "5", "--json"]
    done = ended([*command, *asked, "--out", run], run, tmp_path / "scratch")
    assert done.child.returncode == 0, done.said
    outputs = xr.open_dataset(run / "outputs.nc")
    missing = np.isnan(outputs["cases"])
    assert missing.any() and not missing.all() and not np.isnan(outputs["infectious"]).any()
    report = (run / "report.html").read_text()
    assert "Told above a threshold" in report and "coordinator as dealer" in report
    found = read_leakage(run / "parties" / "north" / "ledger.jsonl")
    (row,) = [each for each in found.seen if each.what == tensor_of("cases")]
    assert row.numbers == int((~missing).sum()) and "at least 12 agents" in row.of
    assert any("coordinator as dealer" in label for label in found.weaker)
    for name in ("north", "west"):
        assert not audit(run / "parties" / name, peers=[run / "parties" / "south" / "ledger.jsonl"]).problems
