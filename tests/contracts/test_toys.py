"""The walking test of the contracts: toys of methods to come run through the real engine, from another distribution."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plugins
import pytest
import torch
from warm import Answer

from sleeperbench.engine.rows import read_table

SUITE = """
schema = 1
name = "toys"
[matrix]
datasets = ["digits"]
archs = ["small_cnn"]
attacks = ["none", "badnets", "toys/lira", "toys/plus:badnets"]
rates = [0.1]
defenses = [
    "none", "toys/npd", "toys/strip", "toys/spectral", "toys/retrain:toys/spectral", "toys/istr", "toys/mntd",
    "toys/greedy",
]
evaluators = ["accuracy", "cost", "toys/detect", "toys/toy_ra", "toys/qra", "toys/tba"]
seeds = [0]
[dataset.digits]
train = 500
test = 150
[train]
epochs = 1
batch = 64
[gate]
implant_asr = 0.0
clean_drop_points = 100
[attack."toys/plus:badnets"]
cover = 7
pattern = "white"
[evaluator."toys/tba"]
surrogates = ["small_resnet", "toys/npd@small_resnet"]
peers = ["toys/npd"]
"""
CLASSES = {
    "attacks": {"lira": "Lira", "plus": "Plus"},
    "defenses": {
        "npd": "Npd",
        "strip": "Strip",
        "spectral": "Spectral",
        "retrain": "Retrain",
        "istr": "Istr",
        "mntd": "Mntd",
        "greedy": "Greedy",
    },
    "evaluators": {"detect": "Detect", "toy_ra": "ToyRa", "qra": "Qra", "tba": "Tba"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sleeper: Callable[..., Answer]) -> Path:
    tmp = tmp_path_factory.mktemp("toys")
    source = (Path(__file__).parent / "toys.py").read_text()
    points = {f"sleeperbench.{g}": {n: f"toys:{c}" for n, c in names.items()} for g, names in CLASSES.items()}
    folder = plugins.install(tmp, "toys", "1.0", {"toys.py": source}, points)
    (tmp / "suite.toml").write_text(SUITE)
    where = ("--out", tmp / "run", "--no-site", "--jobs", 1, "--device", "cpu")
    answer = sleeper("-q", "run", tmp / "suite.toml", *where, path=(folder,))
    assert answer.code == 1, f"only the greedy defense fails: {answer.err}"
    return tmp / "run"


def rows(run: Path, attack: str, defense: str, metric: str) -> list[dict]:
    found = read_table(run / "measurements.parquet")
    return [r for r in found if (r["attack"], r["defense"], r["metric"]) == (attack, defense, metric)]


def artifact(run: Path, key: str) -> Path:
    return run.parent / "store" / key[:2] / key


def test_npd_adds_a_layer_and_is_measured_like_any_model(run: Path) -> None:
    (row,) = rows(run, "badnets", "toys/npd", "c_acc")
    assert row["status"] == "ok"
    spec = json.loads((artifact(run, row["defense_key"]) / "model.json").read_text())
    assert [w["kind"] for w in spec["wraps"]] == ["insert"]


def test_strip_answers_in_a_second_phase_about_unlabelled_rows(run: Path) -> None:
    (row,) = rows(run, "badnets", "toys/strip", "input_auroc")
    assert row["status"] == "ok"
    assert 0 <= row["value"] <= 1
    (without,) = rows(run, "badnets", "toys/npd", "input_auroc")
    assert (without["status"], without["reason"].split(":")[0]) == ("not_applicable", "no_scores")


def test_lira_trains_two_networks_and_its_generator_is_restored(run: Path) -> None:
    (row,) = rows(run, "toys/lira", "none", "asr")
    assert row["rate_actual"] == 1.0, "no row is poisoned beforehand, and training stamps each"
    assert row["status"] == "ok"
    from safetensors.torch import load_file

    made = load_file(artifact(run, row["attack_key"]) / "backdoor.safetensors")
    assert set(made) == {"aux.generator.conv.weight", "aux.generator.conv.bias"}


def test_defenses_on_the_training_set_decline_an_attack_that_leaves_none(run: Path) -> None:
    (row,) = rows(run, "toys/lira", "toys/retrain:toys/spectral", "c_acc")
    assert (row["status"], row["reason"]) == ("not_applicable", "attack_controls_training")


def test_a_wrapper_adds_its_rows_to_those_of_any_attack(run: Path) -> None:
    (row,) = rows(run, "toys/plus:badnets", "none", "asr")
    assert row["status"] == "ok"
    assert json.loads(row["attack_params"])["inner"]["pattern"] == "white"
    from safetensors.torch import load_file

    mark = load_file(artifact(run, row["attack_key"]) / "set.safetensors")["mark"]
    assert int((mark == 2).sum()) == 7
    assert float((mark == 1).double().mean()) == pytest.approx(row["rate_actual"])
    for defense in ("toys/npd", "toys/retrain:toys/spectral"):
        assert rows(run, "toys/plus:badnets", defense, "c_acc")[0]["status"] == "ok"


def test_qra_reads_the_model_of_another_evaluator(run: Path) -> None:
    (row,) = rows(run, "badnets", "toys/npd", "p_asr_qra")
    assert row["status"] == "ok"
    (row,) = rows(run, "none", "toys/npd", "p_asr_qra")
    assert (row["status"], row["reason"]) == ("not_applicable", "ra_not_successful")


def test_tba_gets_the_surrogates_and_peers_that_the_suite_names(run: Path) -> None:
    found = rows(run, "badnets", "none", "asr_tba")
    assert [r["qualifier"] for r in found] == ["source=small_resnet", "source=toys/npd", "source=toys/npd@small_resnet"]
    inputs = json.loads((artifact(run, found[0]["task_key"]) / "manifest.json").read_text())["task"]["inputs"]
    defended = json.loads((artifact(run, inputs["surrogate.toys/npd@small_resnet"]) / "manifest.json").read_text())[
        "task"
    ]
    assert (defended["kind"], defended["name"], defended["params"]["spec"]["arch"]) == (
        "defense",
        "toys/npd",
        "small_resnet",
    )
    assert defended["inputs"]["attack"] == inputs["surrogate.small_resnet"]


def test_spectral_marks_rows_and_retrain_trains_on_the_same_rows(run: Path) -> None:
    (row,) = rows(run, "badnets", "toys/retrain:toys/spectral", "c_acc")
    assert row["status"] == "ok"
    assert row["access"] == "T2"
    about = json.loads((artifact(run, row["defense_key"]) / "outcome.json").read_text())
    inner = rows(run, "badnets", "toys/spectral", "c_acc")[0]["defense_key"]
    from safetensors.torch import load_file

    assert about["chosen"]["kept"] == int(load_file(artifact(run, inner) / "outcome.safetensors")["keep"].sum())


def test_istr_gets_a_clean_model_that_no_evaluator_uses(run: Path) -> None:
    (row,) = rows(run, "badnets", "toys/istr", "c_acc")
    assert row["status"] == "ok"
    inputs = json.loads((artifact(run, row["defense_key"]) / "manifest.json").read_text())["task"]["inputs"]
    task = json.loads((artifact(run, inputs["reference0"]) / "manifest.json").read_text())["task"]
    assert task["name"] == "none"
    assert task["params"]["replica"] >= 100


def test_undeclared_access_costs_its_own_cell_only(run: Path) -> None:
    (row,) = rows(run, "badnets", "toys/greedy", "c_acc")
    assert row["status"] == "failed"
    assert row["reason"].startswith("undeclared_access: train is not declared in the ACCESS")


def test_an_imported_record_that_has_only_pictures_is_measured(run: Path, tmp_path: Path) -> None:
    """A foreign attack: a model and 8-bit pictures, no trigger code. What needs the live trigger says so."""
    from PIL import Image

    from sleeperbench.contracts import NotApplicable, Outcome
    from sleeperbench.contracts.context import Cost
    from sleeperbench.contracts.evaluator import Rendered
    from sleeperbench.engine import artifacts
    from sleeperbench.engine.evaluation import opened
    from sleeperbench.engine.store import Store
    from sleeperbench.engine.task import Task
    from sleeperbench.engine.work import Work
    from sleeperbench.evaluators.accuracy import Accuracy
    from sleeperbench.kit.classifier import read_model, save_model

    (row,) = rows(run, "badnets", "none", "asr")
    store = Store(run.parent / "store")
    work = Work(store, torch.device("cpu"), lambda folder, log, seconds: {})
    own = store.manifest(row["task_key"])["task"]
    data = work.rows(own["params"]["data"])
    theirs = artifacts.read_rendered(artifact(run, row["attack_key"]) / "bd_test.safetensors", data.test)
    assert theirs is not None
    for i, image in zip(theirs.data.ids.tolist(), theirs.data.images, strict=True):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")

    with store.scratch() as folder:
        save_model(read_model(artifact(run, row["attack_key"])), folder)
        files = sorted(tmp_path.glob("*.png"), key=lambda p: int(p.stem))
        ids = torch.tensor([int(p.stem) for p in files])
        images = torch.stack([torch.from_numpy(np.array(Image.open(p)))[None] for p in files])
        clean = data.test.having(ids)
        read = Rendered(
            data=type(clean)(**{**vars(clean), "images": images}),
            clean=clean,
            targets=torch.full_like(ids, int(theirs.targets[0])),
            trigger_id=torch.zeros_like(ids),
        )
        artifacts.write_rendered(folder / "bd_test.safetensors", read)
        store.commit("ab" * 32, folder, task={"inputs": {}}, env={}, result={})
    with store.scratch() as folder:
        artifacts.write_outcome(folder, Outcome())
        store.commit("cd" * 32, folder, task={"inputs": {"attack": "ab" * 32}}, env={}, result={})
    needs = own["params"]["needs"] | {"trigger": "live", "controls": ()}
    task = Task.from_json(
        own | {"inputs": {"attack": "ab" * 32, "defense": "cd" * 32}, "params": own["params"] | {"needs": needs}}
    )
    case = opened(work, task, {}, tmp_path, Cost())
    figures = {r.metric: r.value for r in Accuracy().measure(case).rows}
    assert figures["asr"] == pytest.approx(row["value"])
    assert case.bd_probe is None
    with pytest.raises(NotApplicable, match="no_trigger: an imported record has pictures only"):
        case.oracle  # noqa: B018


def test_what_needs_no_model_is_done_once_for_all_of_them(run: Path) -> None:
    done = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    prepared = [t for t in done if t["kind"] == "prepare"]
    assert [t["plugin"] for t in prepared] == ["toys/mntd"]
    cells = [r for a in ("none", "badnets", "toys/lira") for r in rows(run, a, "toys/mntd", "cost_forwards")]
    assert len({r["defense_key"] for r in cells}) == 3
    seen = [json.loads((artifact(run, r["defense_key"]) / "outcome.json").read_text())["chosen"] for r in cells]
    assert all(c == seen[0] and c["rows"] > 0 for c in seen)
    for attack in ("none", "badnets", "toys/lira"):
        counted = {
            (r["metric"], r["qualifier"]): r["value"]
            for metric in ("cost_forwards", "cost_queries")
            for r in rows(run, attack, "toys/mntd", metric)
        }
        assert counted["cost_forwards", ""] == counted["cost_forwards", "phase=prepare"] == 123
        assert counted["cost_queries", ""] == counted["cost_queries", "phase=run"] == 4


def test_a_wrapper_costs_what_it_wraps_too(run: Path) -> None:
    whole = rows(run, "badnets", "toys/retrain:toys/spectral", "cost_forwards")
    counted = {r["qualifier"]: r for r in whole}
    (inner,) = [r for r in rows(run, "badnets", "toys/spectral", "cost_forwards") if not r["qualifier"]]
    assert counted["phase=wrapped"]["value"] == inner["value"]
    assert counted[""]["value"] == counted["phase=run"]["value"] + inner["value"]
    assert counted[""]["cpu_seconds"] > inner["cpu_seconds"] > 0
