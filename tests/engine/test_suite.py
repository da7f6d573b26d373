"""Suites: what a TOML file and the command line resolve to."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sleeperbench.engine.suite import RECIPES, Changes, build, read, shipped
from sleeperbench.engine.task import PUBLIC_SECRET
from sleeperbench.errors import BadInput


def labels(variants: Any) -> list[str]:
    return [v.label for v in variants]


def test_every_value_is_resolved(make_suite: Any) -> None:
    s = make_suite(
        tail='[train]\nepochs = 3\nrecipe = "bb"\npad = 2\ncurves = true\n[access]\nclean = 40\n'
        "[budget]\nthreads = 2\n[gate]\nimplant_asr = 0.5\n[dataset.digits]\ntrain = 500\n"
        "[model.small_cnn]\nwidth = 8\n[attack.badnets]\nsize = 4\n[defense.ft]\nlr = 1\n",
        seeds=[2, 5],
    )
    assert s.name == "tiny"
    assert s.secret == PUBLIC_SECRET
    assert s.datasets == ("digits",)
    assert s.dataset_rows == {"digits": {"train": 500}}
    assert s.arch_args == {"small_cnn": {"width": 8}}
    assert s.rates == (0.1,)
    assert s.seeds == (2, 5)
    assert s.calibration_seed == 2
    assert s.recipe == RECIPES["bb"] | {"epochs": 3, "pad": 2, "precision": "fp32"}
    assert s.curves is True
    assert s.access == {"clean": 40, "clean_source": "heldout"}
    assert (s.budget["threads"], s.budget["task_seconds"], s.budget["memory_gb"]) == (2, 7200, 4)
    assert (s.gate["implant_asr"], s.gate["implant_asr_low"], s.gate["collapse_points"]) == (0.5, 0.7, 10)
    badnets, ft = s.attacks[1], s.defenses[1]
    assert (badnets.id, badnets.label, badnets.params["size"]) == ("badnets", "badnets", 4)
    assert badnets.params["pattern"] == "checker3"
    assert ft.params["lr"] == 1.0
    assert type(ft.params["lr"]) is float  # so that 1 and 1.0 are one task


def test_defaults_fill_what_a_suite_leaves_out(make_suite: Any) -> None:
    s = make_suite(rates=None, evaluators=None, seeds=None)
    assert (s.rates, s.seeds, labels(s.evaluators)) == ((0.05,), (0,), ["accuracy"])
    assert s.recipe == RECIPES["s3"] | {"precision": "fp32"}
    assert s.curves is False


def test_every_shipped_suite_can_be_built(registry: Any) -> None:
    assert {"smoke", "quick", "cpu"} <= set(shipped())
    for name, text in shipped().items():
        suite, same = build(name, registry)
        assert (suite.name, same) == (name, text)


def test_a_list_is_swept_and_the_first_keeps_the_bare_label(make_suite: Any) -> None:
    s = make_suite(tail="[attack.badnets]\nsize = [3, 5]\n", attacks=["badnets"])
    first, second = s.attacks
    assert (first.label, first.params["size"]) == ("badnets", 3)
    # The digest of the full parameters, written out here once more.
    text = json.dumps(second.params, sort_keys=True, separators=(",", ":"))
    assert second.label == f"badnets~{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    assert second.params == first.params | {"size": 5}
    assert s.default("attack", "badnets", None).params == first.params


def test_a_sweep_of_two_parameters_is_their_product(make_suite: Any) -> None:
    s = make_suite(tail='[attack.badnets]\nsize = [3, 5]\ncorner = ["upper_left", "lower_left"]\n', attacks=["badnets"])
    assert [(v.params["size"], v.params["corner"]) for v in s.attacks] == [
        (3, "upper_left"),
        (3, "lower_left"),
        (5, "upper_left"),
        (5, "lower_left"),
    ]
    assert len(set(labels(s.attacks))) == 4


def test_a_tuple_parameter_is_not_swept(make_suite: Any) -> None:
    s = make_suite(tail="[evaluator.ra_budget]\nks = [1, 2]\n", evaluators=["ra_budget"])
    assert [v.params["ks"] for v in s.evaluators] == [(1, 2)]
    assert labels(s.evaluators) == ["ra_budget"]


def test_set_changes_a_parameter_and_the_label(make_suite: Any) -> None:
    s = make_suite(Changes(settings=["defense.ft.steps=7", "train.epochs=2", "attack.badnets.pattern=white"]))
    assert s.recipe["epochs"] == 2
    assert s.attacks[1].params["pattern"] == "white"
    assert s.defenses[1].params["steps"] == 7
    assert re.fullmatch(r"ft~[0-9a-f]{6}", s.defenses[1].label)
    assert s.defenses[0].label == "none"


def test_set_to_the_suites_own_value_keeps_the_bare_label(make_suite: Any) -> None:
    s = make_suite(Changes(settings=["attack.badnets.size=4"]), tail="[attack.badnets]\nsize = 4\n")
    assert labels(s.attacks) == ["none", "badnets"]


def test_set_of_a_list_sweeps(make_suite: Any) -> None:
    s = make_suite(Changes(settings=["attack.badnets.size=[0, 5]"]))
    assert [v.params.get("size") for v in s.attacks] == [None, 0, 5]
    assert s.attacks[1].label == "badnets"


def test_a_name_of_wrapper_and_wrapped_is_told_apart_by_inner(make_suite: Any) -> None:
    def params(tail: str = "", *settings: str) -> tuple[float, float, int]:
        suite = make_suite(Changes(settings=settings), defenses=["unlearn:neural_cleanse"], tail=tail)
        p = suite.defenses[-1].params
        return p["lr"], p["inner"]["lr"], p["inner"]["epochs"]

    own, wrapped, epochs = params()
    head = '[defense."unlearn:neural_cleanse"]\n'
    assert params(head + "lr = 0.5\nepochs = 3") == (0.5, wrapped, 3)
    assert params(head + "inner.lr = 0.5\ninner.epochs = 3") == (own, 0.5, 3)
    assert params(head + '"inner.lr" = 0.5\nlr = 0.25') == (0.25, 0.5, epochs)
    assert params("", "defense.unlearn:neural_cleanse.inner.lr=0.5") == (own, 0.5, epochs)
    assert params(head + "inner.lr = 0.25", "defense.unlearn:neural_cleanse.inner.lr=0.5") == (own, 0.5, epochs)
    with pytest.raises(BadInput, match=r"epochs and inner\.epochs are one here"):
        params(head + "epochs = 3\ninner.epochs = 4")
    with pytest.raises(BadInput, match="nosuch"):
        params(head + "inner.nosuch = 3")
    swept = make_suite(defenses=["unlearn:neural_cleanse"], tail=head + "inner.lr = [0.5, 0.25]").defenses
    assert [v.params["inner"]["lr"] for v in swept if v.id != "none"] == [0.5, 0.25]


def test_an_attack_may_have_rates_of_its_own(make_suite: Any, make_plan: Any) -> None:
    given = {"attacks": ["none", "badnets", "sig"], "rates": [0.1], "tail": "[attack.sig]\nrates = [0.05, 0.03]\n"}

    def names(changes: Changes | None = None) -> set[str]:
        return {c.name.split("/")[2] for c in make_plan(changes, **given).cells}

    assert make_suite(**given).attack_rates == {"sig": (0.05, 0.03)}
    assert names() == {"none@0", "badnets@0.1", "sig@0.05", "sig@0.03"}
    assert names(Changes(settings=["attack.sig.rates=[0.2]"])) == {"none@0", "badnets@0.1", "sig@0.2"}
    assert names(Changes(rates=[0.3])) == {"none@0", "badnets@0.3", "sig@0.3"}, "what --rate asks for is for all"
    for wrong, what in (
        ("0.05", "give a list"),
        ("[2.0]", "outside 0"),
        ("[]", "nothing to run"),
        ('["a"]', "not float"),
    ):
        with pytest.raises(BadInput, match=what):
            make_suite(tail=f"[attack.sig]\nrates = {wrong}\n")


def test_a_preset_gives_its_efforts_and_what_stands_beside_it_counts_more(make_suite: Any, registry: Any) -> None:
    blueprint = registry.get("defense", "ct").blueprint
    own, normal = blueprint.info["presets"]["reduced"], {k: f.default for k, f in blueprint.fields.items()}

    def params(defense: str, tail: str, *settings: str) -> dict[str, Any]:
        head = f'[defense."{defense}"]\n{tail}' if tail else ""
        found = make_suite(Changes(settings=settings), defenses=["none", defense], tail=head).defenses[-1].params
        return dict(found)

    reduced = normal | own
    assert params("ct", 'preset = "reduced"') == reduced != normal
    assert params("ct", "", "defense.ct.preset=reduced") == reduced
    assert params("ct", 'preset = "reduced"\nsteps = 7') == reduced | {"steps": 7}
    for name in ("ct", "retrain:ct"):  # taken back
        assert params(name, 'preset = "reduced"', f"defense.{name}.preset=published") == params(name, "")
    assert params("retrain:ct", 'preset = "reduced"')["inner"] == reduced
    for given in ("steps", "inner.steps"):
        assert params("retrain:ct", f'preset = "reduced"\n{given} = 7')["inner"] == reduced | {"steps": 7}
    many = make_suite(defenses=["ct"], tail='[defense.ct]\npreset = "reduced"\nsteps = [7, 8]\n').defenses
    assert [v.params for v in many if v.id == "ct"] == [reduced | {"steps": n} for n in (7, 8)]


@pytest.mark.parametrize(
    ("defense", "preset", "what"),
    [("ct", '"redused"', "reduced"), ("ct", "3", "reduced"), ("ft", '"published"', "it has none")],
)
def test_a_preset_that_is_not_there(make_suite: Any, defense: str, preset: str, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        make_suite(defenses=[defense], tail=f"[defense.{defense}]\npreset = {preset}\n")


HONEST = {
    "ft_sam": "rho",
    "fst": "alpha",
    "nad": "scale",
    "sau": "eps",
    "i_bau": "rounds",
    "npd": "eps",
    "bti_u": "rounds",
    "pam": "rho",
    "seam": "patience",
}
"""Repairs with a fixed setting, in the place of which None asks for the benchmark's rule of selection."""


@pytest.mark.parametrize(("defense", "key"), HONEST.items())
def test_the_honest_choice_can_be_asked_for(make_plan: Any, registry: Any, defense: str, key: str) -> None:
    def methods(tail: str = "", *settings: str, name: str = defense) -> list[Any]:
        plan = make_plan(Changes(settings=settings), defenses=["none", name], tail=tail)
        tasks = [t for t in plan.tasks.values() if t.kind == "defense" and t.name == defense]
        sent = [json.loads(json.dumps(t.to_json()))["params"]["method"] for t in tasks]  # as the run's child reads it
        return [registry.load("defense", defense).from_params(params) for params in sent]

    published = registry.get("defense", defense).blueprint.fields[key].default
    assert published is not None
    assert {getattr(m, key) for m in methods()} == {published}
    for found in (
        methods(f'[defense.{defense}]\n{key} = "none"\n'),
        methods("", f"defense.{defense}.{key}=none"),
        methods("", f'defense.{defense}.{key}="none"'),
        methods("", f"defense.ft_same_budget:{defense}.{key}=none", name=f"ft_same_budget:{defense}"),
        methods("", f"defense.ft_same_budget:{defense}.inner.{key}=none", name=f"ft_same_budget:{defense}"),
    ):
        assert found and all(getattr(m, key) is None for m in found)
    swept = methods(f'[defense.{defense}]\n{key} = [{published}, "none"]\n')
    assert {getattr(m, key) for m in swept} == {published, None}


def test_a_sweep_with_none_leaves_the_rows_before_it_as_they_were(make_plan: Any, make_suite: Any) -> None:
    parts = {"defenses": ["none", "ft_sam"]}
    tail = '[defense.ft_sam]\npreset = "reduced"\n'
    before = make_plan(tail=tail, **parts)
    after = make_plan(tail=tail + 'rho = [2.0, "none"]\n', **parts)
    keys = {c.name: (c.attack_key, c.defense_key, [e.key for e in c.evaluations]) for c in after.cells}
    old = {c.name: (c.attack_key, c.defense_key, [e.key for e in c.evaluations]) for c in before.cells}
    assert old.items() <= keys.items()
    assert {re.sub("~[0-9a-f]{6}", "~", name.split("/")[3]) for name in keys.keys() - old.keys()} == {"ft_sam~"}
    published, honest = make_suite(tail=tail + 'rho = [2.0, "none"]\n', **parts).defenses[1:]
    assert published.label == "ft_sam"
    assert honest.params == published.params | {"rho": None}
    assert '"rho":null' in {c.identity["defense_params"] for c in after.cells if "~" in c.name}.pop()
    with pytest.raises(BadInput, match="the same parameters twice"):
        make_suite(tail='[defense.ft_sam]\nrho = ["none", 2.0, "none"]\n', **parts)


def test_none_in_words_is_the_default_none(make_plan: Any, make_suite: Any) -> None:
    parts = {"defenses": ["none", "anp"]}  # whose threshold is None by default
    plain, said = make_plan(**parts), make_plan(tail='[defense.anp]\nthreshold = "none"\n', **parts)
    assert list(plain.tasks) == list(said.tasks)
    assert [c.name for c in plain.cells] == [c.name for c in said.cells]
    tail = "[defense.anp]\nthreshold = 0.3\n"
    label = make_suite(Changes(settings=["defense.anp.threshold=none"]), tail=tail, **parts).defenses[-1].label
    assert re.fullmatch(r"anp~[0-9a-f]{6}", label), "against the suite's own value it is another variant"


def test_none_where_there_is_no_choice_to_make(make_suite: Any) -> None:
    with pytest.raises(BadInput, match=r"`rho` is 'nine' \(str\); wanted: float \| None \(None is written \"none\"\)"):
        make_suite(Changes(settings=["defense.ft_sam.rho=nine"]), defenses=["ft_sam"])
    with pytest.raises(BadInput, match=r"`lr` is 'none' \(str\); wanted: float$"):
        make_suite(Changes(settings=["defense.ft_sam.lr=none"]), defenses=["ft_sam"])


def test_lists_restrict_the_matrix_but_keep_the_controls(make_suite: Any) -> None:
    s = make_suite(
        Changes(attacks=["blended"], defenses=["ft"], evaluators=["accuracy"], seeds=[3, 4], rates=[0.2]),
        attacks=["none", "badnets", "blended"],
        defenses=["none", "bn_refresh", "ft"],
        evaluators=["accuracy", "stealth"],
    )
    assert labels(s.attacks) == ["none", "blended"]
    assert labels(s.defenses) == ["none", "ft"]
    assert labels(s.evaluators) == ["accuracy"]
    assert (s.seeds, s.rates) == ((3, 4), (0.2,))
    assert s.calibration_seed == 0  # the suite's first, so that a slice of it shares its calibration


def test_an_id_that_is_not_in_the_matrix_is_added(make_suite: Any) -> None:
    s = make_suite(Changes(defenses=["bn_refresh"], archs=["small_resnet"]))
    assert labels(s.defenses) == ["none", "bn_refresh"]
    assert s.archs == ("small_resnet",)


def test_a_suite_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b"name = \xff\xfe")
    with pytest.raises(BadInput, match="UTF-8"):
        read(str(file))


def test_a_data_set_of_the_users_own_can_be_named(make_suite: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import numpy as np

    from sleeperbench.data.added import add_arrays

    arrays = tmp_path / "arrays"
    arrays.mkdir()
    images = np.zeros((20, 16, 16, 3), np.uint8)
    for split in ("train", "test"):
        np.savez(arrays / f"{split}.npz", images=images, labels=np.arange(20, dtype=np.int64) % 2)
    monkeypatch.setenv("SLEEPERBENCH_DATA", str(tmp_path / "root"))
    add_arrays(tmp_path / "root", "mine", arrays)
    assert make_suite(datasets=["mine"]).datasets == ("mine",)


def test_tuned_settings_are_named_by_the_suite(make_suite: Any) -> None:
    head = 'schema = 1\nname = "tiny"\ntuned = ["attack.badnets"]\n'
    assert make_suite(head=head, tail="[attack.badnets]\nsize = 4\n", attacks=["badnets"]).tuned == ("attack.badnets",)
    with pytest.raises(BadInput, match="no table here"):
        make_suite(head=head, attacks=["badnets"])


def test_poisoned_rows_replace_clean_ones_unless_the_suite_appends_them(make_suite: Any) -> None:
    assert not make_suite().append
    s = make_suite(tail='[train]\npoisoned = "append"\n')
    assert s.append and s.recipe == make_suite().recipe
    with pytest.raises(BadInput, match="poisoned"):
        make_suite(tail='[train]\npoisoned = "both"\n')


def test_injection_by_fine_tuning_changes_the_recipe_of_attacks_alone(make_suite: Any) -> None:
    assert make_suite().injection == {}
    s = make_suite(tail='[train]\ninject = "finetune"\ninject_epochs = 2\n')
    assert s.injection == {"lr": 0.01, "epochs": 2}
    assert s.recipe["lr"] == 0.1
    with pytest.raises(BadInput, match="inject_epochs needs inject"):
        make_suite(tail="[train]\ninject_epochs = 2\n")


def test_the_suite_in_the_documentation_does_what_it_says(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "suites.md").read_text()
    (tmp_path / "mine.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    suite, _ = build(str(tmp_path / "mine.toml"), registry)
    assert [v.params.get("size") for v in suite.attacks if v.id == "badnets"] == [2, 3]
    assert suite.attack_rates == {"sig": (0.05,)}
    unlearn = suite.defenses[-1].params
    assert (unlearn["steps"], unlearn["inner"]["epochs"], unlearn["inner"]["lr"]) == (50, 10, 0.1)
    assert unlearn["lr"] != 0.1
    assert suite.dataset_rows == {"digits": {"train": 1000}}
