"""The GPU beside the CPU of the same machine: the same bits, the time of a day, memory, the command line, NCCL.

    python benchmarks/cuda.py --device cuda --out cuda.json
    python benchmarks/cuda.py --device cpu --agents 200000 --large 0 --days 10      (to try the script itself)

Each part stands alone, and what one finds is written at once: a failure in one is recorded under its name and loses
none of the others. `days` measures W (`lpm bench W`) by the executor for CPUs on all cores, by tensor operations on the
device, and by Triton kernels there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
CITY = str(ROOT / "simulations" / "nyc_boroughs")


def executors(device: str) -> list[str]:
    """What can run on the device: tensor operations, and Triton kernels where it is a GPU."""
    return [f"torch:{device}", *([f"triton:{device}"] if device != "cpu" else [])]


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What this was measured on, and how fast the device copies (bytes read and written)."""
    found: dict[str, Any] = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    if options.device != "cpu":
        import triton

        about = torch.cuda.get_device_properties(options.device)
        found |= {"gpu": about.name, "gpu_gib": round(about.total_memory / 2**30, 1), "triton": triton.__version__}
        source = torch.randint(0, 100, (1 << 30,), dtype=torch.int32, device=options.device)
        target = torch.empty_like(source)
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found["copy_gb_per_s"] = round(2 * source.nbytes / statistics.median(times) / 1e9)
    return found


def contract(options: argparse.Namespace) -> dict[str, Any]:
    """The tests of the executors' contract, of which each that the machine offers is run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_executors.py",
        "tests/test_device.py",
        "-o",
        "filterwarnings=",
    ]
    done = subprocess.run([*command, "-rs", "--tb=short"], cwd=ROOT, capture_output=True, text=True, timeout=180)
    return {"rc": done.returncode, "end": done.stdout[-3000:], "errors": done.stderr[-500:]}


def _run(model: Any, theta: np.ndarray, executor: str, days: int, **more: Any) -> tuple[Any, list[float]]:
    from lpm.bench.workload import day_timer
    from lpm.simulation import run

    mark, measured = day_timer()
    found = run(model, theta, steps=days, seed=5, executor=executor, progress=mark, **more)
    return found, measured()


def bits(options: argparse.Namespace) -> dict[str, Any]:
    """Whole trajectories to the bit: W and New York, one parameter vector and nine, and across a checkpoint."""
    from lpm.bench.workload import default_values, workload
    from lpm.scenario import load
    from lpm.simulation import Keeper

    scenario = load(CITY).with_options(agents=options.small)
    city = scenario.build()
    at = np.array([[scenario.defaults[parameter.name] for parameter in city.parameters]])
    people = workload(options.small, parameters=4)
    cases = {
        "W": (people, default_values(4), 60),
        "W, 9 vectors": (people, default_values(4) * np.linspace(0.6, 1.4, 9)[:, None], 20),
        "nyc_boroughs": (city, at, 60),
        "nyc_boroughs, 9 vectors": (city, np.repeat(at, 9, axis=0) * np.linspace(0.9, 1.1, 9)[:, None], 10),
    }
    found: dict[str, Any] = {}
    for name, (model, theta, days) in cases.items():
        expected = _run(model, theta, "cpu", days)[0].words
        found[name] = {"agents": options.small, "days": days, "sum": int(expected.sum() >> 32)}
        for executor in executors(options.device):
            found[name][executor] = bool(np.array_equal(_run(model, theta, executor, days)[0].words, expected))
    states: list[Any] = []
    whole = _run(city, at, "cpu", 20, keeper=Keeper(8, states.append))[0].words
    for executor in executors(options.device):
        onward: list[Any] = []
        again = _run(city, at, executor, 20, keeper=Keeper(16, onward.append, states[0]))[0].words
        back = _run(city, at, "cpu", 20, keeper=Keeper(found=onward[0]))[0].words
        found[f"checkpoint, {executor}"] = bool(np.array_equal(again, whole) and np.array_equal(back, whole))
    return found


def gradients(options: argparse.Namespace) -> dict[str, Any]:
    """`fd` on the device against `fd` on the CPU, all versions in one pass; what else is refused."""
    import lpm
    from lpm.bench.workload import PARAMETERS, workload

    model = workload(options.small, parameters=4)
    values = {name: PARAMETERS[name][0] for name in list(PARAMETERS)[:4]}
    found: dict[str, Any] = {}
    for executor in ["cpu", *executors(options.device)]:
        began = time.perf_counter()
        result = lpm.simulate(model, values, steps=40, seed=3, gradient="fd", executor=executor)
        assert result.gradient is not None
        gradient = result.gradient.to_array().to_numpy()
        if executor == "cpu":
            expected = gradient
        largest = float(np.abs(gradient - expected).max() / np.abs(expected).max())
        found[executor] = {"relative_difference": largest, "seconds": round(time.perf_counter() - began, 2)}
    for name in ("tangent", "alternates"):
        try:
            lpm.simulate(model, values, steps=2, seed=3, gradient=name, executor=f"device:{options.device}")
            found[name] = "ran"
        except lpm.errors.InputError as refused:
            found[name] = str(refused)
    return found


@contextmanager
def _kernels() -> Iterator[dict[str, float]]:
    """Time spent in each kernel on the device, in ms in all."""
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, float] = {}
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        yield found
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda event: -event.device_time_total)
    # Triton's kernels by name; all else is for the start of a run.
    found |= {e.key: round(e.device_time_total / 1e3, 3) for e in events if e.key.startswith("_")}


def days(options: argparse.Namespace) -> dict[str, Any]:
    """W by each executor at each size: median day, agent-steps per second, memory; the counts must be the same."""
    from lpm.bench.workload import default_values, workload
    from lpm.processes import peak_memory_mb

    theta, found = default_values(0), {}
    for agents in [options.agents, *([options.large] if options.large else [])]:
        began = time.perf_counter()
        model = workload(agents)
        at: dict[str, Any] = {"making_s": round(time.perf_counter() - began, 1)}
        found[f"{agents:,}"] = at
        words = {}
        for executor in [*reversed(executors(options.device)), "cpu"]:
            number = options.days if agents == options.agents or executor.startswith("triton") else options.days // 4
            _run(workload(20_000), theta, executor, 2)  # compiles
            if options.device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            result, measured = _run(model, theta, executor, number)
            median = statistics.median(measured)
            words[executor] = result.words
            at[executor] = {
                "days": number,
                "median_day_ms": round(1e3 * median, 3),
                "quartiles_ms": [round(1e3 * float(np.quantile(measured, q)), 3) for q in (0.25, 0.75)],
                "agent_steps_per_s": float(f"{agents / median:.4g}"),
                "peak_rss_mb": round(peak_memory_mb()),
            }
            if options.device != "cpu" and executor != "cpu":
                at[executor]["peak_device_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
            report(options, "days", found)
        shortest = min(len(each) for each in words.values())
        first = next(iter(words.values()))[:shortest]
        at["same_bits"] = all(np.array_equal(each[:shortest], first) for each in words.values())
        at["final_counts"] = [int(number) >> 32 for number in next(iter(words.values()))[-1, 1:, 0]]
        if options.device != "cpu":
            with _kernels() as kernels:
                _run(model, theta, f"triton:{options.device}", 20)
            at["kernels_ms_in_20_days"] = kernels
    return found


def vectors(options: argparse.Namespace) -> dict[str, Any]:
    """W with nine parameter vectors at once, as `fd` of four parameters runs it: median day by each executor."""
    from lpm.bench.workload import default_values, workload

    theta = default_values(4) * np.linspace(0.9, 1.1, 9)[:, None]
    model, found = workload(options.agents, parameters=4), {}
    for executor in ("cpu", executors(options.device)[-1]):
        _run(workload(20_000, parameters=4), theta, executor, 2)
        found[executor] = round(1e3 * statistics.median(_run(model, theta, executor, 15)[1]), 2)
    return {"agents": options.agents, "vectors": 9, "median_day_ms": found}


def shapes(options: argparse.Namespace) -> dict[str, Any]:
    """The Triton kernels by how many agents a program handles, and by how many threads."""
    from lpm.bench.workload import default_values, workload
    from lpm.kernels import cuda

    model, found = workload(options.agents), {}
    for block, warps in ((256, 2), (256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8)):
        cuda._BLOCK, cuda._WARPS = block, warps
        _run(model, default_values(0), f"triton:{options.device}", 2)
        with _kernels() as kernels:
            _run(model, default_values(0), f"triton:{options.device}", 30)
        found[f"{block} agents, {warps} warps"] = dict(kernels)
    cuda._BLOCK, cuda._WARPS = 512, 4
    return found


def _lpm(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "lpm", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, **more)


def _side_by_side(folder: str, asked: list[str], ways: dict[str, list[str]], found: dict[str, Any]) -> bool:
    """A command in several ways, each into its own folder; whether all came through."""
    for name, more in ways.items():
        began = time.perf_counter()
        done = _lpm(*asked, *more, "--out", f"{folder}/{name}")
        found[name] = {"rc": done.returncode, "seconds": round(time.perf_counter() - began, 1)}
        if done.returncode:
            found[name]["errors"] = done.stderr[-1500:]
            return False
    return True


def command_line(options: argparse.Namespace) -> dict[str, Any]:
    """`lpm simulate … --device`, against the same without; and one that is killed and resumed."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = ["simulate", CITY, "--agents", str(options.small), "--steps", "60", "--seed", "4"]
        if not _side_by_side(folder, asked, {"plain": [], "device": ["--device", options.device]}, found):
            return found
        record = json.loads((Path(folder) / "device" / "run.json").read_text())
        found["executor"], found["recorded_device"] = record["executor"], record["device"]
        words = Path(f"{folder}/plain/words.npy").read_bytes()
        found["same_bits"] = Path(f"{folder}/device/words.npy").read_bytes() == words

        command = [sys.executable, "-W", "ignore", "-m", "lpm", *asked, "--device", options.device]
        child = subprocess.Popen([*command, "--out", f"{folder}/killed", "--checkpoint-every", "5"], cwd=ROOT)
        until = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < until and not list(Path(folder).glob("killed/checkpoint/*")):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        found["killed_before_the_end"] = not Path(f"{folder}/killed/words.npy").exists()
        done = _lpm("resume", f"{folder}/killed")
        found["resume_rc"] = done.returncode
        if done.returncode:
            found["resume_errors"] = done.stderr[-1500:]
        else:
            found["resumed_to_the_same_bits"] = Path(f"{folder}/killed/words.npy").read_bytes() == words
    return found


def large_city(options: argparse.Namespace) -> dict[str, Any]:
    """`lpm simulate simulations/nyc_boroughs --device cuda --agents N`, as a user types it."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["simulate", CITY, "--agents", str(options.city), "--steps", "60", "--device", options.device]
        command = [sys.executable, "-W", "ignore", "-m", "lpm", *asked, "--out", f"{folder}/run"]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=options.patience)
        found = {"rc": done.returncode, "seconds": round(time.perf_counter() - began, 1)}
        if done.returncode:
            found["errors"] = done.stderr[-800:]
        else:
            record = json.loads(Path(f"{folder}/run/run.json").read_text())
            found |= {key: record[key] for key in ("agents", "steps", "executor", "timings", "peak_memory_mb")}
    return found


def sensitivities(options: argparse.Namespace) -> dict[str, Any]:
    """`lpm bench sensitivity`, with `fd`: every output of 180 days by six parameters, on the device and on the CPU."""
    asked = ["bench", "sensitivity", "--agents", str(options.agents), "--days", str(3 * options.days), "--json"]
    found: dict[str, Any] = {}
    for name, more in (("device", ["--device", options.device]), ("cpu", [])):
        done = _lpm(*asked, *more)
        found[name] = json.loads(done.stdout) if done.returncode == 0 else {"errors": done.stderr[-1500:]}
        report(options, "sensitivities", found)
    timed = ("executor", "building_s", "computing_s", "peak_rss_mb")
    values = [{k: v for k, v in each.items() if k not in timed} for each in found.values()]
    return {**found, "same_values": values[0] == values[1]}


def calibration(options: argparse.Namespace) -> dict[str, Any]:
    """`lpm calibrate … --device` of New York, three iterations, against the same without: the posterior to the bit."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = ["calibrate", CITY, "--agents", str(options.small), "--iterations", "3", "--seed", "4"]
        ways = {"device": ["--device", options.device], "cpu": ["--gradient", "fd"]}
        if not _side_by_side(folder, asked, ways, found):
            return found
        for name in ways:
            found[name]["device"] = json.loads(Path(f"{folder}/{name}/run.json").read_text())["device"]
        drawn = {Path(f"{folder}/{name}/posterior.parquet").read_bytes() for name in ways}
        found["same_bits"] = len(drawn) == 1
    return found


def nccl(options: argparse.Namespace) -> dict[str, Any]:
    """One rank under torchrun adds words up on the GPU by NCCL; several ranks need several GPUs."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__, "--child"]
    done = subprocess.run([*command, "--device", options.device], cwd=ROOT, capture_output=True, text=True, timeout=90)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"rc": done.returncode, "errors": done.stderr[-2000:]}


def child(device: str) -> dict[str, Any]:
    """What the rank does."""
    import torch.distributed as dist

    from lpm.kernels.device import find_device
    from lpm.worlds.process_group import Ranks

    where = str(find_device(device))
    group = Ranks(60.0, where)
    words = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 420_000)
    same = bool(np.array_equal(group.add(words), words))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        group.add(words)
        times.append(time.perf_counter() - began)
    names = str(dist.get_backend_config())
    return {"device": where, "backends": names, "same_words": same, "add_ms": 1e3 * statistics.median(times)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "machine": machine,
    "contract": contract,
    "bits": bits,
    "gradients": gradients,
    "days": days,
    "vectors": vectors,
    "command_line": command_line,
    "nccl": nccl,
    "sensitivities": sensitivities,
    "calibration": calibration,
    "shapes": shapes,
    "large_city": large_city,
}


def report(options: argparse.Namespace, part: str, found: object) -> None:
    """Write what has been found so far."""
    options.found[part] = found
    options.out.write_text(json.dumps(options.found, indent=1) + "\n")


def main() -> None:
    """Run the parts asked for, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default=",".join(list(PARTS)[:10]), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--small", type=int, default=100_000, help="agents of comparisons to the bit")
    parser.add_argument("--agents", type=int, default=8_400_000)
    parser.add_argument("--large", type=int, default=100_000_000, help="agents of the second size of `days`; 0: none")
    parser.add_argument("--city", type=int, default=100_000_000, help="agents of `large_city`")
    parser.add_argument("--patience", type=float, default=500.0, help="seconds that `large_city` may take")
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("cuda.json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.device)), flush=True)
        return
    options.found = {}
    for name in options.parts.split(","):
        began = time.perf_counter()
        try:
            found = PARTS[name](options)
        except Exception as error:
            found = {
                **options.found.get(name, {}),
                "failed": repr(error)[-1500:],
                "where": traceback.format_exc()[-2500:],
            }
        report(options, name, {"took_s": round(time.perf_counter() - began, 1), **found})
        print(name, json.dumps(options.found[name]), flush=True)


if __name__ == "__main__":
    main()
