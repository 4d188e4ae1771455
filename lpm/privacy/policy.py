"""A site's policy: what an institution's steward lets be asked of its people and series, whoever asks.

It is a file of the steward's own (`policy.toml`), read at the institution alone and never overridden from outside. The
rules here are pure: they take what is asked and what was spent, and either say what it costs or refuse with the line of
the policy. A refusal names the line and what was asked, both of which the coordinator may know, and nothing private.
"""

from __future__ import annotations

import datetime as dt
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError, PolicyRefused

__all__ = ["MODES", "PERMISSIVE", "AllowedScenario", "Charge", "Policy", "Question", "Request", "read_policy"]

MODES = ("none", "outputs", "outputs+gradients")
"""What differential privacy covers, from the weakest: nothing, opened outputs, losses and gradients too."""

PERMISSIVE = """\
# Written by the launcher, because no policy was given: it allows what the protocol allows. No steward stands behind it.
label = "permissive: no steward wrote it"

[scenarios]
any = true

[session]
public_seed = true
no_disclosure_control = true

[releases]
fit = true
"""
"""The policy of a trial on one machine."""

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SCHEMA: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "": {"label": str, "approval": str},
    "scenarios": {"any": bool, "allowed": list},
    "session": {
        "institutions": int,
        "people": int,
        "engines": list,
        "public_seed": bool,
        "no_disclosure_control": bool,
    },
    "outputs": {"allowed": list, "resolution_days": int},
    "parameters": {},  # any name: [lowest, highest]
    "limits": {"trajectories": int, "losses": int, "gradients": int},
    "privacy": {"mode": str, "epsilon": (int, float), "delta": (int, float), "honest": int},
    "calendar": {"days": list, "hours": list, "first": dt.date, "last": dt.date},
    "people": {"opt_out": str},
    "releases": {"fit": bool},
    "audit": {"keep_mib": int},
}
_KINDS = {str: "text", bool: "true or false", int: "a whole number", list: "a list", dt.date: "a date"}


@dataclass(frozen=True)
class AllowedScenario:
    """A scenario that may be run.

    Attributes:
        name: of the scenario.
        code: hex SHA-256 of its files and of `lpm` as installed, as `lpm policy new` writes it.
        settings: hex digest of its public part after settings; "" for any.
    """

    name: str
    code: str
    settings: str = ""


@dataclass(frozen=True)
class Request:
    """What a session is about, as its manifest and the institution's own installation say.

    Attributes:
        scenario: its name.
        code: digest of its files in this installation.
        settings: digest of its public part.
        engine: of the secure sum.
        institutions: parties in the roster.
        people: fewest agents in an opened group, by the scenario's rule.
        outputs: names of the opened outputs.
        resolution_days: days that are opened as one sum.
        mode: one of `MODES`.
        honest: parties whose noise is counted on.
        public_seed: whether this party's random numbers are public.
        no_disclosure_control: whether groups of any size are opened.
        release_fit: whether this party's fit is to go to the coordinator.
    """

    scenario: str
    code: str
    settings: str
    engine: str
    institutions: int
    people: int
    outputs: tuple[str, ...]
    resolution_days: int = 1
    mode: str = "none"
    honest: int = 2
    public_seed: bool = False
    no_disclosure_control: bool = False
    release_fit: bool = False


@dataclass(frozen=True)
class Charge:
    """What an answer takes off a party's budget, or what was taken in all.

    Attributes:
        trajectories: parameter draws that are answered.
        losses: opened sums that hold a loss (or score) of this party's series.
        gradients: opened components of gradients.
        noise: noise multiplier (as text, so that it is the same in every file) → how many releases had it.
    """

    trajectories: int = 0
    losses: int = 0
    gradients: int = 0
    noise: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Charge) -> Charge:
        noise = dict(self.noise)
        for multiplier, count in other.noise.items():
            noise[multiplier] = noise.get(multiplier, 0) + count
        return Charge(
            self.trajectories + other.trajectories,
            self.losses + other.losses,
            self.gradients + other.gradients,
            noise,
        )


@dataclass(frozen=True, eq=False)
class Question:
    """A task, as far as a policy cares.

    Attributes:
        kind: "simulate", "evaluate" or "predict".
        theta: [K, P].
        names: of the parameters, P.
        gradient: the estimator; "none" opens no gradient.
        noise: as in `Charge`: what the mechanism in force adds up to for this answer.
    """

    kind: str
    theta: NDArray[np.float64]
    names: tuple[str, ...]
    gradient: str = "none"
    noise: Mapping[str, int] = field(default_factory=dict)

    @property
    def charge(self) -> Charge:
        """What answering it costs; the shifted runs of finite differences are part of their draw."""
        draws, parameters = self.theta.shape
        losses = {"evaluate": draws, "predict": 2}.get(self.kind, 0)
        gradients = draws * parameters if self.kind == "evaluate" and self.gradient != "none" else 0
        return Charge(draws, losses, gradients, self.noise)


@dataclass(frozen=True)
class Policy:
    """The rules of one site; see `read_policy`. What a file leaves out has the strict default shown here.

    Attributes:
        label: shown in ledger and reports; "" for a steward's own.
        approval: "rule", or "hand": each new kind of session waits for the steward's signature.
        any_scenario: whether every installed scenario may be run.
        scenarios: those that may.
        institutions: fewest in a session.
        people: fewest agents in an opened group.
        engines: that may be used.
        public_seed: whether a public seed is allowed.
        no_disclosure_control: whether small groups may be opened.
        outputs: that may be opened; "*" for all.
        resolution_days: at least so many days are opened as one sum.
        parameters: name → lowest and highest value that is answered.
        trajectories: most parameter draws answered in all sessions; None: any number.
        losses: most opened losses of this party's series in all sessions; None: any number.
        gradients: most opened gradient components in all sessions; None: any number.
        mode: the least differential privacy.
        epsilon: its budget over all sessions.
        delta: of (ε, δ).
        honest: at most so many parties may be counted on for the noise: the others may collude.
        days: of the week on which it answers, Monday is 0.
        hours: from and until which hour of the day, on this machine's clock.
        first: no answer before this day.
        last: none after it.
        opt_out: file of people who are left out, beside the policy; "" for nobody.
        release_fit: whether this party's fit may go to the coordinator.
        keep_mib: size, for each run, up to which opened sums are kept (sealed) to replay them before an auditor.
    """

    label: str = ""
    approval: str = "rule"
    any_scenario: bool = False
    scenarios: tuple[AllowedScenario, ...] = ()
    institutions: int = 3
    people: int = 10
    engines: tuple[str, ...] = ("crypten", "masked")
    public_seed: bool = False
    no_disclosure_control: bool = False
    outputs: tuple[str, ...] = ("*",)
    resolution_days: int = 1
    parameters: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    trajectories: int | None = None
    losses: int | None = None
    gradients: int | None = None
    mode: str = "none"
    epsilon: float = math.inf
    delta: float = 1e-6
    honest: int = 2
    days: tuple[int, ...] = tuple(range(7))
    hours: tuple[int, int] = (0, 24)
    first: dt.date | None = None
    last: dt.date | None = None
    opt_out: str = ""
    release_fit: bool = False
    keep_mib: int = 1024
    _lines: Mapping[str, str] = field(default_factory=dict, repr=False)

    def line(self, key: str) -> str:
        """The line of the file that a rule stands in, or that it is the default."""
        return self._lines.get(key, f"{key} (by default)")

    def _refuse(self, key: str, asked: str) -> PolicyRefused:
        return PolicyRefused(f"The policy forbids it: {self.line(key)}. Asked for: {asked}.")

    def judge(self, request: Request, now: dt.datetime) -> None:
        """Refuse a session that the policy forbids.

        Args:
            request: what it is about.
            now: local time.

        Raises:
            PolicyRefused: with the line of the policy.
        """
        self.open_at(now)
        known = [each for each in self.scenarios if each.name == request.scenario and each.code == request.code]
        if not self.any_scenario:
            if not known:
                raise self._refuse(
                    "scenarios.allowed", f"the scenario {request.scenario} with the code {request.code[:16]}…"
                )
            if not any(each.settings in ("", request.settings) for each in known):
                raise self._refuse(
                    "scenarios.allowed", f"{request.scenario} with other settings ({request.settings[:16]}…)"
                )
        if request.engine not in self.engines:
            raise self._refuse("session.engines", f"the engine {request.engine}")
        if request.institutions < self.institutions:
            raise self._refuse("session.institutions", f"a session of {request.institutions} institutions")
        if request.no_disclosure_control and not self.no_disclosure_control:
            raise self._refuse("session.no_disclosure_control", "groups of any size")
        if request.people < self.people and not (request.no_disclosure_control and self.no_disclosure_control):
            raise self._refuse("session.people", f"groups from {request.people} people on")
        if request.public_seed and not self.public_seed:
            raise self._refuse("session.public_seed", "a public seed")
        hidden = [name for name in request.outputs if "*" not in self.outputs and name not in self.outputs]
        if hidden:
            raise self._refuse("outputs.allowed", f"the output {hidden[0]}")
        if request.resolution_days < self.resolution_days:
            raise self._refuse("outputs.resolution_days", f"sums of {request.resolution_days} day(s)")
        if MODES.index(request.mode) < MODES.index(self.mode):
            raise self._refuse("privacy.mode", f"differential privacy: {request.mode}")
        if request.mode != "none" and request.honest > self.honest:
            raise self._refuse("privacy.honest", f"noise that only {request.honest} honest parties make wide enough")
        if request.release_fit and not self.release_fit:
            raise self._refuse("releases.fit", "this institution's own fit in the clear")

    def open_at(self, now: dt.datetime) -> None:
        """Refuse to answer outside the calendar.

        Raises:
            PolicyRefused: with the line of the policy.
        """
        asked = f"an answer on {now:%A %Y-%m-%d at %H:%M}"
        if now.weekday() not in self.days:
            raise self._refuse("calendar.days", asked)
        if not self.hours[0] <= now.hour < self.hours[1]:
            raise self._refuse("calendar.hours", asked)
        if self.first is not None and now.date() < self.first:
            raise self._refuse("calendar.first", asked)
        if self.last is not None and now.date() > self.last:
            raise self._refuse("calendar.last", asked)

    def admit(self, question: Question, spent: Charge, epsilon: float, *, charged: bool = False) -> Charge:
        """What a question costs, or a refusal.

        Args:
            question: which.
            spent: in all sessions so far.
            epsilon: what all releases so far and this one's add up to, at the policy's δ; 0 without noise.
            charged: whether the same answer was charged before: then it costs nothing.

        Returns:
            the charge.

        Raises:
            PolicyRefused: with the line of the policy.
        """
        for k, name in enumerate(question.names):
            if name in self.parameters:
                low, high = self.parameters[name]
                values = question.theta[:, k]
                if values.size and (values.min() < low or values.max() > high):
                    raise self._refuse(f"parameters.{name}", f"{name} from {values.min():.6g} to {values.max():.6g}")
        if charged:
            return Charge()
        charge = question.charge
        after = spent + charge
        for key in ("trajectories", "losses", "gradients"):
            limit, asked, before = getattr(self, key), getattr(charge, key), getattr(spent, key)
            if limit is not None and getattr(after, key) > limit:
                raise self._refuse(f"limits.{key}", f"{asked} more {key} after {before}")
        if epsilon > self.epsilon:
            asked = f"an answer after which ε would be {epsilon:.4g} (δ = {self.delta:g})"
            raise self._refuse("privacy.epsilon", asked)
        return charge


def read_policy(path: Path) -> Policy:
    """Read a policy, strictly.

    Args:
        path: of the file.

    Returns:
        the policy.

    Raises:
        InputError: naming the file, the key, the value and what would be accepted.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as problem:
        raise InputError(f"The policy {path} can't be read: {problem.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"The policy {path} can't be read: {problem}.") from None
    given = _check_keys(path, tree)
    take = given.get
    whole = {"session.institutions": 3, "session.people": 1, "outputs.resolution_days": 1, "privacy.honest": 1}
    whole |= {f"limits.{name}": 0 for name in ("trajectories", "losses", "gradients")} | {"audit.keep_mib": 0}
    for key, lowest in whole.items():
        if key in given and given[key] < lowest:
            raise _wrong(path, key, given[key], f"a whole number from {lowest}")
    if take("approval", "rule") not in ("rule", "hand"):
        raise _wrong(path, "approval", given["approval"], "rule or hand")
    if take("privacy.mode", "none") not in MODES:
        raise _wrong(path, "privacy.mode", given["privacy.mode"], ", ".join(MODES))
    epsilon, delta = float(take("privacy.epsilon", math.inf)), float(take("privacy.delta", 1e-6))
    if not epsilon > 0:
        raise _wrong(path, "privacy.epsilon", epsilon, "a number above 0")
    if not 0 < delta < 1:
        raise _wrong(path, "privacy.delta", delta, "a number between 0 and 1")
    days = take("calendar.days", list(_DAYS))
    if not days or any(day not in _DAYS for day in days):
        raise _wrong(path, "calendar.days", days, ", ".join(_DAYS))
    hours = take("calendar.hours", [0, 24])
    if len(hours) != 2 or any(type(h) is not int for h in hours) or not 0 <= hours[0] < hours[1] <= 24:
        raise _wrong(path, "calendar.hours", hours, "two whole hours, such as [8, 18]")
    defaults = Policy()
    return Policy(
        label=take("label", ""),
        approval=take("approval", "rule"),
        any_scenario=take("scenarios.any", False),
        scenarios=tuple(_scenario(path, each) for each in take("scenarios.allowed", [])),
        institutions=take("session.institutions", defaults.institutions),
        people=take("session.people", defaults.people),
        engines=_words(path, "session.engines", take("session.engines", list(defaults.engines))),
        public_seed=take("session.public_seed", False),
        no_disclosure_control=take("session.no_disclosure_control", False),
        outputs=_words(path, "outputs.allowed", take("outputs.allowed", ["*"])),
        resolution_days=take("outputs.resolution_days", 1),
        parameters={name: _range(path, name, value) for name, value in tree.get("parameters", {}).items()},
        trajectories=take("limits.trajectories"),
        losses=take("limits.losses"),
        gradients=take("limits.gradients"),
        mode=take("privacy.mode", "none"),
        epsilon=epsilon,
        delta=delta,
        honest=take("privacy.honest", 2),
        days=tuple(sorted(_DAYS.index(day) for day in days)),
        hours=(hours[0], hours[1]),
        first=take("calendar.first"),
        last=take("calendar.last"),
        opt_out=take("people.opt_out", ""),
        release_fit=take("releases.fit", False),
        _lines=_lines(path, text),
    )


def _check_keys(path: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the tree to section.key → value, refusing what is unknown or of another kind."""
    given: dict[str, Any] = {}
    sections = {name for name in _SCHEMA if name}
    for name, value in tree.items():
        if name in sections:
            if not isinstance(value, dict):
                raise _wrong(path, name, value, "a table")
            for key, inner in value.items():
                if name != "parameters":
                    given[f"{name}.{key}"] = _kind(path, name, key, inner)
        elif name in _SCHEMA[""]:
            given[name] = _kind(path, "", name, value)
        else:
            accepted = ", ".join([*_SCHEMA[""], *(f"[{each}]" for each in sorted(sections))])
            raise InputError(f"{path}: {name} is not known: there are {accepted}.")
    return given


def _kind(path: Path, section: str, key: str, value: Any) -> Any:
    kinds = _SCHEMA[section]
    where = f"{section}.{key}" if section else key
    if key not in kinds:
        raise InputError(f"{path}: {where} is not known: there are {', '.join(kinds)}.")
    kind = kinds[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(path, where, value, "a number" if isinstance(kind, tuple) else _KINDS[kind])
    return value


def _scenario(path: Path, given: Any) -> AllowedScenario:
    key = "scenarios.allowed"
    if not isinstance(given, dict) or not {"name", "code"} <= set(given) <= {"name", "code", "settings"}:
        raise _wrong(path, key, given, '{ name = "…", code = "SHA-256" } and, for fixed settings, settings = "…"')
    if any(not isinstance(value, str) for value in given.values()) or len(given["code"]) != 64:
        raise _wrong(path, key, given, "texts, the code as 64 hex digits (`lpm policy new` writes them)")
    return AllowedScenario(**{name: value if name == "name" else value.lower() for name, value in given.items()})


def _range(path: Path, name: str, value: Any) -> tuple[float, float]:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != 2 or not value[0] <= value[1]:
        raise _wrong(path, f"parameters.{name}", value, "two numbers, the lower first")
    return float(value[0]), float(value[1])


def _words(path: Path, key: str, value: Sequence[Any]) -> tuple[str, ...]:
    if any(not isinstance(each, str) for each in value):
        raise _wrong(path, key, value, "a list of names")
    return tuple(value)


def _wrong(path: Path, key: str, value: Any, accepted: str) -> InputError:
    return InputError(f"{path}: {key} is {value!r}: {accepted}.")


def _lines(path: Path, text: str) -> dict[str, str]:
    """Key → `policy.toml, line 7: losses = 5000`, for refusals."""
    lines: dict[str, str] = {}
    section = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("  #")[0].strip()
        if line.startswith("[") and line.endswith("]") and "=" not in line:
            section = line.strip("[] ")
        elif "=" in line and not line.startswith("#"):
            name = line.partition("=")[0].strip().strip("\"'")
            key = f"{section}.{name}" if section else name
            lines.setdefault(key, f"{path.name}, line {number}: {f'[{section}] ' if section else ''}{line}")
    return lines
