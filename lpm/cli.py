"""The command `lpm`: a thin shell that reads flags, calls one function and shows what it returns.

`lpm coordinator`, `lpm client` and `lpm audit-session` are registered by the packages that hold them (entry points
`lpm.commands`); they are imported only when they are run, as is everything heavy, so that `lpm --help` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import json as json_module
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from lpm import cli_bench, cli_keys, cli_oversight, ranks
from lpm.errors import InputError, Interrupted, LpmError, PeerLost
from lpm.options import GRADIENTS, MODES, Options, parse_settings

__all__ = ["main"]

_PLUGINS = {
    "audit-session": "Replay a party's shard from its seed, and open the commitments it made in a run.",
    "coordinator": "Compose the sums of a federation, and hold its posterior (what `federate` starts).",
    "client": "Take part in a federation as one institution (what `federate` starts).",
}


class _Commands(TyperGroup):
    """The commands here and those other packages register, which are loaded when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(point.name for point in _entry_points())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is None and any(point.name == cmd_name for point in _entry_points()):
            return click.Command(cmd_name, help=_PLUGINS.get(cmd_name, "Registered by another package."))
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        for point in _entry_points():
            if point.name == name:
                return name, _load(point), rest
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _interrupted() from None


class _Number(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number that is refused with what would be accepted."""

    def __init__(self, lowest: int = 0, whole: bool = True) -> None:
        self.lowest, self.whole = lowest, whole
        self.name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        flag = param.opts[0] if param else "the value"
        try:
            number = int(value) if self.whole else float(value)
        except ValueError:
            number = self.lowest - 1
        if not number >= self.lowest:
            kind = "a whole number" if self.whole else "a number"
            raise InputError(f"`{flag}` is {value}: {kind} from {self.lowest}.")
        return number


app = typer.Typer(
    name="lpm",
    cls=_Commands,
    help="Large Population Models: agent-based simulation and calibration, across institutions that share no data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(help="Make the keys a federation needs.", no_args_is_help=True)
cli_keys.register_keys(keys)
app.add_typer(keys, name="keys")
app.add_typer(cli_keys.manifest, name="manifest")

Scenario = Annotated[Path, typer.Argument(metavar="SCENARIO", help="The scenario's folder.", show_default=False)]
Steps = Annotated[int | None, typer.Option(click_type=_Number(1), metavar="DAYS", help="Days to simulate.")]
Seed = Annotated[int | None, typer.Option(click_type=_Number(0), help="Of all random numbers.")]
Agents = Annotated[int | None, typer.Option(click_type=_Number(1), help="Size of the population that is made.")]
Iterations = Annotated[int | None, typer.Option(click_type=_Number(1), help="Optimiser steps.")]
Gradient = Annotated[str | None, typer.Option(metavar="|".join(GRADIENTS[1:]), help="How derivatives are found.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter, or a key of scenario.toml (calibration.draws=8)."),
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="The run's directory; else a fresh runs/SCENARIO-N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Every = Annotated[
    int | None,
    typer.Option(click_type=_Number(1), metavar="K", help="Steps between two checkpoints of a simulation."),
]
Limit = Annotated[
    float | None,
    typer.Option(click_type=_Number(0, whole=False), metavar="SECONDS", help="Stop there, converged or not."),
]


Deadline = Annotated[
    float | None,
    typer.Option(
        click_type=_Number(1), metavar="SECONDS", help="Under torchrun: how long a rank may keep the others waiting."
    ),
]
Device = Annotated[str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Run contagions on a torch device.")]
_UNDER_TORCHRUN = ("simulate", "sensitivity", "calibrate", "resume")


@app.callback(invoke_without_command=True)
def _before(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")] = False,
) -> None:
    from lpm import console

    console.set_up_logging(verbose)
    if ranks.place().ranks > 1 and context.invoked_subcommand not in _UNDER_TORCHRUN:
        can = ", ".join(_UNDER_TORCHRUN)
        raise InputError(
            f"`lpm {context.invoked_subcommand or ''}` can't be run on several ranks: {can} can.",
            "Start it without torchrun.",
        )
    if version:
        typer.echo(f"lpm {metadata.version('lpm')}")
        raise typer.Exit
    ranks.threads()  # numba would meet a bad number first


@app.command()
def simulate(
    scenario: Scenario,
    steps: Steps = None,
    seed: Seed = None,
    agents: Agents = None,
    gradient: Annotated[
        str | None, typer.Option(metavar="|".join(GRADIENTS), help="Derivatives of all outputs, or none.")
    ] = None,
    settings: Settings = None,
    checkpoint_every: Every = None,
    device: Device = None,
    deadline: Deadline = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Simulate a scenario: in one process, or on the ranks that `torchrun … -m lpm simulate` starts."""
    options = _options("simulate", locals())
    _show(options, lambda: _commands().simulate_command(options))


@app.command()
def sensitivity(
    scenario: Scenario,
    steps: Steps = None,
    seed: Seed = None,
    agents: Agents = None,
    gradient: Gradient = None,
    mode: Annotated[
        str, typer.Option(metavar="|".join(MODES), help="Every output and day, or one pass back for the targets alone.")
    ] = "forward",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT[:total|:peak]", help="What is ranked; as often as needed, else every output."),
    ] = None,
    replicates: Annotated[
        int, typer.Option(click_type=_Number(1), help="Runs with other random numbers; from 2, standard errors.")
    ] = 1,
    settings: Settings = None,
    checkpoint_every: Every = None,
    device: Device = None,
    deadline: Deadline = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Find how every output answers to every parameter, from one differentiated run."""
    targets = tuple(target or ())
    del target
    options = _options("sensitivity", locals())
    _show(options, lambda: _commands().sensitivity_command(options))


@app.command()
def audit(
    scenario: Scenario,
    steps: Steps = None,
    seed: Seed = None,
    agents: Agents = None,
    seeds: Annotated[int, typer.Option(click_type=_Number(2), help="At most so many runs of each estimator.")] = 24,
    estimators: Annotated[
        str, typer.Option(metavar="A,B", help="Which to measure against finite differences; else all.")
    ] = "",
    settings: Settings = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure how true each gradient estimator is on this scenario, and recommend one."""
    flags = locals() | {"estimators": tuple(name.strip() for name in estimators.split(",") if name.strip())}
    options = _options("audit", flags)
    _show(options, lambda: _commands().audit_command(options))


@app.command()
def calibrate(
    scenario: Scenario,
    steps: Steps = None,
    seed: Seed = None,
    agents: Agents = None,
    iterations: Iterations = None,
    gradient: Gradient = None,
    settings: Settings = None,
    time_limit: Limit = None,
    device: Device = None,
    deadline: Deadline = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Calibrate a scenario to its data in one process."""
    options = _options("calibrate", locals())
    _show(options, lambda: _commands().calibrate_command(options))


@app.command()
def federate(
    scenario: Scenario,
    parties: Annotated[
        int | None, typer.Option(click_type=_Number(1), help="Parties the institutions are spread over, from 3.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            click_type=_Number(1), help="Processes the parties share; one each where the machine can hold it."
        ),
    ] = None,
    simulate_only: Annotated[bool, typer.Option("--simulate-only", help="One simulation, no calibration.")] = False,
    sharing: Annotated[
        str | None, typer.Option(metavar="crypten|masked", help="The engine of the secure sum; else the scenario's.")
    ] = None,
    control: Annotated[
        str, typer.Option(metavar="flower|streams", help="A SuperLink and SuperNodes, or plain streams.")
    ] = "flower",
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The key folder; else local keys are made in the run.")
    ] = None,
    steps: Steps = None,
    seed: Seed = None,
    agents: Agents = None,
    iterations: Iterations = None,
    gradient: Gradient = None,
    settings: Settings = None,
    time_limit: Limit = None,
    checkpoint_every: Every = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-disclosure-control", help="Allow small groups: for invented people only.")
    ] = False,
    privacy: Annotated[
        str | None,
        typer.Option(metavar="none|outputs|outputs+gradients", help="Differential privacy; see --set privacy.…"),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A policy.toml for all parties; else a permissive one.")
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Calibrate a scenario with one process per institution on this machine; only sums leave each."""
    if policy is not None and not policy.is_file():
        raise InputError(f"`--policy` is {policy}: a policy.toml, as `lpm policy new` writes one.")
    if privacy is not None:
        settings = [*(settings or ()), f"privacy.mode={privacy}"]
    del privacy
    options = _options("federate", locals())
    _show(options, lambda: _commands().federate_command(options))


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", show_default=False)],
    time_limit: Limit = None,
    json: Json = False,
) -> None:
    """Go on with a run that was stopped."""
    from lpm.runs import Run

    opened = Run.open(run)
    options = Options.from_command(opened.record().get("command", {})).with_(out=opened.path, json=json)
    if time_limit is not None:
        options = options.with_(time_limit=time_limit)
    _show(options, lambda: _commands().resume_command(opened.path, options))


@app.command()
def doctor(
    key_folder: Annotated[
        Path | None, typer.Option("--keys", metavar="DIR", help="A party's key folder, or that of `lpm keys local`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where runs will be written.")] = None,
    json: Json = False,
) -> None:
    """Check the installation, ports, clocks and key files, and say the remedy."""
    from dataclasses import asdict

    from lpm import console
    from lpm.doctor import examine, worst

    if json:
        with console.only_json_on_stdout() as stdout:
            found = examine(key_folder, folder=out)
            answer = {"verdict": worst(found), "checks": [asdict(check) for check in found]}
            stdout.write(json_module.dumps(answer) + "\n")
    else:
        found = examine(key_folder, folder=out)
        console.checks([(check.verdict, check.subject, check.finding, check.remedy) for check in found])
    if worst(found) == "fail":
        raise typer.Exit(1)


@keys.command("local")
def keys_local(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)],
    parties: Annotated[str, typer.Option(metavar="A,B,C", help="The parties' names.", show_default=False)],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name or address of the coordinator's machine, as often as needed."),
    ] = None,
) -> None:
    """Make an authority of your own, with keys for the coordinator and for each party."""
    from lpm import console
    from lpm.protocol.identity import make_local_authority

    names = [name.strip() for name in parties.split(",")]
    if not all(names) or len(names) < 3:
        raise InputError(
            f"`--parties` is {parties}: at least 3 names with commas between them, as in bronx,queens,brooklyn."
        )
    make_local_authority(folder, names, hosts=("localhost", "127.0.0.1", *(host or ())))
    console.note(f"Keys for the coordinator and {len(names)} parties are in {folder}.")
    console.note("Give each party its own folder of `parties/`; keep `authority/` to yourself.")


# In the order in which the help lists them.
cli_oversight.register(app)
cli_bench.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `lpm`.

    Args:
        arguments: without the program's name; None: those of this process.

    Returns:
        The exit code: 0 done, 2 bad input, 3 stopped but resumable, 1 anything else.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        # What a service manager sends first is treated like Ctrl-C: the run is left resumable.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="lpm", standalone_mode=False)
        return code if isinstance(code, int) else 0  # of a typer.Exit
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return 2
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lpm"
        # typer and click both add their guess: one is enough.
        message, guess, names = error.format_message().partition("Did you mean")
        names = names.partition("?")[0].removeprefix(" one of").lstrip(": ").replace("'", "`")
        remedy = f"Did you mean {names}? See `{where} --help`." if guess else f"See `{where} --help`."
        return _fail(arguments, InputError(message.rstrip(" (.") + ".", remedy))
    except LpmError as error:
        return _fail(arguments, error)
    except KeyboardInterrupt:
        return _fail(arguments, _interrupted())
    except SystemExit as ended:  # a command whose processes have said themselves what went wrong
        return _end(arguments, ended.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        cause = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
        return _fail(arguments, _unexpected(cause))


def _fail(arguments: Sequence[str], error: LpmError) -> int:
    from lpm import console

    ranks.say_end("" if isinstance(error, Interrupted | PeerLost) else str(error))
    path = _mark(error.exit_code, str(error))
    if not ranks.speaks():
        return error.exit_code
    message, remedy = error.message, error.remedy.replace("lpm resume RUN", f"lpm resume {path or 'RUN'}")
    console.error_line(message, remedy)
    _answer(arguments, {"error": message, "remedy": remedy, "exit_code": error.exit_code, "run": path and str(path)})
    return error.exit_code


def _end(arguments: Sequence[str], code: str | int | None) -> int:
    from lpm import console
    from lpm.runs import Run, active_run

    code = code if isinstance(code, int) else int(code is not None)
    if code == 0:
        return 0
    path = active_run()
    starter = path is not None and Run(path).owned  # what it started speaks through it
    _mark(code, "")
    reason = ""
    if path is not None and starter:
        with contextlib.suppress(LpmError):
            reason = str(Run(path).record().get("error", ""))
    # A coordinator that was started by hand has said itself how to go on; the launcher speaks for one that it started.
    starter = starter and "coordinator" not in arguments[:1]
    remedy = f"Continue with `lpm resume {path}`." if starter and code == Interrupted.exit_code else ""
    if remedy:
        console.note(remedy)
    reason = reason or "What was started did not end well: standard error says why."  # no record: a full disk
    _answer(arguments, {"error": reason, "remedy": remedy, "exit_code": code, "run": path and str(path)})
    return code


def _mark(code: int, error: str) -> Path | None:
    """Leave the mark of a failure on the active run, if this process works on it; return its directory."""
    from lpm.runs import Run, active_run

    path = active_run()
    if path is None:
        return None
    try:
        run = Run.open(path)
        if run.owned and run.status == "running":
            fields = {"error": error} if error else {}
            # A checkpoint that other flags or another number of ranks can't go on from is as good as before.
            kept = code == Interrupted.exit_code or (code == InputError.exit_code and run.checkpoints.steps())
            run.update(status="paused" if kept else "failed", **fields)
    except LpmError:  # a full disk, or the directory is gone: the first error is the one to tell
        pass
    return path


def _answer(arguments: Sequence[str], failure: Mapping[str, Any]) -> None:
    if "--json" in arguments:
        sys.stdout.write(json_module.dumps(dict(failure)) + "\n")
        sys.stdout.flush()


def _interrupted() -> LpmError:
    from lpm.runs import active_run

    found = ranks.lost()
    if found is not None:
        return found
    if active_run() is None:
        return Interrupted("Stopped before a run began.", "Nothing was written.")
    return Interrupted("Stopped; the run is kept.", "Continue it with `lpm resume RUN`.")


def _unexpected(error: BaseException) -> LpmError:
    from lpm.runs import active_run

    # The text of a foreign exception may quote a private value: it goes into a file of this user, not to the screen.
    report = "".join(traceback.TracebackException.from_exception(error, capture_locals=False).format())
    written = ""
    for folder in (active_run(), None):
        try:
            handle, name = tempfile.mkstemp(prefix="error-", suffix=".log", dir=folder)
            with os.fdopen(handle, "w") as log:
                log.write(report)
        except OSError:  # no such folder, no permission, no room: try the next
            continue
        written = f"The traceback is in {name}."
        break
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's, of a GPU
        return LpmError(f"The memory is spent{where}.", f"Ask for fewer --agents, or use a larger machine. {written}")
    return LpmError(f"Something unforeseen happened: {type(error).__name__}{where}.", written)


def _show(options: Options, work: Callable[[], Mapping[str, Any]]) -> None:
    from lpm import console
    from lpm.runs import jsonable

    if ranks.place().rank > 0:
        with console.only_json_on_stdout():
            work()
    elif options.json:
        with console.only_json_on_stdout() as stdout:
            found = work()
            stdout.write(json_module.dumps(jsonable(found), allow_nan=False) + "\n")
    else:
        console.summary(work())


def _commands() -> Any:
    return importlib.import_module("lpm.commands")


def _options(command: str, flags: Mapping[str, Any]) -> Options:
    """The flags of a command, by the names that its function and `Options` share."""
    settings = parse_settings(flags["settings"] or ())
    return Options(command=command, **{**flags, "scenario": _folder(flags["scenario"]), "settings": settings})


def _folder(scenario: Path) -> Path:
    if not scenario.is_dir():
        raise InputError(f"There is no scenario {scenario}: the path of a folder with a scenario.toml.")
    if not (scenario / "scenario.toml").is_file():
        raise InputError(f"{scenario} is not a scenario: it has no scenario.toml.")
    return scenario


def _entry_points() -> list[metadata.EntryPoint]:
    return sorted(metadata.entry_points(group="lpm.commands"), key=lambda point: point.name)


def _load(point: metadata.EntryPoint) -> click.Command:
    try:
        function = point.load()
    except ModuleNotFoundError as error:
        raise InputError(
            f"`lpm {point.name}` needs the package {error.name}, which is not installed.", "Run `lpm doctor`."
        ) from None
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(point.name)(function)
    command = typer.main.get_command(single)
    command.name = point.name
    return command
