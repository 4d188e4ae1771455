"""How true the estimators are: relative L1 distance of mean gradients from published references, noise and cost.

    python benchmarks/gradients.py homecity [--seeds 60] [--one-layer] [--estimator alternates]

Needs the folder of known answers (LPM_VECTORS, or ../shared/vectors beside the checkout): populations of 20,000 people
in households, workplaces and one city, daily SIR, and gradients of cumulative infections by central differences. Adds
its row to benchmarks/figures/gradients.json. The cost is process time
relative to plain runs, mixed with them one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lpm  # noqa: E402
from lpm import console  # noqa: E402
from lpm.estimators import evaluate  # noqa: E402
from tests.test_gradients import _published  # noqa: E402

FIGURES = ROOT / "benchmarks" / "figures" / "gradients.json"


def main() -> None:
    """Run one case with one estimator and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--estimator", default="alternates")
    parser.add_argument("--one-layer", action="store_true", help="workplaces as linear sums")
    arguments = parser.parse_args()
    vectors = Path(os.environ.get("LPM_VECTORS", ROOT.parent / "shared" / "vectors")) / "gradients"
    known = json.loads((vectors / "cases.json").read_text())
    case = next(case for case in known["cases"] if case["name"] == arguments.case)
    model = _published(vectors / case["population"], known["parameters"])
    if arguments.one_layer:
        linear = [lpm.Groups(n.name, of=n.of, layer=False) if n.name == "workplace" else n for n in model.networks]
        model = lpm.Model(model.population, linear, model.protocols, outputs=model.outputs)
    columns = [known["parameters"].index(parameter.name) for parameter in model.parameters]
    theta = np.array([[case["theta"][column] for column in columns]])
    took = {"none": 0.0, arguments.estimator: 0.0}
    rows = []
    for estimator in took:
        evaluate(model, theta, estimator=estimator, steps=2, seed=0)  # compiles
    with console.progress(arguments.case, arguments.seeds) as advance:
        for seed in range(arguments.seeds):
            for estimator in took:
                began = time.process_time()
                result = evaluate(model, theta, estimator=estimator, steps=case["days"], seed=50_000 + seed)
                took[estimator] += time.process_time() - began
            assert result.derivative is not None
            rows.append(np.cumsum(result.derivative[:, 0, 0], axis=0))
            advance()
    own, reference = np.array(rows), np.array(case["gradient"])[1:, columns]
    size, error = np.abs(reference).sum(0), own.std(0, ddof=1) / np.sqrt(len(own))
    spread = np.hypot(error, np.array(case["standard_error"])[1:, columns])
    clear = np.abs(reference) > 5 * spread
    row: dict[str, object] = {
        "case": arguments.case,
        "label": case["label"],
        "estimator": arguments.estimator + (" (one layer)" if arguments.one_layer else ""),
        "seeds": arguments.seeds,
        "cost": round(took[arguments.estimator] / took["none"], 1),
        "parameters": {},
    }
    by_parameter: dict[str, dict[str, float]] = {}
    for k, parameter in enumerate(model.parameters):
        if size[k] > 0:
            by_parameter[parameter.name] = {
                "relative_l1": round(float(np.abs(own.mean(0) - reference)[:, k].sum() / size[k]), 4),
                "standard_error": round(float(error[:, k].sum() / size[k]), 4),
                "reference_error": round(float(np.array(case["standard_error"])[1:, columns[k]].sum() / size[k]), 4),
                "sd_of_a_run": round(float(own.std(0, ddof=1)[:, k].sum() / size[k]), 3),
                "wrong_signs": int((np.sign(own.mean(0)) != np.sign(reference))[clear[:, k], k].sum()),
            }
    row["parameters"] = by_parameter
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
    found = [each for each in found if (each["case"], each["estimator"]) != (row["case"], row["estimator"])]
    FIGURES.write_text(json.dumps([*found, row], indent=1) + "\n")
    console.note(json.dumps(row))


if __name__ == "__main__":
    main()
