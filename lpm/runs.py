"""A run is a directory of results: what was asked, what ran, what came out, and what it can be resumed from.

    run.json            command, versions, scenario, seed, parameters, timings, peak memory, world, status …
    processes.json      role, party, pid and address of every process (written by the launcher)
    outputs.nc          time × output, with units (netCDF 4)
    posterior.parquet   one row per posterior draw, one column per parameter
    figures/*.png       report.html
    checkpoint/         what the coordinator (or the one process) goes on from
    parties/<party>/    each party's own checkpoint and log; never read by the coordinator

Every file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import fcntl
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpm.checkpoint import CheckpointStore, atomic_file, atomic_write
from lpm.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["STATUSES", "Run", "active_run", "fresh_path", "jsonable", "versions"]

STATUSES = ("running", "paused", "done", "failed")
"""`paused` and `running` runs can be resumed (a killed one still says `running`); a `done` one is left alone."""
_FORMAT = 1
_owned: dict[Path, int] = {}  # runs this process works on: directory → the descriptor that holds the lock
_active: contextvars.ContextVar[Path | None] = contextvars.ContextVar("active_run", default=None)


class Run:
    """One directory of results. Made by `create` or `open`, never directly.

    Args:
        path: the directory, absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        """The directory."""
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, path: Path | None, command: Mapping[str, Any], scenario: str = "run") -> Run:
        """Begin a run in a directory of its own.

        Args:
            path: the directory, absent or empty. None: a fresh `runs/<scenario>-<n>` under the current folder.
            command: what was asked, as plain values (`Options.to_command`).
            scenario: its name, for the fresh directory.

        Returns:
            The run, with the status `running`.

        Raises:
            InputError: if the directory holds a run or anything else; nothing in it is touched.
            DiskFull: if there is no room.
        """
        if path is None:
            path = fresh_path(scenario)
        else:
            _refuse_occupied(path)
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"`--out` is {path}, which can't be made: {os.strerror(error.errno or 0)}.",
                    "Name a folder you may write to.",
                ) from None
        run = cls(path.resolve())
        run._write(
            {
                "format": _FORMAT,
                "status": "running",
                "command": jsonable(command),
                "scenario": {"name": scenario},
                "versions": versions(),
                "platform": {"system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count()},
                "started": _now(),
            }
        )
        run.claim()
        _active.set(run.path)
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Take up an existing run.

        Raises:
            InputError: if the directory is not a run, or its `run.json` can't be read.
        """
        if not path.is_dir():
            raise InputError(f"There is no run {path}.", "Name the directory that `lpm` printed when the run began.")
        run = cls(path.resolve())
        if not (path / "run.json").is_file():
            raise InputError(f"{path} is not a run: it has no run.json.", "Name the directory of a run.")
        run.record()
        _active.set(run.path)
        return run

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def figures(self) -> Path:
        """The folder of figures, made on first use."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        return str(self.record().get("status", "failed"))

    @property
    def checkpoints(self) -> CheckpointStore:
        """The unsealed checkpoints of the coordinator, or of the one process."""
        return self.checkpoint_store()

    def checkpoint_store(self, key: bytes | None = None, context: str = "") -> CheckpointStore:
        """The checkpoints in `checkpoint/`.

        Args:
            key: 32 bytes to seal them under; None: unsealed.
            context: what they belong to (`CheckpointStore`).
        """
        return CheckpointStore(self.path / "checkpoint", key, context)

    def party(self, name: str) -> Path:
        """A party's own folder, readable by its owner alone.

        Args:
            name: the party, a plain word.

        Raises:
            InputError: if the name could lead outside of the run.
        """
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise InputError(f"The party is called {name!r}: letters, digits, '-', '_' and '.'.")
        folder = self.path / "parties" / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def record(self) -> dict[str, Any]:
        """What `run.json` holds.

        Raises:
            InputError: if it can't be read.
        """
        try:
            record = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            raise InputError(
                f"{self.path / 'run.json'} can't be read.", "Start the run again in a new folder."
            ) from None
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise InputError(f"{self.path} was written by another lpm.", "Use the version named in its run.json.")
        return record

    def processes(self) -> list[dict[str, Any]]:
        """The processes the launcher named; none for a run in one process."""
        try:
            processes = json.loads((self.path / "processes.json").read_text())
        except (OSError, ValueError):
            return []
        if isinstance(processes, dict):
            processes = processes.get("processes", [])
        return [process for process in processes if isinstance(process, dict)]

    def update(self, **fields: Any) -> None:
        """Set fields of `run.json`, whole or not at all, also when several processes do so at once.

        Args:
            fields: name → value. A mapping is merged into the mapping that is there; all else replaces. The status
                `done` or `failed` also notes the time; numpy values become plain ones, NaN and infinities null.

        Raises:
            InputError: for a status that is none of `STATUSES`.
            DiskFull: if there is no room; `run.json` is unchanged.
        """
        if fields.get("status", "done") not in STATUSES:
            raise InputError(f"The status of a run is {fields['status']!r}: one of {', '.join(STATUSES)}.")
        with self._locked():
            record = self.record()
            for name, value in fields.items():
                plain = jsonable(value)
                before = record.get(name)
                record[name] = {**before, **plain} if isinstance(before, dict) and isinstance(plain, dict) else plain
            if fields.get("status") in ("done", "failed"):
                record["ended"] = _now()
            self._write(record)
        if fields.get("status", "running") != "running" and self.owned:
            os.close(_owned.pop(self.path))

    @property
    def owned(self) -> bool:
        """Whether this process works on the run (`claim`)."""
        return self.path in _owned

    def claim(self) -> None:
        """Say that this process works on the run, until the process ends or the status is no longer `running`.

        Raises:
            InputError: if another process does.
        """
        if self.owned:
            return
        handle = os.open(self.path / ".owner", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise InputError(f"Another process is working on {self.path}.", "Wait until it ends, or stop it.") from None
        _owned[self.path] = handle

    def reopen(self) -> None:
        """Say that the run goes on, and count how often it did.

        Raises:
            InputError: if it is done, or another process is working on it.
        """
        record = self.record()
        if record.get("status") == "done":
            raise InputError(f"{self.path} is done: there is nothing to resume.", "Start a new run.")
        self.claim()
        with self._locked():
            record = self.record()
            for past in ("error", "ended"):
                record.pop(past, None)
            record |= {"status": "running", "resumed": int(record.get("resumed", 0)) + 1, "versions": versions()}
            self._write(record)

    def write_outputs(self, outputs: xr.Dataset) -> Path:
        """Write `outputs.nc`.

        Args:
            outputs: one variable per output, each with a `units` attribute; dims time × ….

        Raises:
            ValueError: if a variable has no units.
            DiskFull: if there is no room.
        """
        nameless = [str(name) for name in outputs.data_vars if "units" not in outputs[name].attrs]
        if nameless:
            raise ValueError(f"no units: {', '.join(nameless)}")
        path = self.path / "outputs.nc"
        with atomic_file(path) as temporary:
            outputs.to_netcdf(temporary, engine="h5netcdf")
        return path

    def read_outputs(self) -> xr.Dataset:
        """Read `outputs.nc` into memory."""
        import xarray as xr

        with xr.open_dataset(self._existing("outputs.nc"), engine="h5netcdf") as outputs:
            return outputs.load()

    def write_posterior(self, draws: pd.DataFrame) -> Path:
        """Write `posterior.parquet`.

        Args:
            draws: one row per draw, one column per parameter (and `log_q`, if known).
        """
        return self._write_table("posterior.parquet", draws)

    def write_fits(self, fits: pd.DataFrame) -> Path:
        """Write `fits.parquet`.

        Args:
            fits: released fits, as `lpm.report.tabulate_fits` makes them.
        """
        return self._write_table("fits.parquet", fits)

    def read_fits(self) -> pd.DataFrame:
        """Read `fits.parquet`."""
        return self._read_table("fits.parquet")

    def _write_table(self, name: str, table: pd.DataFrame) -> Path:
        path = self.path / name
        with atomic_file(path) as temporary:
            table.to_parquet(temporary, engine="pyarrow", index=False)
        return path

    def read_posterior(self) -> pd.DataFrame:
        """Read `posterior.parquet`."""
        return self._read_table("posterior.parquet")

    def _read_table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        return pd.read_parquet(self._existing(name))

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{self.path} has no {name}.", f"Its status is {self.status}.")
        return path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, record: Mapping[str, Any]) -> None:
        atomic_write(self.path / "run.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def active_run() -> Path | None:
    """The directory of the run this process last began or took up: for messages and logs."""
    return _active.get()


def fresh_path(scenario: str, root: Path | None = None) -> Path:
    """Make a new directory `<root>/<scenario>-<n>` with the next number.

    Args:
        scenario: its name; characters that folders dislike become `-`.
        root: None: `runs` under the current folder.

    Raises:
        InputError: if the folder can't be written to.
    """
    root = Path("runs") if root is None else root
    stem = re.sub(r"[^\w.-]+", "-", scenario).strip("-.") or "run"
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken = (re.fullmatch(rf"{re.escape(stem)}-(\d+)", entry) for entry in os.listdir(root))
        number = max((int(match.group(1)) for match in taken if match), default=0)
        while True:  # another process may take the same number
            number += 1
            with contextlib.suppress(FileExistsError):
                (root / f"{stem}-{number}").mkdir()
                return root / f"{stem}-{number}"
    except OSError as error:
        raise InputError(
            f"{root} can't be written to: {os.strerror(error.errno or 0)}.", "Name a folder with --out DIR."
        ) from None


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("lpm", "torch", "numpy", "numba", "zuko", "flwr", "grpcio", "crypten", "cryptography", "xarray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def jsonable(value: Any) -> Any:
    """Plain values for JSON.

    Args:
        value: dicts, lists, numbers, text, paths, dates, numpy scalars and arrays.

    Returns:
        The same as dicts with text keys, lists, numbers, text; NaN and infinities, which JSON lacks, as None.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    if type(value).__module__ == "numpy":
        if value.dtype.kind in "mM":
            return jsonable(value.astype(str).tolist())
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} can't be written as JSON")


def _refuse_occupied(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"`--out` is {path}, which is a file: a folder that is new or empty.")
    if (path / "run.json").is_file():
        try:
            status = Run(path).status
        except InputError:
            status = "unreadable"
        remedy = "Name another folder with --out."
        if status in ("running", "paused"):
            remedy = f"Continue it with `lpm resume {path}`, or name another folder with --out."
        raise InputError(f"`--out` is {path}, which holds a run already ({status}).", remedy)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"`--out` is {path}, which holds other files: a folder that is new or empty.",
            "Nothing in it was touched.",
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
