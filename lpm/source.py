"""What code an institution runs for a scenario, as one hash: what the steward's policy allows by.

The coordinator can't choose what code a client runs (its scenarios come from the institution's own installation); this
says which code that is, so that neither a changed model nor a changed `lpm` answers under a policy written for another.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

__all__ = ["folder_hash", "source_hash"]

_PACKAGES = ("clients", "lpm")
"""What an institution runs besides its scenario."""


def folder_hash(folder: Path) -> str:
    """SHA-256 of the files of a scenario's folder, as hex.

    Series (`observed_*`) are no code: each belongs to one institution, and nobody else's process opens it.

    Args:
        folder: of the scenario.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith(("observed_", ".")) or "__pycache__" in name:
            continue
        if path.is_file() and not name.startswith("."):
            files.append((name, path))
    return _digest(files)


def source_hash(folder: Path) -> str:
    """SHA-256 of all that an institution runs for a scenario, as hex: the scenario's files and those of `lpm`.

    Libraries that `lpm` is built on (torch, numba and so on) are not in it.

    Args:
        folder: of the scenario.
    """
    return hashlib.sha256(f"{folder_hash(folder)} {_installed()}".encode()).hexdigest()


@functools.cache
def _installed() -> str:
    roots = [(package, _root(package)) for package in _PACKAGES]
    return _digest(
        (f"{package}/{path.relative_to(root).as_posix()}", path)
        for package, root in roots
        for path in sorted(root.rglob("*.py"))
    )


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        content = path.read_bytes()
        digest.update(f"{len(name)} {name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _root(package: str) -> Path:
    found = importlib.util.find_spec(package)  # looked up, not imported: `lpm` knows nothing of `clients`
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))
