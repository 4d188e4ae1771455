"""Checkpoints: what was saved comes back bit for bit, a torn file is told, a full disk and a wrong key lose nothing."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpm.checkpoint import CheckpointStore, DiskFull, atomic_file, atomic_write, pack, unpack
from lpm.errors import CheckpointError, InputError, LpmError

KEY = bytes(range(32))


def tree() -> dict[str, Any]:
    """One of everything a checkpoint may hold."""
    return {
        "step": 12,
        "big": 2**63 - 1,
        "pi": 0.1 + 0.2,
        "infinite": float("inf"),
        "none": None,
        "text": "Brønx",
        "raw": b"\x00\xff",
        "nested": {"list": [1, [2.5, True]], "tuple": (0.9, 0.999)},
        "optimiser": {
            0: {"step": torch.tensor(3.0)},
            1: {"moment": torch.arange(6, dtype=torch.float64).reshape(2, 3)},
        },
        "stages": np.arange(12, dtype=np.int8).reshape(3, 4)[:, ::2],
        "words": np.array([-(2**63), 2**63 - 1], dtype=np.int64),
        "ids": np.array([2**64 - 1], dtype=np.uint64),
        "empty": np.zeros((0, 3)),
        "scalar": np.float32(1.5),
        "generator": torch.Generator().manual_seed(5).get_state(),
        "__lpm__": "a key like the format's own",
    }


def equal(a: Any, b: Any) -> bool:
    """Equal in value and in type, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and np.shape(a) == np.shape(b) and a.tobytes() == b.tobytes()
    return bool(a == b)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond a size: a real write that stops half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("key", [None, KEY])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, key: bytes | None) -> None:
    store = CheckpointStore(tmp_path / "checkpoint", key, "run 1")
    path = store.save(tree(), 12)
    loaded = CheckpointStore(tmp_path / "checkpoint", key, "run 1").latest()
    assert loaded is not None and loaded.step == 12
    assert equal(loaded.content, tree())
    assert path.stat().st_mode & 0o777 == 0o600


def test_arrays_that_come_back_can_be_written_to(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"state": np.zeros(3), "tensor": torch.zeros(3)}, 0)
    content = store.load(0).content
    content["state"][0] = content["tensor"][0] = 1.0
    assert content["state"][0] == 1.0


@pytest.mark.parametrize("value", [object(), {1.5: 1}, np.array([object()]), np.array(["text"]), {1, 2}])
def test_what_can_not_be_kept_is_refused_by_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"content\.party"):
        pack({"party": {"inner": value} if not isinstance(value, dict) else value})


def test_pack_is_the_same_bytes_for_the_same_tree() -> None:
    assert b"".join(pack(tree())) == b"".join(pack(unpack(b"".join(pack(tree())))))


def test_two_are_kept_and_later_ones_of_an_abandoned_past_are_dropped(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    for step in (1, 2, 3):
        store.save({"step": step}, step)
    assert store.steps() == [2, 3]
    store.save({"step": 2, "again": True}, 2)
    assert store.steps() == [2]
    assert store.load(2).content["again"]
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        store.load(3)


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("damage", ["cut", "empty", "first", "step", "digest", "last", "longer"])
def test_a_torn_file_is_told_and_the_one_before_is_used(
    tmp_path: Path, key: bytes | None, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, key)
    store.save({"step": 1}, 1)
    path = store.save({"step": 2}, 2)
    size = path.stat().st_size
    if damage == "cut":
        os.truncate(path, size // 2)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        flip(path, {"first": 0, "step": 16, "digest": 60, "last": size - 1}[damage])
    loaded = store.latest()
    assert loaded is not None and loaded.content == {"step": 1}
    assert "torn" in caplog.text and "The one before it is used" in caplog.text
    flip(tmp_path / "step-000000000001.lpm", 50)
    caplog.clear()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        store.latest()
    assert caplog.text.count("is torn") == 2 and caplog.text.count("The one before it is used") == 1


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_litter(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"step": 1}, 1)
    with room_for(10_000), pytest.raises(DiskFull, match=r"disk is full.*step 1 is intact.*lpm resume") as caught:
        store.save({"state": np.zeros(10_000)}, 2)
    assert isinstance(caught.value, LpmError) and caught.value.exit_code == 3
    assert os.listdir(tmp_path) == ["step-000000000001.lpm"]
    loaded = store.latest()
    assert loaded is not None and loaded.content == {"step": 1}
    store.save({"state": np.zeros(10_000)}, 2)
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_disk_that_fills_at_any_call_leaves_the_old_file(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write(tmp_path / "run.json", b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskFull):
        patch.setattr(os, call, full)
        atomic_write(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_full_disk_that_is_told_in_words_only(tmp_path: Path) -> None:
    with pytest.raises(DiskFull), atomic_file(tmp_path / "outputs.nc"):
        raise OSError("Can't write data (error message = 'No space left on device')")


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"old")
    with pytest.raises(ValueError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise ValueError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be written"):
        atomic_write(tmp_path / "absent" / "a", b"")


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    program = """
import os, sys, numpy as np
from pathlib import Path
from lpm.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
store.save({"step": 1}, 1)
os.replace = lambda *_: os.kill(os.getpid(), 9)
store.save({"step": 2}, 2)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert len(os.listdir(tmp_path)) == 2, "the killed process left its temporary file"
    store = CheckpointStore(tmp_path)
    loaded = store.latest()
    assert loaded is not None and loaded.step == 1
    store.save({"step": 2}, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-000000000001.lpm", "step-000000000002.lpm"]


def test_a_sealed_checkpoint_shows_nothing_and_opens_under_its_key_alone(tmp_path: Path) -> None:
    secret = np.arange(40, dtype=np.int64)
    store = CheckpointStore(tmp_path, KEY, "session")
    path = store.save({"admissions": secret}, 7)
    raw = path.read_bytes()
    assert b"admissions" not in raw and secret.tobytes()[8:40] not in raw
    for other, message in ((bytes(32), "another key"), (None, "no storage key")):
        with pytest.raises(CheckpointError, match=message) as caught:
            CheckpointStore(tmp_path, other, "session").latest()
        assert "admissions" not in str(caught.value)
    with pytest.raises(CheckpointError, match="another run"):
        CheckpointStore(tmp_path, KEY, "another session").latest()
    assert KEY.hex() not in repr(store) and "sealed=True" in repr(store)


def test_a_sealed_checkpoint_is_never_written_twice_under_one_nonce(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, KEY)
    first = store.save({"a": 1}, 1).read_bytes()
    assert store.save({"a": 1}, 1).read_bytes() != first


def test_a_sealed_checkpoint_that_was_renamed_or_forged_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, KEY)
    path = store.save({"a": 1}, 1)
    path.rename(tmp_path / "step-000000000002.lpm")
    with pytest.raises(CheckpointError, match="renamed"):
        store.latest()
    CheckpointStore(tmp_path).save({"a": 2}, 3)
    with pytest.raises(CheckpointError, match="not sealed"):
        store.latest()


def test_a_storage_key_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="32 bytes"):
        CheckpointStore(tmp_path, b"short")
