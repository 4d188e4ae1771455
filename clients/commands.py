"""`lpm client`, one institution's process from reporting to the coordinator to the end of the session; and
`lpm audit-session`, by which it answers for what it sent.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clients.config import ClientConfig

__all__ = ["audit_session", "client"]


def client(
    scenario: Annotated[Path, typer.Argument(help="The scenario's folder, in this institution's installation.")],
    party: Annotated[
        str, typer.Option(help="This party's name, as its certificate says; several with commas share this process.")
    ],
    keys: Annotated[Path, typer.Option(help="This party's key folder, or that of `lpm keys local`.")],
    out: Annotated[Path, typer.Option(help="The run's folder; only parties/PARTY in it is used.")],
    control_address: Annotated[str, typer.Option(help="HOST:PORT where the coordinator's control plane is.")],
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of its data plane; as it says if empty.")] = "",
    control: Annotated[str, typer.Option(help="flower (a SuperNode) or streams.")] = "flower",
    institutions: Annotated[
        str,
        typer.Option(help="Institutions held, with commas (of several parties, with ; between); as named if empty."),
    ] = "",
    sharing: Annotated[str, typer.Option(help="The engine of the secure sum: crypten or masked.")] = "crypten",
    agents: Annotated[int | None, typer.Option(help="Agents of all parties together.")] = None,
    seed: Annotated[int | None, typer.Option(help="A public seed, for repeatable tests; else a secret one.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as needed.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of this institution's series.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from this party's checkpoint.")] = False,
    release_fit: Annotated[
        bool, typer.Option("--release-fit", help="Let the coordinator have this party's fit: bands and its own series.")
    ] = False,
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-disclosure-control", help="Allow small cells. For tests only.")
    ] = False,
    policy: Annotated[
        Path | None, typer.Option(help="The steward's policy.toml; its folder holds budget, approvals and `stop`.")
    ] = None,
    join_limit: Annotated[float, typer.Option(help="Seconds to wait for the coordinator.")] = 120.0,
    announce: Annotated[Path | None, typer.Option(hidden=True, help="Where to say that this process is up.")] = None,
) -> None:
    """Take part in one session with this institution's people, data and keys."""
    from lpm.processes import end_with_parent, keep_flower_quiet, log_to, terminate_as_interrupt, to_exit_code

    keep_flower_quiet()
    end_with_parent()
    terminate_as_interrupt()

    def work() -> int:
        from clients.config import ClientConfig, own_folder
        from lpm.errors import InputError
        from lpm.options import parse_settings
        from lpm.processes import parse_address

        parse_address("control-address", control_address)
        if coordinator:
            parse_address("coordinator", coordinator)
        parties, held = _names(party), institutions.split(";") if institutions else [""] * len(_names(party))
        if not parties or len(held) != len(parties):
            raise InputError(f"`--party` names {len(parties)} parties, `--institutions` has {len(held)} lists.")
        config = ClientConfig(
            scenario=scenario.resolve(),
            party=parties[0],
            keys=own_folder(keys, parties[0]).resolve(),
            out=out.resolve(),
            coordinator=coordinator,
            institutions=_names(held[0]),
            sharing=sharing,
            agents=agents,
            seed=seed,
            settings=parse_settings(settings or []),
            data=None if data is None else data.resolve(),
            checkpoint_every=checkpoint_every,
            resume=resume,
            release_fit=release_fit,
            unsafe=unsafe,
            policy=None if policy is None else policy.resolve(),
        )
        config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_to(config.folder / "party.log", parties[0] if len(parties) == 1 else f"{parties[0]} and others")
        if len(parties) == 1:
            return _take_part(config, control, control_address, join_limit, announce)
        if control != "streams":
            raise InputError("Several parties in one process need --control streams.", "Or start one process for each.")
        from clients.group import link_logs, take_part_together

        together = [
            replace(config, party=name, keys=own_folder(keys, name).resolve(), institutions=_names(own))
            for name, own in zip(parties, held, strict=True)
        ]
        link_logs(together)
        return take_part_together(together, control_address, join_limit, announce)

    raise SystemExit(to_exit_code(work))


def audit_session(
    folder: Annotated[Path, typer.Argument(metavar="PARTY", help="The party's part of a run: RUN/parties/PARTY.")],
    keys: Annotated[Path | None, typer.Option(help="Its key folder, if it has moved.")] = None,
    scenario: Annotated[Path | None, typer.Option(help="Its installation of the scenario, if it has moved.")] = None,
    trajectory: Annotated[
        list[int] | None, typer.Option(help="Only the task of this number, as the ledger says; as often as needed.")
    ] = None,
    peer: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another party's ledger.jsonl, which holds the same sums.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Replay a party's shard from its seed, and open the commitments it made in a run, before an auditor."""
    from lpm.processes import keep_flower_quiet, to_exit_code

    keep_flower_quiet()

    def work() -> int:
        import dataclasses
        import json as json_module

        from clients.audit import audit
        from lpm import console

        found = audit(folder, keys=keys, scenario=scenario, trajectories=trajectory or (), peers=peer or ())
        if json:
            typer.echo(json_module.dumps(dataclasses.asdict(found) | {"agrees": not found.problems}))
        else:
            rows = [("fail", found.party, each, "") for each in found.problems]
            said = f"{found.commitments:,} commitments of {found.tasks:,} tasks are what people, series and seed give."
            rows.append(("ok" if found.tasks else "warn", found.party, said, ""))
            console.checks([*rows, *(("warn", "note", each, "") for each in found.notes)], "It agrees.", "It does not")
        return 1 if found.problems else 0

    raise SystemExit(to_exit_code(work))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _take_part(config: ClientConfig, control: str, address: str, patience: float, announcement: Path | None) -> int:
    import os

    from clients.config import CONFIG_FILE, CONFIG_VARIABLE
    from lpm.errors import InputError
    from lpm.processes import Process, announce
    from lpm.protocol.identity import load_identity

    load_identity(config.keys, config.party)  # refuses here, before anything is started
    written = config.folder / CONFIG_FILE
    config.write(written)
    os.environ[CONFIG_VARIABLE] = str(written)
    here = Process(role="client", party=config.party, pid=os.getpid(), address=address)
    if control == "streams":
        from clients.app import app
        from clients.node import run_node

        announce(announcement, [here])
        return run_node(app, config.keys, address, patience=patience)
    if control == "flower":
        from clients.supernode import SuperNode

        with contextlib.closing(SuperNode(address, config, patience)) as node:
            announce(
                announcement, [here, Process(role="supernode", party=config.party, pid=node.pid, address=node.address)]
            )
            return node.run_app()
    raise InputError(f"`--control` is {control!r}: flower or streams.")
