"""Keys with which Flower's SuperNodes prove who they are to its SuperLink: P-384, registered by hand beforehand.

A party keeps `node.key`; the coordinator keeps each party's public half as `nodes/<party>.pub`. They guard the control
plane only; the data plane is guarded by the certificates.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from lpm.errors import InputError

__all__ = ["collect_node_keys", "node_key", "registered_keys"]


def node_key(folder: Path) -> tuple[Path, bool]:
    """A party's node key, made at its first use.

    Args:
        folder: the party's own key folder.

    Returns:
        The private key's file (OpenSSH format), and whether it was made just now; `node.pub` lies beside it.
    """
    path = folder / "node.key"
    if path.is_file() and (folder / "node.pub").is_file():
        return path, False
    key = ec.generate_private_key(ec.SECP384R1())
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (folder / "node.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return path, True


def collect_node_keys(keys: Path, parties: Sequence[str]) -> None:
    """Give the coordinator every party's public node key, on one machine.

    Args:
        keys: the folder of `lpm keys local`.
        parties: their names.
    """
    nodes = keys / "coordinator" / "nodes"
    nodes.mkdir(mode=0o700, exist_ok=True)
    for party in parties:
        node_key(keys / "parties" / party)
        shutil.copyfile(keys / "parties" / party / "node.pub", nodes / f"{party}.pub")


def registered_keys(folder: Path, parties: Sequence[str]) -> dict[str, Path]:
    """The public node keys the coordinator was given.

    Args:
        folder: the coordinator's own key folder.
        parties: the roster.

    Returns:
        Party → file of its public key.

    Raises:
        InputError: naming the first party whose key is missing, or two parties with one key.
    """
    found: dict[str, Path] = {}
    seen: dict[bytes, str] = {}
    for party in parties:
        path = folder / "nodes" / f"{party}.pub"
        if not path.is_file():
            raise InputError(
                f"{path} is missing: the coordinator does not know the node key of {party}.",
                f"Ask {party} for the node.pub in its key folder (its first `lpm client` makes it), and save it there.",
            )
        public = path.read_bytes().strip()
        if public in seen:
            raise InputError(f"{party} and {seen[public]} have the same node key: each party its own.")
        seen[public] = party
        found[party] = path
    return found
