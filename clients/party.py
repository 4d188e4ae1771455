"""One session of one institution: join, do the coordinator's tasks on one's own people, leave."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from typing import Any

import numpy as np
import torch

from clients.config import ClientConfig, own_folder
from clients.shard import Shard
from clients.steward import Steward
from clients.streams import join
from lpm.checkpoint import CheckpointStore, atomic_write
from lpm.errors import InputError
from lpm.privacy.withheld import tensor_of
from lpm.processes import peak_memory_mb
from lpm.protocol.identity import load_identity
from lpm.protocol.manifest import Manifest
from lpm.scenario import Scenario, load
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.transcript import Transcript
from lpm.worlds.world import Disclosure

__all__ = ["SUMMARY", "TRANSCRIPT", "find_seed", "serve"]

SUMMARY = "summary.json"
"""What a party notes of a finished session in its own folder: how long, how many rounds, how much memory."""

TRANSCRIPT = "transcript"
"""The folder of what a party keeps of its rounds for an audit."""

_log = logging.getLogger(__name__)


def serve(config: ClientConfig) -> dict[str, Any]:
    """Take part in one session until the coordinator ends it.

    Args:
        config: the institution's own.

    Returns:
        party, tasks done, rounds, seconds, executor, peak_memory_mb.

    Raises:
        LpmError: as `clients.streams.join` and the session raise; nothing private is in any message.
    """
    began = time.monotonic()
    # One thread per party: on one machine the parties share the cores, and sums must not depend on a thread count.
    torch.set_num_threads(1)
    scenario = load(config.scenario).with_options(agents=config.agents, settings=config.settings)
    scenario.require_thresholds(config.sharing)
    keys = own_folder(config.keys, config.party)
    key = (keys / "storage.key").read_bytes()
    steward = Steward(config, load_identity(keys, config.party), scenario)
    try:
        summary = _take_part(config, scenario, key, steward)
    except BaseException as problem:
        steward.end(problem)
        raise
    steward.end(None)
    summary |= {"seconds": time.monotonic() - began, "ledger": steward.ledger.head}
    atomic_write(config.folder / SUMMARY, json.dumps(summary).encode(), 0o600)
    return summary


def _take_part(config: ClientConfig, scenario: Scenario, key: bytes, steward: Steward) -> dict[str, Any]:
    def check(manifest: Manifest) -> None:
        # The coordinator's terms say how long the run is and whether it calibrates; they are checked before signing.
        _require_terms(manifest, scenario)
        steward.judge(manifest)

    session = join(config, scenario.hash, check=check)
    with session:
        steward.begin(session.manifest)
        disclosure = None if config.unsafe else Disclosure(scenario.minimum_people, scenario.minimum_institutions)
        world = FederatedWorld(session.secure_sum, disclosure, steward.watch)
        transcript = Transcript(config.folder / TRANSCRIPT, key, steward.policy.keep_mib << 20)
        world.witness = transcript
        shard = Shard(
            scenario,
            config.institutions,
            seed=_seed(config, key),
            folder=config.folder,
            key=key,
            data=config.data,
            every=config.checkpoint_every or 0,
            calibrates=session.manifest.terms.gradient != "none",
            left_out=steward.left_out,
        )
        done = 0
        for task in session.tasks(steward.parting):
            steward.admit(task, world, shard.question(task), transcript)
            release = shard.perform(task, world, consents=config.release_fit)
            steward.finish(released=release is not None)
            session.done(task, release)
            done += 1
    return {
        "party": config.party,
        "tasks": done,
        "rounds": session.rounds,
        "rescaled": len(world.rescaled),
        "executor": shard.evidence.ran,
        "peak_memory_mb": peak_memory_mb(),
        "pid": os.getpid(),
    }


def _require_terms(manifest: Manifest, scenario: Scenario) -> None:
    terms = manifest.terms
    allowed = scenario.droppable
    if not set(terms.droppable) <= set(allowed):
        raise InputError(
            f"The manifest lets the rounds of {', '.join(terms.droppable)} lose parties: only {', '.join(allowed)}.",
            "A lost party takes its share of the noise along, and nothing goes on from a part of the people.",
        )
    for what, theirs, own in (
        ("scenario", terms.scenario, scenario.name),
        ("steps", terms.steps, scenario.steps),
        ("agents", terms.agents, scenario.agents),
        ("outputs", terms.outputs, tuple(scenario.outputs)),
        ("privacy", terms.privacy, scenario.mechanism.label),
        ("list of thresholds", terms.thresholds, tuple(map(tensor_of, scenario.thresholds))),
        ("resolution", terms.resolution_days, scenario.federation.resolution_days),
    ):
        if theirs != own:
            raise InputError(
                f"The manifest's {what} is {theirs}, this installation's is {own}.",
                "Start both sides with the same scenario and flags.",
            )


def find_seed(config: ClientConfig, key: bytes) -> int | None:
    """The public test seed if one is given, else the party's own secret one, which is kept sealed; None before that."""
    if config.seed is not None:
        return config.seed
    kept = _seed_store(config, key).latest()
    return None if kept is None else int(np.asarray(kept.content["seed"]).astype(np.uint64)[0])


def _seed(config: ClientConfig, key: bytes) -> int:
    """`find_seed`, or a new secret one, which a resumed run finds again."""
    found = find_seed(config, key)
    if found is not None:
        return found
    seed = secrets.randbits(64)
    _seed_store(config, key).save({"seed": np.array([seed], dtype=np.uint64)}, 0)
    return seed


def _seed_store(config: ClientConfig, key: bytes) -> CheckpointStore:
    return CheckpointStore(config.folder / "seed", key, "seed")
