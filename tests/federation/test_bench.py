"""`lpm bench federation` times real processes, and says so in the agreed names."""

from __future__ import annotations

import json

import pytest

from lpm import cli
from lpm.bench.federation import bench_step
from lpm.errors import InputError


@pytest.mark.parametrize("sharing", ["crypten", "masked"])
def test_rounds_of_real_processes_are_timed(sharing, capfd):
    asked = ["bench", "federation", "--parties", "3", "--words", "500", "--sharing", sharing, "--rounds", "3", "--json"]
    assert cli.main(asked) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["parties"], found["words"], found["sharing"]) == (3, 500, sharing)
    for name in ("round_ms", "party_cpu_ms", "coordinator_cpu_ms", "to_coordinator_ms"):
        assert found[name] > 0, name
    # One copy of 500 words of 8 bytes up and one down, and with additive shares one more of each for the third party.
    copies = {"crypten": 4, "masked": 2}[sharing]
    assert copies * 4000 <= found["bytes_per_party"] < copies * 4000 + 4000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parties", "2"], "`--parties` is 2: a whole number from 3"),
        (["--sharing", "none"], "one of crypten, masked"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments, message, capsys):
    assert cli.main(["bench", "federation", *arguments, "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_a_federated_day_is_timed_against_the_same_people_apart():
    found = bench_step(3, 300, "masked", days=2, repeats=1)
    assert (found["parties"], found["agents_each"], len(found["extra_each_ms"])) == (3, 300, 1)
    assert found["apart_ms"] > 0
    assert found["together_ms"] > 0
    with pytest.raises(InputError, match="whole numbers from 1"):
        bench_step(3, 0)
