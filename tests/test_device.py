"""The executors of torch devices keep the contract of the others: the same integers to the bit.

Tensor operations run on the CPU device everywhere; on a machine with a GPU they and the Triton kernels run there too.
Without one, the kernels run in Triton's interpreter where `TRITON_INTERPRET=1` is set and triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpm
from lpm import cli
from lpm.errors import InputError
from lpm.kernels import device
from lpm.kernels.device import find_device, philox_words
from lpm.rng import Address, Ids
from lpm.scenario import load
from lpm.simulation import Keeper, run
from tests import models
from tests.e2e.processes import CITY, CLINICS

_INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    "torch:cpu",
    *(["torch:cuda", "triton:cuda"] if torch.cuda.is_available() else []),
    *(["triton:cpu"] if _INTERPRETED else []),
]
"""Executors of devices that this machine offers."""


@pytest.fixture(params=[1 << 18, 150], ids=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many agents and lanes are handled at once changes nothing."""
    monkeypatch.setattr(device, "_HOST_CHUNK", request.param)
    monkeypatch.setattr(device, "_DEVICE_CHUNK", request.param)


@pytest.mark.parametrize(
    "ids",
    [
        Ids.consecutive(23),
        Ids.consecutive(21, first=2**32 - 7),
        Ids.consecutive(9, first=2**64 - 10),
        Ids.of(np.array([5, 2, 2**63 + 3, 2**64 - 1, 2**40, 0], dtype=np.uint64)),
    ],
)
def test_random_words_are_those_of_every_executor(ids: Ids) -> None:
    address = Address(2**64 - 3, 17, 40_000, ids)
    expected = address.words()[0].astype(np.int64)
    cpu = torch.device("cpu")
    assert np.array_equal(philox_words(address, slice(0, ids.count), cpu).numpy(), expected)
    assert np.array_equal(philox_words(address, slice(3, ids.count - 1), cpu).numpy(), expected[3:-1])


def outside() -> lpm.Model:
    """Edges, people in no group, mixing in a local network, a relative susceptibility, named first cases."""
    rng = np.random.default_rng(2)
    networks = [
        lpm.Edges("web", [(k, (7 * k + 3) % 300) for k in range(300) if (7 * k + 3) % 300 != k]),
        lpm.Groups("team", of=np.where(rng.random(300) < 0.5, -1, rng.integers(0, 40, 300))),
        lpm.Groups("area", of=np.repeat([0, 1, 2], 100), mixing=0.1 + np.eye(3)),
    ]
    sir = lpm.Contagion(
        "S V I R",
        {"S -> I": 1.0, "V -> I": 0.3},
        {"I": 1.0},
        over={"web": 0.2, "team": models.BETA_CITY, "area": 0.3},
        progression={"I -> R": 0.2},
        initial={"I": np.arange(10), "V": 0.4},
    )
    return lpm.Model(
        lpm.Population(300), networks, [sir], outputs={"infections": lpm.flow("S -> I"), "V": lpm.count("V")}
    )


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("executor", DEVICES)
@pytest.mark.parametrize("which", ["town", "reordered", "outside", "clinics"])
def test_a_device_executor_gives_the_bits_of_the_others(which: str, executor: str) -> None:
    order = np.random.default_rng(5).permutation(600)
    model = {
        "town": models.town,
        "reordered": lambda: models.town(order=order),
        "outside": outside,
        "clinics": lambda: load(CLINICS).build(),
    }[which]()
    rows = [{**models.THETA, "transmissibility": 0.5, "beta_city": beta} for beta in (0.3, 0.9)]
    theta = np.array([[row[parameter.name] for parameter in model.parameters] for row in rows])
    found = run(model, theta, steps=15, seed=3, executor=executor)
    assert found.executor.startswith(executor)
    assert np.array_equal(found.words, run(model, theta, steps=15, seed=3, executor="reference").words)
    assert np.array_equal(found.words, run(model, theta, steps=15, seed=3, executor="cpu").words)
    assert found.words.any()


@pytest.mark.parametrize("executor", DEVICES)
def test_a_run_goes_on_from_another_executors_checkpoint(executor: str) -> None:
    model, states = models.town(200), []
    theta = np.array([[models.THETA[parameter.name] for parameter in model.parameters]])
    asked: dict[str, Any] = {"steps": 10, "seed": 3}
    whole = run(model, theta, executor=executor, keeper=Keeper(6, states.append), **asked)
    again = run(model, theta, executor="cpu", keeper=Keeper(6, states.append, states[0]), **asked)
    back = run(model, theta, executor=executor, keeper=Keeper(found=states[0]), **asked)
    assert np.array_equal(again.words, whole.words) and np.array_equal(back.words, whole.words)


def test_fd_on_a_device_is_fd() -> None:
    model = models.town(200)
    found = [
        lpm.simulate(model, models.THETA, steps=8, seed=3, gradient="fd", executor=executor).gradient
        for executor in ("cpu", *DEVICES)
    ]
    assert found[0] is not None and all(found[0].equals(other) for other in found[1:])
    assert any(bool((found[0][name] != 0).any()) for name in found[0])


def test_the_city_runs_on_a_device_and_the_run_says_which(tmp_path: Path) -> None:
    asked = ["simulate", str(CITY), "--agents", "2000", "--steps", "8", "--seed", "4"]
    assert cli.main([*asked, "--out", str(tmp_path / "a"), "--device", "cpu"]) == 0
    assert cli.main([*asked, "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "words.npy").read_bytes() == (tmp_path / "b" / "words.npy").read_bytes()
    record = lpm_record(tmp_path / "a")
    assert (record["executor"], record["device"]) == ("torch:cpu", "cpu")


def lpm_record(path: Path) -> dict[str, Any]:
    from lpm.runs import Run

    return Run.open(path).record()


@pytest.mark.parametrize(
    ("name", "gpus", "words"),
    [
        ("tpu", 0, "The device is 'tpu'"),
        ("cuda:x", 1, "cuda:N"),
        ("cuda", 0, "cuda is absent: torch .* finds no GPU"),
        ("cuda:2", 2, "cuda:2 is absent: this machine has 2 GPUs"),
    ],
)
def test_a_device_that_is_absent_is_refused(
    name: str, gpus: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=words):
        find_device(name)
    # Before a run is begun, whose folder would be left behind.
    assert cli.main(["simulate", str(CLINICS), "--device", name, "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for variable, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InputError, match="at most 2 ranks"):
        find_device("cuda")


def test_tangents_on_a_device_are_refused() -> None:
    model = models.town(60)
    theta = np.array([[models.THETA[parameter.name] for parameter in model.parameters]])
    with pytest.raises(InputError, match="device executor runs neither tangents"):
        run(model, theta, steps=2, seed=1, derivative="forward", executor="device:cpu")


def test_derivatives_and_posteriors_on_a_device_are_those_of_fd(tmp_path: Path) -> None:
    asked = {
        "sensitivity": (["--steps", "6"], "targets.csv"),
        "calibrate": (["--steps", "20", "--iterations", "1"], "posterior.parquet"),
    }
    for command, (more, file) in asked.items():
        shared = [command, str(CLINICS), "--agents", "600", "--seed", "2", *more]
        for name, where in (("device", ["--device", "cpu"]), ("plain", ["--gradient", "fd"])):
            assert cli.main([*shared, *where, "--out", str(tmp_path / command / name)]) == 0
        found = [(tmp_path / command / name / file).read_bytes() for name in ("device", "plain")]
        assert found[0] == found[1], command
        record = lpm_record(tmp_path / command / "device")
        assert (record["executor"], record["device"]) == ("torch:cpu", "cpu")
        assert lpm_record(tmp_path / command / "plain")["executor"] == "cpu"


def test_an_estimator_that_does_not_run_on_a_device_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["calibrate", str(CLINICS), "--device", "cpu", "--gradient", "tangent", "--out", str(tmp_path / "run")]
    assert cli.main(asked) == 2
    assert "`--gradient` is tangent, which does not run on a device." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
