"""Is this machine fit for a run? Each check says what it found, whether that is well, and the remedy if not.

The checks look and change nothing, apart from opening a loopback port for a moment. `lpm doctor` shows them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

__all__ = ["Check", "examine", "examine_keys", "worst"]

Verdict = Literal["ok", "warn", "fail"]

_EXPIRES_SOON = timedelta(days=30)
_CLOCK_SLACK_SECONDS = 2.0
_MEMORY_GIB = 6.0
_DISK_GIB = 1.0
_PLACES = ("authority", "coordinator")
_CERTIFICATES = (("tls.pem", "tls.key"), ("identity.pem", "identity.key"))


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Args:
        subject: what was looked at.
        verdict: "ok", "warn" (works, but) or "fail" (won't work).
        finding: what was found, in a few words.
        remedy: what to do; "" if all is well.
    """

    subject: str
    verdict: Verdict
    finding: str
    remedy: str = ""


def worst(checks: Sequence[Check]) -> Verdict:
    """The worst verdict among checks.

    Args:
        checks: some, or none.

    Returns:
        "fail" if any failed, else "warn" if any warned, else "ok".
    """
    verdicts = {check.verdict for check in checks}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "ok"


def examine(keys: Path | None = None, *, folder: Path | None = None, now: datetime | None = None) -> list[Check]:
    """Check this installation, this machine and, if named, a key folder.

    Args:
        keys: a party's key folder, the coordinator's, or the folder of `lpm keys local`.
        folder: where runs will be written; None: the working folder.
        now: the time to judge certificates by; None: this machine's clock.

    Returns:
        The checks, in the order they were made; none of them raises.
    """
    checks = [_guarded("Python", _python)]
    checks += _packages()
    checks += [
        _guarded("CrypTen", _crypten),
        _guarded("Flower", _flower),
        _guarded("loopback", _loopback),
        _guarded("host name", _host_name),
        _guarded("clock", _clock),
        _guarded("processors", _processors),
        _guarded("memory", _memory),
        _guarded("disk", lambda: _disk(folder or Path.cwd())),
    ]
    if keys is not None:
        checks += examine_keys(keys, now=now)
    return checks


def examine_keys(keys: Path, *, now: datetime | None = None) -> list[Check]:
    """Check key files: present, private, matching, from the authority beside them, and not about to expire.

    Args:
        keys: a party's key folder, the coordinator's, or the folder of `lpm keys local`.
        now: the time to judge by; None: this machine's clock.

    Returns:
        The checks.
    """
    now = now or datetime.now(UTC)
    if not keys.is_dir():
        return [Check("keys", "fail", f"{keys} is no folder", "Make keys with `lpm keys local DIR --parties A,B,C`.")]
    if (keys / "tls.pem").is_file():
        return list(_key_folder(keys, keys.resolve().name, now))
    folders = [keys / "coordinator", *sorted((keys / "parties").glob("*"))]
    found = [folder for folder in folders if folder.is_dir()]
    if not found:
        return [Check("keys", "fail", f"{keys} holds no keys", "Make keys with `lpm keys local DIR --parties A,B,C`.")]
    checks = [check for folder in found for check in _key_folder(folder, folder.name, now)]
    if (keys / "authority" / "authority.key").is_file():
        checks += list(_private(keys / "authority" / "authority.key"))
        if len(found) > 1:
            checks.append(
                Check(
                    "keys",
                    "warn",
                    "all parties' keys are in one folder, with the authority's",
                    "Right for a trial on one machine; in earnest each party makes and keeps its own.",
                )
            )
    return checks


def _guarded(subject: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as problem:  # a doctor that falls ill helps nobody
        return Check(subject, "warn", f"can't be checked here ({type(problem).__name__})")


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()} at {sys.prefix}"
    if (3, 11) <= sys.version_info < (3, 13):
        return Check("Python", "ok", found)
    return Check("Python", "fail", found, "Use Python 3.11 or 3.12.")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in metadata.requires("lpm") or []]
    except metadata.PackageNotFoundError:
        yield Check("lpm", "fail", "is not installed", "Run `./run.sh`, or `pip install -e .` in the project's folder.")
        return
    yield Check("lpm", "ok", metadata.version("lpm"))
    for requirement in needed:
        extra = bool(requirement.marker and not requirement.marker.evaluate({"extra": ""}))
        if extra and not requirement.marker.evaluate({"extra": "mpc"}):  # type: ignore[union-attr]
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            remedy = "Install the extra: `pip install -e '.[mpc]'`." if extra else "Run `./run.sh`, which installs it."
            yield Check(requirement.name, "fail", "is not installed", remedy)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check(requirement.name, "ok", found)
        else:
            yield Check(
                requirement.name, "fail", f"{found}, not {requirement.specifier}", "Run `./run.sh`, which installs it."
            )


def _crypten() -> Check:
    if importlib.util.find_spec("crypten") is None:
        return Check("CrypTen", "fail", "is not installed", "Install the extra: `pip install -e '.[mpc]'`.")
    try:
        importlib.import_module("lpm.privacy.crypten_engine")
    except ImportError as problem:
        missing = problem.name or "a part of it"
        return Check("CrypTen", "fail", f"can't be imported ({missing} is missing)", "Install the extra mpc anew.")
    return Check("CrypTen", "ok", "can be imported")


def _flower() -> Check:
    folder = Path(sys.executable).parent
    names = ("flower-superlink", "flower-supernode")
    missing = [name for name in names if not (folder / name).exists() and shutil.which(name) is None]
    if missing:
        return Check(
            "Flower", "fail", f"{' and '.join(missing)} not found", "Reinstall flwr, or use `--control streams`."
        )
    return Check("Flower", "ok", "SuperLink and SuperNode are there")


def _loopback() -> Check:
    with socket.socket() as listener, socket.socket() as caller:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            caller.settimeout(2.0)
            caller.connect(listener.getsockname())
            answered, _ = listener.accept()
        except OSError as problem:
            return Check(
                "loopback", "fail", f"127.0.0.1 can't be used ({problem.strerror})", "Allow local connections."
            )
        answered.close()
    proxies = [name for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy") if _proxied(name)]
    if proxies:
        return Check(
            "loopback", "warn", f"{', '.join(proxies)} also covers 127.0.0.1", "Set no_proxy=localhost,127.0.0.1."
        )
    return Check("loopback", "ok", "free ports on 127.0.0.1")


def _proxied(name: str) -> bool:
    spared = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    return bool(os.environ.get(name) or os.environ.get(name.upper())) and not {"127.0.0.1", "*"} & set(spared)


def _host_name() -> Check:
    try:
        socket.getaddrinfo("localhost", None)
    except OSError:
        return Check("host name", "warn", "localhost is not known", "Add `127.0.0.1 localhost` to the hosts file.")
    return Check("host name", "ok", "localhost is known")


def _clock() -> Check:
    now = datetime.now(UTC)
    built = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    if now < built - timedelta(days=1):
        return Check(
            "clock", "fail", f"says {now:%Y-%m-%d}, before this program was written", "Set it, or switch NTP on."
        )
    steady, wall = time.monotonic(), time.time()
    time.sleep(0.05)
    jump = abs((time.time() - wall) - (time.monotonic() - steady))
    if jump > _CLOCK_SLACK_SECONDS:
        return Check("clock", "warn", "jumps", "Switch NTP on: certificates and time stamps depend on it.")
    return Check("clock", "ok", f"{now:%Y-%m-%d %H:%M} UTC")


def _processors() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Check("processors", "warn", "1", "A federation of five on one machine wants at least 2.")
    return Check("processors", "ok", str(count))


def _memory() -> Check:
    import psutil

    from lpm.memory import available

    free, total = available() / 2**30, psutil.virtual_memory().total / 2**30
    finding = f"{free:.1f} GiB free of {total:.1f}"
    if free < _MEMORY_GIB:
        return Check("memory", "warn", finding, "The five boroughs on one machine want 6 GiB; close other programs.")
    return Check("memory", "ok", finding)


def _disk(folder: Path) -> Check:
    place = folder
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Check("disk", "fail", f"{place} can't be written to", "Name another folder with `--out`.")
    free = shutil.disk_usage(place).free / 2**30
    if free < _DISK_GIB:
        return Check("disk", "warn", f"{free:.1f} GiB free at {place}", "A run with checkpoints wants 1 GiB.")
    return Check("disk", "ok", f"{free:.0f} GiB free at {place}")


def _key_folder(folder: Path, name: str, now: datetime) -> Iterator[Check]:
    files = ["authority.pem", *(file for pair in _CERTIFICATES for file in pair)]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        yield Check(
            f"keys of {name}",
            "fail",
            f"{', '.join(missing)} missing in {folder}",
            "Copy the whole key folder, or make a new one with `lpm keys local`.",
        )
        return
    private = [*(key for _, key in _CERTIFICATES), "storage.key", "node.key", "authority.key"]
    faults = [check for file in private if (folder / file).is_file() for check in _private(folder / file)]
    yield from faults
    try:
        authority = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    except (OSError, ValueError):
        yield Check(f"keys of {name}", "fail", f"{folder / 'authority.pem'} is no certificate", "Copy it anew.")
        return
    certificates = [_certificate(folder, file, key, authority, now) for file, key in _CERTIFICATES]
    certificates.append(_validity(f"authority of {name}", authority, now))
    bad = [check for check in certificates if check.verdict != "ok"]
    yield from bad
    if not bad and not faults:
        yield Check(f"keys of {name}", "ok", certificates[0].finding)


def _private(path: Path) -> Iterator[Check]:
    if os.name == "posix" and path.stat().st_mode & 0o077:
        yield Check(str(path), "fail", "can be read by other users", f"chmod 600 {path}")


def _certificate(folder: Path, file: str, key_file: str, authority: x509.Certificate, now: datetime) -> Check:
    subject = str(folder / file)
    try:
        certificate = x509.load_pem_x509_certificate((folder / file).read_bytes())
        key = load_pem_private_key((folder / key_file).read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        return Check(subject, "fail", "can't be read, or its key can't", "Have the party's keys made anew.")
    if certificate.public_key() != key.public_key():
        return Check(subject, "fail", f"does not belong to {key_file}", "Have the party's keys made anew.")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return Check(
            subject, "fail", "was not issued by the authority.pem beside it", "Use one authority for the federation."
        )
    return _validity(subject, certificate, now)


def _validity(subject: str, certificate: x509.Certificate, now: datetime) -> Check:
    until = certificate.not_valid_after_utc
    if now > until:
        return Check(subject, "fail", f"expired on {until:%Y-%m-%d}", "Have it certified anew, or set the clock.")
    if now < certificate.not_valid_before_utc:
        start = certificate.not_valid_before_utc
        return Check(subject, "fail", f"is valid only from {start:%Y-%m-%d %H:%M} UTC", "Set this machine's clock.")
    if until - now < _EXPIRES_SOON:
        return Check(subject, "warn", f"expires on {until:%Y-%m-%d}", "Have it certified anew.")
    return Check(subject, "ok", f"valid until {until:%Y-%m-%d}")
