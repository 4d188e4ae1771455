"""`lpm coordinator`: starts the control plane, holds one session, and ends with its exit code."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lpm.options import GRADIENTS

if TYPE_CHECKING:
    from server.config import CoordinatorConfig

__all__ = ["coordinator"]


def coordinator(
    scenario: Annotated[Path, typer.Argument(help="The scenario's folder; only its scenario.toml is read.")],
    keys: Annotated[Path, typer.Option(help="The coordinator's key folder, or that of `lpm keys local`.")],
    parties: Annotated[str, typer.Option(help="The roster: names with commas, at least three.")],
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    data_address: Annotated[str, typer.Option(help="HOST:PORT where the parties' data streams are taken.")],
    control_address: Annotated[str, typer.Option(help="HOST:PORT where the parties report.")] = "127.0.0.1:9092",
    control: Annotated[str, typer.Option(help="flower (a SuperLink) or streams.")] = "flower",
    sharing: Annotated[str, typer.Option(help="The engine of the secure sum: crypten or masked.")] = "crypten",
    agents: Annotated[int | None, typer.Option(help="Agents of all parties together.")] = None,
    steps: Annotated[int | None, typer.Option(help="Days to simulate.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    draws: Annotated[int | None, typer.Option(help="Parameter draws in an iteration.")] = None,
    gradient: Annotated[str, typer.Option(help=f"{', '.join(GRADIENTS)}; as the scenario says if empty.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of the coordinator's own draws.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as needed.")] = None,
    simulate_only: Annotated[bool, typer.Option("--simulate-only", help="One simulation, no calibration.")] = False,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the run's folder.")] = False,
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-disclosure-control", help="Allow small cells. For tests only.")
    ] = False,
    deadline: Annotated[
        float | None,
        typer.Option(help="Seconds one step may take before its party counts as lost; else as the scenario says."),
    ] = None,
    join_limit: Annotated[float, typer.Option(help="Seconds to wait for all parties.")] = 120.0,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which a calibration stops.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Something that is weaker here than by default, for the manifest.")
    ] = None,
    announce: Annotated[Path | None, typer.Option(hidden=True, help="Where to say that this process is up.")] = None,
) -> None:
    """Coordinate one session: draw parameters, pass sealed messages, receive opened sums."""
    from lpm.processes import end_with_parent, keep_flower_quiet, log_to, terminate_as_interrupt, to_exit_code

    keep_flower_quiet()
    end_with_parent()
    terminate_as_interrupt()

    def work() -> int:
        import secrets

        from lpm.options import parse_settings
        from lpm.processes import parse_address
        from server.config import CoordinatorConfig, own_folder

        if announce is not None:  # else the run's folder is made below, and must be empty until then
            log_to(out / "coordinator.log", "coordinator")
        parse_address("data-address", data_address)
        parse_address("control-address", control_address)
        config = CoordinatorConfig(
            scenario=scenario,
            keys=own_folder(keys),
            out=out,
            parties=tuple(name.strip() for name in parties.split(",") if name.strip()),
            data_address=data_address,
            session=secrets.token_hex(8),
            sharing=sharing,
            agents=agents,
            steps=steps,
            iterations=iterations,
            draws=draws,
            gradient=gradient,
            seed=seed,
            settings=parse_settings(settings or []),
            simulate_only=simulate_only,
            checkpoint_every=checkpoint_every,
            resume=resume,
            unsafe=unsafe,
            labels=tuple(label or ()),
            deadline_seconds=deadline,
            join_seconds=join_limit,
            time_limit_seconds=time_limit,
        )
        if announce is None:
            _take_up_run(config)
            log_to(out / "coordinator.log", "coordinator")
        return _coordinate(config, control, control_address, announce)

    raise SystemExit(to_exit_code(work))


def _take_up_run(config: CoordinatorConfig) -> None:
    """Make the run's folder, or go on with it: what `lpm federate` has done before it starts a coordinator."""
    from lpm.runs import Run

    if config.resume:
        Run.open(config.out).reopen()
    else:
        Run.create(config.out, {"command": "coordinator", "scenario": str(config.scenario.resolve())})


def _coordinate(config: CoordinatorConfig, control: str, address: str, announcement: Path | None) -> int:
    import logging
    import os

    from lpm.errors import InputError
    from lpm.processes import Process, announce
    from lpm.protocol.identity import COORDINATOR, load_identity
    from server.config import CONFIG_VARIABLE

    load_identity(config.keys, COORDINATOR)  # refuses here, before anything is started
    written = config.out / "control" / "coordinator.json"
    written.parent.mkdir(parents=True, exist_ok=True)
    config.write(written)
    os.environ[CONFIG_VARIABLE] = str(written)
    here = Process(role="coordinator", party="", pid=os.getpid(), address=config.data_address)
    if control == "streams":
        from server.grid import StreamsGrid, run_app

        with StreamsGrid(address, config.keys, config.parties) as grid:
            announce(announcement, [here])
            status = run_app(grid)
    elif control == "flower":
        from server.superlink import SuperLink

        with contextlib.closing(SuperLink(address, config)) as link:
            announce(announcement, [here, Process(role="superlink", party="", pid=link.pid, address=address)])
            status = link.run_app()
    else:
        raise InputError(f"`--control` is {control!r}: flower or streams.")
    exit_code = int(str(status.get("exit", 1)))
    if exit_code:
        logging.getLogger("server").error("%s", status.get("message", "The session did not end."))
    return exit_code
