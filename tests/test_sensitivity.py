"""All sensitivities of one run: against exact answers, against finite differences by hand, and as files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lpm
from lpm import cli, console
from lpm.analysis.audit import Audit
from lpm.analysis.sensitivity import elasticity_of
from lpm.errors import InputError
from lpm.runs import Run
from tests import models
from tests.test_gradients import _households
from tests.test_three_clinics import FOLDER

HALF = -np.log(0.5)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_household_of_two_has_its_exact_elasticity():
    # One infectious and one susceptible: E[new] = p = 1 − e^(−h), so d/dh = 1 − p and the elasticity is h (1 − p)/p.
    found = lpm.sensitivity(_households(2, 4000), {"hazard": HALF}, steps=2, gradient="tangent", replicates=3)
    row = found.targets.set_index("target").loc["new:total"]
    assert row["derivative"] == pytest.approx(4000 * 0.5, rel=1e-9)  # the tangent is exact for one generation
    assert row["derivative_se"] == pytest.approx(0.0, abs=1e-6)
    # The number of infected is binomial: 3 runs of 4,000 households scatter by .9 %.
    assert row["elasticity"] == pytest.approx(HALF, rel=0.04)
    assert 0 < row["elasticity_se"] < 0.05
    assert found.derivative is not None and found.derivative["new"].dims == ("time", "parameter")
    assert found.elasticity is not None and found.standard_error is not None
    # Nobody is infected on the second day, and nothing changes that: the elasticity of 0 is 0 by rule.
    assert found.outputs["new"].to_numpy()[1] == 0 and found.elasticity["new"].to_numpy()[1, 0] == 0


def test_finite_differences_by_hand_give_the_same_sensitivities():
    model = models.town(300)
    found = lpm.sensitivity(model, models.THETA, steps=12, seed=3, gradient="fd", step=0.05, targets="admissions:peak")
    up, down = ({**models.THETA, "gamma": models.THETA["gamma"] * factor} for factor in (1.05, 0.95))
    runs = [lpm.simulate(model, values, steps=12, seed=3).outputs for values in (up, down)]
    slope = (runs[0] - runs[1]) / (0.1 * models.THETA["gamma"])
    assert found.derivative is not None and found.elasticity is not None
    for name in ("infections", "admissions", "ill"):
        by_gamma = found.derivative[name].sel(parameter="gamma")
        np.testing.assert_allclose(by_gamma, slope[name], atol=1e-9)
        outputs = found.outputs[name].to_numpy()
        elasticity = found.elasticity[name].sel(parameter="gamma").to_numpy()
        some = outputs != 0
        np.testing.assert_allclose(
            elasticity[some], models.THETA["gamma"] * slope[name].to_numpy()[some] / outputs[some]
        )
    day = int(np.argmax(found.outputs["admissions"].to_numpy()))
    peak = found.targets.set_index(["target", "parameter"]).loc[("admissions:peak", "gamma")]
    assert peak["derivative"] == pytest.approx(float(slope["admissions"][day]))
    plain = lpm.simulate(model, models.THETA, steps=12, seed=3)
    assert all(found.outputs[name].equals(plain.outputs[name]) for name in plain.outputs)


def test_one_pass_back_gives_the_targets_of_the_pass_forward():
    model = models.town(120)
    settings = {"steps": 8, "seed": 2, "gradient": "tangent", "targets": ["infections", "admissions:total"]}
    forward = lpm.sensitivity(model, models.THETA, **settings)
    back = lpm.sensitivity(model, models.THETA, mode="reverse", **settings)
    np.testing.assert_allclose(back.targets["derivative"], forward.targets["derivative"], rtol=1e-8)
    assert list(back.targets["target"].unique()) == ["infections:total", "infections:peak", "admissions:total"]
    assert back.derivative is None and len(back.ranking) == 3 * len(model.parameters)


def test_the_ranking_weighs_days_by_what_happens_on_them():
    found = lpm.sensitivity(models.town(3000), models.THETA, steps=10, seed=1, gradient="fd", step=0.1)
    assert found.derivative is not None
    for name in ("infections", "admissions"):
        table = found.ranking[found.ranking["output"] == name]
        assert list(table["rank"]) == [1, 2, 3, 4] and table["importance"].is_monotonic_decreasing
        assert table["share"].sum() == pytest.approx(1.0)
        values = np.array([found.theta[parameter] for parameter in table["parameter"]])
        change = np.abs(found.derivative[name].sel(parameter=list(table["parameter"])).to_numpy() * values).sum(0)
        np.testing.assert_allclose(table["importance"], change / np.abs(found.outputs[name].to_numpy()).sum())


def test_an_elasticity_at_zero_has_a_rule():
    found = elasticity_of(np.array([[2.0, 0.0], [2.0, 0.0]]), np.array([4.0, 0.0]), np.array([1.0, 1.0]))
    np.testing.assert_array_equal(found, [[0.5, 0.0], [np.nan, 0.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": "none"}, "needs derivatives"),
        ({"targets": ["deaths"]}, "'deaths' is none of this model"),
        ({"targets": "deaths"}, "'deaths' is none of this model"),
        ({"targets": ["infections:mean"]}, "OUTPUT:total or OUTPUT:peak"),
        ({"gradient": "fd", "mode": "reverse"}, "fd has no reverse mode"),
        ({"replicates": 0}, "replicates is 0"),
        ({"steps": None}, "steps is missing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_work(change, message):
    with pytest.raises(InputError, match=message):
        lpm.sensitivity(models.town(60), models.THETA, **{"steps": 3, **change})


def test_the_command_leaves_a_run_and_resumes_to_the_same_bits(capsys, monkeypatch):
    asked = [
        "sensitivity",
        str(FOLDER),
        "--steps",
        "8",
        "--gradient",
        "fd",
        "--replicates",
        "2",
        "--seed",
        "4",
        "--json",
    ]
    assert cli.main([*asked, "--out", "whole"]) == 0
    summary = json.loads(capsys.readouterr().out)
    for file in ("run.json", "sensitivity.nc", "targets.csv", "ranking.csv", "figures/elasticities.png", "report.html"):
        assert Path("whole", file).is_file(), file
    assert summary["gradient"] == "fd" and summary["ranking"][0]["rank"] == 1
    console.summary(summary)
    assert "% for 1 % of" in (said := capsys.readouterr().out) and " ± " in said
    with xr.open_dataset("whole/sensitivity.nc", engine="h5netcdf") as dataset:
        assert {"cases", "d_cases", "elasticity_cases", "se_cases"} <= set(dataset.data_vars)

    seen = []

    def stop(description: str, total: int, start: int = 0):
        import contextlib

        @contextlib.contextmanager
        def bar():
            def advance(note: str = "") -> None:
                seen.append(start)
                if len(seen) == 13:
                    raise KeyboardInterrupt

            yield advance

        return bar()

    with monkeypatch.context() as patch:
        patch.setattr("lpm.console.progress", stop)
        assert cli.main([*asked, "--checkpoint-every", "3", "--out", "cut"]) == 3
    assert cli.main(["resume", "cut", "--json"]) == 0
    assert Run.open(Path("cut")).status == "done"
    for table in ("targets.csv", "ranking.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(f"cut/{table}"), pd.read_csv(f"whole/{table}"), check_exact=True)


def test_the_audit_command_leaves_its_table_figure_and_recommendation(capsys):
    asked = ["audit", str(FOLDER), "--steps", "6", "--seeds", "4", "--estimators", "tangent,st-gumbel", "--json"]
    assert cli.main([*asked, "--out", "audit"]) == 0
    summary = json.loads(capsys.readouterr().out)
    table = pd.read_csv("audit/audit.csv").set_index("estimator")
    assert list(table.index) == ["fd", "tangent", "st-gumbel"]
    assert table["chosen"].sum() == 1 and table.loc[summary["chosen"], "chosen"]
    assert table.loc["st-gumbel", "label"] == "st-gumbel (biased)"
    assert (table["cost"] > 0).all() and Path("audit/figures/audit.png").is_file()
    console.summary(summary)
    assert "wrong signs" in (said := capsys.readouterr().out) and "st-gumbel" in said
    assert cli.main(["audit", str(FOLDER), "--estimators", "magic", "--json"]) == 2
    assert "no estimator 'magic'" in json.loads(capsys.readouterr().out)["error"]


def test_an_audit_that_was_stopped_begins_again(capsys, monkeypatch):
    asked = ["audit", str(FOLDER), "--steps", "4", "--seeds", "3", "--estimators", "tangent"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lpm.analysis.audit.audit_gradients", stop)
        assert cli.main([*asked, "--out", "stopped"]) == 3
    assert "lpm resume" in capsys.readouterr().err
    assert cli.main(["resume", "stopped"]) == 0
    assert list(pd.read_csv("stopped/audit.csv")["estimator"]) == ["fd", "tangent"]
    capsys.readouterr()
    assert cli.main(["resume", "stopped"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_way_back_that_no_true_estimator_has_is_refused_and_not_recorded(capsys, monkeypatch):
    def choose_fd(model, theta, gradient, **_):
        return "fd", Audit("fd", "nothing else is true", (), 3)

    asked = ["sensitivity", str(FOLDER), "--steps", "4", "--mode", "reverse"]
    monkeypatch.setattr("lpm.analysis.audit.resolve_estimator", choose_fd)
    assert cli.main([*asked, "--out", "back"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "No estimator with a reverse mode was shown to be true here (nothing else is true)" in said
    assert "gradient" not in Run.open(Path("back")).record()
    assert cli.main([*asked, "--gradient", "fd", "--out", "never"]) == 2
    assert "fd has no reverse mode" in capsys.readouterr().err and not Path("never").exists()
