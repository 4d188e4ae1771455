"""`lpm bench`: what reference workloads cost on this machine; a thin shell over `lpm.bench`."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lpm.options import SHARINGS

__all__ = ["register"]

Agents = Annotated[int, typer.Option(metavar="N", help="Size of the population, from 20.")]
Days = Annotated[int, typer.Option(metavar="DAYS", help="Days to simulate, from 2.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all random numbers.")]
Device = Annotated[str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Run contagions on a torch device.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the group to `lpm`.

    Args:
        app: the command line.
    """
    group = typer.Typer(help="Time reference workloads on this machine.", no_args_is_help=True)
    group.command("W")(workload)
    group.command("sensitivity")(sensitivity)
    group.command("federation")(federation)
    group.command("gradients")(gradients)
    app.add_typer(group, name="bench")


def federation(
    parties: Annotated[int, typer.Option(min=1, metavar="N", help="How many, from 3.")] = 3,
    words: Annotated[int, typer.Option(min=1, metavar="WORDS", help="64-bit words in a round.")] = 10_000,
    sharing: Annotated[str, typer.Option(metavar="|".join(SHARINGS), help="The engine of the secure sum.")] = "crypten",
    rounds: Annotated[int, typer.Option(min=1, metavar="ROUNDS", help="Timed rounds of each kind.")] = 200,
    json: Json = False,
) -> None:
    """One round of a secure sum between processes of this machine, over mutual TLS: time, processor time, bytes."""
    from lpm.bench.federation import bench_federation

    show(bench_federation(parties, words, sharing, rounds), json)


def sensitivity(
    agents: Agents = 8_400_000,
    days: Annotated[int, typer.Option(min=1, metavar="DAYS", help="Days to simulate.")] = 180,
    parameters: Annotated[int, typer.Option(min=1, metavar="P", help="How many parameters.")] = 6,
    gradient: Annotated[str, typer.Option(metavar="ESTIMATOR", help="How derivatives are found.")] = "fd",
    device: Device = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """All sensitivities of the reference workload: every output of every day by every parameter."""
    from lpm.bench.sensitivity import bench_sensitivity

    show(bench_sensitivity(agents, days, parameters, gradient, seed, _executor(device)), json)


def _executor(device: str | None) -> str:
    return "auto" if device is None else f"device:{device}"


def show(found: Mapping[str, Any], json: bool) -> None:
    """Print what was measured, as one JSON object or for a person."""
    from lpm import console

    if json:
        typer.echo(json_module.dumps(found))
    else:
        console.measured(found)


def workload(
    agents: Agents = 8_400_000,
    days: Days = 60,
    device: Device = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """The reference workload: households, workplaces and community cells, SEIR; time of a day, memory, counts."""
    from lpm.bench.workload import bench_workload

    show(bench_workload(agents, days, seed, _executor(device)), json)


def gradients(
    agents: Agents = 1_000_000,
    days: Days = 180,
    parameters: Annotated[int, typer.Option(min=1, max=6, metavar="P", help="How many parameters.")] = 4,
    layers: Annotated[
        int, typer.Option(min=1, max=2, help="Small groups followed: 1 households, 2 workplaces too.")
    ] = 1,
    gradient: Annotated[
        str, typer.Option(metavar="alternates|tangent", help="The estimator that the compiled executor carries.")
    ] = "alternates",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """W with derivatives, over a whole epidemic: mean time of a day beside a plain one's."""
    from lpm.bench.gradients import bench_gradients

    show(bench_gradients(agents, days, parameters, layers, seed, gradient), json)
