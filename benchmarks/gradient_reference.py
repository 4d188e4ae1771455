"""The reference gradient of the dense random graph: central differences with common random numbers over many seeds.

    python benchmarks/gradient_reference.py [--seeds 4500]

Writes tests/known/random_graph_gradient.json: the mean over seeds of ∂(cumulative infections)/∂θ by day, its standard
error, and the settings. The graph, the people and the disease are those of tests/models.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lpm import console  # noqa: E402
from lpm.estimators import evaluate  # noqa: E402
from tests import models  # noqa: E402

AGENTS, DEGREE, GRAPH_SEED, DAYS, STEP = 5000, 40, 1, 60, 0.02
THETA = {"beta_city": 0.0075, "gamma": 0.1}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4500)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "known" / "random_graph_gradient.json")
    arguments = parser.parse_args()
    model = models.random_graph(AGENTS, DEGREE, GRAPH_SEED)
    names = [parameter.name for parameter in model.parameters]
    theta = np.array([[THETA[name] for name in names]])
    total = np.zeros((DAYS, len(names)))
    squares = np.zeros_like(total)
    attack = 0.0
    with console.progress("Central differences", arguments.seeds) as advance:
        for seed in range(arguments.seeds):
            result = evaluate(model, theta, estimator="fd", steps=DAYS, seed=1_000_000 + seed, step=STEP)
            assert result.derivative is not None
            gradient = np.cumsum(result.derivative[:, 0, 0], axis=0)
            total += gradient
            squares += gradient**2
            attack += result.outputs[:, 0, 0].sum() / AGENTS / arguments.seeds
            advance()
    mean = total / arguments.seeds
    error = np.sqrt((squares / arguments.seeds - mean**2) / (arguments.seeds - 1))
    relative = np.abs(error).sum(0) / np.abs(mean).sum(0)
    arguments.out.write_text(
        json.dumps(
            {
                "what": "d(expected cumulative infections after each day)/d(parameter): mean over seeds of central "
                "differences with common random numbers; own computation",
                "agents": AGENTS,
                "mean_degree": DEGREE,
                "graph_seed": GRAPH_SEED,
                "days": DAYS,
                "step": STEP,
                "theta": THETA,
                "parameters": names,
                "seeds": arguments.seeds,
                "attack_rate": attack,
                "relative_standard_error": relative.tolist(),
                "gradient": np.round(mean, 3).tolist(),
                "standard_error": np.round(error, 3).tolist(),
            }
        )
        + "\n"
    )
    console.note(f"relative standard error {relative}")


if __name__ == "__main__":
    main()
