"""The doctor finds a healthy installation healthy, and names each thing that is not, with a remedy."""

from __future__ import annotations

import shutil
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lpm import doctor
from lpm.doctor import Check, examine, examine_keys, worst
from lpm.protocol.identity import make_local_authority


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_local_authority(tmp_path / "keys", ["east", "north", "west"])
    return tmp_path / "keys"


def only_trouble(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.verdict != "ok"]


def test_this_installation_passes(tmp_path: Path) -> None:
    checks = examine(folder=tmp_path / "not" / "yet")
    assert not [check for check in checks if check.verdict == "fail"]
    assert {"Python", "lpm", "torch", "flwr", "crypten", "CrypTen", "Flower", "loopback", "clock"} <= {
        check.subject for check in checks
    }
    assert all(check.remedy for check in only_trouble(checks))


def test_good_keys_pass_with_one_word_about_all_lying_together(keys: Path) -> None:
    (trouble,) = only_trouble(examine_keys(keys))
    assert trouble.verdict == "warn" and "one folder" in trouble.finding
    assert only_trouble(examine_keys(keys / "parties" / "east")) == []
    assert only_trouble(examine_keys(keys / "coordinator")) == []


def test_a_key_others_can_read_fails(keys: Path) -> None:
    path = keys / "parties" / "east" / "tls.key"
    path.chmod(0o644)
    (trouble,) = only_trouble(examine_keys(keys / "parties" / "east"))
    assert (trouble.verdict, trouble.remedy) == ("fail", f"chmod 600 {path}")


@pytest.mark.parametrize(("days", "verdict"), [(400, "fail"), (350, "warn"), (10, "ok"), (-10, "fail")])
def test_expiry_is_told_beforehand(keys: Path, days: int, verdict: str) -> None:
    checks = examine_keys(keys / "parties" / "east", now=datetime.now(UTC) + timedelta(days=days))
    assert worst(checks) == verdict


def test_a_certificate_of_another_authority_fails(keys: Path, tmp_path: Path) -> None:
    make_local_authority(tmp_path / "other", ["east", "north", "west"])
    shutil.copy(tmp_path / "other" / "authority" / "authority.pem", keys / "parties" / "east")
    trouble = only_trouble(examine_keys(keys / "parties" / "east"))
    assert len(trouble) == 2 and all("not issued" in check.finding for check in trouble)


def test_a_key_of_somebody_else_fails(keys: Path) -> None:
    shutil.copy(keys / "parties" / "west" / "identity.key", keys / "parties" / "east")
    (trouble,) = only_trouble(examine_keys(keys / "parties" / "east"))
    assert "does not belong to identity.key" in trouble.finding


@pytest.mark.parametrize("file", ["authority.pem", "tls.pem", "identity.key"])
def test_a_spoilt_or_missing_file_fails(keys: Path, file: str) -> None:
    path = keys / "parties" / "east" / file
    path.write_text("-----BEGIN NOTHING-----")
    assert worst(examine_keys(keys / "parties" / "east")) == "fail"
    path.unlink()
    trouble = only_trouble(examine_keys(keys))
    assert any(file in check.finding and check.verdict == "fail" for check in trouble)


def test_no_keys_fail_with_the_command_that_makes_them(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        (check,) = examine_keys(folder)
        assert check.verdict == "fail" and "lpm keys local" in check.remedy


def test_a_missing_package_an_old_one_and_a_missing_extra_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version

    def version(name: str) -> str:
        if name in {"zuko", "crypten"}:
            raise doctor.metadata.PackageNotFoundError
        return "1.39.0" if name == "flwr" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {check.subject: check for check in doctor._packages()}
    assert found["zuko"].finding == "is not installed"
    assert "1.39.0" in found["flwr"].finding and found["flwr"].verdict == "fail"
    assert "mpc" in found["crypten"].remedy


def test_little_memory_one_processor_and_missing_executables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(2**30, 2**32))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(doctor.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor._memory().verdict == "warn"
    assert doctor._processors().verdict == "warn"
    assert doctor._flower().verdict == "fail"


def test_a_proxy_over_loopback_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert doctor._loopback().verdict == "warn"
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    assert doctor._loopback().verdict == "ok"


def test_a_check_that_breaks_is_a_warning_not_an_end() -> None:
    def breaks() -> Check:
        raise OSError("no such thing")

    assert doctor._guarded("x", breaks).verdict == "warn"


def test_worst() -> None:
    assert worst([]) == "ok"
    assert worst([Check("a", "ok", ""), Check("b", "warn", "")]) == "warn"
    assert worst([Check("a", "fail", ""), Check("b", "warn", "")]) == "fail"
