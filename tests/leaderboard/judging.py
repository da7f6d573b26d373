"""A made-up run with methods that judge: figures that a reader can work out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthetic import cell_row, measurement, wilson, write_media, write_run

INPUTS = {"badnets": (0.9, 0.7), "blended": (0.2, 0.4)}
"""TPR at 1 % FPR of strip, per attack and seed."""
INVERTED = {"badnets": (1.0, 0.25), "blended": (0.5, 0.75)}
"""REASR and REASR clean of neural_cleanse, per attack; one seed has no claim."""
KINDS = {
    "strip": "detection",
    "neural_cleanse": "inversion",
    "spectral": "cleansing",
    "silent": "detection",
    "unlearn:neural_cleanse": "repair",
    "retrain:spectral": "in_training",
    "ft": "repair",
}
ZOO = (
    *(("det_auroc", "", 0.875), ("det_auroc", "stat=lower", 0.5), ("det_auroc", "stat=upper", 0.96875)),
    *(("det_bacc", "", 0.625), ("det_bacc", "stat=lower", 0.25), ("det_bacc", "stat=upper", 0.875)),
    ("det_auroc", "attack=badnets", 1.0),
    ("det_auroc", "attack=badnets;stat=lower", 0.375),
    ("det_auroc", "attack=badnets;stat=upper", 1.0),
)


def plugins(kinds: Mapping[str, str] = KINDS) -> list[dict[str, Any]]:
    """Entries of plugins.json."""
    return [{"kind": "defense", "id": d, "title": d.upper(), "info": {"kind": k}} for d, k in kinds.items()]


def _cell(attack: str, defense: str, seed: int, **more: Any) -> dict[str, Any]:
    figures = {"c_acc": 0.95, "o_asr": None if attack == "none" else 0.99}
    if defense in ("ft", "retrain:spectral", "unlearn:neural_cleanse"):
        figures = {"c_acc": 0.94, "o_asr": 0.02, "p_asr": 0.5}
    reasons = {"p_asr": "model_unchanged: the defense repairs nothing"} if KINDS.get(defense) in DETECT else {}
    rate = None if attack == "none" else 0.1
    return cell_row(attack, rate, defense, seed, **{**figures, "reasons": json.dumps(reasons), **more})


DETECT = ("detection", "inversion", "cleansing")


def tables() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cells and measurements."""
    cells, rows = [], []
    for attack in ("none", "badnets", "blended"):
        for seed in (0, 1):
            for defense in ("none", *KINDS):
                cell = _cell(attack, defense, seed)
                cells.append(cell)
                if defense == "silent":
                    cell |= {"status": "failed", "reason": "raised: ValueError", "c_acc": None, "o_asr": None}
                if defense == "strip":
                    if attack == "none":
                        rows.append(measurement(cell, "input_tpr_fpr1", status="not_applicable", reason="no_trigger"))
                        continue
                    low, high = wilson(round(400 * INPUTS[attack][seed]), 400)
                    count = {"count": round(400 * INPUTS[attack][seed]), "total": 400, "lower": low, "upper": high}
                    rows.append(measurement(cell, "input_tpr_fpr1", value=INPUTS[attack][seed], **count))
                    rows.append(measurement(cell, "input_auroc", value=0.75))
                    # A qualified row is another figure and must not take the headline's place.
                    rows.append(measurement(cell, "input_auroc", value=0.125, qualifier="trigger=1", task_key="q"))
                if defense == "neural_cleanse":
                    rows += _inverted(cell, attack, seed)
    models = _cell("zoo", "neural_cleanse", 0, cell="digits/small_resnet/zoo/neural_cleanse/s0", rate=0.0)
    over = {"scope": "zoo", "evaluator": "detection_zoo"}
    for metric, qualifier, value in ZOO:
        rows.append(measurement(models, metric, value=value, qualifier=qualifier, **over))
    for metric, qualifier, count, total in (
        ("det_tpr", "", 3, 4),
        ("det_tpr", "attack=badnets", 2, 2),
        ("det_fpr", "", 1, 2),
    ):
        low, high = wilson(count, total)
        more = {"value": count / total, "count": count, "total": total, "lower": low, "upper": high}
        rows.append(measurement(models, metric, qualifier=qualifier, flag="reduced", **more, **over))
    lost = _cell("zoo", "strip", 0, cell="digits/small_resnet/zoo/strip/s0", rate=0.0)
    rows.append(measurement(lost, "det_auroc", status="not_applicable", reason="no_verdict", **over))
    return cells, rows


def _inverted(cell: dict[str, Any], attack: str, seed: int) -> list[dict[str, Any]]:
    cell |= {"det_score": 3.0, "verdict": True}
    if attack == "none":
        return [measurement(cell, "label_fpr", value=0.5), measurement(cell, "det_score", value=3.0)]
    gross, clean = INVERTED[attack]
    if (attack, seed) == ("blended", 1):
        cell |= {"reasr": 0.0, "apd_rel": 1.0}
        reasons = json.loads(cell["reasons"]) | {"reasr_clean": "no_claim"}
        cell["reasons"] = json.dumps(reasons)
        return [measurement(cell, "mask_iou", value=0.0), measurement(cell, "label_tpr", value=0.0)]
    cell |= {"reasr": gross, "reasr_clean": clean, "apd_rel": 0.5}
    return [
        measurement(cell, "mask_iou", value=0.5),
        measurement(cell, "label_tpr", value=1.0, count=1, total=1),
        measurement(cell, "label_fpr", value=0.25),
    ]


def judging_run(folder: Path) -> Path:
    """A run folder of it, with the pictures and curves that evaluators leave."""
    cells, rows = tables()
    write_run(folder, cells, rows, plugins())
    of = {(c["attack"], c["defense"], c["seed"]): c["cell"] for c in cells}
    roc = {
        "name": "detection-roc",
        "title": "Inputs: 4 triggered against 4 clean",
        "x_label": "false positive rate",
        "y_label": "true positive rate",
        "series": [{"label": "inputs", "x": [0, 0, 1], "y": [0, 0.5, 1]}],
    }
    cell = of["badnets", "strip", 0]
    write_media(folder, cell, {"cell": cell, "pictures": [], "curves": [roc]}, {})
    cell = "digits/small_resnet/zoo/neural_cleanse/s0"
    models = {"name": "detection_zoo-roc", "title": "Models: 4 backdoored against 2 clean"}
    series = [{"label": label, "x": [0, 0, 1], "y": [0, 0.75, 1]} for label in ("all attacks", "badnets")]
    write_media(folder, cell, {"cell": cell, "pictures": [], "curves": [roc | models | {"series": series}]}, {})
    cell = of["badnets", "neural_cleanse", 0]
    picture = {"file": "trigger.png", "title": "recovered", "caption": "recovered, by inversion"}
    facts = {"name": "inversion-recovered", "residual_factor": 3}
    write_media(folder, cell, {"cell": cell, "pictures": [picture], "curves": [facts]})
    return folder
