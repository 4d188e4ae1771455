"""Noise in force: what the coordinator opens is the clipped sum and the parties' noise, and the books agree."""

from __future__ import annotations

import shutil
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from scipy.stats import chi2

from clients.config import ClientConfig
from clients.shard import Shard
from clients.steward import Steward
from lpm import ring
from lpm.errors import PolicyRefused
from lpm.privacy.ledger import verify
from lpm.privacy.policy import PERMISSIVE
from lpm.protocol.identity import load_identity, make_local_authority
from lpm.protocol.messages import Task
from lpm.scenario import Scenario, load
from tests.e2e.processes import CLINICS
from tests.federation.harness import federate

PARTIES = ("north", "south", "west")
THETA = np.array([[0.5, 0.05, 0.6], [0.4, 0.05, 0.6]])
ASKED = {"privacy.mode": "outputs+gradients", "privacy.noise": "6", "privacy.clip_gradient": "1e5"}


def scenario(steps: int = 6, **changes: str) -> Scenario:
    settings = ASKED | {name.replace("__", "."): value for name, value in changes.items()}
    return load(CLINICS).with_options(steps=steps, agents=240, settings=settings)


def opened(folder: Path, which: Scenario, task: Task, key: bytes = b"k" * 32) -> dict[str, np.ndarray]:
    """What the coordinator opens of one task."""
    shards = [
        Shard(which, [p], seed=5, folder=folder / p, key=key, data=None, every=0, calibrates=True) for p in PARTIES
    ]
    work = [lambda world, each=each: each.perform(task, world, consents=False) for each in shards]
    _, hub = federate(work)
    return {round.tensor: total for round, total in hub.totals.items()}


def _require_normal(drawn: np.ndarray) -> None:
    """Mean 0 and variance 1, at a false-alarm rate of 2e-6."""
    assert chi2.ppf(5e-7, drawn.size) < (drawn**2).sum() < chi2.ppf(1 - 5e-7, drawn.size)
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)


def test_each_opened_sum_has_noise_of_the_agreed_width_and_the_same_for_the_same_answer(tmp_path: Path) -> None:
    task = Task("evaluate", 3, THETA, "fd", None, {"replicates": 1})
    exact = opened(tmp_path / "exact", scenario(privacy__mode="none"), task)
    gradient = ring.decode(exact["gradient"]).reshape(2, 3) * scenario().units
    noise = {"loss": [], "gradient": []}
    for k in range(5):
        found = opened(tmp_path / str(k), scenario(), task, key=bytes([k]) * 32)
        noise["loss"].append(ring.decode(found["loss"] - exact["loss"]))
        noise["gradient"].append((ring.decode(found["gradient"]).reshape(2, 3) - gradient).reshape(-1))
    for name, clip in {"loss": 1000.0, "gradient": 1e5}.items():
        # Three parties of whom any two are enough: √(3/2) times what is counted on.
        width = 6 * 2 * clip * np.sqrt(2) * np.sqrt(3 / 2)
        drawn = np.concatenate(noise[name]) / width
        _require_normal(drawn)
    # A party that forgot that it had answered adds the same noise again: nothing can be averaged out.
    for p in PARTIES:
        shutil.rmtree(tmp_path / "0" / p)
    again = opened(tmp_path / "0", scenario(), task, key=bytes([0]) * 32)
    once = opened(tmp_path / "new", scenario(), task, key=bytes([0]) * 32)
    for name in ("loss", "gradient"):
        np.testing.assert_array_equal(again[name], once[name])


def test_outputs_have_noise_and_scores_are_withheld(tmp_path: Path) -> None:
    simulate = Task("simulate", 1, THETA, options={"plain": True})
    exact = opened(tmp_path / "exact", scenario(privacy__mode="none"), simulate)["outputs"]
    found = opened(tmp_path / "noisy", scenario(privacy__mode="outputs", privacy__clip_outputs="1e5"), simulate)
    drawn = ring.decode(found["outputs"] - exact) / (6 * 2 * 1e5 * np.sqrt(2) * np.sqrt(3 / 2))
    assert drawn.size == 24
    _require_normal(drawn)
    assert not opened(tmp_path / "score", scenario(18), Task("predict", 2, THETA))["score"].any()


def test_the_budget_of_epsilon_holds_over_restarts_and_the_ledger_says_what_the_library_says(tmp_path: Path) -> None:
    make_local_authority(tmp_path / "keys", PARTIES)
    (tmp_path / "policy.toml").write_text(
        PERMISSIVE + '\n[privacy]\nmode = "outputs+gradients"\nepsilon = 4.5\ndelta = 1e-5\n'
    )
    config = ClientConfig(
        scenario=CLINICS, party="north", keys=tmp_path / "keys", out=tmp_path, policy=tmp_path / "policy.toml"
    )
    config.folder.mkdir(parents=True)
    world = federate([lambda world: world] * 3)[0][0]
    identity, which = load_identity(tmp_path / "keys" / "parties" / "north"), scenario()
    answered = 0
    with pytest.raises(PolicyRefused, match=r"\[privacy\] epsilon = 4\.5"):
        for k in range(40):
            rules = Steward(config, identity, which)  # a restart for every question
            rules.admit(Task("evaluate", k, THETA, "fd"), world, f"question {k}")
            answered += 1
    event = dp_accounting.GaussianDpEvent(6.0)
    counts = (2 * answered, 2 * answered + 2)
    costs = [dp_accounting.rdp.RdpAccountant().compose(event, count).get_epsilon(1e-5) for count in counts]
    assert costs[0] <= 4.5 < costs[1]
    lines = [entry for entry in verify(config.folder / "ledger.jsonl").entries if entry.kind == "task"]
    assert lines[-1].body["epsilon"] == costs[0]
    # The same question again costs nothing, spent budget or not.
    Steward(config, identity, which).admit(Task("evaluate", 0, THETA, "fd"), world, "question 0")
