"""Keys and certificates: those of `lpm keys local`, and those that should not be believed."""

from __future__ import annotations

import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from lpm.errors import InputError, LpmError, SessionRefused
from lpm.protocol.identity import (
    COORDINATOR,
    load_identity,
    make_local_authority,
    require_party_name,
    verify_certificate,
    verify_signature,
)

_PARTIES = ("bronx", "brooklyn", "staten_island")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "local"
    make_local_authority(folder, _PARTIES)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "foreign"
    make_local_authority(folder, _PARTIES)
    return folder


def test_local_authority_makes_private_keys_for_everybody(keys: Path) -> None:
    for name, folder in [(COORDINATOR, keys / COORDINATOR), *((p, keys / "parties" / p) for p in _PARTIES)]:
        identity = load_identity(folder, name)
        assert identity.name == load_identity(folder).name == name
        key = verify_certificate(identity.certificate, name, identity.authority, datetime.now(UTC))
        verify_signature(key, name, b"test", b"message", identity.sign(b"test", b"message"))
        assert x509.load_pem_x509_certificate(identity.tls_certificate).public_key().curve.name == "secp256r1"  # type: ignore[union-attr]
        assert len((folder / "storage.key").read_bytes()) == 32
        assert "key" not in repr(identity)
    files = [path for path in keys.rglob("*") if path.is_file()]
    assert len(files) == 2 + 6 * 4
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in keys.rglob("*") if path.is_dir())
    private = [path.read_bytes() for path in files if path.suffix == ".key"]
    assert len(set(private)) == len(private)


def test_a_coordinator_s_certificate_serves_and_a_party_s_does_not(keys: Path) -> None:
    for folder, use in ((keys / COORDINATOR, "serverAuth"), (keys / "parties" / "bronx", "clientAuth")):
        certificate = x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert [each._name for each in uses] == [use]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "coordinator", "Coordinator", "a b", "-a", "a" * 64, "é"])
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="party name"):
        require_party_name(name)
    with pytest.raises(InputError, match="party name"):
        make_local_authority(tmp_path / "keys", ["bronx", "queens", name])
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("parties", [("bronx", "queens", "bronx"), ("bronx", "Bronx", "queens")])
def test_a_party_twice_is_refused(parties: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?i)bronx is named twice"):
        make_local_authority(tmp_path / "keys", parties)


def test_keys_are_never_overwritten(keys: Path) -> None:
    before = (keys / "authority" / "authority.key").read_bytes()
    with pytest.raises(InputError, match="not empty"):
        make_local_authority(keys, _PARTIES)
    assert (keys / "authority" / "authority.key").read_bytes() == before


def test_expired_and_not_yet_valid_keys_are_refused(tmp_path: Path) -> None:
    make_local_authority(tmp_path / "keys", _PARTIES, days=10)
    folder = tmp_path / "keys" / "parties" / "bronx"
    now = datetime.now(UTC)
    load_identity(folder, "bronx", now)
    with pytest.raises(SessionRefused, match=r"bronx expired on .*clock"):
        load_identity(folder, "bronx", now + timedelta(days=11))
    with pytest.raises(SessionRefused, match=r"valid only from .*clock"):
        load_identity(folder, "bronx", now - timedelta(days=1))


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_keys_of_another_authority_are_refused(keys: Path, foreign: Path, tmp_path: Path) -> None:
    mixed = _copy(keys / "parties" / "bronx", tmp_path / "bronx")
    shutil.copy(foreign / "parties" / "bronx" / "authority.pem", mixed / "authority.pem")
    with pytest.raises(SessionRefused, match="not issued by this federation's authority"):
        load_identity(mixed, "bronx")


def test_keys_of_somebody_else_are_refused(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(SessionRefused, match=r"shown for queens belongs to bronx"):
        load_identity(keys / "parties" / "bronx", "queens")
    mixed = _copy(keys / "parties" / "bronx", tmp_path / "bronx")
    shutil.copy(keys / "parties" / "brooklyn" / "tls.pem", mixed / "tls.pem")
    with pytest.raises(SessionRefused, match="belongs to brooklyn"):
        load_identity(mixed, "bronx")


@pytest.mark.parametrize("file", ["identity.key", "tls.key"])
def test_a_key_that_does_not_belong_to_its_certificate_is_refused(keys: Path, tmp_path: Path, file: str) -> None:
    mixed = _copy(keys / "parties" / "bronx", tmp_path / "bronx")
    shutil.copy(keys / "parties" / "brooklyn" / file, mixed / file)
    with pytest.raises(InputError, match=file):
        load_identity(mixed, "bronx")


@pytest.mark.parametrize("file", ["authority.pem", "identity.pem", "identity.key", "tls.pem", "tls.key"])
def test_missing_and_broken_files_are_named(keys: Path, tmp_path: Path, file: str) -> None:
    folder = _copy(keys / "parties" / "bronx", tmp_path / "bronx")
    (folder / file).write_text("no key")
    with pytest.raises(LpmError, match="not a PEM"):
        load_identity(folder, "bronx")
    (folder / file).unlink()
    with pytest.raises(InputError, match=rf"{file} can't be read"):
        load_identity(folder, "bronx")


def test_a_key_that_others_can_read_is_refused(keys: Path, tmp_path: Path) -> None:
    folder = _copy(keys / "parties" / "bronx", tmp_path / "bronx")
    (folder / "identity.key").chmod(0o640)
    with pytest.raises(InputError, match="other users"):
        load_identity(folder, "bronx")


def test_certificates_of_strangers_are_refused(keys: Path, foreign: Path) -> None:
    now = datetime.now(UTC)
    mine = load_identity(keys / "parties" / "bronx")
    theirs = load_identity(foreign / "parties" / "bronx")
    with pytest.raises(SessionRefused, match="not issued by"):
        verify_certificate(theirs.certificate, "bronx", mine.authority, now)
    with pytest.raises(SessionRefused, match="belongs to bronx"):
        verify_certificate(mine.certificate, "queens", mine.authority, now)
    for broken in (b"", b"\x30", mine.certificate[:-1], mine.certificate + b"\x00", mine.certificate[:50]):
        with pytest.raises(SessionRefused, match="bronx"):
            verify_certificate(broken, "bronx", mine.authority, now)
    # A TLS certificate proves no identity, and a party is no authority.
    tls = x509.load_pem_x509_certificate(mine.tls_certificate)
    with pytest.raises(SessionRefused, match="no Ed25519 key"):
        verify_certificate(tls.public_bytes(_der()), "bronx", mine.authority, now)
    with pytest.raises(SessionRefused, match="not issued by"):
        verify_certificate(mine.certificate, "bronx", mine.tls_certificate, now)


def _der() -> object:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


def test_a_signature_proves_one_thing_only(keys: Path) -> None:
    identity = load_identity(keys / "parties" / "bronx")
    key = verify_certificate(identity.certificate, "bronx", identity.authority, datetime.now(UTC))
    signature = identity.sign(b"hello", b"message")
    for purpose, message, shown in (
        (b"manifest", b"message", signature),
        (b"hello", b"messag", signature),
        (b"hellom", b"essage", signature),
        (b"hello", b"message", bytes(64)),
        (b"hello", b"message", signature[:-1]),
    ):
        with pytest.raises(SessionRefused, match="bronx"):
            verify_signature(key, "bronx", purpose, message, shown)
