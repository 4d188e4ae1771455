"""A tap inside TLS during a whole run of a scenario: simulation, losses, gradients and forecast of three clinics."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import free_port, in_thread
from numpy.typing import NDArray

import clients.party
from clients.config import ClientConfig
from clients.streams import join
from lpm.privacy.crypten_engine import CrypTenSum
from lpm.protocol.identity import make_local_authority
from lpm.protocol.manifest import Terms
from lpm.ring import decode, encode
from lpm.scenario import load
from server.calibrator import FederatedBackend
from server.config import CoordinatorConfig
from server.relay import gather

pytestmark = pytest.mark.timeout(200)

_SCENARIO = Path(__file__).resolve().parents[2] / "simulations" / "three_clinics"
_WINDOW = 4
"""Single small counts turn up by chance; four neighbours in a row do not."""


def _plaintexts(values: Sequence[float] | NDArray[np.float64]) -> Iterator[bytes]:
    """Every way in which somebody might write a few neighbouring numbers."""
    numbers = np.asarray(values, dtype=np.float64)
    for order in "<>":
        yield np.rint(numbers * 2.0**32).astype(f"{order}i8").tobytes()
        yield numbers.astype(f"{order}f8").tobytes()
        yield numbers.astype(f"{order}f4").tobytes()
        whole = np.rint(numbers)
        if (whole == numbers).all() and np.abs(whole).max() < 2**31:
            for width in (2, 4, 8):  # four bytes alone turn up by chance
                if np.abs(whole).max() < 2 ** (8 * width - 1):
                    yield whole.astype(f"{order}i{width}").tobytes()
    for each in (repr, "{:g}".format, "{:.6f}".format, lambda x: str(int(x)) if x == int(x) else repr(x)):
        texts = [each(float(number)) for number in numbers]
        for between in (",", ", ", " ", "\n", "\t", ";"):
            yield between.join(texts).encode()


def _windows(values: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Runs of neighbours with something in them to recognise."""
    flat = values.reshape(-1)
    for start in range(max(0, flat.size - _WINDOW + 1)):
        window = flat[start : start + _WINDOW]
        if np.unique(window[window != 0]).size >= 3:
            yield window


class _Clinics:
    """One tapped run: what was said on the wire and in logs, and what each party put in."""

    def __init__(self, folder: Path) -> None:
        scenario = load(_SCENARIO)
        parties = tuple(scenario.institutions)
        make_local_authority(folder / "keys", parties)
        self.series = {
            name: np.asarray(scenario.observation(name, None).series[0].values, dtype=np.float64) for name in parties
        }
        self.frames: list[bytes] = []
        self.contributions: dict[tuple[int, str], list[NDArray[np.int64]]] = defaultdict(list)
        records: list[str] = []
        address = f"127.0.0.1:{free_port()}"

        def heard(way: str, party: str, frame: bytes) -> None:
            self.frames.append(frame)

        def recorded(opening: str) -> Any:
            original = getattr(CrypTenSum, opening)

            @functools.wraps(original)
            def opened(engine: CrypTenSum, round: Any, words: NDArray[np.int64], *others: Any) -> Any:
                self.contributions[engine.me, round.tensor].append(words.copy())
                return original(engine, round, words, *others)

            return opened

        class Listen(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                records.append(record.getMessage())

        listener = Listen()
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clients.party, "join", functools.partial(join, tap=heard))
            for opening in ("open_to_parties", "open_to_coordinator"):
                patch.setattr(CrypTenSum, opening, recorded(opening))
            logging.getLogger().addHandler(listener)
            try:
                serving = [
                    in_thread(
                        functools.partial(
                            clients.party.serve,
                            ClientConfig(
                                scenario=_SCENARIO,
                                party=name,
                                keys=folder / "keys",
                                out=folder / "run",
                                coordinator=address,
                                release_fit=False,
                            ),
                        )
                    )
                    for name in parties
                ]
                config = CoordinatorConfig(
                    scenario=_SCENARIO,
                    keys=folder / "keys",
                    out=folder / "run",
                    parties=parties,
                    data_address=address,
                )
                terms = Terms(
                    scenario.name,
                    scenario.hash,
                    outputs=tuple(scenario.outputs),
                    gradient="fd",
                    steps=scenario.steps,
                    agents=scenario.agents,
                )
                theta = np.array([[each.value for each in scenario.declared]] * 2) * [[1.0], [1.1]]
                with gather(config, terms, tap=heard) as session:
                    backend = FederatedBackend(session, scenario)
                    self.loss, self.gradient = backend.evaluate(theta, 0, "fd")
                    self.outputs = backend.words(theta, 1)
                    backend.forecast(theta, 2, "posterior")
                for each in serving:
                    each.result(60)
            finally:
                logging.getLogger().removeHandler(listener)
                torch.set_num_threads(threads)
        self.releases = backend.releases
        self.said = b"\x00".join([*self.frames, "\n".join(records).encode()])


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory) -> _Clinics:
    return _Clinics(tmp_path_factory.mktemp("clinics"))


def test_the_run_did_something(clinics: _Clinics) -> None:
    assert np.isfinite(clinics.loss).all() and np.abs(clinics.gradient).max() > 0 and clinics.outputs.any()
    assert {tensor for _, tensor in clinics.contributions} >= {"loss", "gradient", "outputs", "score"}
    assert {party for party, _ in clinics.contributions} == {0, 1, 2}
    assert clinics.releases == {}
    assert sum(map(len, clinics.frames)) > 100_000


def test_no_private_series_is_on_the_wire_or_in_a_log(clinics: _Clinics) -> None:
    for name, series in clinics.series.items():
        windows = list(_windows(series[np.isfinite(series)]))
        assert windows
        found = [each for window in windows for each in _plaintexts(window) if each in clinics.said]
        assert not found, f"the series of {name} can be read off the wire"


def test_no_contribution_is_on_the_wire_or_in_a_log(clinics: _Clinics) -> None:
    looked = 0
    for (party, tensor), contributions in clinics.contributions.items():
        for words in contributions:
            for window in itertools.islice(_windows(decode(words)), 8):
                looked += 1
                found = [each for each in _plaintexts(window) if each in clinics.said]
                assert not found, f"party {party}'s {tensor} can be read off the wire"
    assert looked > 500


def test_no_loss_of_a_party_is_on_the_wire_or_in_a_log(clinics: _Clinics) -> None:
    """Losses and gradients have many digits: here each single number is looked for."""
    looked = 0
    for tensor in ("loss", "gradient", "score"):
        for party in range(3):
            for words in clinics.contributions[party, tensor]:
                for word, number in zip(words.reshape(-1), decode(words).reshape(-1), strict=True):
                    if word % 2**16 == 0:  # a round number has too few digits to be recognised by
                        continue
                    looked += 1
                    patterns = [np.array([word]).astype(f"{order}i8").tobytes() for order in "<>"]
                    patterns += [np.array([number]).astype(f"{order}f8").tobytes() for order in "<>"]
                    patterns += [repr(float(number)).encode(), f"{number:.6f}".encode()]
                    assert not [each for each in patterns if each in clinics.said]
    assert looked > 20


def test_the_search_would_find_what_is_there(clinics: _Clinics) -> None:
    """θ is public and does pass in the clear; so would a series that somebody sent by mistake, in whatever form."""
    theta = np.array([each.value for each in load(_SCENARIO).declared], dtype="<f8").tobytes()
    assert theta in clinics.said
    series = next(iter(clinics.series.values()))
    windows = list(_windows(series))
    for leak in (
        json.dumps(series.tolist()).encode(),
        json.dumps(series.astype(int).tolist()).encode(),
        repr(series.tolist()).encode(),
        "\n".join(str(int(each)) for each in series).encode(),
        series.astype(">f4").tobytes(),
        series.astype("<i2").tobytes(),
        encode(series).tobytes(),
        series.astype("<f4").tobytes(),
    ):
        assert any(each in leak for window in windows for each in _plaintexts(window))
