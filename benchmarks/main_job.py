"""The main job, or another federation, as a user runs it: wall time, CPU time and memory of all processes together.

    python benchmarks/main_job.py [--scenario FOLDER] [--keep DIR] [flags of `lpm federate`]

Memory is the largest sum of proportional set sizes (shared pages counted once) seen in samples a second apart. Prints
one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SCENARIO = Path(__file__).resolve().parent.parent / "simulations" / "nyc_boroughs"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", type=Path, default=SCENARIO, help="its folder")
    parser.add_argument("--keep", type=Path, help="where the run stays; else it is thrown away")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.keep or Path(folder) / "run"
        command = [sys.executable, "-m", "lpm", "federate", str(arguments.scenario)]
        command += ["--out", str(out), "--json", *flags]
        began = time.monotonic()
        load = psutil.getloadavg()[0]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak, cpu = 0, {}
        while True:
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(run.pid)
                together = 0
                for process in (parent, *parent.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        together += process.memory_full_info().pss
                        times = process.cpu_times()
                        cpu[process.pid] = times.user + times.system
                peak = max(peak, together)
            with contextlib.suppress(subprocess.TimeoutExpired):
                text, _ = run.communicate(timeout=1)
                break
        record = json.loads((out / "run.json").read_text()) if run.returncode == 0 else {}
    summary = json.loads(text)
    result = {
        "flags": flags,
        "exit": run.returncode,
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(sum(cpu.values()), 1),
        "peak_pss_gib": round(peak / 2**30, 2),
        "load_before": round(load, 2),
        "cores": psutil.cpu_count(),
        "timings": record.get("timings"),
        "rounds": record.get("rounds"),
        "bytes": record.get("bytes"),
        "headline": summary.get("headline"),
        "scores": summary.get("scores"),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
