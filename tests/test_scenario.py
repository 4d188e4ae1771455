"""A scenario's public part is read strictly; settings apply by name, and the hash binds what all must agree on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clients
import lpm
from lpm import source
from lpm.errors import InputError
from lpm.options import parse_settings
from lpm.scenario import load

ROOT = Path(__file__).resolve().parent.parent
CLINICS = ROOT / "simulations" / "three_clinics"


@pytest.fixture
def broken(tmp_path):
    """A copy of a scenario whose text a test may change."""

    def make(old: str, new: str) -> Path:
        text = (CLINICS / "scenario.toml").read_text()
        assert old in text
        (tmp_path / "scenario.toml").write_text(text.replace(old, new, 1))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps =", "stepps =", r"scenario.stepps is not known"),
        ("agents =", "agents = -5 #", r"population.agents is -5: a whole number from 1"),
        ("[calibration]", "[calibrations]", "calibrations is not known"),
        ("[gradient]", "[gradient", "can't be read"),
        ('role = "dynamics"', 'role = "magic"', "dynamics or observation"),
        ("start = 2020-01-06", "start = 2020-01-06T10:30:00", "scenario.start is 2020-01-06 10:30:00: a date alone"),
        ("agents = 480", "agents = 480\npeople = 0", r"population.people is 0.0: a finite number above 0"),
        ("agents = 480", "agents = 480\npeople = inf", r"population.people is inf: a finite number above 0"),
        ("groups = 4", "groups = 0", r"networks.town.groups is 0: a whole number from 1"),
        ("groups = 4", "groups = 4.0", r"networks.town.groups is 4.0: a whole number"),
        ("bound = 1.0", "bound = -1", r"networks.town.bound is -1.0: a finite number above 0"),
        ("bound = 1.0", "bound = nan", r"networks.town.bound is nan: a finite number above 0"),
        ("fraction_bits = 32", "fraction_bits = 63", r"federation.fraction_bits is 63: a whole number from 1 to 62"),
        ("deadline_seconds = 20.0", "deadline_seconds = inf", "federation.deadline_seconds is inf: a finite number"),
        ("draws = 3", "draws = 3\nreplicates = 0", r"calibration.replicates is 0: a whole number from 1"),
        ("bounds = [0.02, 5.0]", 'bounds = ["a", 5.0]', r"transmissibility.bounds is \['a', 5.0\]: two numbers"),
        ("bounds = [0.02, 5.0]", "bounds = [true, 5.0]", "transmissibility.bounds is .*: two numbers"),
        ("bounds = [0.02, 5.0]", "bounds = [0.02]", "transmissibility.bounds is .*: two numbers"),
        ("[networks.town]", "[[networks]]", "networks is .*: a table"),
    ],
)
def test_mistakes_are_named(broken, old, new, words):
    with pytest.raises(InputError, match=words):
        load(broken(old, new))


@pytest.fixture
def town(tmp_path):
    """A copy of a scenario, one of whose files a test may change."""

    def make(file: str, old: str, new: str) -> Path:
        folder = tmp_path / "town"
        shutil.copytree(CLINICS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))
        return folder

    return make


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("scenario.toml", "groups = 4", "groups = 5", "has 4 groups in the shared network town; .* declares 5 as"),
        ("scenario.toml", "[networks.town]", "[networks.city]", "has 4 groups .* network town; .* declares none as"),
        ("scenario.toml", "[outputs.cases]", "[networks.road]\ngroups = 2\n\n[outputs.cases]", "has no groups .* road"),
        ("model.py", "shared=True", "shared=False", "has no groups .* network town; .* declares 4 as networks.town"),
    ],
)
@pytest.mark.parametrize("institutions", [None, ("north",)])
def test_the_model_shares_the_networks_that_are_declared(town, file, old, new, words, institutions):
    with pytest.raises(InputError, match=words):
        load(town(file, old, new)).build(institutions)


@pytest.mark.parametrize("name", ["three_clinics", "nyc_boroughs", "nyc_hospitals"])
def test_a_shard_shares_the_networks_that_are_declared(name):
    scenario = load(CLINICS.with_name(name)).with_options(agents=2000)
    for institutions in (None, scenario.institutions[:1], scenario.institutions[-2:]):
        scenario.build(institutions)


def test_a_scenario_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "scenario.toml").write_bytes(b'[scenario]\ntitle = "Caf\xe9"\n')
    with pytest.raises(InputError, match=r"scenario.toml can't be read: byte 23 is not UTF-8"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"x = 1\ny = (\n", r"model.py, line 2, is not Python\.$"),
        (b"x = '\xff'\n", r"model.py, line 1, is not Python\.$"),
        (b"import json\nimport nowhere_at_all.deep\n", "model.py, line 2, needs the module nowhere_at_all, which"),
        (b"build = 3\n", "model.py defines no build"),
        (b"def build(*_, **__):\n    return {}\n", r"build of .*model.py returns a dict: an lpm.Model\.$"),
    ],
)
def test_a_model_that_is_none_is_named(town, code, words):
    folder = town("model.py", "", "")
    (folder / "model.py").write_bytes(code)
    for _ in range(2):
        with pytest.raises(InputError, match=words):
            load(folder).build()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("raise ValueError('private: 17')\n", ValueError),
        ("eval('private: 17')\n", SyntaxError),
        ("def build(*_, **__):\n    raise KeyError('private: 17')\n", KeyError),
    ],
)
def test_an_error_of_the_models_own_code_stays_as_it_is(town, code, kind):
    folder = town("model.py", "", "")
    (folder / "model.py").write_text(code)
    with pytest.raises(kind):
        load(folder).build()


def test_an_unknown_scenario_is_named():
    with pytest.raises(InputError, match="There is no scenario nowhere"):
        load("nowhere")


def test_settings_apply_by_name_and_unknown_ones_are_refused():
    scenario = load(CLINICS)
    name = scenario.declared[0].parameter.name
    changed = scenario.with_options(settings={name: str(scenario.declared[0].value * 1.01), "calibration.draws": "6"})
    assert changed.calibration.draws == 6 and changed.declared[0].value != scenario.declared[0].value
    for settings, words in (
        ({"nothing": "1"}, "no such key"),
        ({name: "much"}, "a finite number"),
        ({name: "1e9"}, name),
        ({"calibration.draws": "2.5"}, "a whole number"),
        ({"calibration.draws": "0"}, "calibration.draws is 0"),
        ({"calibration.draws": ""}, "`--set calibration.draws=`: a whole number"),
        ({"gradient.step": ""}, "`--set gradient.step=`: a finite number"),
        ({name: ""}, f"`--set {name}=`: a finite number"),
        ({"gradient.estimator": ""}, "gradient.estimator is '': one of"),
        ({"calibration.replicates": "0"}, "calibration.replicates is 0"),
        ({"federation.fraction_bits": "0"}, "federation.fraction_bits is 0"),
        ({"federation.deadline_seconds": "-1"}, "federation.deadline_seconds is -1"),
    ):
        with pytest.raises(InputError, match=words):
            scenario.with_options(settings=settings)


def test_an_empty_text_is_none():
    scenario = load(CLINICS).with_options(settings={"federation.thresholds": "cases"})
    assert scenario.thresholds == ("cases",)
    assert scenario.with_options(settings=parse_settings(["federation.thresholds="])).thresholds == ()


def test_a_shorter_run_holds_out_fewer_days():
    scenario = load(ROOT / "simulations" / "nyc_boroughs")
    shorter = scenario.with_options(settings={"scenario.steps": str(scenario.steps // 2)})
    assert shorter == scenario.with_options(steps=scenario.steps // 2)
    assert 0 < shorter.held_out < scenario.held_out


def test_the_hash_binds_what_all_must_agree_on():
    scenario = load(CLINICS)
    assert scenario.hash == load(CLINICS).hash
    assert scenario.with_options(iterations=999).hash == scenario.hash
    assert scenario.with_options(agents=scenario.agents + 3).hash != scenario.hash
    assert scenario.with_options(steps=scenario.steps - 1).hash != scenario.hash
    first = scenario.declared[0]
    assert scenario.with_options(settings={first.parameter.name: str(first.value * 1.01)}).hash != scenario.hash


@pytest.mark.parametrize("name", ["three_clinics", "nyc_boroughs", "nyc_hospitals"])
def test_the_series_hold_as_many_days_as_the_scenario_says(name):
    scenario = load(CLINICS.with_name(name))
    whole = scenario.with_options(steps=scenario.observed_days)
    whole.require_observed()
    longer = scenario.with_options(steps=scenario.observed_days + 1)
    with pytest.raises(InputError, match=rf"hold {scenario.observed_days} days from {scenario.start}"):
        longer.require_observed()
    first = scenario.institutions[0]
    whole.observation(first)
    with pytest.raises(InputError, match="are needed"):
        scenario.with_options(steps=scenario.observed_days + 7).observation(first)  # some series are weekly


def test_the_code_a_policy_allows_is_the_scenarios_and_lpms_own(tmp_path, monkeypatch):
    shutil.copytree(CLINICS, tmp_path / "town", ignore=shutil.ignore_patterns("__pycache__"))
    scenario = load(tmp_path / "town")
    assert scenario.code == load(CLINICS).code
    (tmp_path / "town" / "figures" / "observed_north.csv").write_text("another institution's series")
    assert scenario.code == load(CLINICS).code
    with (tmp_path / "town" / "model.py").open("a") as model:
        model.write("\n# another model\n")
    assert scenario.code != load(CLINICS).code

    # Another installation of lpm, that differs in one line.
    shutil.copytree(Path(lpm.__file__).parent, tmp_path / "lpm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(clients.__file__).parent, tmp_path / "clients", ignore=shutil.ignore_patterns("__pycache__"))

    def elsewhere() -> str:
        source._installed.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(source, "_root", lambda package: tmp_path / package)
            found = load(CLINICS).code
        source._installed.cache_clear()
        return found

    assert elsewhere() == load(CLINICS).code
    with (tmp_path / "lpm" / "ring.py").open("a") as module:
        module.write("# another\n")
    assert elsewhere() != load(CLINICS).code


def test_the_public_part_is_read_without_a_simulator():
    code = (
        "import sys, lpm.scenario; lpm.scenario.load(sys.argv[1]); "
        "print([m for m in sys.modules if m.startswith(('lpm.flame', 'lpm.simulation', 'lpm.kernels', 'numba'))])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(CLINICS)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
