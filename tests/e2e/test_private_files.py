"""Each institution's process opens its own files and nobody else's: an audit hook in every process notes them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.processes import CLINICS, ended

PARTIES = ("north", "south", "west")
HOOK = """
import json, os, sys
def note(event, arguments, folder=os.environ["OPENED"], argv=getattr(sys, "orig_argv", [])):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and not busy:
        busy.append(1)
        try:
            with open(os.path.join(folder, str(os.getpid())), "a") as log:
                log.write(json.dumps([argv, os.path.abspath(os.fsdecode(arguments[0]))]) + "\\n")
        finally:
            busy.clear()
busy = []
sys.addaudithook(note)
"""


def test_a_party_opens_its_own_files_alone(tmp_path: Path) -> None:
    run, opened, hook = tmp_path / "run", tmp_path / "opened", tmp_path / "hook"
    opened.mkdir()
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    arguments = ["federate", CLINICS, "--control", "streams", "--gradient", "fd", "--iterations", "1", "--out", run]
    arguments += ["--set", "calibration.replicates=1", "--set", "calibration.predictive_draws=2", "--json"]
    environment = {"PYTHONPATH": str(hook), "OPENED": str(opened)}
    command = ended(arguments, run, tmp_path / "output", environment=environment)
    assert command.wait() == 0, command.said
    seen: dict[str, set[Path]] = {}
    for log in opened.iterdir():
        for line in log.read_text().splitlines():
            argv, path = json.loads(line)
            role = argv[argv.index("--party") + 1] if "--party" in argv else "coordinator" * ("coordinator" in argv)
            seen.setdefault(role, set()).add(Path(path))
    for party in PARTIES:
        private = _private(run, party)
        assert any(path.name == f"observed_{party}.csv" for path in seen[party])
        assert any(path.is_relative_to(private[0]) for path in seen[party])
        assert any(path.is_relative_to(private[1]) for path in seen[party])
        for role in {*PARTIES, "coordinator"} - {party}:
            foreign = [path for path in seen[role] if any(path.is_relative_to(each) for each in private)]
            assert not foreign, (role, foreign)
    assert {path for path in seen["coordinator"] if path.is_relative_to(CLINICS)} == {CLINICS / "scenario.toml"}
    for party in PARTIES:
        keys = [path for path in seen[party] if path.is_relative_to(run / "keys")]
        assert keys and all(path.is_relative_to(run / "keys" / "parties" / party) for path in keys)


def _private(run: Path, party: str) -> tuple[Path, ...]:
    return (run / "parties" / party, run / "keys" / "parties" / party, CLINICS / "figures" / f"observed_{party}.csv")
