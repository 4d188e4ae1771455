"""Fixtures that all tests share: where the known answers and the public figures lie."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import clients  # noqa: F401 - before any test loads gRPC: it restricts TLS for the whole process

# Several processes and threads share few cores: a spinning pool of threads in each would slow all of them.
torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore SIGINT, and so would every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of known-answer vectors (`LPM_VECTORS`, or ../shared/vectors beside the checkout)."""
    folder = Path(os.environ.get("LPM_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not folder.is_dir():
        pytest.skip("no known-answer vectors: name their folder in LPM_VECTORS")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of full public series (`LPM_DATA`, or ../shared/data beside the checkout)."""
    folder = Path(os.environ.get("LPM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no public series: name their folder in LPM_DATA")
    return folder
