"""The graph of tasks: how many, shared by whom, and what their keys depend on."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

import plugins
import pytest

from sleeperbench.contracts.access import Access
from sleeperbench.engine import costs, progress, run
from sleeperbench.engine.plan import Cell, Plan, Planner, restrict
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.suite import Changes, build
from sleeperbench.engine.task import PUBLIC_SECRET, Task, attack_seed, canonical, digest, target_class
from sleeperbench.engine.work import Work
from sleeperbench.errors import BadInput

RATED = {"evaluators": ["accuracy", "ra"], "defenses": ["none", "clean_model", "ft"]}


def cell(plan: Plan, attack: str, defense: str, seed: int = 0) -> Cell:
    (found,) = [c for c in plan.cells if c.name == f"digits/small_cnn/{attack}/{defense}/s{seed}"]
    return found


def kinds(plan: Plan) -> Counter[str]:
    return Counter(t.kind for t in plan.tasks.values())


@pytest.mark.parametrize(
    ("attacks", "rates", "defenses", "seeds"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1), (2, 1, 3, 1), (2, 2, 3, 3)],
)
def test_counts_in_closed_form(make_plan: Any, attacks: int, rates: int, defenses: int, seeds: int) -> None:
    plan = make_plan(
        attacks=["none", "badnets", "blended"][: attacks + 1],
        rates=[0.1, 0.2][:rates],
        defenses=["none", "ft", "bn_refresh", "exact_purification"][: defenses + 1],
        seeds=list(range(seeds)),
    )
    models = seeds * (1 + attacks * rates)
    assert kinds(plan) == {"attack": models, "defense": models * (1 + defenses), "evaluate": models * (1 + defenses)}
    assert len(plan.cells) == models * (1 + defenses)


def test_without_attack_none_no_clean_model_is_planned_that_nothing_reads(make_plan: Any) -> None:
    plan = make_plan(attacks=["badnets"])
    assert kinds(plan) == {"attack": 1, "defense": 2, "evaluate": 2}


def test_an_evaluator_of_attacks_measures_once_per_attacked_model(make_plan: Any) -> None:
    plan = make_plan(evaluators=["stealth"], defenses=["none", "ft", "bn_refresh"], seeds=[0, 1])
    assert kinds(plan)["evaluate"] == 2 * 2


def test_clean_models_are_shared(make_plan: Any) -> None:
    """RA's budget reads clean models 0 to 2 of the calibration seed; `clean_model` is clean model 0 of its seed."""
    plan = make_plan(**RATED, seeds=[0, 1])
    trained = {(t.name, t.seed, t.params["replica"]) for t in plan.tasks.values() if t.kind == "attack"}
    none0, none1 = (attack_seed(PUBLIC_SECRET, "none", s) for s in (0, 1))
    bad0, bad1 = (attack_seed(PUBLIC_SECRET, "badnets", s) for s in (0, 1))
    clean = {("none", none0, 0), ("none", none0, 1), ("none", none0, 2), ("none", none1, 0)}
    assert trained == clean | {("badnets", bad0, 0), ("badnets", bad1, 0)}
    reference = plan.tasks[cell(plan, "badnets@0.1", "clean_model", 1).defense_key].inputs["reference0"]
    assert reference == cell(plan, "none@0", "none", 1).attack_key


def test_the_controls_of_ra_are_the_cells_of_attack_none(make_plan: Any) -> None:
    plan = make_plan(**RATED)
    (ra,) = [e for e in cell(plan, "badnets@0.1", "ft").evaluations if e.evaluator == "ra"]
    inputs = plan.tasks[ra.key].inputs
    assert inputs["defended_clean"] == cell(plan, "none@0", "ft").defense_key
    (control,) = [e for e in cell(plan, "badnets@0.1", "clean_model").evaluations if e.evaluator == "ra"]
    assert inputs["control.clean_model"] == control.key
    assert plan.tasks[inputs["evaluator.ra_budget"]].name == "ra_budget"


def test_an_evaluator_of_triggers_reads_what_a_wrapper_wraps(make_plan: Any) -> None:
    plan = make_plan(defenses=["none", "neural_cleanse", "unlearn:neural_cleanse"], evaluators=["inversion"])
    keys = {}
    for defense in ("neural_cleanse", "unlearn:neural_cleanse"):
        here = cell(plan, "badnets@0.1", defense)
        (inversion,) = here.evaluations
        keys[defense] = here.defense_key, plan.tasks[inversion.key].inputs
    inner, plain = keys["neural_cleanse"]
    _, wrapping = keys["unlearn:neural_cleanse"]
    assert "wrapped" not in plain
    assert wrapping["wrapped"] == inner


def test_the_budget_is_calibrated_once(make_plan: Any) -> None:
    plan = make_plan(**RATED, seeds=[0, 1, 2])
    budgets = [t for t in plan.tasks.values() if t.name == "ra_budget"]
    assert sorted({t.inputs["attack"] for t in budgets}) == sorted(
        {cell(plan, a, "none").attack_key for a in ("none@0", "badnets@0.1")}
    )
    assert len(budgets) == 2


def test_inputs_precede_their_users_and_users_are_known(make_plan: Any) -> None:
    plan = make_plan(**RATED, attacks=["none", "badnets", "blended"], seeds=[0, 1])
    seen: set[str] = set()
    for key, task in plan.tasks.items():
        assert set(task.inputs.values()) <= seen
        assert all(key in plan.users[i] for i in plan.inputs(key))
        seen.add(key)


def test_planning_is_deterministic(make_plan: Any) -> None:
    one, two = make_plan(**RATED), make_plan(**RATED)
    assert list(one.tasks) == list(two.tasks)
    assert [c.identity for c in one.cells] == [c.identity for c in two.cells]
    assert one.gates == two.gates


def keys(plan: Plan) -> dict[str, str]:
    """The keys of the undefended evaluation, attack and defense of the first repaired cell."""
    (c,) = [c for c in plan.cells if c.attack_group and not c.is_control]
    return {"attack": c.attack_key, "defense": c.defense_key, "evaluate": c.evaluations[0].key}


ALL = {"attack", "defense", "evaluate"}


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ({"seeds": [1]}, ALL),
        ({"rates": [0.2]}, ALL),
        ({"archs": ["small_resnet"]}, ALL),
        ({"digest": "e"}, ALL),
        ({"tail": "[attack.badnets]\nsize = 4\n"}, ALL),
        ({"tail": "[defense.ft]\nlr = 0.5\n"}, {"defense", "evaluate"}),
        ({"tail": "[train]\nepochs = 9\n"}, ALL),
        ({"tail": "[train]\nlr = 0.2\n"}, ALL),
        ({"tail": '[train]\nprecision = "bf16"\n'}, ALL),
        ({"tail": "[train]\ncurves = true\n"}, ALL),
        ({"tail": "[access]\nclean = 0.1\n"}, ALL),
        ({"tail": '[access]\nclean_source = "training"\n'}, ALL),
        ({"tail": "[budget]\nthreads = 2\n"}, ALL),
        ({"tail": "[dataset.digits]\ntrain = 500\n"}, ALL),
        ({"tail": "[dataset.digits]\ntest = 200\n"}, ALL),
        ({"tail": "[model.small_cnn]\nwidth = 8\n"}, ALL),
        ({"head": 'schema = 1\nname = "tiny"\nsecret = "s"\n'}, ALL),
        ({"head": 'schema = 1\nname = "other"\ntitle = "Other"\n'}, set()),
        ({"tail": "[budget]\ntask_seconds = 5\nmemory_gb = 1\n"}, set()),
        ({"tail": "[gate]\nimplant_asr = 0.1\n"}, set()),
        ({"changes": Changes(timeout=3.0)}, set()),
        ({"evaluators": ["accuracy", "stealth"]}, set()),
        ({"attacks": ["badnets"]}, set()),
        ({"defenses": ["ft"]}, set()),
    ],
)
def test_keys_move_with_what_determines_a_result_alone(
    make_plan: Any, changed: dict[str, Any], moves: set[str]
) -> None:
    base, other = keys(make_plan()), keys(make_plan(**changed))
    assert {k for k in base if base[k] != other[k]} == moves


@pytest.mark.parametrize("field", ["kind", "name", "version", "params", "seed", "numerics", "inputs"])
def test_a_tasks_key_holds_every_field(field: str) -> None:
    task: dict[str, Any] = {"kind": "attack", "name": "a", "version": 1, "params": {"x": 1}, "seed": 3}
    task |= {"numerics": {"threads": 1}, "inputs": {"attack": "k"}}
    other = {"kind": "defense", "name": "b", "version": 2, "params": {"x": 2}, "seed": 4, "numerics": {"threads": 2}}
    other["inputs"] = {"attack": "l"}
    assert Task(**task).key != Task(**task | {field: other[field]}).key
    assert Task(**task).key == Task(**task, timeout=1.0, role="view").key
    assert Task.from_json(Task(**task).to_json()) == Task(**task)


def test_canonical_json() -> None:
    assert canonical({"b": (1, 2.5), "a": "é", "c": None}) == '{"a":"é","b":[1,2.5],"c":null}'
    assert digest([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"  # sha256sum of `[]`
    with pytest.raises(ValueError):
        canonical(float("nan"))


def test_an_attacks_seed_is_the_hmac_of_the_secret() -> None:
    # printf 'badnets\0000' | openssl dgst -sha256 -hmac secret: the first 8 bytes, as a 63-bit number
    assert attack_seed("secret", "badnets", 0) == int("c318c94d1f6571a0", 16) >> 1


def test_seeds_are_independent() -> None:
    drawn = {attack_seed(s, a, n) for s in ("x", "y") for a in ("badnets", "blended") for n in range(20)}
    assert len(drawn) == 80


def test_what_repeats_ra_s_runs_has_its_seed_and_settings(make_plan: Any) -> None:
    plan = make_plan(
        evaluators=["ra", "ra_budget", "qra", "wake", "accident"], seeds=[0, 1], tail="[evaluator.ra]\nlr = 0.02\n"
    )
    seeds: dict[str, set[int]] = {}
    for t in plan.tasks.values():
        if t.kind == "evaluate":
            seeds.setdefault(t.name, set()).add(t.seed)
            assert "draws_of" not in t.params["needs"]
    assert len(seeds["ra"]) == 2
    assert seeds["qra"] == seeds["wake"] == seeds["ra"]
    assert not seeds["ra"] & (seeds["accident"] | seeds["ra_budget"])
    (qra, *_) = [t for t in plan.tasks.values() if t.name == "qra"]
    assert qra.params["settings"]["ra"]["lr"] == 0.02
    assert set(qra.params["settings"]) == {"ra", "ra_budget"}


def test_a_defenses_seed_tells_nothing_of_the_attack(make_plan: Any) -> None:
    plan = make_plan(attacks=["none", "badnets", "blended"], rates=[0.1, 0.2], tail="[attack.badnets]\nsize = [3, 4]\n")
    seeds = {t.seed for t in plan.tasks.values() if t.kind == "defense" and t.name == "ft"}
    assert len(seeds) == 1
    secret = make_plan(head='schema = 1\nname = "tiny"\nsecret = "s"\n')
    assert seeds == {t.seed for t in secret.tasks.values() if t.kind == "defense" and t.name == "ft"}


def test_target_classes() -> None:
    assert [target_class(PUBLIC_SECRET, "badnets", s, 10) for s in (0, 1, 2)] == [0, 1, 8]
    assert target_class(PUBLIC_SECRET, "badnets", 2, 5) < 5  # class 8 does not exist there
    hidden = [target_class("secret", "badnets", s, 10) for s in range(200)]
    assert set(hidden) == set(range(10))
    assert hidden[:3] != [0, 1, 8]


def test_gates_hold_repairs_and_not_what_decides_them(make_plan: Any) -> None:
    plan = make_plan()
    group = "digits/small_cnn/badnets@0.1"
    repaired, undefended = cell(plan, "badnets@0.1", "ft"), cell(plan, "badnets@0.1", "none")
    assert plan.gates[repaired.defense_key] == plan.gates[repaired.evaluations[0].key] == group
    for key in (undefended.attack_key, undefended.defense_key, undefended.evaluations[0].key):
        assert key not in plan.gates
    assert cell(plan, "none@0", "ft").defense_key not in plan.gates


def test_a_task_that_two_attacks_need_waits_for_no_gate(make_plan: Any) -> None:
    """The clean model after a defense is a control of every attack; one that did not implant must not take it away."""
    plan = make_plan(**RATED, attacks=["badnets", "blended"])
    shared = {k for k, users in plan.users.items() if len({plan.gates.get(u) for u in users} - {None}) > 1}
    assert any(plan.tasks[k].kind == "defense" and plan.tasks[k].name == "ft" for k in shared)
    assert not shared & set(plan.gates)


STREAM = '''from dataclasses import dataclass
from sleeperbench import Access, Attack, Defense

@dataclass(frozen=True, kw_only=True)
class Stream(Attack):
    """Poisons batches, so there is no training set to hand over."""
    INFO = {"title": "Stream", "version": 1, "api": 1, "kind": "training_control", "paper": "", "micro": {}}
    SNAPSHOT = "none"

@dataclass(frozen=True, kw_only=True)
class Sift(Defense):
    """Looks through the training set."""
    INFO = {"title": "Sift", "version": 1, "api": 1, "kind": "cleanser", "paper": "", "micro": {}}
    ACCESS = Access(train=True)
'''


def test_a_defense_that_needs_the_training_set_is_blocked_without_a_snapshot(
    suite_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_plan: Any
) -> None:
    entries = {"sleeperbench.attacks": {"stream": "streams:Stream"}, "sleeperbench.defenses": {"sift": "streams:Sift"}}
    folder = plugins.install(tmp_path, "streams", "1.0", {"streams.py": STREAM}, entries)
    monkeypatch.syspath_prepend(str(folder))
    matrix = {"attacks": ["none", "badnets", "streams/stream"], "defenses": ["none", "streams/sift"]}
    registry = Registry.discover("all")
    suite, _ = build(str(suite_file(**matrix)), registry)
    plan = Planner(suite, registry, make_plan().datasets).build()
    blocked = {c.name: c.blocked for c in plan.cells if c.blocked}
    assert blocked == {"digits/small_cnn/streams/stream@0.1/streams/sift/s0": "not_applicable attack_controls_training"}


TRANSFER = """[evaluator.tba]
peers = ["ft"]
surrogates = ["small_resnet", "ft@small_resnet", "bn_refresh@timm:resnet18"]
[defense.ft]
lr = 0.5
"""


def test_surrogates_are_attacked_or_defended_models_of_other_architectures(make_plan: Any) -> None:
    plan = make_plan(evaluators=["tba"], tail=TRANSFER)
    at = cell(plan, "badnets@0.1", "ft")
    inputs = plan.tasks[at.evaluations[0].key].inputs
    attacked, tuned, refreshed = (
        plan.tasks[inputs[f"surrogate.{n}"]] for n in ("small_resnet", "ft@small_resnet", "bn_refresh@timm:resnet18")
    )
    target = plan.tasks[at.attack_key]
    assert (attacked.kind, attacked.params["spec"]["arch"]) == ("attack", "small_resnet")
    assert (attacked.name, attacked.seed, attacked.params["method"]) == (
        target.name,
        target.seed,
        target.params["method"],
    )
    assert tuned.inputs["attack"] == inputs["surrogate.small_resnet"]
    assert (tuned.kind, tuned.name, tuned.params["spec"]["arch"]) == ("defense", "ft", "small_resnet")
    assert tuned.params["method"]["lr"] == 0.5, "the suite's own setting"
    assert plan.gates[tuned.key] == at.attack_group
    assert refreshed.name == "bn_refresh"
    other = plan.tasks[refreshed.inputs["attack"]]
    assert (other.kind, other.params["spec"]["arch"]) == ("attack", "timm:resnet18")
    assert other.key != attacked.key != at.attack_key
    clean = plan.tasks[cell(plan, "none@0", "ft").evaluations[0].key]
    assert not [r for r in clean.inputs if r.startswith("surrogate.")], "there is no trigger to transfer"


def test_a_surrogate_of_an_unknown_defense_names_the_nearest(make_plan: Any) -> None:
    with pytest.raises(BadInput, match="fts"):
        make_plan(evaluators=["tba"], tail=TRANSFER.replace('"ft@', '"fts@'))


def test_a_surrogate_that_needs_a_training_set_which_there_is_not(
    suite_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_plan: Any
) -> None:
    entries = {"sleeperbench.attacks": {"stream": "streams:Stream"}, "sleeperbench.defenses": {"sift": "streams:Sift"}}
    folder = plugins.install(tmp_path, "streams", "1.0", {"streams.py": STREAM}, entries)
    monkeypatch.syspath_prepend(str(folder))
    tail = '[evaluator.tba]\nsurrogates = ["streams/sift@small_resnet"]\n'
    for attack, fails in (("badnets", False), ("streams/stream", True)):
        matrix = {"attacks": ["none", attack], "defenses": ["none"], "evaluators": ["tba"], "tail": tail}
        registry = Registry.discover("all")
        suite, _ = build(str(suite_file(**matrix)), registry)
        planner = Planner(suite, registry, make_plan().datasets)
        if fails:
            with pytest.raises(BadInput, match="has no training set"):
                planner.build()
        else:
            planner.build()


def test_a_calibration_waits_for_the_gate_and_stealth_does_not(make_plan: Any) -> None:
    plan = make_plan(evaluators=["accuracy", "ra", "ra_budget", "stealth"], defenses=["none", "ft"])
    at = cell(plan, "badnets@0.1", "none")
    keys = {e.evaluator: e.key for e in at.evaluations}
    assert plan.gates[keys["ra_budget"]] == at.attack_group
    assert not {keys["accuracy"], keys["stealth"]} & set(plan.gates)


def test_a_backdoor_can_be_tuned_into_a_clean_model(make_plan: Any) -> None:
    plan = make_plan(tail='[train]\ninject = "finetune"\ninject_epochs = 2\n')
    task = plan.tasks[cell(plan, "badnets@0.1", "none").attack_key]
    start = plan.tasks[task.inputs["start"]]
    assert (start.name, start.inputs) == ("none", {})
    clean = plan.tasks[cell(plan, "none@0", "none").attack_key]
    assert start.params["replica"] != clean.params["replica"], "the start is no evaluator's reference"
    assert (task.params["recipe"]["epochs"], task.params["recipe"]["lr"]) == (2, 0.01)
    assert start.params["recipe"] == clean.params["recipe"] != task.params["recipe"]


def test_appended_rows_are_a_matter_of_attacked_models_alone(make_plan: Any) -> None:
    plain, plan = make_plan(), make_plan(tail='[train]\npoisoned = "append"\n')
    assert cell(plan, "none@0", "ft").defense_key == cell(plain, "none@0", "ft").defense_key
    own, other = (p.tasks[cell(p, "badnets@0.1", "none").attack_key] for p in (plan, plain))
    assert own.params == other.params | {"append": True}


def test_only_keeps_what_gates_and_figures_need(make_plan: Any) -> None:
    matrix: dict[str, Any] = {"attacks": ["none", "badnets", "blended"], "seeds": [0, 1]}
    plan = make_plan(**matrix, defenses=["none", "ft", "bn_refresh"])
    whole = set(plan.tasks)
    restrict(plan, "*/badnets@0.1/ft/s0")
    names = {c.name.removeprefix("digits/small_cnn/") for c in plan.cells}
    assert names == {
        "badnets@0.1/ft/s0",
        "badnets@0.1/none/s0",
        "badnets@0.1/none/s1",
        "none@0/none/s0",
        "none@0/none/s1",
    }
    assert set(plan.tasks) < whole
    assert all(i in plan.tasks for t in plan.tasks.values() for i in t.inputs.values())
    assert all(u in plan.tasks for us in plan.users.values() for u in us)
    assert kinds(plan) == {"attack": 4, "defense": 5, "evaluate": 5}


def test_only_on_a_clean_cell_keeps_its_own_control_alone(make_plan: Any) -> None:
    plan = make_plan(seeds=[0, 1])
    restrict(plan, "*/none@0/ft/s1")
    names = {c.name.removeprefix("digits/small_cnn/") for c in plan.cells}
    assert names == {"none@0/ft/s1", "none@0/none/s1"}


def test_only_without_a_match_names_the_nearest(make_plan: Any) -> None:
    with pytest.raises(BadInput, match="did you mean"):
        restrict(make_plan(), "digits/small_cnn/badnet@0.1/ft/s0")


def test_too_many_rows(make_plan: Any) -> None:
    with pytest.raises(BadInput, match=r"train = 5000, but there are 1000"):
        make_plan(tail="[dataset.digits]\ntrain = 5000\n")


JUDGING = ("strip", "refine:neural_cleanse")


def test_what_only_judges_is_spared_the_reactivation_attacks(make_plan: Any) -> None:
    plan = make_plan(evaluators=["accuracy", "ra"], defenses=["none", *JUDGING, "unlearn:neural_cleanse"])
    for defense in JUDGING:
        judged = {e.evaluator: e for e in cell(plan, "badnets@0.1", defense).evaluations}
        assert judged["accuracy"].key
        assert (judged["ra"].key, judged["ra"].reason.partition(":")[0]) == ("", "model_unchanged")
    assert all(e.key for e in cell(plan, "badnets@0.1", "unlearn:neural_cleanse").evaluations)


def test_every_kind_of_task_is_known_everywhere() -> None:
    kinds = set(get_args(get_type_hints(Task)["kind"]))
    assert kinds == set(costs.PRIOR) == set(run._ORDER)
    assert all(hasattr(Work, f"_{kind}") for kind in kinds)


def test_what_a_defense_prepares_is_one_task_for_all_models(make_plan: Any) -> None:
    plan = make_plan(attacks=["none", "badnets", "blended"], defenses=["none", "mntd", "unlearn:istr"], seeds=[0, 1])
    prepared = {t.key: t for t in plan.tasks.values() if t.kind == "prepare"}
    assert sorted((t.name, t.inputs) for t in prepared.values()) == [("istr", {})] * 2 + [("mntd", {})] * 2
    users = {k: [plan.tasks[u] for u in plan.users[k]] for k in prepared}
    assert all(len(u) == 3 and {t.kind for t in u} == {"defense"} for u in users.values())
    # Needed by clean models too, so no closed gate takes it away.
    assert not set(prepared) & set(plan.gates)
    only = plan.tasks[next(iter(prepared))].params["access"]
    assert only == asdict(Access(model="none", clean=0.05))
    names = progress.names(plan)
    assert {names[k] for k in prepared} == {f"digits/small_cnn/{n}/s{s}" for n in ("istr", "mntd") for s in (0, 1)}
