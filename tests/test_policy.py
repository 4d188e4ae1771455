"""A site's policy is read strictly and refuses with its own line; its budget survives restarts, never spent twice."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lpm.errors import InputError, PolicyRefused
from lpm.privacy.budget import Budget
from lpm.privacy.policy import PERMISSIVE, Charge, Policy, Question, Request, read_policy

CODE = "c0" * 32
STRICT = f"""\
approval = "rule"

[scenarios]
allowed = [{{ name = "town", code = "{CODE}", settings = "aa" }}]

[session]
institutions = 4
people = 20
engines = ["crypten"]

[outputs]
allowed = ["cases"]
resolution_days = 7

[parameters]
beta = [0.1, 0.4]

[limits]
trajectories = 10
losses = 8
gradients = 20

[privacy]
mode = "outputs"
epsilon = 2.0
delta = 1e-5

[calendar]
days = ["mon", "tue"]
hours = [8, 18]
first = 2026-01-01
last = 2026-12-31
"""
MONDAY = dt.datetime(2026, 11, 23, 10, 0)
REQUEST = Request("town", CODE, "aa", "crypten", 5, 20, ("cases",), 7, "outputs")


def policy(folder: Path, text: str = STRICT) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    return read_policy(path)


def test_what_the_policy_allows_is_let_be(tmp_path: Path) -> None:
    rules = policy(tmp_path)
    rules.judge(REQUEST, MONDAY)
    cost = rules.admit(Question("evaluate", np.full((2, 3), 0.2), ("beta", "b", "c"), "fd"), Charge(), 1.0)
    assert cost == Charge(trajectories=2, losses=2, gradients=6)
    policy(tmp_path, PERMISSIVE).judge(replace(REQUEST, no_disclosure_control=True, public_seed=True), MONDAY)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"scenario": "village"}, "[scenarios] allowed ="),
        ({"code": "c1" * 32}, "[scenarios] allowed ="),
        ({"settings": "ab"}, "[scenarios] allowed ="),
        ({"engine": "masked"}, 'line 9: [session] engines = ["crypten"]'),
        ({"institutions": 3}, "line 7: [session] institutions = 4"),
        ({"people": 19}, "line 8: [session] people = 20"),
        ({"outputs": ("cases", "deaths")}, 'line 12: [outputs] allowed = ["cases"]'),
        ({"resolution_days": 1}, "line 13: [outputs] resolution_days = 7"),
        ({"mode": "none"}, '[privacy] mode = "outputs"'),
        ({"honest": 3}, "privacy.honest (by default)"),
        ({"public_seed": True}, "session.public_seed (by default)"),
        ({"no_disclosure_control": True}, "session.no_disclosure_control (by default)"),
        ({"release_fit": True}, "releases.fit (by default)"),
    ],
)
def test_a_session_outside_the_policy_is_refused_with_its_line(tmp_path: Path, change: dict, line: str) -> None:
    with pytest.raises(PolicyRefused) as refusal:
        policy(tmp_path).judge(replace(REQUEST, **change), MONDAY)
    assert line in refusal.value.message


@pytest.mark.parametrize(
    ("now", "key"),
    [
        (dt.datetime(2026, 11, 25, 10), "days"),
        (dt.datetime(2026, 11, 23, 7, 59), "hours"),
        (dt.datetime(2026, 11, 23, 18, 0), "hours"),
        (dt.datetime(2025, 12, 30, 10), "first"),
        (dt.datetime(2027, 1, 4, 10), "last"),
    ],
)
def test_nothing_is_answered_outside_the_calendar(tmp_path: Path, now: dt.datetime, key: str) -> None:
    with pytest.raises(PolicyRefused, match=rf"\[calendar\] {key} ="):
        policy(tmp_path).judge(REQUEST, now)


@pytest.mark.parametrize(
    ("draws", "spent", "epsilon", "line"),
    [
        (2, Charge(trajectories=9), 0.0, "[limits] trajectories = 10"),
        (2, Charge(losses=7), 0.0, "[limits] losses = 8"),
        (2, Charge(gradients=19), 0.0, "[limits] gradients = 20"),
        (2, Charge(), 2.01, "[privacy] epsilon = 2.0"),
    ],
)
def test_what_goes_over_a_cap_is_refused_and_what_was_charged_before_is_not(
    tmp_path: Path, draws: int, spent: Charge, epsilon: float, line: str
) -> None:
    rules, question = policy(tmp_path), Question("evaluate", np.full((draws, 1), 0.2), ("beta",), "fd")
    with pytest.raises(PolicyRefused) as refusal:
        rules.admit(question, spent, epsilon)
    assert line in refusal.value.message
    assert rules.admit(question, spent, epsilon, charged=True) == Charge()


def test_parameters_out_of_range_are_refused_even_if_charged_before(tmp_path: Path) -> None:
    question = Question("simulate", np.array([[0.1], [0.41]]), ("beta",))
    with pytest.raises(PolicyRefused, match=r"beta = \[0\.1, 0\.4\].*0\.41"):
        policy(tmp_path).admit(question, Charge(), 0.0, charged=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aproval = 'rule'", "aproval is not known: there are label, approval"),
        ("[limits]\nloses = 5", "limits.loses is not known: there are trajectories, losses, gradients"),
        ("[limits]\nlosses = -1", "limits.losses is -1: a whole number from 0"),
        ("[limits]\nlosses = true", "limits.losses is True: a whole number"),
        ("[session]\ninstitutions = 2", "session.institutions is 2: a whole number from 3"),
        ("approval = 'phone'", "approval is 'phone': rule or hand"),
        ("[privacy]\nmode = 'some'", "privacy.mode is 'some': none, outputs, outputs+gradients"),
        ("[privacy]\ndelta = 1.5", "privacy.delta is 1.5"),
        ("[calendar]\ndays = ['someday']", "calendar.days"),
        ("[calendar]\nhours = [18, 8]", "two whole hours"),
        ("[parameters]\nbeta = [0.4, 0.1]", "parameters.beta is [0.4, 0.1]: two numbers"),
        ("[scenarios]\nallowed = [{ name = 'town' }]", "scenarios.allowed"),
        ("[scenarios]\nany = 1", "scenarios.any is 1: true or false"),
        ("[scenarios", "can't be read"),
    ],
)
def test_a_policy_with_a_mistake_is_no_policy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as problem:
        policy(tmp_path, text)
    assert said in problem.value.message and "policy.toml" in problem.value.message


def test_an_empty_policy_allows_no_scenario(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match=r"scenarios\.allowed \(by default\)"):
        policy(tmp_path, "").judge(REQUEST, MONDAY)


def test_a_budget_survives_restarts_and_charges_an_answer_once(tmp_path: Path) -> None:
    path = tmp_path / "steward" / "budget.jsonl"
    cost = Charge(3, 3, 9, {"4.0": 2})
    assert Budget(path).charge("a", cost)
    assert not Budget(path).charge("a", cost)  # a restart, or a repeated task
    assert Budget(path).charge("b", cost)
    assert Budget(path).spent == Charge(6, 6, 18, {"4.0": 4})
    assert Budget(path).charged("a") and not Budget(path).charged("c")
    assert path.stat().st_mode & 0o077 == 0


def test_a_charge_that_a_crash_cut_off_is_void_and_a_damaged_budget_answers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "budget.jsonl"
    Budget(path).charge("a", Charge(1, 1, 1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    assert Budget(path).spent == Charge(1, 1, 1)
    Budget(path).charge("b", Charge(2, 0, 0))
    assert [json.loads(line)["question"] for line in path.read_text().splitlines()] == ["a", "b"]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(InputError, match="damaged in line 1"):
        Budget(path).charge("c", Charge(1, 0, 0))
