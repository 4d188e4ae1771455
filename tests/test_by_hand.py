"""A federation started by hand, process by process: what the launcher otherwise does beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509

from lpm.cli import main
from lpm.errors import InputError
from lpm.runs import Run
from server.commands import _take_up_run
from server.config import CoordinatorConfig


def _config(tmp_path: Path, **changes) -> CoordinatorConfig:
    fields = {"scenario": tmp_path, "keys": tmp_path, "out": tmp_path / "run", "parties": ("a", "b", "c")}
    return CoordinatorConfig(**fields | {"data_address": "127.0.0.1:1"} | changes)


def test_a_coordinator_makes_its_run_and_resumes_it(tmp_path: Path) -> None:
    _take_up_run(_config(tmp_path))
    run = Run.open(tmp_path / "run")
    assert run.status == "running"
    run.update(status="paused")
    with pytest.raises(InputError, match="holds a run already"):
        _take_up_run(_config(tmp_path))
    _take_up_run(_config(tmp_path, resume=True))
    assert run.record()["resumed"] == 1
    run.update(status="paused")


def test_resume_says_how_a_run_begun_by_hand_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _take_up_run(_config(tmp_path))
    Run.open(tmp_path / "run").update(status="paused")
    assert main(["resume", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "begun by hand" in said and "--resume" in said


def test_keys_name_the_coordinators_machine(tmp_path: Path) -> None:
    assert main(["keys", "local", str(tmp_path / "keys"), "--parties", "a,b,c", "--host", "far.example.org"]) == 0
    certificate = x509.load_pem_x509_certificate((tmp_path / "keys" / "coordinator" / "tls.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "far.example.org" in names.get_values_for_type(x509.DNSName)
