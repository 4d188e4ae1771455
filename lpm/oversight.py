"""What a steward asks of the records that a federation leaves: is this ledger whole, who could see what.

It reads files that parties wrote, checks their signatures, and starts nothing.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from lpm.errors import InputError
from lpm.privacy.ledger import Trust, Verdict, verify
from lpm.protocol.identity import verify_certificate

__all__ = ["check_ledger", "fingerprint"]


def fingerprint(certificate: bytes) -> str:
    """The first 16 hex digits of a certificate's SHA-256, by which people compare keys over the telephone."""
    return x509.load_der_x509_certificate(certificate).fingerprint(SHA256()).hex()[:16]


def check_ledger(path: Path, authority: Path | None = None, kept_head: str = "") -> tuple[Verdict, str]:
    """Check a ledger and say by whose word.

    Args:
        path: the ledger, with its head beside it.
        authority: PEM of the authority that certified the party; None: the key in the ledger's first line is believed.
        kept_head: hex digest of a line that was noted elsewhere; "" without.

    Returns:
        what was found, and a sentence on whose key was believed.

    Raises:
        InputError: if a file can't be read.
    """
    trust: Trust | None = None
    if authority is not None:
        try:
            pem = authority.read_bytes()
            x509.load_pem_x509_certificate(pem)
        except (OSError, ValueError):
            raise InputError(f"The authority's certificate {authority} can't be read.", "Give its PEM file.") from None

        def judge(certificate: bytes, party: str, now: datetime) -> None:
            verify_certificate(certificate, party, pem, now)

        trust = judge
    found = verify(path, trust, kept_head.lower())
    keys = ", ".join(fingerprint(each) for each in found.certificates) or "no key"
    if authority is None:
        return found, f"Signed with {keys}: the ledger's own word. Give --authority to check whose key that is."
    return found, f"Signed with {keys}, certified by {authority}."
