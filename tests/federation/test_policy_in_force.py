"""A policy in force at real parties: refusals reach both sides with their line, a question has one answer, people may
stay out, and the kill switch stops everything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.config import ClientConfig
from clients.shard import Shard
from clients.steward import Steward
from lpm.errors import InputError, PolicyRefused
from lpm.oversight import approve, manifest_diff, manifest_rows, read_manifest
from lpm.privacy.ledger import verify
from lpm.privacy.memory_channel import MemoryHub
from lpm.privacy.policy import PERMISSIVE
from lpm.protocol.identity import load_identity, make_local_authority
from lpm.protocol.manifest import Entry, Manifest, Terms
from lpm.protocol.messages import Task
from lpm.scenario import load
from lpm.worlds.federated import FederatedWorld
from tests.e2e.processes import CLINICS, ended
from tests.federation.harness import federate

PARTIES = ("north", "south", "west")
THETA = np.array([[0.5, 0.05, 0.6], [0.4, 0.05, 0.6]])
TASK = Task("evaluate", 3, THETA, "fd", None, {"estimator": "fd", "replicates": 1})
SCENARIO = load(CLINICS).with_options(steps=6, agents=240)


def shard(folder: Path, name: str, **changes: Any) -> Shard:
    """A party's people and series, as a session makes them."""
    settings = {"seed": 5, "key": b"k" * 32, "data": None, "every": 0, "calibrates": True} | changes
    return Shard(SCENARIO, [name], folder=folder / name, **settings)


def session(shards: Sequence[Shard], task: Task) -> tuple[dict[str, np.ndarray], list[dict], MemoryHub]:
    """All parties do a task; what the coordinator opened, and what each party noted of its openings."""
    noted: list[dict] = []

    def work(each: Shard) -> Any:
        def act(world: FederatedWorld) -> None:
            each.perform(task, world, consents=False)
            noted.append(dict(world.opened))

        return act

    _, hub = federate([work(each) for each in shards])
    return {round.tensor: total for round, total in hub.totals.items()}, noted, hub


def test_the_same_question_has_one_answer_also_after_a_restart(tmp_path: Path) -> None:
    first, noted, _ = session([shard(tmp_path, name) for name in PARTIES], TASK)
    assert any(tensor.startswith("emit") for tensor, _ in noted[0])
    # θ within 2^-20 is the same question: the kept answer, and no simulation.
    near = Task("evaluate", 3, THETA + 1e-8, "fd", None, dict(TASK.options))
    again, noted, _ = session([shard(tmp_path, name) for name in PARTIES], near)
    assert {tensor for tensor, _ in noted[0]} == {"answered", "loss", "gradient"}
    for name in ("loss", "gradient"):
        np.testing.assert_array_equal(first[name], again[name])
    other, noted, _ = session([shard(tmp_path, name) for name in PARTIES], Task("evaluate", 3, THETA + 1e-4, "fd"))
    assert len(noted[0]) > 3 and not np.array_equal(first["loss"], other["loss"])


def test_a_question_whose_answer_has_changed_is_not_answered_twice(tmp_path: Path) -> None:
    session([shard(tmp_path, name) for name in PARTIES], TASK)
    # South forgot its answers, so all simulate again, at parameters that are another question only below 2^-20.
    for path in sorted((tmp_path / "south" / "answers").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    near = Task("evaluate", 3, THETA + 1e-8, "fd", None, dict(TASK.options))
    with pytest.raises(PolicyRefused, match="answered before"):
        session([shard(tmp_path, name) for name in PARTIES], near)


def test_other_people_series_or_seeds_make_another_question(tmp_path: Path) -> None:
    plain = shard(tmp_path, "north")
    near = Task("evaluate", 3, THETA + 1e-8, "fd", None, dict(TASK.options))
    assert plain.question(TASK) == plain.question(near)
    others = [shard(tmp_path, "north", **change) for change in ({"seed": 6}, {"left_out": (256,)}, {"key": b"l" * 32})]
    others += [shard(tmp_path, "south"), shard(tmp_path, "north", calibrates=False)]
    questions = {each.question(TASK) for each in [plain, *others]}
    questions.add(plain.question(Task("evaluate", 4, THETA, "fd", None, dict(TASK.options))))
    assert len(questions) == 7


def test_people_who_opted_out_are_not_there_and_change_nobody_else(tmp_path: Path) -> None:
    model = SCENARIO.build(["north"], seed=0)
    ids = model.population.addresses
    gone = ids[[0, 5, 17]]
    rest = model.without(gone)
    assert rest.population.agents == model.population.agents - 3
    assert not np.isin(rest.population.addresses, gone).any()
    stay = ~np.isin(ids, gone)
    for network in model.networks:
        before, after = np.asarray(network.of)[stay], np.asarray(rest.network(network.name).of)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(before, after)
    assert model.without(np.array([2**60], dtype=np.uint64)) is model
    # In a federation the opened census has three people fewer.
    shards = [shard(tmp_path, name) for name in PARTIES[1:]]
    shards.insert(0, shard(tmp_path, "north", left_out=[int(each) for each in gone]))
    totals, _, _ = session(shards, Task("simulate", 1, THETA[:1], options={"plain": True}))
    assert totals["outputs"].size == 2 * SCENARIO.steps


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "local"
    make_local_authority(folder, PARTIES)
    return folder


def steward(keys: Path, folder: Path, policy: str) -> Steward:
    """North's, under a policy."""
    (folder / "policy").mkdir(exist_ok=True)
    (folder / "policy" / "policy.toml").write_text(policy)
    config = ClientConfig(
        scenario=CLINICS, party="north", keys=keys, out=folder, policy=folder / "policy" / "policy.toml"
    )
    config.folder.mkdir(parents=True, exist_ok=True)
    return Steward(config, load_identity(keys / "parties" / "north"), SCENARIO)


def test_a_budget_is_spent_over_sessions_and_a_refusal_is_in_the_ledger(keys: Path, tmp_path: Path) -> None:
    policy = PERMISSIVE + "\n[limits]\nlosses = 5\n"
    world = federate([lambda world: world] * 3)[0][0]
    steward(keys, tmp_path, policy).admit(TASK, world, "one")
    again = steward(keys, tmp_path, policy)  # a new session
    again.admit(TASK, world, "one")  # the same question costs nothing again
    again.admit(TASK, world, "two")
    assert again.budget.spent.losses == 4
    with pytest.raises(PolicyRefused, match=r"\[limits\] losses = 5"):
        steward(keys, tmp_path, policy).admit(TASK, world, "three")
    assert again.budget.spent.losses == 4
    found = verify(tmp_path / "parties" / "north" / "ledger.jsonl")
    assert not found.problems
    kinds = [entry.kind for entry in found.entries]
    assert kinds == ["open", "task", "task", "task", "refused"]
    assert "losses = 5" in found.entries[-1].body["why"]
    assert found.entries[2].body["answered_before"] and not found.entries[3].body["answered_before"]


def test_the_kill_switch_stops_answers_in_the_middle_of_a_task(keys: Path, tmp_path: Path) -> None:
    rules = steward(keys, tmp_path, PERMISSIVE)
    shards = [shard(tmp_path, name) for name in PARTIES]

    def north(world: FederatedWorld) -> None:
        world._guard = lambda: (rules.watch(), (tmp_path / "policy" / "stop").touch())[0]
        shards[0].perform(TASK, world, consents=False)

    others = [lambda world, each=each: each.perform(TASK, world, consents=False) for each in shards[1:]]
    with pytest.raises(PolicyRefused, match="has stopped all answers"):
        federate([north, *others])
    assert rules.ledger.lines == 2
    (tmp_path / "policy" / "stop").unlink()
    rules.watch()


def test_a_list_of_people_that_cant_be_read_stops_before_anything_and_quotes_nobody(keys: Path, tmp_path: Path) -> None:
    policy = PERMISSIVE + '\n[people]\nopt_out = "gone.txt"\n'
    with pytest.raises(InputError, match=r"gone\.txt"):
        steward(keys, tmp_path, policy)
    (tmp_path / "policy" / "gone.txt").write_text("12 # a person\n\n7\nMary Miller\n")
    with pytest.raises(InputError, match=r"line 4") as problem:
        steward(keys, tmp_path, policy)
    assert "Mary" not in str(problem.value)
    (tmp_path / "policy" / "gone.txt").write_text("12 # a person\n7\n")
    assert steward(keys, tmp_path, policy).left_out == (7, 12)


def test_what_waits_for_approval_is_signed_for_these_terms_by_this_party_alone(keys: Path, tmp_path: Path) -> None:
    identities = {name: load_identity(keys / "parties" / name) for name in PARTIES}
    terms = Terms("three_clinics", SCENARIO.hash, outputs=tuple(SCENARIO.outputs), steps=6, agents=240)

    def shown(session: bytes, **changes: Any) -> Manifest:
        roster = tuple(Entry(name, each.certificate, session * 2, bytes(64)) for name, each in identities.items())
        return Manifest(session, roster, dataclasses.replace(terms, session=session.hex(), **changes))

    rules = steward(keys, tmp_path, 'approval = "hand"\n' + PERMISSIVE)
    file, policy = tmp_path / "parties" / "north" / "manifest.json", tmp_path / "policy" / "policy.toml"
    with pytest.raises(PolicyRefused, match=r'approval = "hand".*lpm manifest sign'):
        rules.judge(shown(b"a" * 16))
    approve(read_manifest(file), keys / "parties" / "south", policy)  # another's hand
    with pytest.raises(PolicyRefused, match="has not signed"):
        rules.judge(shown(b"a" * 16))
    approve(read_manifest(file), keys / "parties" / "north", policy)
    rules.judge(shown(b"b" * 16))  # a later session on the same terms
    with pytest.raises(PolicyRefused, match="has not signed"):
        rules.judge(shown(b"c" * 16, steps=7))
    assert manifest_diff(shown(b"a" * 16), shown(b"b" * 16)) == []
    assert manifest_diff(shown(b"a" * 16), shown(b"c" * 16, steps=7)) == [("steps", "6", "7")]
    assert manifest_rows(read_manifest(file))["outputs"] == "cases; infectious"
    assert [entry.kind for entry in verify(rules.ledger.path).entries] == ["open", *["refused"] * 3]


def test_a_refusal_reaches_both_sides_with_the_line_of_the_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(PERMISSIVE + "\n[limits]\ntrajectories = 0\n")
    run = tmp_path / "run"
    asked = ["federate", CLINICS, "--simulate-only", "--control", "streams", "--steps", "4", "--seed", "1"]
    command = ended([*asked, "--policy", policy, "--out", run, "--json"], run, tmp_path / "output")
    line = "[limits] trajectories = 0"
    assert command.wait() != 0 and line in command.said and "Traceback" not in command.said
    assert line in (run / "coordinator.log").read_text()
    refusing = [p for p in PARTIES if line in (run / "parties" / p / "party.log").read_text()]
    assert refusing
    ledgers = {p: verify(run / "parties" / p / "ledger.jsonl") for p in PARTIES}
    assert not any(found.problems for found in ledgers.values())
    refused = [entry for found in ledgers.values() for entry in found.entries if entry.kind == "refused"]
    assert refused and all(line in entry.body["why"] for entry in refused)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
