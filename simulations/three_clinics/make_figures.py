"""Write the synthetic series of the three clinics: one simulation at a known truth, and reports drawn from it.

python simulations/three_clinics/make_figures.py
"""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path

import numpy as np

import lpm
from lpm import scenario as scenarios

TRUTH = {"transmissibility": 0.55, "initial": 0.04, "reporting": 0.65}
"""The parameters that the series were made with."""

SEED = 20200106
"""Of the people, the epidemic and the reports that the series were made with."""

DAYS = 28
"""Length of the series."""


def make(folder: Path, out: Path) -> None:
    """Write the series.

    Args:
        folder: of the scenario.
        out: folder of the tables.
    """
    world = scenarios.load(folder)
    model = world.build(seed=SEED)
    run = lpm.simulate(model, {name: TRUTH[name] for name in world.dynamics}, steps=DAYS, seed=SEED)
    random = np.random.Generator(np.random.Philox(SEED))
    for name in world.institutions:
        cases = random.binomial(np.asarray(run.outputs[f"cases/{name}"]).astype(np.int64), TRUTH["reporting"])
        lines = [
            f"# SYNTHETIC: cases reported to the clinic {name}, by day. Unit: people per day.",
            f"# Source: simulations/three_clinics/make_figures.py, seed {SEED}, at "
            + ", ".join(f"{key} = {value:g}" for key, value in TRUTH.items())
            + ".",
            "date,cases",
        ]
        lines += [f"{world.start + dt.timedelta(days=t)},{count}" for t, count in enumerate(cases.tolist())]
        (out / f"observed_{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    (here / "figures").mkdir(exist_ok=True)
    make(here, here / "figures")
    sys.exit(0)
