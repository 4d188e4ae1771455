"""What a steward asks of the records that a federation leaves: is this ledger whole, who could see what.

It reads files that parties wrote, checks their signatures, and starts nothing.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from lpm.errors import InputError, PolicyRefused, SessionRefused
from lpm.privacy.dp import epsilon_of
from lpm.privacy.ledger import Trust, Verdict, verify
from lpm.privacy.policy import Charge, Policy, Question, Request
from lpm.protocol.identity import load_identity, verify_certificate
from lpm.protocol.manifest import Manifest
from lpm.scenario import Scenario

__all__ = [
    "APPROVALS",
    "approve",
    "check_ledger",
    "fingerprint",
    "manifest_diff",
    "manifest_rows",
    "policy_template",
    "read_manifest",
    "rehearse",
]

APPROVALS = "approvals"
"""Where a steward's signatures lie, beside the policy."""

_TEMPLATE = """\
# The policy of one institution: what may be asked of its people and series, whoever asks. It is yours; nothing outside
# this machine changes it. A key that is left out has the strict default. While a file named "stop" lies beside this
# one, nothing is answered.
label = ""
approval = "rule"                # or "hand": each new kind of session waits for `lpm manifest sign`

[scenarios]
# By the hash of all code that answers: the scenario's files, and lpm as it is installed here.
allowed = [
    {{ name = "{name}", code = "{code}" }},
]

[session]
institutions = {institutions}                 # fewest in a session
people = {people}                      # fewest in a group whose sum is opened
engines = ["crypten", "masked"]
public_seed = false              # true lets whoever knows the seed and the code simulate your people again
no_disclosure_control = false

[outputs]
allowed = [{outputs}]
resolution_days = {resolution}              # at least so many days are opened as one sum

[parameters]                     # ranges that are answered
{parameters}

[limits]                         # over all sessions together
trajectories = 20000
losses = 2000
gradients = 20000

[privacy]
mode = "none"                    # the least that is accepted: none, outputs, outputs+gradients
honest = 2                       # so many parties' noise may be counted on: the others may collude
delta = 1e-6                     # and, with noise, epsilon = 8.0 as the budget of all sessions

[calendar]
days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
hours = [0, 24]                  # this machine's clock

[people]
opt_out = ""                     # a file beside this one: ids of people who are left out, one a line

[releases]
fit = false                      # true lets `--release-fit` show your series beside the fit

[audit]
keep_mib = 1024                  # of each run, so much of the opened sums is kept, sealed, for `lpm audit-session`
"""


def fingerprint(certificate: bytes) -> str:
    """The first 16 hex digits of a certificate's SHA-256, by which people compare keys over the telephone."""
    return x509.load_der_x509_certificate(certificate).fingerprint(SHA256()).hex()[:16]


def check_ledger(path: Path, authority: Path | None = None, kept_head: str = "") -> tuple[Verdict, str]:
    """Check a ledger and say by whose word.

    Args:
        path: the ledger, with its head beside it.
        authority: PEM of the authority that certified the party; None: the key in the ledger's first line is believed.
        kept_head: hex digest of a line that was noted elsewhere; "" without.

    Returns:
        what was found, and a sentence on whose key was believed.

    Raises:
        InputError: if a file can't be read.
    """
    trust: Trust | None = None
    if authority is not None:
        try:
            pem = authority.read_bytes()
            x509.load_pem_x509_certificate(pem)
        except (OSError, ValueError):
            raise InputError(f"The authority's certificate {authority} can't be read.", "Give its PEM file.") from None

        def judge(certificate: bytes, party: str, now: datetime) -> None:
            verify_certificate(certificate, party, pem, now)

        trust = judge
    found = verify(path, trust, kept_head.lower())
    keys = ", ".join(fingerprint(each) for each in found.certificates) or "no key"
    if authority is None:
        return found, f"Signed with {keys}: the ledger's own word. Give --authority to check whose key that is."
    return found, f"Signed with {keys}, certified by {authority}."


def policy_template(scenario: Scenario) -> str:
    """A strict policy that allows one scenario, as this machine has it installed, for a steward to edit.

    Args:
        scenario: which.
    """
    ranges = []
    for each in scenario.declared:
        low, high = each.parameter.bounds if each.parameter.bounds is not None else (0.0, 0.0)
        name = each.parameter.name
        ranges.append(f"{name} = [{low:g}, {high:g}]" if low < high else f"# {name} = [lowest, highest]")
    return _TEMPLATE.format(
        name=scenario.name,
        code=scenario.code,
        institutions=max(3, scenario.minimum_institutions),
        people=scenario.minimum_people,
        outputs=", ".join(f'"{name}"' for name in scenario.outputs),
        resolution=scenario.federation.resolution_days,
        parameters="\n".join(ranges),
    )


def rehearse(
    policy: Policy,
    scenario: Scenario,
    spent: Charge,
    *,
    now: datetime,
    engine: str = "crypten",
    simulate_only: bool = False,
    release_fit: bool = False,
) -> list[tuple[str, str, str, str]]:
    """What a policy would answer and refuse of one run of a scenario; nothing is asked and nothing is charged.

    Args:
        policy: whose.
        scenario: after settings.
        spent: so far.
        now: local time of the run.
        engine: of the secure sum.
        simulate_only: one simulation, no calibration.
        release_fit: whether the party would show its fit.

    Returns:
        verdict (`ok` or `fail`), subject, finding and "" of each part, in order.
    """
    request = Request(
        scenario=scenario.name,
        code=scenario.code,
        settings=scenario.hash,
        engine=engine,
        institutions=len(scenario.institutions),
        people=scenario.minimum_people,
        outputs=tuple(scenario.outputs),
        resolution_days=scenario.federation.resolution_days,
        mode=scenario.privacy.mode,
        honest=scenario.privacy.honest,
        release_fit=release_fit and not simulate_only,
    )
    rows: list[tuple[str, str, str, str]] = []
    try:
        policy.judge(request, now)
        digests = f"code {scenario.code[:16]}…, settings {scenario.hash[:16]}…"
        rows.append(("ok", "session", f"{scenario.name}, {digests}", ""))
    except PolicyRefused as refusal:
        rows.append(("fail", "session", refusal.message, ""))
    names = tuple(parameter.name for parameter in scenario.parameters)
    values = np.array([[each.value for each in scenario.declared]])
    asked = scenario.calibration
    tasks: list[tuple[str, str, int, int]] = [("simulation", "simulate", 1, 1)]
    if not simulate_only:
        tasks = [
            ("prior forecast", "predict", asked.predictive_draws, 1),
            ("calibration", "evaluate", asked.draws, asked.iterations),
            ("posterior forecast", "predict", asked.predictive_draws, 1),
            ("outputs", "simulate", asked.predictive_draws, 1),
        ]
    total = spent
    for subject, kind, draws, times in tasks:
        noise = scenario.mechanism.releases(kind)
        question = Question(kind, np.repeat(values, draws, axis=0), names, scenario.gradient.estimator, noise)
        done = 0
        try:
            while done < times:
                epsilon = epsilon_of((total + question.charge).noise, policy.delta)
                total = total + policy.admit(question, total, epsilon)
                done += 1
            cost = question.charge
            privacy = f", ε = {epsilon_of(total.noise, policy.delta):.3g}" if total.noise else ""
            rows.append(("ok", subject, f"{times} × {_said(cost)}; then {_said(total)} in all{privacy}", ""))
        except PolicyRefused as refusal:
            rows.append(("fail", subject, f"after {done} of {times}: {refusal.message}", ""))
    for each in scenario.declared:
        name, bounds = each.parameter.name, each.parameter.bounds
        if bounds is not None and name in policy.parameters:
            low, high = policy.parameters[name]
            if bounds[0] < low or bounds[1] > high:
                said = f"the scenario draws {name} from {bounds[0]:g} to {bounds[1]:g}: draws outside are refused"
                rows.append(("warn", "parameters", f"{policy.line(f'parameters.{name}')}; {said}", ""))
    return rows


def _said(cost: Charge) -> str:
    parts = {"draws": cost.trajectories, "losses": cost.losses, "gradient components": cost.gradients}
    return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count) or "nothing"


def read_manifest(path: Path) -> Manifest:
    """A manifest that a party kept.

    Raises:
        InputError: if it can't be read.
    """
    try:
        return Manifest.decode(path.read_bytes())
    except (OSError, SessionRefused):
        raise InputError(
            f"{path} is no manifest.", "A party keeps the last one it was shown: parties/PARTY/manifest.json."
        ) from None


def manifest_rows(manifest: Manifest) -> dict[str, str]:
    """A manifest in words: what is agreed → its value, in the order in which one reads it."""
    rows = {
        "session": manifest.session.hex(),
        "agreement": manifest.agreement.hex(),
        **{f"party {entry.party}": f"key {fingerprint(entry.certificate)}" for entry in manifest.roster},
    }
    for name, value in manifest.plain_terms().items():
        label = "session name" if name == "session" else name
        if isinstance(value, dict):
            rows |= {f"{label}.{key}": f"{each:g}" for key, each in value.items()}
        elif isinstance(value, list):
            rows[label] = "; ".join(map(str, value)) or "none"
        else:
            rows[label] = str(value)
    return rows


def manifest_diff(before: Manifest, after: Manifest) -> list[tuple[str, str, str]]:
    """What a steward would have to approve anew: (what, before, after); sessions and their keys differ always."""
    old, new = manifest_rows(before), manifest_rows(after)
    passing = ("session", "agreement", "session name")
    keys = [key for key in [*old, *(key for key in new if key not in old)] if key not in passing]
    return [(key, old.get(key, ""), new.get(key, "")) for key in keys if old.get(key) != new.get(key)]


def approve(manifest: Manifest, keys: Path, policy: Path) -> Path:
    """Sign the agreement of a manifest with a party's own key, where its policy looks for it.

    Args:
        manifest: which the party was shown.
        keys: the party's own key folder.
        policy: the policy with `approval = "hand"`.

    Returns:
        the file of the signature.

    Raises:
        InputError: if the party is not in the roster.
    """
    identity = load_identity(keys)
    if identity.name not in manifest.parties:
        raise InputError(f"{identity.name} is not in the roster of this manifest: {', '.join(manifest.parties)}.")
    path = policy.parent / APPROVALS / f"{manifest.agreement.hex()}.sig"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text(identity.sign(b"approval", manifest.agreement).hex() + "\n")
    return path
