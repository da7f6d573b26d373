from __future__ import annotations

import configparser
import shutil
import sys
from pathlib import Path

import pytest
from plugins import GENTLE, install

import sleeperbench
from sleeperbench.engine import entries
from sleeperbench.engine.registry import Registry
from sleeperbench.errors import BadInput, BrokenPlugin

ROOT = Path(__file__).parents[2]
DEFENSES = "sleeperbench.defenses"
INFO = '"title": "Gentle", "version": 1, "api": 1, "kind": "repair"'


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Installs a distribution for this test and discovers; its modules are forgotten afterwards."""
    monkeypatch.delenv("SLEEPERBENCH_PLUGINS", raising=False)
    before = set(sys.modules)

    def add(dist="outside", version="1.0", module="reg_gentle", source=GENTLE, points=None, discover=True):
        points = points or {DEFENSES: {"gentle": f"{module}:Gentle"}}
        monkeypatch.syspath_prepend(install(tmp_path, dist, version, {f"{module}.py": source}, points))
        return Registry.discover() if discover else None

    yield add
    for name in set(sys.modules) - before:
        if name.startswith("reg_"):
            del sys.modules[name]


def status_of(registry: Registry, id: str) -> str:
    """Of one defense: the status of all would have all sources read."""
    (found,) = [p for p in registry.of("defense") if p.id == id]
    return found.status


def test_a_foreign_plugin_is_listed_read_and_loaded(add):
    registry = add(dist="My_Out.side")
    plugin = registry.get("defense", "my-out-side/gentle")
    assert (plugin.kind, plugin.name, plugin.dist, plugin.dist_version) == ("defense", "gentle", "my-out-side", "1.0")
    assert (plugin.status, plugin.reason, plugin.value) == ("ok", "", "reg_gentle:Gentle")
    assert plugin.blueprint.resolve({"epochs": 2}) == {"epochs": 2, "lr": 0.001}
    assert plugin.blueprint.access.track() == "T1"
    assert "reg_gentle" not in sys.modules
    assert registry.load("defense", "my-out-side/gentle").__name__ == "Gentle"


def test_it_cannot_replace_a_built_in(add):
    registry = add(points={DEFENSES: {"ft": "reg_gentle:Gentle"}})
    assert registry.get("defense", "ft").value == "sleeperbench.defenses.ft:FineTuning"
    assert registry.get("defense", "outside/ft").value == "reg_gentle:Gentle"


def test_a_distribution_of_our_name_cannot_either(add):
    registry = add(dist="SleeperBench", points={DEFENSES: {"ft": "reg_gentle:Gentle"}})
    assert registry.get("defense", "ft").value == "sleeperbench.defenses.ft:FineTuning"
    with pytest.raises(BrokenPlugin, match="calls itself sleeperbench: uninstall it or rename it"):
        registry.get("defense", "sleeperbench/ft")


def test_our_metadata_twice_is_one_set_of_plugins(add):
    points = {DEFENSES: {"ft": "sleeperbench.defenses.ft:FineTuning"}}
    registry = add(dist="sleeperbench", version="0.0.1", points=points)
    assert [p.id for p in registry.of("defense")].count("ft") == 1
    assert registry.get("defense", "ft").dist_version == sleeperbench.__version__


def test_our_metadata_with_another_class_is_refused(add):
    registry = add(dist="sleeperbench", version="0.0.1", points={DEFENSES: {"ft": "sleeperbench.defenses.ft:Old"}})
    with pytest.raises(BrokenPlugin, match=r"registered more than once: .*ft:Old.* and .*ft:FineTuning"):
        registry.get("defense", "ft")


@pytest.mark.parametrize(
    ("old", "new", "status", "reason"),
    [
        ('"api": 1', '"api": 2', "incompatible", "needs API 2, this is 1: update sleeperbench or ask the"),
        ('"api": 1, ', "", "broken", "INFO['api'] is missing: write it there as int"),
        ('"version": 1', '"version": "1"', "broken", "INFO['version'] is '1': write it there as int"),
        ('"version": 1', '"version": True', "broken", "INFO['version'] is True"),
        ('"title": "Gentle"', '"title": ""', "broken", "INFO['title'] is ''"),
        ('"kind": "repair", ', "", "broken", "INFO['kind'] is missing"),
        ('{"epochs": 1}', '{"epoch": 1}', "broken", "did you mean `epochs`?"),
        ('{"epochs": 1}', "3", "broken", "INFO['micro']"),
        ("INFO = {", "INFO = dict(**{", "broken", "mend the syntax error"),
        ("INFO = {", "INFO = dict() or {", "broken", "`INFO` must be literal"),
        ("INFO", "OTHER", "broken", "INFO['title'] is missing"),
        ("Gentle(Defense)", "Gentle(Attack)", "broken", "derives from Attack, but is registered under"),
        ("Gentle(Defense)", "Gentle(object)", "broken", "derive the class from one of sleeperbench's"),
        ("class Gentle", "class Other", "broken", "has no `Gentle` at its top level"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_used_disables_only_itself(add, old, new, status, reason):
    assert old in GENTLE
    source = GENTLE.replace(old, new, 1).replace("import Access, Defense", "import Access, Attack, Defense")
    good = {DEFENSES: {"gentle": "reg_gentle:Gentle", "fine": "reg_fine:Gentle"}}
    registry = add(source=source, points=good)
    add(dist="second", module="reg_fine", discover=False)
    plugin = next(p for p in registry.of("defense") if p.id == "outside/gentle")
    assert plugin.status == status
    assert reason in plugin.reason
    with pytest.raises(BrokenPlugin) as e:
        registry.get("defense", "outside/gentle")
    assert reason in str(e.value)
    assert "`outside/gentle` (outside 1.0)" in str(e.value)
    with pytest.raises(BrokenPlugin):
        _ = plugin.blueprint
    assert status_of(Registry.discover(), "outside/fine") == "ok"
    assert status_of(registry, "ft") == "ok"


def test_a_missing_file_is_named(add):
    registry = add(points={DEFENSES: {"gentle": "reg_gone:Gentle"}})
    with pytest.raises(BrokenPlugin, match="there is no module `reg_gone`"):
        registry.get("defense", "outside/gentle")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("import sys; sys.exit(3)", r"it calls sys.exit\(3\) when imported: move that under"),
        ("import reg_absent", "No module named 'reg_absent'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
    ],
)
def test_what_fails_on_import_is_listed_and_refused_when_loaded(add, line, named):
    registry = add(source=f"{GENTLE}\n{line}\n")
    assert registry.get("defense", "outside/gentle").status == "ok"
    with pytest.raises(BrokenPlugin, match=named) as e:
        registry.load("defense", "outside/gentle")
    assert e.value.exit_code == 3
    assert "`outside/gentle` (outside 1.0)" in str(e.value)


def test_an_interrupt_while_importing_stays_one(add):
    with pytest.raises(KeyboardInterrupt):
        add(source=f"{GENTLE}\nraise KeyboardInterrupt\n").load("defense", "outside/gentle")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("Gentle.ACCESS = Access(oracle=True)", "`ACCESS` is .*oracle=True.* after import"),
        ("Gentle.INFO['version'] = 2", "`INFO` is"),
        ("Gentle.REQUIRES = frozenset({'bn'})", "`REQUIRES` is"),
        ("Gentle.METRICS = (Metric(name='a', unit='', low=0, high=1, better='up', doc=''),)", "`METRICS` is"),
        ("globals()['Gentle'] = dataclass(frozen=True)(type('G', (Gentle,), {'__annotations__': {'x': int}, 'x': 1}))",
         "parameter `x` after import"),
        ("Gentle.__dataclass_fields__['lr'].default = 9.0", "parameter `lr` after import"),
        ("Gentle.__abstractmethods__ = frozenset({'run'})", "it does not define run"),
    ],
)  # fmt: skip
def test_a_class_that_is_not_what_its_source_says_is_refused(add, line, named):
    registry = add(source=f"{GENTLE}\nfrom sleeperbench import Metric\n{line}\n")
    with pytest.raises(BrokenPlugin, match=named):
        registry.load("defense", "outside/gentle")


def test_one_name_twice_in_a_distribution_is_refused(add, tmp_path):
    add(discover=False)
    (file,) = tmp_path.rglob("entry_points.txt")
    file.write_text(f"[{DEFENSES}]\ngentle = reg_gentle:Gentle\ngentle = reg_other:Gentle\nfine = reg_gentle:Gentle\n")
    registry = Registry.discover()
    assert status_of(registry, "outside/fine") == "ok"
    with pytest.raises(BrokenPlugin, match=r"`reg_gentle:Gentle` in .* and `reg_other:Gentle` in"):
        registry.get("defense", "outside/gentle")


def test_two_distributions_of_one_name_are_both_refused(add):
    add(dist="out-side", discover=False)
    registry = add(dist="out_side", version="2.0", module="reg_b", points={DEFENSES: {"b": "reg_b:Gentle"}})
    for id in ("out-side/gentle", "out-side/b"):
        with pytest.raises(
            BrokenPlugin, match=r"installed more than once: 2\.0 in .* and 1\.0 in .*: uninstall all but"
        ):
            registry.get("defense", id)
    assert status_of(registry, "ft") == "ok"


def test_one_folder_twice_on_the_path_is_one_plugin(add, monkeypatch):
    add(discover=False)
    monkeypatch.setattr(sys, "path", [sys.path[0], *sys.path])
    assert [p.status for p in Registry.discover().of("defense") if not p.builtin] == ["ok"]


def test_the_same_metadata_in_two_folders_is_one_plugin(add, tmp_path, monkeypatch):
    add(discover=False)
    shutil.copytree(tmp_path / "outside-1.0" / "outside-1.0.dist-info", tmp_path / "copy" / "outside-1.0.dist-info")
    monkeypatch.syspath_prepend(tmp_path / "copy")
    assert [p.status for p in Registry.discover().of("defense") if not p.builtin] == ["ok"]


def test_a_stale_version_in_the_same_folder_is_seen(add, tmp_path):
    add(discover=False)
    info = tmp_path / "outside-1.0" / "outside-1.0.dist-info"
    shutil.copytree(info, info.with_name("outside-0.9.dist-info"))
    (info.with_name("outside-0.9.dist-info") / "METADATA").write_text("Name: outside\nVersion: 0.9\n")
    with pytest.raises(BrokenPlugin, match=r"(?=.*\b0\.9 in)(?=.*\b1\.0 in)"):
        Registry.discover().get("defense", "outside/gentle")


def test_damaged_metadata_disables_only_its_own(add, tmp_path):
    add(dist="first", discover=False)
    (tmp_path / "first-1.0" / "first-1.0.dist-info" / "METADATA").unlink()
    add(dist="lines", module="reg_b", discover=False)
    (tmp_path / "lines-1.0" / "lines-1.0.dist-info" / "entry_points.txt").write_text(
        f"[console_scripts]\nx\n[{DEFENSES}]\n# a comment\nnovalue\n../up = reg_b:Gentle\nfine = reg_b:Gentle\n"
    )
    registry = Registry.discover()
    seen = {p.id: (p.status, p.reason) for p in registry.of("defense") if not p.builtin}
    assert {i: s for i, (s, _) in seen.items()} == {
        "unnamed/gentle": "broken",
        "lines/novalue": "broken",
        "lines/../up": "broken",
        "lines/fine": "ok",
    }
    assert "install the distribution again" in seen["unnamed/gentle"][1]
    assert "is no name for a plugin" in seen["lines/../up"][1]
    assert status_of(registry, "ft") == "ok"


def test_unknown_names_get_the_nearest(add):
    registry = add()
    with pytest.raises(BadInput, match=r"no defense `fft`: did you mean `ft`.* is the package installed\?"):
        registry.get("defense", "fft")
    with pytest.raises(BadInput, match="did you mean `outside/gentle`"):
        registry.get("defense", "gentle/outside/gentl")
    with pytest.raises(BadInput):
        registry.get("attack", "ft")


def test_the_environment_chooses_distributions(add, monkeypatch):
    add(dist="one", discover=False)
    add(dist="two_b", module="reg_b", points={DEFENSES: {"b": "reg_b:Gentle"}}, discover=False)

    def foreign(value: str | None = None) -> set[str]:
        return {p.id for p in Registry.discover(value).plugins if not p.builtin}

    assert foreign() == {"one/gentle", "two-b/b"}
    for value, wanted in {
        "all": {"one/gentle", "two-b/b"},
        "none": set(),
        "one": {"one/gentle"},
        "Two.B , one": {"one/gentle", "two-b/b"},
    }.items():
        monkeypatch.setenv("SLEEPERBENCH_PLUGINS", value)
        assert foreign() == wanted
        assert status_of(Registry.discover(), "ft") == "ok"
    assert foreign("none") == set()
    monkeypatch.setenv("SLEEPERBENCH_PLUGINS", "onne")
    with pytest.raises(BadInput, match="no plugins of distribution `onne`: did you mean `one`"):
        Registry.discover()


def test_wrappers(add):
    assert Registry.split_wrapper("unlearn:neural_cleanse") == ("unlearn", "neural_cleanse")
    assert Registry.split_wrapper("retrain:unlearn:x") == ("retrain", "unlearn:x")
    assert Registry.split_wrapper("ft") == (None, "ft")
    source = GENTLE.replace('"micro"', '"wrapper": True, "micro"')
    registry = add(points={DEFENSES: {"wrap": "reg_gentle:Gentle"}}, source=source)
    assert registry.get("defense", "outside/wrap:").wrapper
    assert not registry.get("defense", "ft").wrapper
    assert [p.id for p in registry.chain("defense", "outside/wrap:ft")] == ["outside/wrap", "ft"]
    assert [p.id for p in registry.chain("defense", "outside/wrap:outside/wrap:ft")] == ["outside/wrap"] * 2 + ["ft"]
    assert [p.id for p in registry.chain("defense", "ft")] == ["ft"]
    for id, named in {
        "ft:outside/wrap": "`ft` in `ft:outside/wrap` is no wrapper; wrappers: .*`outside/wrap:`",
        "outside/wrap": "write `outside/wrap:<defense>`",
        "outside/wrap:": "write its id behind the colon",
        "outside/wrap:fft": "did you mean `ft`",
    }.items():
        with pytest.raises(BadInput, match=named):
            registry.chain("defense", id)


def test_timm_models_need_no_entry_point(add):
    registry = Registry.discover()
    plugin = registry.get("model", "timm:resnet18")
    assert (plugin.id, plugin.dist, plugin.status, plugin.value) == ("timm:resnet18", "timm", "ok", "")
    with pytest.raises(BadInput, match="built by timm"):
        registry.load("model", "timm:resnet18")
    with pytest.raises(BrokenPlugin, match="no source of ours"):
        _ = plugin.blueprint
    with pytest.raises(BadInput):
        registry.get("model", "timm:")
    with pytest.raises(BadInput):
        registry.get("attack", "timm:resnet18")


def test_what_a_checkout_declares_but_has_not_installed(tmp_path, monkeypatch):
    for folder in ("attacks", "defenses", "evaluators"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "attacks" / "fresh.py").touch()
    (tmp_path / "attacks" / "_shared.py").touch()
    (tmp_path / "defenses" / "late.py").touch()
    (tmp_path / "setup.cfg").write_text(
        f"[metadata]\nname = sleeperbench\n[options.entry_points]\n{DEFENSES} =\n"
        "    ft = sleeperbench.defenses.ft:FineTuning\n    late = sleeperbench.defenses.late:Late\n"
    )
    real = entries.locate

    def locate(module: str):
        spec = real(module)
        spec.origin = str(tmp_path / "attacks" / "__init__.py")
        return spec

    monkeypatch.setattr(entries, "locate", locate)
    registry = Registry.discover("none")
    with pytest.raises(BrokenPlugin, match=r"declared in setup.cfg but not installed: run `pip install -e \.`"):
        registry.get("defense", "late")
    with pytest.raises(BrokenPlugin, match=r"attacks/fresh.py has no line in setup.cfg: write `fresh = "):
        registry.get("attack", "fresh")
    assert "_shared" not in {p.id for p in registry.plugins}
    assert status_of(registry, "ft") == "ok"


BUILT_IN = [p for p in Registry.discover("none").plugins if p.kind in ("attack", "defense", "evaluator")]


@pytest.mark.parametrize("plugin", BUILT_IN, ids=lambda p: f"{p.kind}-{p.id}")
def test_every_built_in_is_what_its_source_says(plugin):
    # `load` compares every declared name and field of the class with the blueprint; see the test above that it does.
    cls = Registry([plugin]).load(plugin.kind, plugin.id)
    assert plugin.blueprint.resolve({}) == {n: getattr(cls(), n) for n in plugin.blueprint.fields}
    assert all(p.doc for p in plugin.blueprint.fields.values()), "a parameter without a line in Args"


def setup_cfg() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def test_every_method_has_its_entry_point_and_every_entry_point_its_method():
    for group in ("attacks", "defenses", "evaluators"):
        text = setup_cfg()["options.entry_points"][f"sleeperbench.{group}"]
        values = [line.partition("=")[2].strip() for line in text.strip().splitlines()]
        modules = {v.partition(":")[0].rpartition(".")[2] for v in values}
        assert modules == {f.stem for f in (ROOT / group).glob("[!_]*.py")}


def test_every_package_is_in_setup_cfg():
    setup = setup_cfg()
    places = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    folders = set()
    for package, place in places.items():
        for init in (ROOT / place).rglob("__init__.py"):
            folders.add(".".join([package, *init.parent.relative_to(ROOT / place).parts]))
    assert set(setup["options"]["packages"].split()) == folders
