"""`lpm bench sensitivity` finds all derivatives of the reference workload, and refuses what it can't time."""

from __future__ import annotations

import json

import pytest

from lpm import cli


def test_all_derivatives_of_a_small_workload(capsys):
    assert cli.main(["bench", "sensitivity", "--agents", "10000", "--days", "30", "--parameters", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["derivatives"] == 4 * 30 * 5 and found["executor"] == "cpu" and found["gradient"] == "fd"
    assert found["computing_s"] > 0 and found["peak_rss_mb"] > 0
    elasticities = [value for name, value in found.items() if name.startswith("elasticity_")]
    assert len(elasticities) == 4 and any(elasticities) and found["attack_rate"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--gradient", "auto"], "`--gradient` is auto"), (["--parameters", "9"], "`--parameters` is 9: a whole number")],
)
def test_what_cannot_be_timed_is_refused(arguments, message, capsys):
    assert cli.main(["bench", "sensitivity", "--agents", "100", *arguments, "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]
