"""New York's key figures stand in a committed baseline, the same from the fused executor and the plain one."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lpm import memory
from lpm import scenario as scenarios
from lpm.cli import main
from lpm.errors import InputError
from lpm.estimators import evaluate
from lpm.simulation import run
from tests import models

ROOT = Path(__file__).parent.parent
BASELINE = json.loads((ROOT / "tests" / "known" / "nyc_boroughs_baseline.json").read_text())


def test_new_york_gives_the_figures_of_the_baseline():
    world = scenarios.load(ROOT / "simulations" / "nyc_boroughs").with_options(agents=BASELINE["agents"])
    model = world.build(seed=BASELINE["seed"])
    theta = np.array([[world.defaults[parameter.name] for parameter in model.parameters]])
    fused = run(model, theta, steps=BASELINE["steps"], seed=BASELINE["seed"])
    assert fused.executor == "cpu"
    found = {
        name: {"sum": int(words.sum()), "peak_day": int(words.argmax())}
        for name, words in zip(model.recorded, fused.words[..., 0].T, strict=True)
    }
    assert found == BASELINE["outputs"]
    assert hashlib.sha256(fused.words.astype("<i8").tobytes()).hexdigest() == BASELINE["sha256"]
    short = run(model, theta, steps=10, seed=BASELINE["seed"], executor="reference").words
    assert np.array_equal(short, fused.words[:10])


def test_more_agents_than_memory_are_refused_before_work(capsys, monkeypatch, tmp_path):
    out = tmp_path / "run"
    city = str(ROOT / "simulations" / "nyc_boroughs")
    assert main(["simulate", city, "--agents", "10000000000", "--out", str(out)]) == 2
    assert not out.exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "10,000,000,000 agents need at least 372.5 GiB" in said and "GiB are available" in said
    assert "--agents" in said
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 4000}))
    memory.require_memory(100)
    with pytest.raises(InputError, match="101 agents"):
        memory.require_memory(101)
    memory.require_memory(200, share=0.5)


def test_alternatives_that_do_not_fit_are_refused_before_work(monkeypatch):
    model = models.random_graph(100, 4, 1)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 24_000}))
    asked = {"estimator": "alternates", "steps": 1, "seed": 1, "cotangent": np.ones_like}
    evaluate(model, np.array([[0.1, 0.2]] * 2), mode="forward", **asked)
    with pytest.raises(InputError, match=r"100 agents .* for the gradient alternates \(280 bytes each\)"):
        evaluate(model, np.array([[0.1, 0.2]]), mode="reverse", **asked)
