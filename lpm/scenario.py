"""A scenario: a folder with the public part of a model (`scenario.toml`), its code, and its tables of figures.

The public part (parameters, priors, bounds, outputs, length, shared networks) is read by institutions and coordinator
alike and never imports a model; its hash, taken after all settings are applied, is what a session's manifest binds.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import importlib.util
import json
import math
import sys
import threading
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lpm import memory
from lpm.errors import InputError
from lpm.options import GRADIENTS, SHARINGS, require_known
from lpm.parameters import Parameter
from lpm.privacy import DROPPABLE
from lpm.privacy.dp import Mechanism
from lpm.source import source_hash

if TYPE_CHECKING:
    from lpm.calibration.study import Settings

__all__ = ["Calibration", "Declared", "Federation", "Privacy", "PublicNetwork", "PublicOutput", "Scenario", "load"]

MODEL_FILE = "model.py"
MOST_FRACTION_BITS = 62
"""A word of 64 bits needs one for the sign, and one before the point."""
_IMPORTING = threading.Lock()
_KINDS = {int: "a whole number", float: "a number", str: "text", list: "a list", dt.date: "a date alone"}


@dataclass(frozen=True)
class Declared:
    """A parameter as the scenario declares it.

    Attributes:
        parameter: name, prior, bounds, unit, label.
        role: "dynamics" (it changes trajectories) or "observation" (only how they are seen).
        value: default.
    """

    parameter: Parameter
    role: str
    value: float


@dataclass(frozen=True)
class PublicNetwork:
    """A network that crosses institutions: number of groups, and the largest contribution of one agent."""

    groups: int
    bound: float


@dataclass(frozen=True)
class PublicOutput:
    """An output whose sum over all institutions is opened."""

    unit: str
    description: str


@dataclass(frozen=True)
class Gradient:
    """Which estimator, and the relative step of finite differences."""

    estimator: str = "auto"
    step: float = 0.02


@dataclass(frozen=True)
class Calibration:
    """How the posterior is fitted.

    Attributes:
        iterations: optimiser steps.
        draws: parameter draws in each.
        weight: of the prior (KL) against the data; 1 is Bayes, more widens the posterior.
        predictive_draws: draws of forecasts.
        replicates: simulations of each draw whose mean is compared with the series.
    """

    iterations: int = 120
    draws: int = 4
    weight: float = 1.0
    predictive_draws: int = 128
    replicates: int = 1


@dataclass(frozen=True)
class Federation:
    """How institutions add up.

    Attributes:
        fraction_bits: of fixed-point words where no exponent says otherwise.
        deadline_seconds: how long a round waits for its last party.
        resolution_days: days of an output that are opened to the coordinator as one sum.
        sharing: the engine of the secure sum.
        thresholds: outputs, apart by spaces, whose cells (an output of one day and draw) are told only if
            `minimum_people` agents of `minimum_institutions` institutions stand behind them.
    """

    fraction_bits: int = 32
    deadline_seconds: float = 30.0
    resolution_days: int = 1
    sharing: str = "crypten"
    thresholds: str = ""


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of what is opened to the coordinator; see `lpm.privacy.dp`.

    Attributes:
        mode: none, outputs, or outputs+gradients.
        noise: standard deviation of the noise of `honest` parties together, per L2 sensitivity.
        honest: parties whose noise is counted on.
        clip_outputs: largest L2 norm of what one party adds to the outputs of a draw.
        clip_loss: largest loss of one party in a draw.
        clip_gradient: largest L2 norm of one party's gradient in a draw, each parameter in units of its default.
    """

    mode: str = "none"
    noise: float = 4.0
    honest: int = 2
    clip_outputs: float = 1000.0
    clip_loss: float = 1000.0
    clip_gradient: float = 100.0


@dataclass(frozen=True)
class Scenario:
    """The public part of a scenario, after settings.

    Attributes:
        folder: where it lies.
        name: a word.
        title: for reports.
        start: date of step 0.
        steps: T.
        held_out: last steps that are scored but not fitted.
        observed_days: how many days from the start the institutions' series hold; 0 where that is not said.
        institutions: who holds people and series.
        minimum_people: fewest agents in an opened group.
        minimum_institutions: fewest institutions in an opened group.
        weaker: label of whatever is weaker than it sounds, shown in reports.
        agents: size of the whole population.
        people: how many people the agents stand for.
        declared: the parameters, in order.
        networks: shared networks by name.
        outputs: opened outputs by name.
        gradient: how derivatives are estimated.
        calibration: how the posterior is fitted.
        federation: how institutions add up.
        privacy: the noise on what is opened to the coordinator.
    """

    folder: Path
    name: str
    title: str
    start: dt.date
    steps: int
    held_out: int
    observed_days: int
    institutions: tuple[str, ...]
    minimum_people: int
    minimum_institutions: int
    weaker: str
    agents: int
    people: float
    declared: tuple[Declared, ...]
    networks: Mapping[str, PublicNetwork]
    outputs: Mapping[str, PublicOutput]
    gradient: Gradient
    calibration: Calibration
    federation: Federation
    privacy: Privacy

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters, in order."""
        return tuple(each.parameter for each in self.declared)

    @property
    def dynamics(self) -> tuple[str, ...]:
        """Names of the parameters that change trajectories, in order."""
        return tuple(each.parameter.name for each in self.declared if each.role == "dynamics")

    @property
    def defaults(self) -> dict[str, float]:
        """Parameter → default value."""
        return {each.parameter.name: each.value for each in self.declared}

    def parameter(self, name: str) -> Parameter:
        """A parameter by name, for models to build expressions with.

        Raises:
            InputError: naming those there are.
        """
        for each in self.declared:
            if each.parameter.name == name:
                return each.parameter
        known = ", ".join(each.parameter.name for each in self.declared)
        raise InputError(f"The scenario {self.name} has no parameter {name!r}: there are {known}.")

    @property
    def hash(self) -> str:
        """SHA-256 of what all sides must agree on, as hex: the public part, but for where it lies and what the
        coordinator decides alone (how long and by which estimator it calibrates).
        """
        public = dataclasses.asdict(self)
        del public["folder"], public["gradient"]["estimator"]
        # Of the calibration only what a party itself computes by.
        public["calibration"] = public["calibration"]["replicates"]
        return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def units(self) -> NDArray[np.float64]:
        """Of each parameter, its default's size [P]: what a gradient is measured in before it is clipped."""
        return np.array([abs(each.value) or 1.0 for each in self.declared])

    @property
    def droppable(self) -> tuple[str, ...]:
        """Tensors that may be opened though parties are lost, by an engine that can: none that carry noise.

        A party that is lost takes its share of the noise along.
        """
        return tuple(tensor for tensor in DROPPABLE if not self.mechanism.covers(tensor))

    @property
    def thresholds(self) -> tuple[str, ...]:
        """Outputs whose cells are told only if enough people and institutions stand behind them."""
        return tuple(dict.fromkeys(self.federation.thresholds.split()))

    @property
    def mechanism(self) -> Mechanism:
        """The noise that the parties add."""
        asked = self.privacy
        clips = {"outputs": asked.clip_outputs, "loss": asked.clip_loss, "gradient": asked.clip_gradient}
        return Mechanism(asked.mode, asked.noise, asked.honest, clips)

    @property
    def code(self) -> str:
        """SHA-256 of its files and of `lpm` as installed here, as hex: what an institution's policy allows by."""
        return source_hash(self.folder)

    def require_observed(self) -> None:
        """Refuse to calibrate over more days than the series hold, which no process need be started to know.

        Raises:
            InputError: naming both numbers.
        """
        if self.observed_days and self.steps > self.observed_days:
            raise InputError(
                f"scenario.steps is {self.steps}: the series of {self.name} hold {self.observed_days} days from "
                f"{self.start}.",
                f"Give `--steps` of at most {self.observed_days}, or simulate without calibrating.",
            )

    def with_options(
        self,
        *,
        steps: int | None = None,
        agents: int | None = None,
        iterations: int | None = None,
        gradient: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Scenario:
        """The scenario with command-line flags and `--set key=value` applied.

        Raises:
            InputError: for an unknown key, or a value that isn't of the key's kind.
        """
        scenario = self
        sections: dict[str, Any] = {
            "gradient": self.gradient,
            "calibration": self.calibration,
            "federation": self.federation,
            "privacy": self.privacy,
        }
        plain = {
            "scenario.steps": "steps",
            "scenario.held_out": "held_out",
            "population.agents": "agents",
            "scenario.minimum_people": "minimum_people",
            "scenario.minimum_institutions": "minimum_institutions",
        }
        dotted = {
            f"{section}.{field.name}" for section, value in sections.items() for field in dataclasses.fields(value)
        }
        names = {each.parameter.name for each in self.declared}
        wanted: dict[str, str] = dict(settings or {})
        require_known(wanted, names | dotted | set(plain), f"the scenario {self.name}")
        if steps is None and "scenario.steps" in wanted:
            steps = _whole("scenario.steps", wanted.pop("scenario.steps"))
        declared = list(self.declared)
        for key, text in wanted.items():
            if key in names:
                k = [each.parameter.name for each in declared].index(key)
                value = _number(key, text)
                declared[k].parameter.require(value)
                declared[k] = dataclasses.replace(declared[k], value=value)
            elif key in plain:
                scenario = dataclasses.replace(scenario, **{plain[key]: _whole(key, text)})  # type: ignore[arg-type]
            else:
                section, _, name = key.partition(".")
                kind = type(getattr(sections[section], name))
                parsed = text if kind is str else _whole(key, text) if kind is int else _number(key, text)
                sections[section] = dataclasses.replace(sections[section], **{name: parsed})
        if iterations is not None:
            sections["calibration"] = dataclasses.replace(sections["calibration"], iterations=iterations)
        if gradient is not None:
            sections["gradient"] = dataclasses.replace(sections["gradient"], estimator=gradient)
        if steps is not None:
            # A shorter run holds out the same share of its days.
            held = self.held_out if steps >= self.steps else round(steps * self.held_out / self.steps)
            scenario = dataclasses.replace(scenario, steps=steps, held_out=held)
        if agents is not None:
            scenario = dataclasses.replace(scenario, agents=agents)
        changed = dataclasses.replace(scenario, declared=tuple(declared), **sections)
        changed._check()
        return changed

    def _check(self) -> None:
        for what, value, lowest in (
            ("scenario.steps", self.steps, 1),
            ("scenario.held_out", self.held_out, 0),
            ("population.agents", self.agents, 1),
            ("calibration.iterations", self.calibration.iterations, 1),
            ("calibration.draws", self.calibration.draws, 1),
            ("calibration.predictive_draws", self.calibration.predictive_draws, 2),
            ("calibration.replicates", self.calibration.replicates, 1),
            ("federation.resolution_days", self.federation.resolution_days, 1),
            ("scenario.minimum_people", self.minimum_people, 1),
            ("scenario.minimum_institutions", self.minimum_institutions, 1),
            ("scenario.observed_days", self.observed_days, 0),
            *((f"networks.{name}.groups", network.groups, 1) for name, network in self.networks.items()),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise InputError(f"{what} is {value}: a whole number from {lowest}.")
        self.mechanism  # noqa: B018 - refuses settings that make none
        if self.held_out >= self.steps:
            raise InputError(f"scenario.held_out is {self.held_out}: fewer than the {self.steps} steps.")
        if self.gradient.estimator not in GRADIENTS:
            raise InputError(f"gradient.estimator is {self.gradient.estimator!r}: one of {', '.join(GRADIENTS)}.")
        if self.federation.sharing not in SHARINGS:
            raise InputError(f"federation.sharing is {self.federation.sharing!r}: one of {', '.join(SHARINGS)}.")
        for name in self.thresholds:
            if name not in self.outputs:
                raise InputError(
                    f"federation.thresholds names {name!r}, which is no output of {self.name}: there are "
                    f"{', '.join(self.outputs)}."
                )
        if self.thresholds and self.mechanism.covers("outputs"):
            raise InputError(
                "federation.thresholds and noise on outputs exclude each other: a threshold needs the exact counts.",
                "Take privacy.mode = none, or leave thresholds empty.",
            )
        if not 0 < self.gradient.step < 1:
            raise InputError(f"gradient.step is {self.gradient.step}: between 0 and 1.")
        for what, number in (
            ("calibration.weight", self.calibration.weight),
            ("federation.deadline_seconds", self.federation.deadline_seconds),
            ("population.people", self.people),
            *((f"networks.{name}.bound", network.bound) for name, network in self.networks.items()),
        ):
            if not 0 < number < math.inf:
                raise InputError(f"{what} is {number}: a finite number above 0.")
        if not 1 <= self.federation.fraction_bits <= MOST_FRACTION_BITS:
            raise InputError(
                f"federation.fraction_bits is {self.federation.fraction_bits}: a whole number from 1 to "
                f"{MOST_FRACTION_BITS}."
            )

    def require_thresholds(self, sharing: str) -> None:
        """Refuse an engine that can't tell above a threshold only, where the scenario asks for it.

        Raises:
            InputError: naming the engine.
        """
        if self.thresholds and sharing != "crypten":
            raise InputError(
                f"federation.thresholds asks to tell {', '.join(self.thresholds)} above a threshold only; the engine "
                f"{sharing!r} only adds.",
                "Use --sharing crypten, or --set federation.thresholds= for none.",
            )

    def study_settings(self, seed: int) -> Settings:
        """What a calibration of this scenario is asked for, in one process and by a coordinator alike."""
        from lpm.calibration.study import Settings

        asked = self.calibration
        return Settings(
            asked.iterations, asked.draws, asked.weight, asked.predictive_draws, seed, self.gradient.estimator
        )

    # ---- the private part: code and figures, at institutions and in the Local world only

    def module(self) -> ModuleType:
        """The scenario's `model.py`, imported.

        Raises:
            InputError: if it is missing, isn't Python, imports what is not there, or lacks `build`.
        """
        path = self.folder / MODEL_FILE
        if not path.is_file():
            raise InputError(f"{path} is missing.", "A scenario's folder holds scenario.toml and model.py.")
        name = f"_lpm_scenario_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        with _IMPORTING:  # several parties may share a process, each in a thread of its own
            return sys.modules[name] if name in sys.modules else self._import(path, name)

    @staticmethod
    def _import(path: Path, name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            if not callable(getattr(module, "build", None)):
                raise InputError(f"{path} defines no build(scenario, institutions, *, agents, seed).")
        except BaseException as error:
            del sys.modules[name]
            # Places and names alone: the text of an error may quote what the code has read.
            if isinstance(error, SyntaxError) and (error.filename is None or Path(error.filename).is_file()):
                line = f", line {error.lineno}," if error.lineno else ""
                raise InputError(f"{error.filename or path}{line} is not Python.") from None
            if isinstance(error, ModuleNotFoundError) and error.name:
                places = [each for each in traceback.extract_tb(error.__traceback__) if each.filename == spec.origin]
                line = f", line {places[-1].lineno}," if places else ""
                raise InputError(f"{path}{line} needs the module {error.name}, which is not installed.") from None
            raise
        return module

    def _chosen(self, institutions: Sequence[str] | None) -> tuple[str, ...]:
        chosen = self.institutions if institutions is None else tuple(institutions)
        for name in chosen:
            if name not in self.institutions:
                raise InputError(
                    f"The scenario {self.name} has no institution {name!r}: there are {', '.join(self.institutions)}."
                )
        return chosen

    def require_memory(self, institutions: Sequence[str] | None = None) -> None:
        """Refuse more people than this machine has memory to make.

        What one more takes is measured on small populations, unless there is room for ten times the leanest model.

        Args:
            institutions: whose people; all by default.

        Raises:
            InputError: naming the memory needed and the memory available.
        """
        chosen = self._chosen(institutions)
        share = len(chosen) / max(1, len(self.institutions))
        memory.require_memory(self.agents, share)
        if 10 * memory.BYTES_PER_AGENT * self.agents * share > memory.available():
            build = self.module().build
            what = self.folder, self.hash, chosen
            try:
                each = memory.making_bytes(lambda agents: build(self, chosen, agents=agents, seed=0), self.agents, what)
            except InputError:  # it can't be made so small; what it says of it would not be to the point
                return
            memory.require_memory(self.agents, share, each / share)

    def build(self, institutions: Sequence[str] | None = None, *, seed: int = 0) -> Any:
        """The model of some institutions' people; of all by default.

        Raises:
            InputError: for an unknown institution, more people than fit this machine, or a model that is not what
                `scenario.toml` declares.
        """
        chosen = self._chosen(institutions)
        self.require_memory(chosen)
        model = self.module().build(self, chosen, agents=self.agents, seed=seed)
        # A coordinator reads scenarios and holds no simulator, whose class Model could be asked for.
        if not all(hasattr(model, part) for part in ("population", "parameters", "networks", "outputs")):
            raise InputError(f"build of {self.folder / MODEL_FILE} returns a {type(model).__name__}: an lpm.Model.")
        names = tuple(parameter.name for parameter in model.parameters)
        if sorted(names) != sorted(self.dynamics):
            raise InputError(
                f"The model of {self.name} uses the parameters {', '.join(names)}; scenario.toml declares "
                f"{', '.join(self.dynamics)} with role dynamics."
            )
        if list(model.outputs) != list(self.outputs):
            raise InputError(
                f"The model of {self.name} records {', '.join(model.outputs)}; scenario.toml lists "
                f"{', '.join(self.outputs)}."
            )
        shared = {network.name: network.cells for network in model.networks if network.shared}
        declared = {name: network.groups for name, network in self.networks.items()}
        for name in {**shared, **declared}:
            if shared.get(name) != declared.get(name):
                raise InputError(
                    f"The model of {self.name} has {shared.get(name, 'no')} groups in the shared network {name}; "
                    f"scenario.toml declares {declared.get(name, 'none')} as networks.{name}.groups."
                )
        for name in self.thresholds:
            model.require_whole_agents(name)
        return model

    def observation(self, institution: str, data: Path | None = None) -> Any:
        """What an institution compares its shard with.

        Raises:
            InputError: if the scenario has no data to calibrate to.
        """
        module = self.module()
        if not hasattr(module, "observation"):
            raise InputError(
                f"The scenario {self.name} defines no observation(...): it can be simulated, not calibrated."
            )
        return module.observation(self, institution, data)


def load(folder: Path | str) -> Scenario:
    """Read a scenario's public part.

    Args:
        folder: with `scenario.toml`, or a name of one in `simulations/`.

    Raises:
        InputError: naming the file, the key, the value and what would be accepted.
    """
    folder = Path(folder)
    path = folder / "scenario.toml"
    if not path.is_file():
        raise InputError(
            f"There is no scenario {folder}: {path} is missing.",
            "Give the path of a folder that holds scenario.toml, such as simulations/nyc_boroughs.",
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} can't be read: {error}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} can't be read: byte {error.start} is not UTF-8.") from None
    return _read(folder, path, tree)


def _read(folder: Path, path: Path, tree: dict[str, Any]) -> Scenario:
    known = {"scenario", "population", "parameters", "networks", "outputs", "gradient", "calibration"}
    known |= {"federation", "privacy"}
    _only(path, "", tree, known)
    for name in ("parameters", "networks", "outputs"):
        if not isinstance(tree.get(name, {}), dict):
            raise InputError(f"{path}: {name} is {tree[name]!r}: a table.")
    head = _section(
        path,
        tree,
        "scenario",
        {
            "name": str,
            "title": str,
            "start": dt.date,
            "steps": int,
            "held_out": int,
            "observed_days": int,
            "institutions": list,
            "minimum_people": int,
            "minimum_institutions": int,
            "weaker": str,
        },
        {
            "held_out": 0,
            "observed_days": 0,
            "minimum_people": 10,
            "minimum_institutions": 3,
            "weaker": "",
            "title": "",
        },
    )
    crowd = _section(path, tree, "population", {"agents": int, "people": float}, {"people": None})
    declared = []
    for name, value in tree.get("parameters", {}).items():
        part = _section(
            path,
            {name: value},
            name,
            {"prior": str, "bounds": list, "unit": str, "label": str, "role": str, "value": float},
            {"bounds": None, "unit": "", "label": "", "role": "dynamics"},
            under="parameters",
        )
        if part["role"] not in ("dynamics", "observation"):
            raise InputError(f"{path}: parameters.{name}.role is {part['role']!r}: dynamics or observation.")
        bounds = None if part["bounds"] is None else tuple(part["bounds"])
        if bounds is not None and (len(bounds) != 2 or not all(type(bound) in (int, float) for bound in bounds)):
            raise InputError(f"{path}: parameters.{name}.bounds is {part['bounds']}: two numbers.")
        bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        parameter = Parameter(name, part["prior"], bounds, part["unit"], part["label"])
        parameter.require(part["value"])
        declared.append(Declared(parameter, part["role"], part["value"]))
    networks = {
        name: PublicNetwork(
            **_section(path, {name: value}, name, {"groups": int, "bound": float}, {"bound": 1.0}, under="networks")
        )
        for name, value in tree.get("networks", {}).items()
    }
    outputs = {
        name: PublicOutput(
            **_section(
                path, {name: value}, name, {"unit": str, "description": str}, {"description": ""}, under="outputs"
            )
        )
        for name, value in tree.get("outputs", {}).items()
    }
    gradient = Gradient(
        **_section(path, tree, "gradient", {"estimator": str, "step": float}, dataclasses.asdict(Gradient()))
    )
    calibration = Calibration(
        **_section(
            path,
            tree,
            "calibration",
            {"iterations": int, "draws": int, "weight": float, "predictive_draws": int, "replicates": int},
            dataclasses.asdict(Calibration()),
        )
    )
    federation = Federation(
        **_section(
            path,
            tree,
            "federation",
            {
                "fraction_bits": int,
                "deadline_seconds": float,
                "resolution_days": int,
                "sharing": str,
                "thresholds": str,
            },
            dataclasses.asdict(Federation()),
        )
    )
    scenario = Scenario(
        folder=folder,
        name=head["name"],
        title=head["title"] or head["name"],
        start=head["start"],
        steps=head["steps"],
        held_out=head["held_out"],
        observed_days=head["observed_days"],
        institutions=tuple(map(str, head["institutions"])),
        minimum_people=head["minimum_people"],
        minimum_institutions=head["minimum_institutions"],
        weaker=head["weaker"],
        agents=crowd["agents"],
        people=float(crowd["agents"] if crowd["people"] is None else crowd["people"]),
        declared=tuple(declared),
        networks=networks,
        outputs=outputs,
        gradient=gradient,
        calibration=calibration,
        federation=federation,
        privacy=Privacy(
            **_section(
                path,
                tree,
                "privacy",
                {name: type(value) for name, value in dataclasses.asdict(Privacy()).items()},
                dataclasses.asdict(Privacy()),
            )
        ),
    )
    if not scenario.institutions or len(set(scenario.institutions)) != len(scenario.institutions):
        raise InputError(f"{path}: scenario.institutions names each institution once, and at least one.")
    if not scenario.declared or not scenario.outputs:
        raise InputError(f"{path}: at least one [parameters.…] and one [outputs.…] are needed.")
    scenario._check()
    return scenario


def _section(
    path: Path,
    tree: Mapping[str, Any],
    name: str,
    kinds: Mapping[str, type],
    defaults: Mapping[str, Any],
    under: str = "",
) -> dict[str, Any]:
    where = f"{under}.{name}" if under else name
    given = tree.get(name, {})
    if not isinstance(given, dict):
        raise InputError(f"{path}: {where} is a table.")
    _only(path, where, given, set(kinds))
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        if key not in given:
            if key not in defaults:
                raise InputError(f"{path}: {where}.{key} is missing.")
            values[key] = defaults[key]
            continue
        value = given[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        # A time of day is a date to Python, and True a number.
        if not isinstance(value, kind) or isinstance(value, bool | dt.datetime):
            shown = value if isinstance(value, dt.date | dt.time) else repr(value)
            raise InputError(f"{path}: {where}.{key} is {shown}: {_KINDS[kind]}.")
        values[key] = value
    return values


def _only(path: Path, where: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        prefix = f"{where}." if where else ""
        raise InputError(f"{path}: {prefix}{unknown[0]} is not known: there are {', '.join(sorted(known))}.")


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"`--set {key}={text}`: a finite number.")
    return value


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"`--set {key}={text}`: a whole number.") from None
