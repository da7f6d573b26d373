"""The scripts that write measured figures into docs/: what they take, how they show it, and what they keep."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scripts import script

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.suite import Changes, build


def row(metric: str, value: float | None, qualifier: str = "", **more: Any) -> dict[str, Any]:
    cell = "cifar10/small_resnet/badnets@0.05/ft/s0"
    told = {"cell": cell, "metric": metric, "value": value, "qualifier": qualifier, "flag": "", "reason": ""}
    known = {"dataset": "cifar10", "attack": "badnets", "defense": "ft", "seed": 0, "evaluator": "accuracy"}
    return told | known | {"scope": "cell", "lower": None, "upper": None, "cpu_seconds": 1.0, "task_key": metric} | more


# ---- measure.py ------------------------------------------------------------------------------------------------------
def test_measure_shows_shares_in_per_cent_and_the_defenses_own_time() -> None:
    measure = script("measure")
    rows = [
        row("c_acc", 0.5),
        row("c_acc", 0.9, "k=1"),  # a variant is another figure
        row("asr", None),
        row("cost_forwards", 128000.0, cpu_seconds=321.0),
        row("cost_forwards", 1.0, "phase=score", cpu_seconds=9.0),
    ]
    lines = measure._lines(rows, {rows[0]["cell"]: {"asr_attacked": 1.0}})
    head, rule, line = measure.table(lines, several=False)
    shown = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=False))
    assert set(rule) <= set("|-")
    assert shown["cell"] == "badnets@0.05/ft/s0"
    assert (shown["c_acc"], shown["asr_attacked"]) == ("50.0", "100.0")
    assert (shown["cost_forwards"], shown["cpu_seconds"]) == ("1.28e+05", "321")
    assert "asr" not in shown


def test_measure_asks_the_suite_for_the_method_and_its_controls() -> None:
    measure = script("measure")

    def values(argv: list[str], flag: str) -> list[str]:
        return [b for a, b in itertools.pairwise(argv) if a == flag]

    defense = measure.command("defense", "unlearn:neural_cleanse", "0,1")
    assert values(defense, "--attack") == ["none", "badnets", "blended"]
    wrapped = ["unlearn:neural_cleanse", "ft_same_budget:unlearn:neural_cleanse"]
    assert values(defense, "--defense") == ["none", "clean_model", "bn_refresh", *wrapped[::-1]]
    assert values(defense, "--set") == []
    for name, beside in (
        *((control, []) for control in ("bn_refresh", "clean_model", "none", "abl")),
        *((control, ["bn_refresh"]) for control in ("ft", "scratch_on_clean", "distil_fresh", "exact_purification")),
        ("ft_same_budget:fst", ["bn_refresh"]),
        ("fst", ["bn_refresh", "ft_same_budget:fst"]),
    ):
        expected = dict.fromkeys(["none", "clean_model", *beside, name])
        assert values(measure.command("defense", name, "0"), "--defense") == [*expected]
    assert (defense[1], measure.command("defense", "abl", "0")[1]) == ("cpu", "cpu")
    repair = measure.command("defense", "fst", "0,1,2")
    assert (repair[1], values(repair, "--seeds")) == ("paper-safety-cpu", ["0,1,2"])
    assert values(repair, "--evaluator") == [*measure.LASTING]
    attack = measure.command("attack", "wanet", "0")
    assert (attack[:2], values(attack, "--attack")) == (["run", "attacks-colour"], ["none", "wanet"])
    suite, _ = build("attacks-colour", Registry.discover("none"))
    assert (suite.datasets, [d.id for d in suite.defenses]) == (("cifar10",), ["none"])
    bare = {p.id for p in Registry.discover("none").of("attack") if not p.blueprint.info.get("wrapper")}
    assert bare <= {a.id for a in suite.attacks}, "every built-in attack stands in the suite"
    assert values(measure.command("evaluator", "ra", "0"), "--evaluator") == ["accuracy", "ra"]
    for name, supplied in (
        ("ra", ["ft"]),
        ("detection", ["neural_cleanse", "strip"]),
        ("inversion", ["ft", "neural_cleanse"]),
        ("stealth", []),
    ):
        assert values(measure.command("evaluator", name, "0"), "--defense") == ["none", *supplied]


def test_measure_puts_three_seeds_into_one_line() -> None:
    measure = script("measure")
    lines = {f"d/n/a@0/x/s{s}": {"c_acc": 0.5 + s / 100, "asr": 1.0, "flags": "tuned" * (s == 0)} for s in (10, 2, 0)}
    lines |= {f"d/n/b@0/x/s{s}": {"c_acc": 0.25, "flags": ""} for s in (0, 1)}
    body = measure.table(lines, several=False)[2:]
    assert body == [
        "| a@0/x | 50.0, 52.0, 60.0 | 100.0 | tuned |",
        "| b@0/x/s0 | 25.0 |  |  |",
        "| b@0/x/s1 | 25.0 |  |  |",
    ]


def test_measure_takes_of_a_repair_its_headlines_and_what_it_chose_among(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure")
    kinds = (("accuracy", "asr", ""), ("accuracy", "asr", "class=1"), ("bec", "bec", ""), ("ra", "p_asr_ra", "k=5"))
    kinds += (("selection", "asr_path", "t=0.20"), ("ra", "p_asr_ra", ""))
    found = [row(m, 0.5, q, cell="c", defense="fst", evaluator=e) for e, m, q in kinds]
    monkeypatch.setattr(measure, "read_table", lambda path: [] if path.stem == "cells" else found)
    monkeypatch.setattr(measure, "provenance", lambda run, rows: {})
    rows = measure.collect(tmp_path, "defense", "fst")[1]
    assert [(r["metric"], r["qualifier"]) for r in rows] == [("asr", ""), ("asr_path", "t=0.20"), ("p_asr_ra", "")]


def test_measure_puts_beside_a_repair_what_the_suite_of_all_repairs_does() -> None:
    measure, registry = script("measure"), Registry.discover("none")
    stand = {d.id for d in build("cpu-repairs", registry)[0].defenses}
    ours = {c for name in stand for c in measure.controls("defense", name)}
    assert ours == {"bn_refresh"} | {name for name in stand if name.startswith("ft_same_budget:")}


def test_measure_takes_the_preset_of_a_dear_defense_and_of_its_control() -> None:
    measure, registry = script("measure"), Registry.discover("none")
    for name, controls in (("pam", ["ft_same_budget:pam"]), ("retrain:ct", [])):
        argv, dear = measure.command("defense", name, "0"), [name, *controls]
        sets = [f"defense.{each}.preset=reduced" for each in dear]
        assert argv[-2 * len(dear) :] == [part for each in sets for part in ("--set", each)]
        paper = [a.replace("preset=reduced", "preset=published") for a in argv]
        assert measure.command("defense", name, "0", published=True) == paper, "the suite may name the preset itself"
    assert "--set" not in measure.command("defense", "fst", "0")
    # The control is that of the very run that stands beside it.
    for name in ("anp", "fst", "unlearn:neural_cleanse"):
        argv = measure.command("defense", name, "0")
        defenses, sets = ([b for a, b in itertools.pairwise(argv) if a == flag] for flag in ("--defense", "--set"))
        suite, _ = build(argv[1], registry, Changes(defenses=defenses, settings=sets))
        params = {d.id: d.params for d in suite.defenses}
        assert params[f"ft_same_budget:{name}"]["inner"] == params[name]


def test_measure_takes_the_rows_of_the_method_and_of_its_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure")
    beside = ("bn_refresh", "ft_same_budget:pam", "ft_same_budget:pam~0a1b2c")
    names = ("none", *beside, "pam~0a1b2c", "pam", "ft", "ft_same_budget:fst")
    found = [row("c_acc", 0.5, defense=d, cell=d) for d in names]
    cells = [{"cell": "pam", "flag": "collapsed;tuned"}]
    monkeypatch.setattr(measure, "read_table", lambda path: cells if path.stem == "cells" else found)
    monkeypatch.setattr(measure, "provenance", lambda run, rows: {})
    rows = measure.collect(tmp_path, "defense", "pam")[1]
    assert [r["defense"] for r in rows] == [*beside, "pam~0a1b2c", "pam"]
    assert [r["flag"] for r in rows] == ["", "", "", "", "collapsed;tuned"]
    assert [r["defense"] for r in measure.collect(tmp_path, "defense", "none")[1]] == ["none"]
    with pytest.raises(SystemExit, match="no rows of defense `fst`"):
        measure.collect(tmp_path, "defense", "fst")


def test_measure_leaves_out_what_lies_underneath_seeds_not_begun_and_the_zoo_of_what_judges_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure")
    found = [
        row("c_acc", 0.5, defense="scan", cell="a", evaluator="accuracy"),
        row("c_acc", 0.4, defense="retrain:scan", cell="b", evaluator="accuracy"),
        row("bec", 0.5, defense="scan", cell="a", evaluator="bec"),
        row("c_acc", None, defense="scan", cell="c", evaluator="accuracy", seed=1),
        row("det_missing", 1.0, defense="scan", cell="zoo", evaluator="detection_zoo", scope="zoo"),
    ]
    monkeypatch.setattr(measure, "read_table", lambda path: [] if path.stem == "cells" else found)
    monkeypatch.setattr(measure, "provenance", lambda run, rows: {})
    assert [r["value"] for r in measure.collect(tmp_path, "defense", "scan")[1]] == [0.5, 0.4]
    found.append(row("det_flag", 1.0, defense="scan", cell="a", evaluator="detection"))
    assert [r["value"] for r in measure.collect(tmp_path, "defense", "scan")[1]] == [0.5, 0.4, 1.0, 1.0]


def test_measure_stores_rows_in_lines_without_what_is_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = script("measure")
    rows = [
        row("asr_wake", 1 / 3, "k=5", evaluator="wake", method_version=1, status="ok", count=1, total=3),
        row("asr_wake", 1 / 3, "draw=0;k=5", evaluator="wake", method_version=1, status="ok", count=1, total=3),
        row("asr_wake", None, "k=0", evaluator="wake", method_version=1, status="failed", count=None, total=None),
    ]
    rows = [r | {"flag": "reduced"} for r in rows]
    cells = [{"cell": rows[0]["cell"], "defense": "ft", "flag": "reduced", "c_acc": 0.5, "asr": 0.25}]
    cells[0] |= dict.fromkeys(measure.ATTACKED)
    monkeypatch.setattr(measure, "read_table", lambda path: cells if path.stem == "cells" else rows)
    monkeypatch.setattr(measure, "provenance", lambda run, rows: {"methods": {}})
    monkeypatch.setattr(measure, "show", lambda kind, name: None)
    monkeypatch.setattr(measure, "DOCS", tmp_path)
    (tmp_path / "measured").mkdir()
    measure.write([tmp_path], "evaluator", "wake", "run", keep=False)
    file = tmp_path / "measured" / "evaluator-wake.json"
    assert len([line for line in file.read_text().splitlines() if '"metric"' in line]) == 2, "one draw is its mean"
    found = measure.stored(file)
    assert found["attacked"] == {rows[0]["cell"]: {"c_acc": 0.5, "asr": 0.25}}
    first, last = found["measurements"]
    assert (first["value"], first["status"], first["flag"], first["scope"]) == (0.333333333, "ok", "reduced", "cell")
    assert (last["value"], last["status"], last["count"]) == (None, "failed", None)


def test_measure_says_what_its_runs_were_made_of_and_why_a_cell_has_no_figure() -> None:
    measure = script("measure")
    rows = [row("asr", 0.5), row("reasr", None, cell="none@0/ft/s0") | {"reason": "no_claim: nothing", "flag": "tuned"}]
    lines = measure._lines(rows, {})
    assert [line["flags"] for line in lines.values()] == ["", "no_claim;tuned"]
    assert measure.common_place(["a/b/c", "a/b/d"]) == "a/b/"
    assert measure.common_place(["a/b/c", "a/x/d"]) == ""
    about = {
        "measurements": [{"cell": "d/n/badnets@0.05/ft/s0"}, {"cell": "d/n/none@0/ft/s0"}],
        "suite": "tiny",
        "train_rows": {"d": 12000},
        "recipe": {"epochs": 3},
        "versions": {"torch": "9", "machine": "m", "cpu": "c"},
        "datasets": {"d": {"note": "125 images lossy"}},
    }
    assert measure._source(about) == (
        "(suite `tiny`: d, 12,000 rows, 3 epochs, rate 5 %), torch 9, m c. Shares in %. "
        "The copy of d differs from its release: 125 images lossy."
    )


def test_an_evaluators_measure_leaves_out_undefended_cells_without_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure")
    found = [
        row("reasr", value, cell=cell, defense=d, evaluator="inversion", method_version=4)
        for cell, d, value in (("a", "none", None), ("b", "ft", None), ("c", "none", 0.5))
    ]
    monkeypatch.setattr(measure, "read_table", lambda path: [] if path.stem == "cells" else found)
    monkeypatch.setattr(measure, "provenance", lambda run, rows: {"methods": {"attack/badnets": 1}})
    about, rows = measure.collect(tmp_path, "evaluator", "inversion")
    assert [r["cell"] for r in rows] == ["b", "c"]
    assert about == {"methods": {"attack/badnets": 1, "evaluator/inversion": 4}}


def test_figures_of_cells_that_are_not_measured_now_stay_with_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure")
    monkeypatch.setattr(measure, "DOCS", tmp_path / "docs")
    for folder in ("measured", "methods"):
        (tmp_path / "docs" / folder).mkdir(parents=True)
    page = tmp_path / "docs" / "methods" / "anp.md"
    page.write_text("# anp\n\nText.\n\n## Measured\n\nOld.\n")
    about = {"suite": "tiny", "train_rows": {}, "recipe": {"epochs": 3}, "datasets": {}}
    about["versions"] = {"torch": "9", "machine": "m", "cpu": "c"}
    now = Registry.discover("none").get("defense", "anp").blueprint.info["version"]
    made = {  # run -> the method's version, and its cells
        "first": (now - 1, [("a/b/s0", 0.25), ("a/b/s1", 0.5)]),
        "second": (now, [("a/b/s1", 0.75)]),
    }

    def collect(run: Path, kind: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        version, cells = made[run.name]
        rows = [row("asr", value, cell=cell) for cell, value in cells]
        rows += [row("cost_forwards", 10.0, cell=cell, evaluator="cost", cpu_seconds=7.0) for cell, _ in cells]
        rows = [r | {"status": "ok", "count": None, "total": None} for r in rows]
        return about | {"methods": {"defense/anp": version}}, rows

    monkeypatch.setattr(measure, "collect", collect)
    monkeypatch.setattr(measure, "read_table", lambda path: [])
    for run in made:
        measure.write([Path(run)], "defense", "anp", run, keep=True)
    text = page.read_text()
    assert text.startswith("# anp\n\nText.\n\n## Measured\n\n1. `second` (suite")
    aged = f"Measured with an earlier version of `anp` ({now - 1}, now {now})."
    assert f"2. `first` (suite `tiny`: 3 epochs), torch 9, m c. Shares in %. {aged}" in text
    assert text.count("earlier version") == 1
    assert "| s0 | 25.0 | 10 | 7 |  | 2 |\n| s1 | 75.0 | 10 | 7 |  | 1 |" in text


def test_measure_lists_every_candidate() -> None:
    measure = script("measure")
    rows = [row("asr_path", 0.25, "t=0.20"), row("c_acc_path", 0.75, "t=0.20"), row("asr_path", None, "t=0.30")]
    assert measure.candidates(rows)[-1] == "| badnets@0.05/ft/s0 | t=0.20: 75.0 / 25.0 |"
    assert measure.candidates(rows[2:]) == []


# ---- attack_pages.py -------------------------------------------------------------------------------------------------
def test_attacks_stand_with_what_they_declare_and_a_figure_per_seed() -> None:
    attacks = script("attack_pages")
    rows = [
        row("asr", 0.5, defense="none", seed=1),
        row("asr", 0.25, defense="none", seed=0),
        row("asr", 1.0, defense="ft"),
        row("asr", 0.0, "trigger=1", defense="none"),
        row("linf", 0.2, defense="none"),
    ]
    cells = [
        {"attack": "badnets", "rate": 0.1, "flag": "weak", "status": "ok", "reason": "", "attack_params": "{}"},
        {"attack": "sig", "rate": 0.1, "flag": "", "status": "failed", "reason": "raised: E", "attack_params": "{}"}
        | {"cell": "digits/small_cnn/sig@0.1/none/s2"},
    ]
    text = attacks.lines(rows, cells, Registry.discover("none"))
    found = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text[2:]}
    assert found["badnets"][1] == "90"
    assert found["badnets"][4] == "25.0, 50.0"
    assert found["badnets"][7] == "51"  # of 255
    assert found["badnets"][-1] == "weak |"
    assert found["sig"][-1] == "seed 2: failed (raised: E) |"
    declined = cells[1] | {"status": "not_applicable", "reason": "no_trigger: after 5 steps there is none"}
    assert attacks.missing(declined) == "seed 2: not_applicable (no_trigger)"
    assert found["badnets"][2].startswith("100.0 (")
    all_to_all = cells[0] | {"attack_params": json.dumps({"targets": "all_to_all"})}
    assert attacks.lines(rows, [all_to_all], Registry.discover("none"))[2].split(" | ")[2] == ""
    apart = attacks.lines(rows, [cells[0], cells[1] | {"rate": 0.05}], Registry.discover("none"))
    assert apart[0].startswith("| attack | rate, % | declared |")
    assert [line.split(" | ")[1] for line in apart[2:]] == ["10", "5"]
    printed = {"value": 0.999, "setting": "s", "source": "t"}
    assert attacks.published([{"published_asr": printed}]) == "99.9 (s; t)"
    assert attacks.published([{}, {"published_asr": printed}], "sig") == "", "the wrapped attack's is another figure"
    of = {"published_asr": {"badnets": printed}}
    assert [attacks.published([of, {}], inner) for inner in ("badnets", "blended")] == ["99.9 (s; t)", ""]
    assert attacks.published([of], "badnets", "targets=all_to_all") == ""
    assert attacks.declared([{"implant_asr": 0.9}, {"implant_asr": 0.5}, {}]) == "50"
    assert attacks.weak([c | {"rate": 0.1} for c in cells]) == "badnets (1 of 2)"


def test_an_attack_s_page_shows_its_lines_of_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = script("attack_pages")
    monkeypatch.setattr(attacks, "DOCS", tmp_path)
    (tmp_path / "measured").mkdir()
    (tmp_path / "methods").mkdir()

    def of(cell: str, attack: str, seed: int, asr: float, flag: str = "") -> dict[str, Any]:
        about = {"cell": f"{cell}/none/s{seed}", "attack": attack, "seed": seed, "flag": flag}
        return about | {"metric": "asr", "qualifier": "", "value": asr}

    def made(rows: list[dict[str, Any]], methods: dict[str, int], params: dict[str, str] | None = None) -> str:
        cells = [
            {"cell": r["cell"], "attack": r["attack"], "rate": float(r["cell"].split("/")[2].partition("@")[2])}
            | {"attack_params": json.dumps(params or {}), "flag": r["flag"], "status": "ok", "reason": ""}
            for r in rows
        ]
        return json.dumps({"parts": [{"rows": rows, "cells": cells, "methods": methods}]})

    small = [of("digits/small_cnn/badnets@0.1", "badnets", i, a, f) for i, a, f in ((1, 0.5, "weak"), (0, 1.0, ""))]
    swept = [of("fashion_mnist/small_cnn/badnets~abc@0.05", "badnets~abc", 0, 0.75)]
    around = [of("digits/small_cnn/belt:badnets@0.1", "belt:badnets", 0, 0.25)]
    wrapped = [of("fashion_mnist/small_cnn/belt:badnets@0.05", "belt:badnets", 0, 0.5)]
    registry = Registry.discover("none")
    belt = registry.get("attack", "belt").blueprint.info["version"]
    known = {"attack/badnets": 99, "attack/belt:badnets": belt}
    (tmp_path / "measured" / "attacks-digits.json").write_text(made(small + around, {"attack/belt:badnets": belt}))
    swept_too = made(swept + wrapped, known, {"targets": "all_to_all"})
    (tmp_path / "measured" / "attacks-fashion.json").write_text(swept_too)
    page = tmp_path / "methods" / "badnets.md"
    page.write_text("# BadNets\n\nText.\n\n## Measured\n\nBy `make measure`.\n")
    (tmp_path / "methods" / "belt.md").write_text("# BELT\n")
    assert attacks.pages(registry) == ["badnets", "belt"]
    once = page.read_text()
    body = [line.split(" | ") for line in once.splitlines() if line.startswith("| badnets")]
    assert [line[:3] + line[5:6] for line in body] == [
        ["| badnets", "digits 10 %", "90", "100.0, 50.0"],
        ["| badnets, targets=all_to_all", "fashion_mnist 5 %", "90", "75.0"],
    ]
    assert [line[-1].strip("| ") for line in body] == ["weak", "of an earlier version"]
    assert [bool(line[3]) for line in body] == [True, False], "what is printed is of one target class"
    assert once.startswith("# BadNets\n\nText.\n\n## Declared, published, measured\n")
    assert once.endswith("\n\n## Measured\n\nBy `make measure`.\n")
    body = [line.split(" | ") for line in (tmp_path / "methods" / "belt.md").read_text().splitlines()[4:]]
    assert [line[:3] for line in body if line[0] == "| belt:badnets"] == [
        ["| belt:badnets", "digits 10 %", "90"],
        ["| belt:badnets", "fashion_mnist 5 %", "90"],
    ]
    aged = [line[-1].strip("| ") for line in body if line[0] == "| belt:badnets"]
    assert aged == ["", "of an earlier version"], (
        "the wrapped attack's version is that of its own line, where it has one"
    )
    attacks.pages(registry)
    assert page.read_text() == once, "the section is replaced, not written twice"
    settings = {"badnets": {"size": 3, "targets": "all_to_one"}, "badnets~abc": {"size": 3, "targets": "all_to_all"}}
    cells = [{"attack": a, "attack_params": json.dumps(p)} for a, p in settings.items()]
    assert attacks.differing(cells) == {"badnets~abc": ["targets=all_to_all"]}
    # Without a plain one, or one from before there was the parameter, its default stands for it.
    alone = [cells[1] | {"attack_params": json.dumps({"include_target": True, "targets": "all_to_all"})}]
    assert attacks.differing(alone) == {"badnets~abc": ["targets=all_to_all"]}
    old = [cells[0] | {"attack_params": '{"size": 3}'}, cells[1]]
    assert attacks.differing(old) == {"badnets~abc": ["targets=all_to_all"]}


def test_the_page_says_how_attacks_came_into_the_models() -> None:
    attacks = script("attack_pages")
    assert attacks.way({}) == []
    assert attacks.way({"injection": {"epochs": 10, "lr": 0.01}, "append": True}) == [
        "Injected into benignly trained models by 10 epochs of fine-tuning at a rate of 0.01.",
        "Poisoned rows stand beside their clean ones.",
    ]


def test_an_attack_s_figures_are_those_of_the_first_part_that_has_its_cell() -> None:
    attacks = script("attack_pages")

    def made(*cells: tuple[str, float], command: str) -> dict[str, Any]:
        about = [{"cell": c, "attack": c[0]} for c, _ in cells]
        return {"command": command, "cells": about, "rows": [{"cell": c, "value": v} for c, v in cells]}

    new, old = made(("a", 1.0), command="new"), made(("a", 0.0), ("b", 0.5), command="old")
    first, second = attacks.together([new, old, made(("b", 0.1), command="oldest")])
    assert (first["command"], first["rows"]) == ("new", [{"cell": "a", "value": 1.0}])
    assert (second["command"], second["rows"]) == ("old", [{"cell": "b", "value": 0.5}])
    assert [c["cell"] for c in second["cells"]] == ["b"]


def test_an_attack_at_several_rates_has_a_line_each() -> None:
    attacks = script("attack_pages")
    cells = [
        {"cell": f"d/n/{a}@{r}/none/s0", "attack": a, "rate": r, "flag": "", "status": "ok", "reason": ""}
        | {"attack_params": "{}"}
        for a, r in (("badnets", 0.1), ("adaptive_blend", 0.015), ("adaptive_blend", 0.1))
    ]
    rows = [row("asr", c["rate"], attack=c["attack"], defense="none", seed=0) | {"cell": c["cell"]} for c in cells]
    rows, cells = attacks.by_rate(rows, cells)
    lines = [line.split(" | ") for line in attacks.lines(rows, cells, Registry.discover("none"))[2:]]
    assert [(line[0], line[1], line[5]) for line in lines] == [
        ("| adaptive_blend", "1.5", "1.5"),
        ("| adaptive_blend", "10", "10.0"),
        ("| badnets", "10", "10.0"),
    ]
    assert attacks.plain("belt:badnets~1a at 1.5 %") == "belt:badnets"


def test_the_attacks_pages_are_those_of_the_stored_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks, own = script("attack_pages"), script("attack_pages").DOCS
    for part in ("measured", "methods"):
        shutil.copytree(own / part, tmp_path / part, ignore=lambda folder, names: {n for n in names if "." not in n})
    monkeypatch.setattr(attacks, "DOCS", tmp_path)
    attacks.shown()
    pages = [f"attacks-{p.stem.removeprefix('attacks-')}.md" for p in (own / "measured").glob("attacks-*.json")]
    pages += [f"methods/{p.name}" for p in (own / "methods").glob("*.md")]
    assert [p for p in pages if (own / p).read_text() != (tmp_path / p).read_text()] == []


def test_methods_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    registry = Registry.discover("none")
    now = registry.get("attack", "cassock").blueprint.info["version"]
    same = registry.get("attack", "badnets").blueprint.info["version"]
    outer = registry.get("attack", "belt").blueprint.info["version"]
    used = [("attack", "badnets", same), ("attack", "cassock", now - 1), ("evaluator", "ra", 1), ("attack", "gone", 1)]
    used += [("attack", "belt:badnets", outer + 1), ("defense", "cassock", now - 1)]
    plugins = [{"kind": k, "id": i, "method_version": v} for k, i, v in used]
    (tmp_path / "plugins.json").write_text(json.dumps(plugins))
    record = script("record")
    found = record.methods(tmp_path)
    assert "evaluator/ra" not in found and found["attack/cassock"] == now - 1
    said = [f"`belt:badnets` ({outer + 1}, now {outer})", f"`cassock` ({now - 1}, now {now})"]
    assert record.older(found, registry) == said
    assert record.aged(found, registry) == [f"Measured with an earlier version of {', '.join(said)}."]
    assert record.aged({"attack/cassock": now}, registry) == []
    bec = registry.get("evaluator", "bec").blueprint.info["version"]
    assert record.older({"evaluator/bec": bec - 1}, registry) == [f"`bec` ({bec - 1}, now {bec})"]
    mixed = {"evaluator/bec": [bec - 1, bec]}
    assert record.older(mixed, registry) == [f"`bec` ({bec - 1} and {bec}, now {bec})"]
    assert record.older({"evaluator/bec": bec, "evaluator/gone": 1}, registry) == []


def test_attacks_keep_success_apart_by_images_triggers_covers_and_classes() -> None:
    attacks = script("attack_pages")

    def of(attack: str, metric: str, value: float, qualifier: str = "", seed: int = 0) -> dict[str, Any]:
        return row(metric, value, qualifier, attack=attack, defense="none", seed=seed)

    rows = [
        *(of("tact", "asr", v, seed=s) for s, v in enumerate((1.0, 0.9))),
        *(of("tact", "asr_leak", v, seed=s) for s, v in enumerate((0.01, 0.02))),
        *(
            of("tact", "asr_leak", v, q, s)
            for q, s, v in (("class=1", 0, 0.03), ("class=2", 0, 0.0), ("class=1", 1, 0.05))
        ),
        *(
            of("hybrid", "asr", v, q)
            for q, v in (("", 0.75), ("trigger=0", 1.0), ("trigger=1", 0.5), ("stat=min", 0.5))
        ),
        *(of("hybrid", "asr_leak", v, q) for q, v in (("", 0.2), ("trigger=1", 0.2), ("class=3;trigger=1", 0.9))),
        *(of("belt:sig", m, v) for m, v in (("asr", 1.0), ("cover_acc", 0.6), ("cover_asr", 0.4), ("c_acc", 0.9))),
        *(of("badnets~1a", m, v, q) for m, v, q in (("c_acc", 0.9, ""), ("asr", 0.8, ""), ("asr", 0.7, "class=10"))),
        of("badnets~1a", "asr", 0.9, "class=2"),
    ]
    found = attacks.figures(rows)
    assert attacks.sparing(found, {})[2:] == ["| tact | 100.0, 90.0 | 1.0, 2.0 | 3.0, 5.0 |  |  |"]
    assert attacks.triggers(found, {"hybrid": ["cassock", "hcb"]}, {})[2:] == [
        "| hybrid | mean | 75.0 | 20.0 |",
        "| hybrid | worst | 50.0 | 20.0 |",
        "| hybrid | 0: cassock | 100.0 |  |",
        "| hybrid | 1: hcb | 50.0 | 20.0 |",
    ]
    assert attacks.covers(found, {})[2:] == ["| belt:sig | 60.0 | 40.0 | 90.0 | 100.0 |"]
    assert attacks.classes(found)[2:] == ["| badnets | 90.0 | 80.0 | 70.0 | 2: 90.0, 10: 70.0 |"]
    assert any("hcb at 50.0 %" in p for p in attacks.prose(found, {"hybrid": ["cassock", "hcb"]}))


def test_a_section_without_rows_is_left_out() -> None:
    section = script("attack_pages").section
    assert section("Covers", "What they are.", []) == section("Covers", "", [""]) == []
    assert section("Covers", "What they are.", ["| a |"]) == ["", "## Covers", "", "What they are.", "", "| a |"]


def test_verdicts_on_separability_follow_the_figures() -> None:
    attacks = script("attack_pages")

    def text(values: dict[str, float]) -> str:
        rows = [row("silhouette", v, attack=a, defense="none") for a, v in values.items()]
        cells = [{"attack": a, "flag": "weak" if a == "badnets" else ""} for a in values]
        return "\n".join(attacks.separability(attacks.figures(rows), cells))

    kept = {"badnets": 0.4, "belt:badnets": 0.5, "beltpp:badnets": 0.1, "adaptive_blend": 0.2}
    assert "«++» lies below «+» in 1 of 1 attacks: that order is seen here" in text(kept)
    assert "adaptive_blend, 0.20: below badnets's 0.40; 1 of the 2 other" in text(kept)
    assert "| badnets | 0.40 (weak) | 0.50 | 0.10 |" in text(kept)
    assert "0 of 1 attacks: that order is not seen" in text(kept | {"beltpp:badnets": 0.6})
    assert "not below badnets's" in text(kept | {"adaptive_blend": 0.45})
    rated = text({"badnets": 0.4, "adaptive_blend at 1.5 %": 0.2, "adaptive_blend at 10 %": 0.5})
    assert "adaptive_blend at 1.5 %, 0.20: below badnets's 0.40" in rated
    assert "adaptive_blend at 10 %, 0.50: not below badnets's 0.40" in rated


# ---- zoo.py ----------------------------------------------------------------------------------------------------------
def test_the_zoo_takes_a_detectors_time_from_its_cost() -> None:
    zoo = script("zoo")
    done = [
        {"kind": "defense", "status": "ok", "name": "digits/x", "plugin": p, "result": {"cpu_seconds": 1.0}}
        for p in ("mntd", "strip")
    ]
    done.append(done[0] | {"kind": "prepare", "result": {"cpu_seconds": 30.0}})
    rows = [
        row("cost_forwards", 9.0, dataset="digits", defense="mntd", cpu_seconds=50.0),
        row("cost_forwards", 9.0, "phase=run", dataset="digits", defense="mntd", cpu_seconds=1.0),
    ]
    assert zoo.took(rows, done) == {("digits", "mntd"): (20.0, 30.0), ("digits", "strip"): (1.0, 0.0)}


def test_the_zoo_names_kinds_of_clean_models_and_what_was_left_out() -> None:
    zoo = script("zoo")
    cells = [
        {"attack": "none", "attack_params": "{}", "dataset": "digits", "reason": ""},
        {
            "attack": "none~1a",
            "attack_params": json.dumps({"stamped": 0.1, "noisy": 0.0}),
            "dataset": "d",
            "reason": "",
        },
        *(
            {"attack": a, "dataset": "digits", "suite": s, "seed": seed, "reason": reason, "attack_params": "{}"}
            for a, s, seed, reason in (
                ("wanet", "zoo", 0, "attack_did_not_implant: mean ASR 0.80 below 0.9"),
                ("wanet", "zoo", 1, "attack_did_not_implant: mean ASR 0.80 below 0.9"),
                ("wanet", "zoo-inputs", 0, ""),
                ("lf", "zoo", 0, "attack_did_not_implant: mean ASR 0.50 below 0.9"),
            )
        ),
    ]
    assert zoo.kinds(cells) == {"none": "plain", "none~1a": "stamped 10 %"}
    assert zoo.absent(cells) == (
        "lf on digits in suite `zoo` (mean ASR 0.50 below 0.9 over 1 seeds); wanet on digits in suite `zoo` (mean ASR "
        "0.80 below 0.9 over 2 seeds; over the seeds of `zoo-inputs` it implanted, and stands there)"
    )
    assert zoo.share(row("det_tpr", 0.5, lower=0.1, upper=0.9)) == "50.0 (10 to 90)"
    assert zoo.share(row("det_tpr", None)) == zoo.share(None) == ""


def test_the_zoo_takes_bounds_from_rows_of_their_own() -> None:
    zoo = script("zoo")
    values = {"": 0.9, "stat=lower": 0.8, "stat=upper": 0.97, "attack=a": 0.5, "attack=b": 0.7}
    values |= {"attack=a;stat=lower": 0.25, "attack=a;stat=upper": 0.75}
    found = {("det_auroc", q): row("det_auroc", v, q, lower=None, upper=None) for q, v in values.items()}
    assert zoo.bounded(found, "det_auroc") == "90.0 (80 to 97)"
    assert zoo.bounded(found, "det_auroc", "attack=a") == "50.0 (25 to 75)"
    assert zoo.bounded(found, "det_auroc", "attack=b") == "70.0", "of a table without bounds"
    assert zoo.bounded(found, "det_bacc") == ""


# ---- record.py -------------------------------------------------------------------------------------------------------
def test_evaluation_time_leaves_the_defenses_out(tmp_path: Path) -> None:
    about = {"suite": {"name": "s", "recipe": {}, "dataset_rows": {"a": {"train": 100}}}, "protocol": 1, "host": {}}
    about["datasets"] = {"a": {"rows": {"train": 500}}, "b": {"rows": {"train": 500}}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    (tmp_path / "plugins.json").write_text("[]")
    rows = [
        row("c_acc", 1.0, cpu_seconds=2.0, env='{"torch": "2", "source": "x"}'),
        row("asr", 1.0, cpu_seconds=3.0, env=""),
        row("cost_forwards", 1.0, evaluator="cost", cpu_seconds=1000.0, env=""),
    ]
    found = script("record").provenance(tmp_path, rows)
    assert found["evaluation_core_seconds"] == 5
    assert found["versions"] == {"torch": "2"}
    assert found["train_rows"] == {"a": 100, "b": 500}


def test_runs_read_as_one_have_the_versions_of_all(tmp_path: Path) -> None:
    about = {"suite": {"name": "s", "recipe": {}, "dataset_rows": {}}, "protocol": 1, "host": {}, "datasets": {}}
    runs = [tmp_path / str(i) for i in (0, 1)]
    for i, run in enumerate(runs):
        run.mkdir()
        (run / "run.json").write_text(json.dumps(about))
        used = [("defense", "ft", 1), ("defense", "pam", i + 2), ("evaluator", "ra", 7), ("defense", f"own{i}", 1)]
        (run / "plugins.json").write_text(json.dumps([{"kind": k, "id": n, "method_version": v} for k, n, v in used]))
    told = [("p_asr_ra", 0.1, "ra", 3), ("bec", 0.2, "bec", 2), ("bec", 0.2, "bec", 3), ("c_acc", None, "accuracy", 4)]
    rows = [
        row(m, 1.0, evaluator=e, task_key=f"{e}{v}", cpu_seconds=1.0, env='{"torch": "2"}')
        | {"value": x, "method_version": v}
        for m, x, e, v in told
    ]
    found = script("record").combined(runs, rows, {"p_asr_ra", "bec", "c_acc"})
    own = {"defense/ft": 1, "defense/own0": 1, "defense/own1": 1, "defense/pam": [2, 3]}
    assert found["methods"] == own | {"evaluator/bec": [2, 3], "evaluator/ra": 3}
    assert found["evaluation_core_seconds"] == 4
    assert script("record").combined(runs, rows, {"cost"})["methods"] == own


def test_a_runs_time_counts_each_task_once(tmp_path: Path) -> None:
    tasks = [
        {"key": "a", "time": 12.0, "result": {"started": 10.0, "cpu_seconds": 1.5}},
        {"key": "b", "time": 15.0, "result": None},  # failed
        {"key": "b", "time": 31.4, "result": {"started": 16.0, "cpu_seconds": 15.0}},
        {"key": "a", "time": 40.0, "result": {"started": 10.0, "cpu_seconds": 1.5}},
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    found = {"tasks": 2, "task_core_seconds": 16, "task_wall_seconds": 30}
    assert script("record").spent(tmp_path) == found
    (tmp_path / "tasks.jsonl").unlink()
    assert script("record").spent(tmp_path) == {}


@pytest.mark.parametrize("name", ["attack_pages", "zoo", "measure", "record"])
def test_every_script_says_what_it_does(name: str) -> None:
    assert "`" in (script(name).__doc__ or "")
