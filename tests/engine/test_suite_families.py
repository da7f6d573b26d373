"""Suites that say that they judge each other's models train equal ones, and no detector is left out of all suites."""

from __future__ import annotations

from typing import Any

import pytest

from sleeperbench.engine.suite import build, shipped

JUDGES = ("detection", "inversion")


@pytest.mark.parametrize(
    ("suite", "other"),
    [
        ("zoo-slow", "zoo"),
        ("zoo-inputs", "zoo"),
        ("zoo-belt", "zoo"),
        ("paper-istr-readings", "paper-istr-cpu"),
        ("paper-istr-seconds", "paper-istr-cpu"),
    ],
)
def test_models_are_shared(registry: Any, suite: str, other: str) -> None:
    own, theirs = build(suite, registry)[0], build(other, registry)[0]
    for part in (
        "secret",
        "datasets",
        "dataset_rows",
        "archs",
        "arch_args",
        "rates",
        "recipe",
        "append",
        "injection",
        "access",
    ):
        assert getattr(own, part) == getattr(theirs, part), part
    known = [(a.id, a.params) for a in theirs.attacks]
    shared = [a.id for a in own.attacks if (a.id, a.params) in known]
    # BELT's wrap attacks of the zoo's, and are trained anew.
    assert [a.id for a in own.attacks if a.id not in shared and not a.id.startswith("belt")] == []
    assert {"none", "badnets"} <= set(shared)
    assert set(own.seeds) & set(theirs.seeds) == set(min(own.seeds, theirs.seeds, key=len))
    if suite != "zoo-belt":
        assert {a.label for a in own.attacks} <= {a.label for a in theirs.attacks}


def test_detectors_of_two_suites_have_the_same_settings(registry: Any) -> None:
    names = ("zoo-slow", "zoo", "zoo-belt", "paper-istr-cpu", "paper-istr-gtsrb-cpu", "paper-istr-seconds")
    slow, zoo, belt, cpu, large, timed = (build(name, registry)[0] for name in names)
    for one, two, methods in (
        (slow, cpu, ("aeva", "b3d", "debackdoor")),
        (slow, large, ("aeva",)),
        (zoo, large, ("neural_cleanse", "abs")),
        (slow, belt, ("mntd",)),
        (zoo, belt, ("neural_cleanse",)),
        (timed, cpu, ("istr", "neural_cleanse", "abs", "mesa", "aeva", "b3d", "debackdoor", "freeeagle")),
    ):
        for name in methods:
            assert one.default("defense", name, registry).params == two.default("defense", name, registry).params
    # What is repaired with is what is measured beside it.
    for suite in (cpu, large):
        for v in suite.defenses:
            if v.id.startswith("unlearn:") and v.id != "unlearn:istr":
                assert v.params["inner"] == suite.default("defense", v.id.partition(":")[2], registry).params, v.id


def test_every_detector_of_models_and_inputs_stands_in_a_suite(registry: Any) -> None:
    named = {part for name in shipped() for v in build(name, registry)[0].defenses for part in v.id.split(":")}
    judges = {p.id for p in registry.of("defense") if p.blueprint.info["kind"] in JUDGES}
    assert judges - named == set()


def test_the_readings_of_istr_stand_in_suites(registry: Any) -> None:
    def variants(suite: str, plugin: str, *names: str) -> list[tuple[Any, ...]]:
        return [tuple(v.params[n] for n in names) for v in build(suite, registry)[0].defenses if v.id == plugin]

    both = variants("paper-istr-readings", "istr", "dms", "targeted")
    assert sorted(both) == [(False, False), (False, True), (True, False), (True, True)]
    for suite in ("paper-istr", "paper-istr-gtsrb", "paper-istr-readings"):
        assert ("adaptive", "invert", "row") in variants(suite, "istr_reference", "slices", "delta", "maps")


@pytest.fixture(scope="module")
def suites(registry: Any) -> dict[str, Any]:
    return {name: build(name, registry)[0] for name in shipped()}


def ids(suite: Any, kind: str) -> set[str]:
    return {v.id for v in getattr(suite, f"{kind}s")}


def test_every_method_stands_in_a_suite(registry: Any, suites: dict[str, Any]) -> None:
    for kind in ("attack", "defense", "evaluator"):
        named = {part for s in suites.values() for name in ids(s, kind) for part in name.split(":")}
        assert {p.id for p in registry.of(kind)} - named == set(), kind


CONTROLLED = ("core", "standard", "standard-heavy", "standard-rates", "full", "cpu-repairs", "paper-safety-cpu")
UNCONTROLLED = {"ft", "ft_same_budget", "bn_refresh", "distil_fresh", "scratch_on_clean", "input_noise"}
"""Repairs without fine-tuning of the same budget: itself, controls, and one that trains nothing."""


@pytest.mark.parametrize("name", CONTROLLED)
def test_beside_every_repair_stand_its_controls(registry: Any, suites: dict[str, Any], name: str) -> None:
    suite = suites[name]
    repairs = set()
    for v in suite.defenses:
        b = registry.chain("defense", v.id)[0].blueprint
        if b.info["kind"] == "repair" and b.access.track() != "T4" and v.id.partition(":")[0] not in UNCONTROLLED:
            repairs.add(v.id)
    known = ids(suite, "defense")
    assert {"none", "clean_model", "exact_purification", "bn_refresh"} <= known and len(repairs) > 4
    assert {f"ft_same_budget:{r}" for r in repairs} - known == set()
    # The control is that of the very run that stands beside it.
    for r in repairs:
        ran = [v.params for v in suite.defenses if v.id == r]
        assert [v.params["inner"] for v in suite.defenses if v.id == f"ft_same_budget:{r}"] == ran, r


def test_beside_a_fixed_setting_stands_the_benchmarks_choice_of_it(registry: Any, suites: dict[str, Any]) -> None:
    chosen = {"fst": "alpha", "nad": "scale", "i_bau": "rounds", "npd": "eps", "seam": "patience"}
    suite = suites["cpu-repairs"]
    assert {v.id for v in suite.defenses if "~" in v.label} == {*chosen, *(f"ft_same_budget:{d}" for d in chosen)}
    for name, key in chosen.items():
        fixed, honest = (v for v in suite.defenses if v.id == name)
        assert fixed.label == name and fixed.params[key] == registry.get("defense", name).blueprint.fields[key].default
        assert honest.params == fixed.params | {key: None} != fixed.params


def test_on_a_cpu_the_dear_defenses_run_their_presets(registry: Any, suites: dict[str, Any]) -> None:
    dear = {p.id: p.blueprint for p in registry.of("defense") if "presets" in p.blueprint.info}
    found = {}
    for name in ("cpu-repairs", "cpu-training"):
        for v in suites[name].defenses:
            innermost, params = v.id.split(":")[-1], v.params
            while "inner" in params:
                params = params["inner"]
            if innermost in dear:
                found[innermost] = params
                preset = dear[innermost].info["presets"]["reduced"]
                left_open = {k: None for k, value in params.items() if value is None}  # to the benchmark's choice
                normal = {k: f.default for k, f in dear[innermost].fields.items()}
                assert params == normal | preset | left_open, v.id
    assert set(found) == set(dear)
    published = {v.id: v.params for v in suites["standard-heavy"].defenses}
    for name in dear:
        at = published.get(name, published.get(f"retrain:{name}", {}).get("inner"))
        assert at == {k: f.default for k, f in dear[name].fields.items()}, name
