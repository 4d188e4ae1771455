"""Identities: who a party is, certified by an authority out of band, and the keys it proves it with.

Each party has an Ed25519 identity, which signs, and a P-256 TLS key, which carries its connection; one authority
certifies both. `make_local_authority` makes them all on one machine, for trials and tests; in earnest every party
makes its own keys and sends the authority only a request.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lpm.errors import InputError, SessionRefused

__all__ = [
    "COORDINATOR",
    "REVOKED",
    "Identity",
    "certify_keys",
    "load_authority",
    "load_identity",
    "make_authority",
    "make_local_authority",
    "private_pem",
    "require_party_name",
    "verify_certificate",
    "verify_signature",
    "write_private",
]

COORDINATOR = "coordinator"
"""The name in the coordinator's certificates; no party may bear it."""

REVOKED = "revoked.pem"
"""The authority's list of certificates that count no more, in a key folder; it is optional."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_CLOCK_SLACK = timedelta(minutes=5)


def require_party_name(name: str) -> None:
    """Refuse a name that can't stand in a certificate or a path.

    Args:
        name: a party's name.

    Raises:
        InputError: naming it and what would be accepted.
    """
    if not _NAME.fullmatch(name) or name.lower() == COORDINATOR:
        raise InputError(
            f"The party name {name!r} can't be used: 1 to 63 letters, digits, - and _, beginning with a letter or"
            f" digit, and not {COORDINATOR!r}."
        )


@dataclass(frozen=True, repr=False)
class Identity:
    """One party's (or the coordinator's) own keys and certificates.

    Args:
        name: as certified.
        certificate: DER of its identity certificate.
        authority: PEM of the authority that both sides trust.
        tls_certificate: PEM for its connections.
        tls_key: PEM of the private key for its connections.
        key: signs in its name.
        revoked: serial numbers of certificates that the authority has taken back.
    """

    name: str
    certificate: bytes
    authority: bytes
    tls_certificate: bytes
    tls_key: bytes
    key: Ed25519PrivateKey
    revoked: frozenset[int] = frozenset()

    def __repr__(self) -> str:
        return f"Identity({self.name})"

    def sign(self, purpose: bytes, message: bytes) -> bytes:
        """Sign a message for one purpose.

        Args:
            purpose: a label, so that a signature made for one thing proves nothing else.
            message: what is signed.

        Returns:
            64 bytes.
        """
        return self.key.sign(_framed(purpose, message))


def _framed(purpose: bytes, message: bytes) -> bytes:
    return b"lpm/signature/v1" + len(purpose).to_bytes(2, "big") + purpose + message


def verify_signature(key: Ed25519PublicKey, name: str, purpose: bytes, message: bytes, signature: bytes) -> None:
    """Check a signature.

    Args:
        key: the signer's certified key.
        name: the signer, for the message.
        purpose: the label it must have been made for.
        message: what was signed.
        signature: 64 bytes.

    Raises:
        SessionRefused: naming the signer and the purpose.
    """
    try:
        key.verify(signature, _framed(purpose, message))
    except InvalidSignature:
        raise SessionRefused(f"The signature of {name} on the {purpose.decode()} is not valid.") from None


def verify_certificate(
    certificate: bytes, name: str, authority: bytes, now: datetime, revoked: frozenset[int] = frozenset()
) -> Ed25519PublicKey:
    """Check that an identity certificate is the named one's, from this authority, and valid now.

    Args:
        certificate: DER.
        name: who it must belong to.
        authority: PEM of the trusted authority.
        now: the time to judge by.
        revoked: serial numbers that the authority has taken back.

    Returns:
        The certified key.

    Raises:
        SessionRefused: naming the party and what is wrong.
    """
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        _check(parsed, name, "identity", x509.load_pem_x509_certificate(authority), now)
        if parsed.serial_number in revoked:
            raise SessionRefused(
                f"The identity certificate of {name} was revoked by the authority.",
                "It needs a new key, certified anew: `lpm keys rotate`.",
            )
    except SessionRefused:
        raise
    except Exception as problem:  # the parser has many ways to refuse what a stranger sent
        raise SessionRefused(f"The identity certificate of {name} can't be read ({type(problem).__name__}).") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SessionRefused(f"The identity certificate of {name} holds no Ed25519 key.")
    return key


def _check(certificate: x509.Certificate, name: str, use: str, authority: x509.Certificate, now: datetime) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
        trusted = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        issued = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        trusted, issued = False, True
    if not trusted or issued:
        raise SessionRefused(
            f"The {use} certificate of {name} was not issued by this federation's authority.",
            "Use the keys that the authority certified, or its authority.pem.",
        )
    for part, whose in ((certificate, f"The {use} certificate of {name}"), (authority, "The authority's certificate")):
        if now > part.not_valid_after_utc:
            raise SessionRefused(
                f"{whose} expired on {part.not_valid_after_utc:%Y-%m-%d}.",
                "Have it certified anew, or check this machine's clock.",
            )
        if now < part.not_valid_before_utc - _CLOCK_SLACK:
            raise SessionRefused(
                f"{whose} is valid only from {part.not_valid_before_utc:%Y-%m-%d %H:%M} UTC.",
                "Check this machine's clock.",
            )
    names = [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name]:
        raise SessionRefused(f"The {use} certificate shown for {name} belongs to {', '.join(names) or 'nobody'}.")


def load_identity(folder: Path, name: str | None = None, now: datetime | None = None) -> Identity:
    """Read a key folder and check it.

    Args:
        folder: holds tls.pem, tls.key, identity.pem, identity.key and authority.pem.
        name: who it must belong to; by default whoever its identity certificate names.
        now: the time to judge by; by default this machine's clock.

    Returns:
        The identity.

    Raises:
        InputError: if a file is missing, unreadable, or open to other users.
        SessionRefused: if a certificate is expired, from another authority, or somebody else's.
    """
    now = now or datetime.now(UTC)
    files = {}
    for file in ("authority.pem", "identity.pem", "identity.key", "tls.pem", "tls.key"):
        path = folder / file
        try:
            files[file] = path.read_bytes()
        except OSError as problem:
            raise InputError(
                f"The key file {path} can't be read: {problem.strerror}.",
                "Make keys with `lpm keys local`, or name their folder.",
            ) from None
        if file.endswith(".key") and path.stat().st_mode & 0o077:
            raise InputError(f"The key file {path} can be read by other users.", f"chmod 600 {path}")
    try:
        authority = x509.load_pem_x509_certificate(files["authority.pem"])
        identity = x509.load_pem_x509_certificate(files["identity.pem"])
        tls = x509.load_pem_x509_certificate(files["tls.pem"])
        key = load_pem_private_key(files["identity.key"], password=None)
        tls_key = load_pem_private_key(files["tls.key"], password=None)
    except (ValueError, TypeError):
        raise InputError(f"A file in {folder} is not a PEM certificate or an unencrypted PEM key.") from None
    if name is None:
        names = identity.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = str(names[0].value) if names else ""
    _check(identity, name, "identity", authority, now)
    _check(tls, name, "TLS", authority, now)
    if not isinstance(key, Ed25519PrivateKey) or key.public_key() != identity.public_key():
        raise InputError(f"{folder / 'identity.key'} is not the Ed25519 key that identity.pem certifies.")
    if tls_key.public_key() != tls.public_key():
        raise InputError(f"{folder / 'tls.key'} is not the key that tls.pem certifies.")
    der = identity.public_bytes(Encoding.DER)
    revoked = _read_revoked(folder / REVOKED, authority)
    if revoked & {identity.serial_number, tls.serial_number}:
        raise SessionRefused(f"The certificates in {folder} were revoked by the authority.", "Have new keys certified.")
    return Identity(name, der, files["authority.pem"], files["tls.pem"], files["tls.key"], key, revoked)


def _read_revoked(path: Path, authority: x509.Certificate) -> frozenset[int]:
    try:
        found = x509.load_pem_x509_crl(path.read_bytes())
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError):
        raise InputError(f"The list of revoked certificates {path} can't be read.") from None
    if not found.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]
        raise InputError(f"The list of revoked certificates {path} was not signed by this federation's authority.")
    return frozenset(each.serial_number for each in found)


def make_local_authority(
    folder: Path,
    parties: Sequence[str],
    *,
    days: float = 365.0,
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
    now: datetime | None = None,
) -> None:
    """Make an authority, the coordinator's keys and each party's, all in one folder.

    Args:
        folder: a new or empty folder.
        parties: their names, each once.
        days: how long the certificates are valid.
        hosts: names and addresses of the coordinator's machine, for its TLS certificate.
        now: when they begin to be valid; by default now.

    Raises:
        InputError: for a name that can't be used or is given twice, or a folder that holds keys already.
    """
    for name in parties:
        require_party_name(name)
    twice = sorted({name for name in parties if sum(name.lower() == other.lower() for other in parties) > 1})
    if twice:
        raise InputError(f"The party {twice[0]} is named twice: each party once.")
    if not days > 0:
        raise InputError(f"`--days` is {days}: more than 0.")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: keys are never overwritten.", "Name a new folder.")
    now = now or datetime.now(UTC)
    until = now + timedelta(days=days)
    make_authority(folder / "authority", days=days, now=now)
    authority_key, authority = load_authority(folder / "authority")
    pem = authority.public_bytes(Encoding.PEM)
    places = [(COORDINATOR, folder / COORDINATOR), *((name, folder / "parties" / name) for name in parties)]
    for name, place in places:
        identity_key, tls_key = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
        identity, tls = certify_keys(
            name, identity_key.public_key(), tls_key.public_key(), authority_key, authority, now, until, hosts
        )
        write_private(place / "authority.pem", pem)
        write_private(place / "identity.pem", identity.public_bytes(Encoding.PEM))
        write_private(place / "identity.key", private_pem(identity_key))
        write_private(place / "tls.pem", tls.public_bytes(Encoding.PEM))
        write_private(place / "tls.key", private_pem(tls_key))
        write_private(place / "storage.key", secrets.token_bytes(32))


def make_authority(folder: Path, *, days: float = 365.0, now: datetime | None = None) -> None:
    """Make an authority's key and certificate, in a folder that is to be kept offline.

    Args:
        folder: a new or empty folder.
        days: how long it is valid.
        now: when it begins to be valid; by default now.

    Raises:
        InputError: if the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: keys are never overwritten.", "Name a new folder.")
    now = now or datetime.now(UTC)
    until = now + timedelta(days=days)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lpm local authority")])
    authority = (
        _builder(subject, subject, authority_key.public_key(), now, until, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .sign(authority_key, SHA256())
    )
    write_private(folder / "authority.pem", authority.public_bytes(Encoding.PEM))
    write_private(folder / "authority.key", private_pem(authority_key))


def load_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Read an authority's key and certificate.

    Raises:
        InputError: if they are not there or don't belong together.
    """
    try:
        certificate = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
        key = load_pem_private_key((folder / "authority.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{folder} holds no authority.", "Make one with `lpm keys authority DIR`, on the registrar's own machine."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise InputError(f"{folder / 'authority.key'} is not the key that authority.pem certifies.")
    return key, certificate


def certify_keys(
    name: str,
    identity_key: Ed25519PublicKey,
    tls_key: ec.EllipticCurvePublicKey,
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    now: datetime,
    until: datetime,
    hosts: Sequence[str] = (),
) -> tuple[x509.Certificate, x509.Certificate]:
    """Certify a party's two public keys.

    Args:
        name: whose they are.
        identity_key: that it signs with.
        tls_key: of its connections.
        authority_key: the authority's own.
        authority: its certificate.
        now: when the certificates begin to be valid.
        until: when they end.
        hosts: names and addresses of the coordinator's machine; used for the coordinator alone.

    Returns:
        the identity's certificate and that for TLS.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    identity = (
        _builder(subject, authority.subject, identity_key, now, until, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(authority_key, SHA256())
    )
    use = ExtendedKeyUsageOID.SERVER_AUTH if name == COORDINATOR else ExtendedKeyUsageOID.CLIENT_AUTH
    own_names = [x509.DNSName(name), *(map(_general_name, hosts) if name == COORDINATOR else ())]
    tls = (
        _builder(subject, authority.subject, tls_key, now, until, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.SubjectAlternativeName(own_names), critical=False)
        .sign(authority_key, SHA256())
    )
    return identity, tls


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | Ed25519PublicKey,
    start: datetime,
    until: datetime,
    authority: ec.EllipticCurvePublicKey,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _CLOCK_SLACK)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not signs,
        crl_sign=not signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """A private key as unencrypted PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can open."""
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)  # born private: no moment at which another user could open it
    path.chmod(0o600)
    path.write_bytes(content)
