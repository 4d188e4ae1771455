"""Keys in earnest: made by the party, certified out of band, rotated by the old key's word, refused once revoked."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lpm.errors import InputError, SessionRefused
from lpm.oversight import check_ledger
from lpm.privacy.ledger import Ledger
from lpm.protocol.identity import COORDINATOR, REVOKED, load_identity, make_authority, verify_certificate
from lpm.protocol.manifest import Terms
from lpm.protocol.registrar import SUCCESSION, certify, install, new_keys, revoke, rotate
from lpm.protocol.session import CoordinatorMachine, PartyMachine

HASH = "ab" * 32


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    """An authority, a coordinator and three parties, each with keys of its own making."""
    make_authority(tmp_path / "authority")
    for name in (COORDINATOR, "north", "south", "west"):
        said = new_keys(tmp_path / name, name)
        sent = tmp_path / f"{name}-certificates"
        certify(tmp_path / name / "request.json", tmp_path / "authority", sent, fingerprint=said, hosts=("localhost",))
        assert install(sent, tmp_path / name) == name
    return tmp_path


def test_a_party_makes_its_own_keys_and_the_registrar_sees_only_a_request(federation: Path) -> None:
    identity = load_identity(federation / "north", "north")
    verify_certificate(identity.certificate, "north", identity.authority, datetime.now(UTC))
    request = (federation / "north" / "request.json").read_text()
    assert "PRIVATE" not in request
    seen = b"".join(path.read_bytes() for path in (federation / "authority").rglob("*") if path.is_file())
    assert seen.count(b"PRIVATE") == 2  # the authority's own key
    for key in (federation / "north").glob("*.key"):
        assert key.stat().st_mode & 0o077 == 0


def test_a_request_that_was_exchanged_on_the_way_or_proves_nothing_is_not_certified(federation: Path) -> None:
    said = new_keys(federation / "east", "east")
    new_keys(federation / "mallory", "east")
    with pytest.raises(InputError, match="fingerprint"):
        certify(federation / "mallory" / "request.json", federation / "authority", federation / "out", fingerprint=said)
    asked = json.loads((federation / "east" / "request.json").read_text())
    for change in ({"name": "north"}, {"identity": asked["identity"].replace("A", "B", 3)}, {"tls": "x"}):
        (federation / "bad.json").write_text(json.dumps(asked | change))
        with pytest.raises(InputError):
            certify(federation / "bad.json", federation / "authority", federation / "out")
    assert not (federation / "out").exists()
    certify(federation / "east" / "request.json", federation / "authority", federation / "out", fingerprint=said)
    with pytest.raises(InputError, match=r"not the Ed25519 key"):
        install(federation / "out", federation / "mallory")
    assert not (federation / "mallory" / "identity.pem").exists()


def test_a_rotated_key_is_vouched_for_by_the_old_one_and_the_ledger_goes_on(federation: Path) -> None:
    def open_ledger() -> Ledger:
        identity = load_identity(federation / "north")
        path = federation / "north" / SUCCESSION
        return Ledger(
            federation / "ledger.jsonl",
            "north",
            identity.certificate,
            identity.key.sign,
            lambda certificate, party, now: verify_certificate(certificate, party, identity.authority, now) and None,
            json.loads(path.read_text()) if path.is_file() else None,
        )

    open_ledger().append("task", {})
    old = load_identity(federation / "north")
    said = rotate(federation / "north")
    assert load_identity(federation / "north").certificate == old.certificate  # in force until the new one is certified
    with pytest.raises(InputError, match="under way"):
        rotate(federation / "north")
    sent = federation / "sent"
    certify(federation / "north" / "next" / "request.json", federation / "authority", sent, fingerprint=said)
    install(sent, federation / "north")
    new = load_identity(federation / "north", "north")
    assert new.certificate != old.certificate and not (federation / "north" / "next").exists()
    assert (federation / "north" / "storage.key").is_file()
    open_ledger().append("task", {})
    for authority in (None, federation / "authority" / "authority.pem"):
        found, _ = check_ledger(federation / "ledger.jsonl", authority)
        assert not found.problems and len(found.certificates) == 2 and not found.notes


def test_a_rotation_that_the_old_key_did_not_sign_is_not_certified(federation: Path) -> None:
    rotate(federation / "north")
    rotate(federation / "south")
    request = federation / "north" / "next" / "request.json"
    asked = json.loads(request.read_text())
    others = json.loads((federation / "south" / "next" / "request.json").read_text())
    for forged in (others["succession"], asked["succession"] | {"old_signature": "00" * 64}, {}, "word"):
        request.write_text(json.dumps(asked | {"succession": forged}))
        with pytest.raises(InputError, match="word for it is not valid"):
            certify(request, federation / "authority", federation / "out")


def test_a_revoked_party_is_refused_at_the_hand_shake_by_all_who_have_the_list(federation: Path) -> None:
    stolen = load_identity(federation / "west")
    issued = next((federation / "authority" / "issued").glob("west-*"))
    assert revoke([issued], federation / "authority") == 2
    for name in (COORDINATOR, "north"):
        shutil.copyfile(federation / "authority" / REVOKED, federation / name / REVOKED)
    coordinator = CoordinatorMachine(
        load_identity(federation / COORDINATOR), ("north", "south", "west"), Terms("town", HASH)
    )
    parties = {"west": PartyMachine(stolen, HASH)}
    hello, _ = parties["west"].receive(coordinator.welcome("west"))
    with pytest.raises(SessionRefused, match=r"west was revoked"):
        coordinator.receive("west", hello[0])
    # A coordinator without the list takes it; the party that has it does not sign.
    (federation / COORDINATOR / REVOKED).unlink()
    careless = CoordinatorMachine(
        load_identity(federation / COORDINATOR), ("north", "south", "west"), Terms("town", HASH)
    )
    parties = {name: PartyMachine(load_identity(federation / name), HASH) for name in ("north", "south", "west")}
    offers: list[tuple[str, bytes]] = []
    for name, machine in parties.items():
        frames, _ = machine.receive(careless.welcome(name))
        offers += careless.receive(name, frames[0])[0]
    with pytest.raises(SessionRefused, match=r"west was revoked"):
        parties["north"].receive(dict(offers)["north"])
    # Its own folder says so too, once the list is there.
    shutil.copyfile(federation / "authority" / REVOKED, federation / "west" / REVOKED)
    with pytest.raises(SessionRefused, match="revoked"):
        load_identity(federation / "west")


def test_a_list_that_another_authority_signed_is_not_believed(federation: Path, tmp_path: Path) -> None:
    make_authority(tmp_path / "other")
    revoke([], tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / REVOKED, federation / "north" / REVOKED)
    with pytest.raises(InputError, match="not signed by this federation's authority"):
        load_identity(federation / "north")
    with pytest.raises(InputError, match="no certificate of this authority"):
        revoke([federation / "north" / "identity.pem"], tmp_path / "other")
