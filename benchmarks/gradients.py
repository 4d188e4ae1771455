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
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from accuracy import distance, measure  # noqa: E402

import lpm  # noqa: E402
from lpm import console  # noqa: E402
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
    with console.progress(arguments.case, arguments.seeds) as advance:
        seeds = range(50_000, 50_000 + arguments.seeds)
        own, cost = measure(model, theta, arguments.estimator, case["days"], seeds, advance)
    reference, error = (np.array(case[name])[1:, columns] for name in ("gradient", "standard_error"))
    found = distance(own, reference, error)
    row: dict[str, object] = {
        "case": arguments.case,
        "label": case["label"],
        "estimator": arguments.estimator + (" (one layer)" if arguments.one_layer else ""),
        "seeds": arguments.seeds,
        "cost": round(cost, 1),
        "parameters": {},
    }
    by_parameter: dict[str, dict[str, float]] = {}
    for k, parameter in enumerate(model.parameters):
        if np.abs(reference[:, k]).sum() > 0:
            by_parameter[parameter.name] = {
                "relative_l1": round(float(found.relative_l1[k]), 4),
                "standard_error": round(float(found.own_error[k]), 4),
                "reference_error": round(float(found.reference_error[k]), 4),
                "sd_of_a_run": round(float(found.sd[k]), 3),
                "wrong_signs": int(found.wrong_signs[k]),
            }
    row["parameters"] = by_parameter
    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
    kept = [each for each in kept if (each["case"], each["estimator"]) != (row["case"], row["estimator"])]
    FIGURES.write_text(json.dumps([*kept, row], indent=1) + "\n")
    console.note(json.dumps(row))


if __name__ == "__main__":
    main()
