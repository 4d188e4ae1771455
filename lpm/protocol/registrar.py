"""Keys in earnest: a party makes its own, an authority out of band certifies, and both can take them back.

A party never lets a private key out of its folder: it sends the registrar a request that proves it holds the keys. The
registrar compares the fingerprint over another way (the telephone), and sends certificates back. A rotated key is
vouched for by the old one, so that the ledger goes on; a revoked one is refused at the hand-shake by everybody who has
the authority's list.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from lpm.errors import InputError
from lpm.protocol.identity import (
    COORDINATOR,
    REVOKED,
    certify_keys,
    load_authority,
    load_identity,
    private_pem,
    require_party_name,
    write_private,
)

__all__ = ["SUCCESSION", "certify", "install", "new_keys", "request_of", "revoke", "rotate"]

SUCCESSION = "succession.json"
"""In a key folder whose keys were rotated: the old key's word for the new one."""

_NEXT = "next"
_LIMIT = 64 << 10


def new_keys(folder: Path, name: str) -> str:
    """Make a party's (or the coordinator's) own keys, and the request that the registrar is to be sent.

    Args:
        folder: a new or empty folder.
        name: as it is to be certified.

    Returns:
        the fingerprint of the request, to be compared over another way.

    Raises:
        InputError: for a name that can't be used, or a folder that holds something.
    """
    if name != COORDINATOR:
        require_party_name(name)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: keys are never overwritten.", "Name a new folder, or `keys rotate`.")
    write_private(folder / "identity.key", private_pem(Ed25519PrivateKey.generate()))
    write_private(folder / "tls.key", private_pem(ec.generate_private_key(ec.SECP256R1())))
    write_private(folder / "storage.key", secrets.token_bytes(32))
    return request_of(folder, name)


def request_of(folder: Path, name: str, succession: Mapping[str, str] | None = None) -> str:
    """Write `request.json` for the keys in a folder; it holds nothing secret.

    Args:
        folder: with identity.key and tls.key.
        name: as it is to be certified.
        succession: the old key's word, if these keys follow others.

    Returns:
        the request's fingerprint.

    Raises:
        InputError: if the keys can't be read.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    identity, tls = _private_key(folder / "identity.key"), _private_key(folder / "tls.key")
    if not isinstance(identity, Ed25519PrivateKey) or not isinstance(tls, ec.EllipticCurvePrivateKey):
        raise InputError(f"The keys in {folder} are of another kind.", "Make them with `lpm keys new`.")
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    asked = {
        "name": name,
        "identity": builder.sign(identity, None).public_bytes(Encoding.PEM).decode(),
        "tls": builder.sign(tls, SHA256()).public_bytes(Encoding.PEM).decode(),
        **({"succession": dict(succession)} if succession else {}),
    }
    (folder / "request.json").write_text(json.dumps(asked, indent=1) + "\n")
    return _fingerprint(asked)


def certify(
    request: Path, authority: Path, out: Path, *, fingerprint: str = "", days: float = 365.0, hosts: Sequence[str] = ()
) -> tuple[str, str]:
    """Certify a request, as the registrar.

    Args:
        request: the file a party sent.
        authority: the registrar's folder.
        out: the folder of certificates to send back; made new.
        fingerprint: as the party read it out; "" to only be told it.
        days: how long the certificates are valid.
        hosts: names and addresses of the coordinator's machine, for its certificate alone.

    Returns:
        the name, and the fingerprint.

    Raises:
        InputError: if the request can't be read or does not prove that its sender holds the keys, the fingerprint is
            another, or the succession is not signed by a key that this authority certified for the name.
    """
    asked = _read_request(request)
    found = _fingerprint(asked)
    if fingerprint and fingerprint.replace(" ", "").lower() != found:
        raise InputError(
            f"The request {request} has the fingerprint {found}, not {fingerprint}: it is not what the party sent.",
            "Certify nothing; ask the party to send it again.",
        )
    name = str(asked["name"])
    if name != COORDINATOR:
        require_party_name(name)
    identity_key, tls_key = _requested(request, asked["identity"], name), _requested(request, asked["tls"], name)
    if not isinstance(identity_key, Ed25519PublicKey) or not isinstance(tls_key, ec.EllipticCurvePublicKey):
        raise InputError(f"The request {request} is for keys of another kind.")
    key, certificate = load_authority(authority)
    if "succession" in asked:
        _check_succession(request, asked["succession"], name, identity_key, authority)
    now = datetime.now(UTC)
    identity, tls = certify_keys(name, identity_key, tls_key, key, certificate, now, now + timedelta(days=days), hosts)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty.", "Name a new folder.")
    for folder in (out, authority / "issued" / f"{name}-{identity.serial_number:x}"):
        write_private(folder / "identity.pem", identity.public_bytes(Encoding.PEM))
        write_private(folder / "tls.pem", tls.public_bytes(Encoding.PEM))
        write_private(folder / "authority.pem", certificate.public_bytes(Encoding.PEM))
    if (authority / REVOKED).is_file():
        write_private(out / REVOKED, (authority / REVOKED).read_bytes())
    return name, found


def install(certificates: Path, folder: Path) -> str:
    """Put the registrar's certificates beside one's keys; after a rotation, put the new keys in force.

    Args:
        certificates: the folder that came from the registrar.
        folder: the party's own key folder.

    Returns:
        the certified name.

    Raises:
        InputError: if the certificates are not for these keys; nothing is changed then.
        SessionRefused: if they are not this authority's, expired or revoked.
    """
    rotated = folder / _NEXT
    target = rotated if rotated.is_dir() else folder
    for file in ("identity.pem", "tls.pem", "authority.pem"):
        if not (certificates / file).is_file():
            raise InputError(f"{certificates / file} is missing.", "Give the folder that the registrar sent.")
    files = [file for file in ("identity.pem", "tls.pem", "authority.pem", REVOKED) if (certificates / file).is_file()]
    before = {file: (target / file).read_bytes() for file in files if (target / file).is_file()}
    for file in files:
        write_private(target / file, (certificates / file).read_bytes())
    try:
        identity = load_identity(target)
    except BaseException:
        for file in files:
            (target / file).unlink()
        for file, content in before.items():
            write_private(target / file, content)
        raise
    if target is rotated:
        past = folder / f"previous-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        past.mkdir(mode=0o700)
        for path in sorted(rotated.iterdir()):
            if (folder / path.name).is_file():
                os.replace(folder / path.name, past / path.name)
            os.replace(path, folder / path.name)
        rotated.rmdir()
    return identity.name


def rotate(folder: Path) -> str:
    """Make the keys that are to follow those in a folder, vouched for by the old ones; these stay in force.

    Args:
        folder: the party's own key folder.

    Returns:
        the new request's fingerprint; the request is `next/request.json`.

    Raises:
        InputError: if a rotation is under way, or the keys can't be used.
    """
    identity = load_identity(folder)
    following = folder / _NEXT
    if following.exists():
        raise InputError(
            f"A rotation is under way: {following} is there.",
            "Send its request.json to the registrar, then `lpm keys install`; or remove it.",
        )
    key = Ed25519PrivateKey.generate()
    write_private(following / "identity.key", private_pem(key))
    write_private(following / "tls.key", private_pem(ec.generate_private_key(ec.SECP256R1())))
    statement = b"lpm/succession/v1" + identity.name.encode() + b"\0" + key.public_key().public_bytes_raw()
    old = x509.load_der_x509_certificate(identity.certificate).public_bytes(Encoding.PEM).decode()
    succession = {
        "statement": statement.hex(),
        "old_signature": identity.key.sign(statement).hex(),
        "old_certificate": old,
    }
    write_private(following / SUCCESSION, json.dumps(succession).encode())
    return request_of(following, identity.name, succession)


def revoke(certificates: Sequence[Path], authority: Path) -> int:
    """Take certificates back: write the authority's signed list anew with these added.

    Args:
        certificates: PEM files (identity.pem and tls.pem), or folders that hold both.
        authority: the registrar's folder; its `revoked.pem` is what everybody copies into their key folder.

    Returns:
        how many certificates are on the list.

    Raises:
        InputError: if a file can't be read or was not issued by this authority.
    """
    key, issuer = load_authority(authority)
    path = authority / REVOKED
    now = datetime.now(UTC)
    serials: dict[int, datetime] = {}
    if path.is_file():
        serials = {each.serial_number: each.revocation_date_utc for each in x509.load_pem_x509_crl(path.read_bytes())}
    files = [
        file
        for given in certificates
        for file in ((given / "identity.pem", given / "tls.pem") if given.is_dir() else (given,))
    ]
    for file in files:
        try:
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
            certificate.verify_directly_issued_by(issuer)
        except (OSError, ValueError, TypeError, InvalidSignature):
            raise InputError(f"{file} is no certificate of this authority.", "See its folder `issued`.") from None
        serials.setdefault(certificate.serial_number, now)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now)
        .next_update(now + timedelta(days=365))
        .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
    )
    for serial, when in serials.items():
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
        )
    write_private(path, builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return len(serials)


def _fingerprint(asked: Mapping[str, Any]) -> str:
    content = json.dumps([asked["name"], asked["identity"], asked["tls"]]).encode()
    return hashlib.sha256(b"lpm/request/v1" + content).hexdigest()[:32]


def _private_key(path: Path) -> object:
    try:
        return load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        raise InputError(f"The key {path} can't be read.", "Make keys with `lpm keys new`.") from None


def _read_request(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        asked = json.loads(raw) if len(raw) <= _LIMIT else None
    except (OSError, ValueError, RecursionError):
        asked = None
    wanted = {"name", "identity", "tls"}
    if not isinstance(asked, dict) or not wanted <= set(asked) <= wanted | {"succession"}:
        raise InputError(f"{path} is no request for certificates.", "`lpm keys new` and `lpm keys rotate` write one.")
    if any(not isinstance(asked[name], str) for name in wanted):
        raise InputError(f"{path} is no request for certificates: its fields are texts.")
    return asked


def _requested(path: Path, pem: str, name: str) -> object:
    try:
        found = x509.load_pem_x509_csr(pem.encode())
        names = [str(each.value) for each in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        proven = found.is_signature_valid
    except (ValueError, TypeError):
        raise InputError(f"The request {path} can't be read.") from None
    if not proven or names != [name]:
        raise InputError(f"The request {path} does not prove that {name} holds its keys.", "Certify nothing.")
    return found.public_key()


def _check_succession(path: Path, given: Any, name: str, new: Ed25519PublicKey, authority: Path) -> None:
    refused = InputError(
        f"The request {path} follows another key, and that key's word for it is not valid.",
        "Certify nothing before you have spoken to the party.",
    )
    if not isinstance(given, dict):
        raise refused
    try:
        old = x509.load_pem_x509_certificate(str(given["old_certificate"]).encode())
        old.verify_directly_issued_by(load_authority(authority)[1])
        key = old.public_key()
        names = [str(each.value) for each in old.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        statement = bytes.fromhex(given["statement"])
        if not isinstance(key, Ed25519PublicKey) or names != [name]:
            raise refused
        if statement != b"lpm/succession/v1" + name.encode() + b"\0" + new.public_bytes_raw():
            raise refused
        key.verify(bytes.fromhex(given["old_signature"]), statement)
    except (KeyError, ValueError, TypeError, InvalidSignature):
        raise refused from None
