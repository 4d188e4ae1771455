"""The commands of a steward and of a registrar, from the first key to the page that says who could see what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpm.cli import main
from lpm.privacy.budget import Budget
from lpm.privacy.ledger import Ledger
from lpm.privacy.policy import Charge
from lpm.protocol.identity import load_identity
from lpm.protocol.manifest import Entry, Manifest, Terms
from tests.e2e.processes import CLINICS

PARTIES = ("north", "south", "west")


def test_a_key_ceremony(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registrar, keys = tmp_path / "registrar", tmp_path / "keys"
    assert main(["keys", "authority", str(registrar)]) == 0
    assert main(["keys", "new", str(keys), "--name", "north"]) == 0
    said = capsys.readouterr().err
    fingerprint = said.strip().rsplit(" ", 1)[1]
    request = str(keys / "request.json")
    sent = str(tmp_path / "sent")
    certify = ["keys", "certify", request, "--authority", str(registrar), "--out"]
    assert main([*certify, sent, "--fingerprint", "00" * 16]) == 2
    assert main([*certify, sent, "--fingerprint", fingerprint]) == 0
    assert main(["keys", "install", sent, str(keys)]) == 0
    assert load_identity(keys).name == "north"
    assert main(["keys", "rotate", str(keys)]) == 0
    follow = ["keys", "certify", str(keys / "next" / "request.json"), "--authority", str(registrar), "--out"]
    assert main([*follow, str(tmp_path / "second")]) == 0
    assert main(["keys", "install", str(tmp_path / "second"), str(keys)]) == 0
    old = next((registrar / "issued").glob(f"north-{_serial(tmp_path / 'sent')}"))
    assert main(["keys", "revoke", str(old), "--authority", str(registrar)]) == 0
    (keys / "revoked.pem").write_bytes((registrar / "revoked.pem").read_bytes())
    assert load_identity(keys).name == "north"  # the new key is not on the list


def _serial(folder: Path) -> str:
    from cryptography import x509

    return f"{x509.load_pem_x509_certificate((folder / 'identity.pem').read_bytes()).serial_number:x}"


def test_a_policy_is_written_strict_and_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "policy.toml"
    assert main(["policy", "new", str(policy), "--scenario", str(CLINICS)]) == 0
    assert main(["policy", "new", str(policy), "--scenario", str(CLINICS)]) == 2  # never overwritten
    check = ["policy", "check", str(CLINICS), "--policy", str(policy), "--party", "north", "--json"]

    def refused(*more: str) -> list[str]:
        capsys.readouterr()
        code = main([*check, *more])
        answer = json.loads(capsys.readouterr().out)
        assert answer["refused"] == bool(code)
        return [f"{subject}: {finding}" for verdict, subject, finding, _ in answer["checks"] if verdict == "fail"]

    assert refused() == []
    assert "fit" in refused("--release-fit")[0]
    assert "scenarios.allowed" not in refused("--release-fit")[0]
    assert any("trajectories = 20000" in line for line in refused("--set", "calibration.predictive_draws=30000"))
    Budget(tmp_path / "budget-north.jsonl").charge("before", Charge(losses=1990))
    assert any("losses = 2000" in line and "after 2 of 12" in line for line in refused())
    (tmp_path / "stop").touch()
    assert "kill switch" in refused()[0]
    policy.write_text(policy.read_text().replace("[limits]", "[limit]"))
    assert main(check) == 2


def test_manifests_are_shown_compared_and_signed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "local", str(tmp_path / "keys"), "--parties", ",".join(PARTIES)]) == 0
    identities = [load_identity(tmp_path / "keys" / "parties" / name) for name in PARTIES]
    roster = tuple(Entry(each.name, each.certificate, b"e" * 32, bytes(64)) for each in identities)
    for name, steps in {"a": 18, "b": 30}.items():
        terms = Terms("town", "ab" * 32, session=name, bounds={"town": 480.0}, steps=steps, outputs=("cases",))
        (tmp_path / f"{name}.json").write_bytes(Manifest(name.encode() * 16, roster, terms).encode())
    first, second = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    capsys.readouterr()
    assert main(["manifest", "show", first]) == 0
    shown = capsys.readouterr().out
    assert "party north" in shown and "bounds.town" in shown and "cases" in shown
    assert main(["manifest", "diff", first, first]) == 0
    assert main(["manifest", "diff", first, second]) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == ["steps", "  - 18", "  + 30"]
    policy = tmp_path / "policy.toml"
    sign = ["manifest", "sign", first, "--keys", str(tmp_path / "keys" / "parties" / "north"), "--policy", str(policy)]
    assert main(sign) == 0
    assert len(list((tmp_path / "approvals").glob("*.sig"))) == 1
    assert main(["manifest", "show", str(policy)]) == 2


def test_a_run_is_looked_at_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "local", str(tmp_path / "keys"), "--parties", ",".join(PARTIES)]) == 0
    identity = load_identity(tmp_path / "keys" / "parties" / "north")
    path = tmp_path / "parties" / "north" / "ledger.jsonl"
    book = Ledger(path, "north", identity.certificate, identity.key.sign, lambda *_: None)
    book.append("refused", {"asked": "evaluate 3", "why": "[limits] losses = 8"})
    book.append("close", {"reason": ""})
    authority = ["--authority", str(tmp_path / "keys" / "authority" / "authority.pem")]
    capsys.readouterr()
    assert main(["verify-log", str(path), *authority, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["whole"] and answer["party"] == "north" and answer["lines"] == 3
    assert main(["leakage", str(tmp_path), "--html", str(tmp_path / "page.html"), "--json"]) == 0
    assert "losses = 8" in json.loads(capsys.readouterr().out)[0]["refused"][0]
    assert main(["leakage", str(tmp_path)]) == 0
    assert "ledger whole" in capsys.readouterr().out
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert main(["verify-log", str(path), *authority]) == 1
    assert main(["leakage", str(tmp_path)]) == 1
    assert main(["verify-log", str(tmp_path / "none")]) == 2
