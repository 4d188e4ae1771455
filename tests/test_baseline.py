"""New York's key figures stand in a committed baseline, the same from the fused executor and the plain one."""

import hashlib
import json
from pathlib import Path

import numpy as np

from lpm import scenario as scenarios
from lpm.simulation import run

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
