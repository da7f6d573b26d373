"""Run folders of made-up tables, drawn from a seed: every status, every kind of empty field, hostile strings, any size.

python tests/leaderboard/synthetic.py OUT --cells 20000 --seed 0
python tests/leaderboard/synthetic.py OUT --like backdoorbench
python tests/leaderboard/synthetic.py OUT --like hostile
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sleeperbench.schema import CELLS, HEADLINE_METRICS, MEASUREMENTS, arrow

SCRIPT = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
JS_LINK = "javascript:alert(3)"
RTL = "\u05e9\u05dc\u05d5\u05dd \u202eevil\u202c \u0007bell"
LONG = "long" * 125
HOSTILE_DEFENSE = f"evil/{SCRIPT}"
NOT_FINITE = (math.nan, math.inf, -math.inf)
SHARES = ("c_acc", "asr", "r_acc", "o_asr")
ACCESS = {"none": "none", "clean_model": "T4", "exact_purification": "T4", "scratch": "T0", "strip": "Q", "abl": "T2"}


def png(width: int, height: int, value: int) -> bytes:
    """A grey PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + bytes((value * (i + 1)) % 256 for _ in range(width)) for i in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval."""
    z, p = 1.959964, count / total
    mid = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return mid - half, mid + half


def cell_row(attack: str, rate: float | None, defense: str, seed: int, /, **more: Any) -> dict[str, Any]:
    """A row of cells.parquet without figures; `more` overrides columns."""
    row: dict[str, Any] = {c.name: None for c in CELLS}
    row |= {
        "suite": "quick",
        "protocol": "1",
        "dataset": "digits",
        "data_digest": "d" * 64,
        "arch": "small_resnet",
        "attack": attack,
        "attack_params": json.dumps({"size": 3, "target": 1}),
        "rate": rate,
        "rate_actual": rate,
        "defense": defense,
        "defense_params": json.dumps({"lr": 0.01}),
        "clean_source": "heldout",
        "access": ACCESS.get(defense, "T1"),
        "seed": seed,
        "cell": f"digits/small_resnet/{attack}@{rate or 0:g}/{defense}/s{seed}",
        "status": "ok",
        "reason": "",
        "flag": "",
        "seconds": 1.5,
        "method_version": 1,
        "attack_key": "a" * 64,
        "defense_key": "b" * 64,
    }
    row |= more
    if row["status"] == "ok" and "reasons" not in more:
        empty = [m for m in (*HEADLINE_METRICS, "verdict") if row[m] is None]
        row["reasons"] = json.dumps(dict.fromkeys(empty, "no_trigger"))
    elif row["reasons"] is None:
        row["reasons"] = json.dumps(dict.fromkeys((*HEADLINE_METRICS, "verdict"), row["reason"] or row["status"]))
    return row


def measurement(cell: Mapping[str, Any], metric: str, /, **more: Any) -> dict[str, Any]:
    """A row of measurements.parquet for a cell."""
    row: dict[str, Any] = {c.name: cell.get(c.name) for c in MEASUREMENTS}
    row |= {
        "scope": "cell",
        "stage": "attacked" if cell["defense"] == "none" else "defended",
        "evaluator": "accuracy",
        "metric": metric,
        "qualifier": "",
        "status": "ok",
        "reason": "",
        "flag": "",
        "cpu_seconds": 1.25,
        "peak_mb": 300.0,
        "forwards": 1000,
        "backwards": 0,
        "queries": 0,
        "device": "cpu",
        "threads": 1,
        "precision": "fp32",
        "dist": "sleeperbench",
        "dist_version": "0.1.0",
        "env": '{"torch":"2"}',
        "task_key": hashlib.sha256(f"{cell['cell']}{metric}".encode()).hexdigest(),
        "started": datetime(2025, 1, 2, tzinfo=UTC),
    }
    return row | more


def _good(rng: random.Random, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Give a cell figures and return their measurements."""
    rows = []
    for metric in SHARES:
        total = 400
        level = {"c_acc": 0.95, "r_acc": 0.8}.get(metric, 0.99 if cell["defense"] == "none" else 0.05)
        count = min(total, max(0, round(total * (level + rng.uniform(-0.04, 0.04)))))
        low, high = wilson(count, total)
        cell[metric] = count / total
        name = {"o_asr": "asr"}.get(metric, metric)
        if metric != "asr":
            more = {"value": count / total, "count": count, "total": total, "lower": low, "upper": high}
            rows.append(measurement(cell, name, **more))
    cell["asr"] = cell["o_asr"]
    cell["c_acc_attacked"], cell["asr_attacked"] = 0.96, 0.99
    if cell["defense"] != "none":
        cell["p_asr"] = cell["p_asr_ra"] = round(rng.uniform(0.1, 0.9), 4)
        cell["p_asr_net"], cell["p_asr_set"] = max(0.0, cell["p_asr"] - 0.05), "ra"
        cell["bec"] = round(rng.uniform(-0.2, 0.9), 4)
        cell["p_der"] = round(rng.uniform(0.5, 1.0), 4)
        rows.append(measurement(cell, "p_asr_ra", value=cell["p_asr"], qualifier="k=5", stage="reactivated"))
        rows.append(measurement(cell, "bec", value=cell["bec"], evaluator="bec"))
    else:
        cell["p_der"] = 0.5
    return rows


def tables(seed: int, attacks: Sequence[str], defenses: Sequence[str], seeds: int) -> tuple[list[Any], list[Any]]:
    """Cells and measurements of a whole matrix; every ninth defended cell has no figures, for differing reasons."""
    rng = random.Random(seed)
    cells, rows = [], []
    states = [
        ("failed", "raised: ValueError: " + SCRIPT),
        ("timeout", "budget: 600 s"),
        ("not_run", "filtered"),
        ("not_applicable", "needs_bn"),
        ("out_of_memory", "raised: " + LONG),
    ]
    n = 0
    for attack in attacks:
        for defense in defenses:
            for s in range(seeds):
                cell = cell_row(attack, None if attack == "none" else 0.1, defense, s)
                n += 1
                if attack == "weakling" and defense != "none":
                    cell |= {"status": "not_run", "reason": "attack_did_not_implant: mean ASR 0.31"}
                elif defense != "none" and n % 9 == 0:
                    cell |= dict(zip(("status", "reason"), states[(n // 9) % len(states)], strict=True))
                if cell["status"] == "ok":
                    rows += _good(rng, cell)
                    flags = ["weak"] * (attack == "weakling")
                    if defense != "none" and n % 13 == 0:
                        flags.append("collapsed")
                        cell |= {"c_acc": 0.1, "o_asr": 0.0, "asr": 0.0}
                    if defense == "strip":
                        cell |= {"det_score": 0.7, "verdict": True}
                    cell["flag"] = ";".join(flags)
                else:
                    rows.append(measurement(cell, "c_acc", status=cell["status"], reason=cell["reason"]))
                empty = [m for m in (*HEADLINE_METRICS, "verdict") if cell[m] is None]
                why = cell["reason"] or "no_static_trigger: " + attack
                cell["reasons"] = json.dumps(dict.fromkeys(empty, why))
                cells.append(cell)
    return cells, rows


def write_run(folder: Path, cells: list[Any], rows: list[Any], plugins: Any = (), info: Any = None) -> Path:
    """A run folder of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(cells, schema=arrow(CELLS)), folder / "cells.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow(MEASUREMENTS)), folder / "measurements.parquet")
    (folder / "plugins.json").write_text(json.dumps(list(plugins)))
    (folder / "run.json").write_text(json.dumps(info if info is not None else {}))
    return folder


def write_media(folder: Path, cell: str, index: Any = None, files: Mapping[str, bytes] | None = None) -> None:
    """Pictures and curves of a cell."""
    at = folder / "media" / hashlib.sha256(cell.encode()).hexdigest()[:12]
    at.mkdir(parents=True, exist_ok=True)
    for name, data in (files if files is not None else {"trigger.png": png(16, 16, 13)}).items():
        (at / name).write_bytes(data)
    curve = {
        "name": "ra",
        "title": "Retuning",
        "x_label": "batches",
        "y_label": "ASR",
        "series": [
            {
                "label": "attacked",
                "x": [0, 10, 20],
                "y": [0.1, 0.5, 0.9],
                "low": [0.0, 0.4, 0.8],
                "high": [0.2, 0.6, 1],
            },
            {"label": SCRIPT, "x": [0, 20], "y": [0.1, 0.2]},
        ],
    }
    pictures = [{"file": "trigger.png", "title": "Trigger", "caption": SCRIPT}]
    (at / "index.json").write_text(json.dumps(index or {"cell": cell, "pictures": pictures, "curves": [curve]}))


PLANE: dict[str, Any] = {
    "name": "evidence-plane",
    "title": SCRIPT,
    "x_label": RTL,
    "y_label": "fooled",
    "threshold": 0.5,
    "series": [
        {"label": SCRIPT, "x": [0.1, 0.9], "y": [0.2, 0.8], "points": True},
        {"label": "b", "x": [0.5], "y": [0.5], "points": True},
        {"label": "c", "x": [0.25], "y": [1.0], "points": True},
        {"label": "curve", "x": [0.0, 1.0], "y": [0.0, 1.0]},
    ],
}
THRESHOLD_BARS: dict[str, Any] = {
    "name": "evidence-index",
    "title": "Anomaly index",
    "threshold": 2,
    "series": [{"label": "", "x": ["0", SCRIPT], "y": [3.5, -1.0]}],
}


def hostile_plugins() -> list[dict[str, Any]]:
    """Entries of plugins.json, some with missing keys, some out to break a page."""
    return [
        {
            "kind": "attack",
            "id": "badnets",
            "title": "BadNets",
            "paper": "https://example.org/badnets",
            "bibtex": "@misc{b}",
        },
        {"kind": "defense", "id": HOSTILE_DEFENSE, "title": SCRIPT, "paper": JS_LINK, "bibtex": "</pre>" + SCRIPT},
        {
            "kind": "defense",
            "id": "ft",
            "info": {"title": RTL, "paper": "http://plain.example.org x https://u:p@e.org"},
        },
        {"kind": "defense", "id": "anp", "title": LONG, "paper": "https://ok.example.org/a?b=1&c=2.", "dist": SCRIPT},
        {"kind": "evaluator", "id": "accuracy", "metrics": [{"name": "det_tpr", "unit": "fraction", "doc": SCRIPT}]},
        {"kind": "defense"},
    ]


def hostile_run(folder: Path) -> Path:
    """A run with every kind of row and every kind of hostile string, three seeds."""
    attacks = ["none", "badnets", "wanet", "weakling", "blended~a1b2c3"]
    defenses = ["none", "clean_model", "exact_purification", "ft", "anp", "unlearn:ft", "strip", "abl", HOSTILE_DEFENSE]
    cells, rows = tables(7, attacks, defenses, 3)
    first = cells[0]
    rows.append(measurement(first, SCRIPT, value=1.0, evaluator=SCRIPT, qualifier=SCRIPT, device=SCRIPT, env=SCRIPT))
    rows.append(measurement(first, "det_tpr", value=0.5, scope="zoo", cell="digits/zoo", defense="strip"))
    for i, value in enumerate(NOT_FINITE):
        rows.append(measurement(first, "strange", value=value, lower=value, upper=value, qualifier=f"draw={i}"))
        odd = cells[i + 6]
        odd |= {"excl": value, "apd": value, "seconds": value}
        odd["reasons"] = json.dumps({k: v for k, v in json.loads(odd["reasons"]).items() if k not in ("excl", "apd")})
    cells[1] |= {
        "arch": "small_resnet",
        "attack_params": "=cmd|' /C calc'!A0",
        "defense_params": json.dumps({SCRIPT: RTL}),
    }
    info = {
        "suite": {"name": "quick", "secret": "do-not-show-this", "title": SCRIPT},
        "versions": {"torch": "2.15", "bad": SCRIPT},
        "counts": {"ok": 1},
        "exit": 0,
    }
    write_run(folder, cells, rows, hostile_plugins(), info)
    for cell in cells[:4]:
        write_media(folder, cell["cell"])
    write_media(folder, cells[4]["cell"], {"cell": cells[4]["cell"], "curves": [PLANE, THRESHOLD_BARS]}, {})
    return folder


FAMILIES = ("patch", "blend", "sample_specific", "warp", "clean_label", "source_specific", "exclusive", "adaptive")
"""Families that made-up attacks are of, in turn."""
EMPTY = (
    ("failed", "raised: RuntimeError: the loss is not finite"),
    ("timeout", "budget: 7200 s"),
    ("out_of_memory", "raised: out of memory"),
    ("not_applicable", "needs_bn"),
    ("not_applicable", "attack_controls_training"),
    ("not_run", "budget"),
)
"""States of cells without figures."""
LAYERS = tuple(f"layer{i}" for i in range(1, 9))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large a made-up matrix is. `empty` and `collapsed` are shares of the defended cells.

    `gap` is the largest difference between the success of two defenses, and `noise` the standard deviation over seeds;
    half of its variance is shared by all defenses of an attacked model, which is what pairing takes out.
    """

    suite: str = "standard"
    datasets: tuple[str, ...] = ("cifar10",)
    archs: tuple[str, ...] = ("preact_resnet18",)
    attacks: tuple[str, ...] = ("none", "attack_1", "attack_2", "attack_3")
    rates: tuple[float, ...] = (0.05,)
    defenses: tuple[str, ...] = ("none", "clean_model", "defense_1", "defense_2", "defense_3")
    seeds: int = 3
    empty: float = 0.1
    collapsed: float = 0.02
    weak: float = 0.05
    gap: float = 0.8
    noise: float = 0.05


def kind_of(defense: str) -> str:
    """The INFO kind of a made-up defense: every seventh detects, every eleventh inverts, every fifth trains."""
    _, _, number = defense.rpartition("_")
    if not number.isdecimal():
        return "oracle" if defense == "exact_purification" else "control"
    n = int(number)
    return "detection" if n % 7 == 0 else "inversion" if n % 11 == 0 else "in_training" if n % 5 == 0 else "repair"


def _access(defense: str) -> str:
    """The access class of a made-up defense."""
    kind = kind_of(defense)
    if kind in ("control", "oracle"):
        return ACCESS.get(defense, "T4")
    return {"in_training": "T2", "detection": "T0", "inversion": "T1"}.get(kind) or ("T1", "T3")[hash_of(defense) % 2]


def hash_of(text: str) -> int:
    """A number that a text always gives."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def plugins_of(shape: Shape) -> list[dict[str, Any]]:
    """plugins.json of a made-up matrix."""
    attacks = [a for a in shape.attacks if a != "none"]
    made: list[dict[str, Any]] = []
    for i, a in enumerate(attacks):
        info = {
            "family": FAMILIES[i % len(FAMILIES)],
            "clean_label": False,
            "implant_asr": 0.9,
            "kind": "data_poisoning",
        }
        made.append({"kind": "attack", "id": a, "title": a.replace("_", " ").title(), "info": info})
    for d in shape.defenses:
        made.append({"kind": "defense", "id": d, "title": d.replace("_", " ").title(), "info": {"kind": kind_of(d)}})
    return made


class _Draw:
    """The figures of a made-up matrix: what each defense and attack is like, then noise per model and per cell."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape, self.rng = shape, random.Random(seed)
        share = {d: self.rng.random() for d in shape.defenses}
        share |= {"none": 0.0, "clean_model": 1.0, "exact_purification": 1.0}
        self.good = {
            d: 1 - shape.gap * (1 - s) if kind_of(d) not in ("control", "oracle") else s for d, s in share.items()
        }
        self.weak = {a for a in shape.attacks if a != "none" and self.rng.random() < shape.weak}

    def cell(
        self, dataset: str, arch: str, attack: str, rate: float | None, defense: str, seed: int, empty: bool
    ) -> Any:
        """A row of cells with its figures or its reason."""
        at = {"suite": self.shape.suite, "dataset": dataset, "arch": arch, "access": _access(defense)}
        at["cell"] = f"{dataset}/{arch}/{attack}@{rate or 0:g}/{defense}/s{seed}"
        weak = attack in self.weak
        if weak and defense != "none":
            return cell_row(attack, rate, defense, seed, status="not_run", reason="attack_did_not_implant: 0.31", **at)
        if empty and defense != "none":
            # What does not apply or was not run keeps a defense from being ranked, so it falls on some defenses alone.
            status, reason = self.rng.choice(EMPTY if hash_of(defense) % 3 == 0 else EMPTY[:3])
            return cell_row(attack, rate, defense, seed, status=status, reason=reason, **at)
        return cell_row(attack, rate, defense, seed, **at, **self._figures(attack, defense, weak, f"{at['cell']}"))

    def _figures(self, attack: str, defense: str, weak: bool, name: str) -> dict[str, Any]:
        rng, kind = self.rng, kind_of(defense)
        shared = random.Random(name.replace(f"/{defense}/", "/")).gauss(0, self.shape.noise * math.sqrt(0.5))
        good = self.good[defense] + shared + rng.gauss(0, self.shape.noise * math.sqrt(0.5))
        before = 0.31 if weak else 0.97
        accuracy = 0.93 + 0.2 * shared
        made: dict[str, Any] = {"c_acc_attacked": _share(accuracy), "flag": "weak" if weak else ""}
        if attack != "none":
            made["asr_attacked"] = before
        if kind in ("detection", "inversion") or defense == "none":
            made |= {"c_acc": made["c_acc_attacked"], "o_asr": made.get("asr_attacked"), "r_acc": _share(1 - before)}
            if kind == "detection":
                made |= {"det_score": round(good, 6), "verdict": good > 0.5}
            if kind == "inversion" and attack != "none":
                made |= {
                    "reasr": _share(good),
                    "reasr_clean": _share(good / 3),
                    "apd": 0.1,
                    "apd_rel": _share(1.5 - good),
                }
        else:
            made |= {"c_acc": _share(accuracy - 0.03 * rng.random()), "bec": round(1 - good, 6)}
            if attack != "none":
                made |= {"o_asr": _share(before * (1 - good)), "r_acc": _share(0.8 * good)}
                made["p_asr"] = made["p_asr_ra"] = _share(made["o_asr"] + 0.5 * (1 - good))
                made |= {"p_asr_net": _share(made["p_asr"] - 0.05), "p_asr_set": "ra"}
            if rng.random() < self.shape.collapsed and kind_of(defense) in ("repair", "in_training"):
                made |= {"c_acc": 0.1117, "o_asr": 0.0 if attack != "none" else None, "flag": "collapsed"}
        made["asr"] = made.get("o_asr")
        if attack != "none" and kind not in ("detection", "inversion"):
            left = max(made["o_asr"], made.get("p_asr_net") or 0.0)
            drop = max(0.0, made["c_acc_attacked"] - made["c_acc"])
            made["p_der"] = (1 + max(0.0, before - left) - drop) / 2
        return made

    def rows(self, cell: Mapping[str, Any], wanted: int) -> list[dict[str, Any]]:
        """`wanted` measurements of a cell: its headline figures, an answer's, then BEC by layer and RA by draw."""
        if cell["status"] != "ok":
            names = [*SHARES, "p_asr_ra", "bec"]
            state = {"status": cell["status"], "reason": cell["reason"]}
            return [measurement(cell, names[i % 6], qualifier=_nth(i // 6), **state) for i in range(wanted)]
        made = []
        for metric in ("c_acc", "o_asr", "r_acc", "p_asr_ra", "bec"):
            if cell[metric] is not None:
                made.append(measurement(cell, {"o_asr": "asr"}.get(metric, metric), **_counted(cell[metric], metric)))
        kind = kind_of(cell["defense"])
        passes = 1000 * (hash_of(cell["defense"]) % 50)
        made.append(measurement(cell, "cost_forwards", value=float(passes), evaluator="cost", forwards=passes))
        if kind == "detection" and cell["attack"] != "none":
            for metric, at in (("input_tpr_fpr1", 0.0), ("input_auroc", 0.3)):
                made.append(measurement(cell, metric, value=_share(cell["det_score"] + at), evaluator="detection"))
        if kind == "inversion" and cell["attack"] != "none":
            made.append(measurement(cell, "mask_iou", value=0.5, evaluator="inversion"))
        for i in itertools.count():
            if len(made) >= wanted:
                return made[:wanted]
            if i < len(LAYERS):
                value = self.rng.uniform(-0.2, 1.0)
                made.append(measurement(cell, "bec", value=value, evaluator="bec", qualifier=f"layer={LAYERS[i]}"))
            else:
                value = _counted(self.rng.random(), "asr")
                made.append(measurement(cell, "asr_path", evaluator="ra", qualifier=_nth(i), **value))


def _nth(i: int) -> str:
    return f"batch={i}" if i else ""


def _share(value: float) -> float:
    """The nearest share of 10,000 test images."""
    return min(1.0, max(0.0, round(value, 4)))


def _counted(value: float, metric: str) -> dict[str, Any]:
    if metric == "bec":
        return {"value": value, "evaluator": "bec"}
    count = round(10_000 * value)
    low, high = wilson(count, 10_000)
    return {"value": count / 10_000, "count": count, "total": 10_000, "lower": low, "upper": high}


def matrix(shape: Shape, seed: int, measurements: int = 0, cells: int = 0) -> tuple[list[Any], list[Any]]:
    """Cells and measurements of a shape, the same for the same seed.

    Args:
        measurements: How many rows in all, spread evenly; 0 is ten per cell.
        cells: Where the matrix is cut off; 0 is nowhere.
    """
    draw = _Draw(shape, seed)
    made = []
    for dataset, arch, attack in itertools.product(shape.datasets, shape.archs, shape.attacks):
        for rate in (None,) if attack == "none" else shape.rates:
            for defense, s in itertools.product(shape.defenses, range(shape.seeds)):
                empty = draw.rng.random() < shape.empty
                made.append((dataset, arch, attack, rate, defense, s, empty))
    rows: list[Any] = []
    found = [draw.cell(*at) for at in (made[:cells] if cells else made)]
    total = measurements or 10 * len(found)
    for i, cell in enumerate(found):
        rows += draw.rows(cell, total * (i + 1) // len(found) - total * i // len(found))
    return found, rows


def shape_of(cells: int) -> Shape:
    """A shape of at least `cells` cells: five seeds and two data sets when they are many."""
    sets, archs = (
        (("cifar10", "gtsrb"), ("preact_resnet18", "vgg19_bn")) if cells >= 8000 else (("cifar10",), ("resnet18",))
    )
    seeds = 5 if cells >= 2000 else 3
    per = max(6, math.ceil(cells / (len(sets) * len(archs) * seeds)))
    attacks = max(2, min(25, math.isqrt(per * 5 // 8)))
    defenses = max(3, math.ceil(per / attacks))
    names = ("none", "clean_model", *(f"defense_{i}" for i in range(1, defenses)))[:defenses]
    return Shape(
        datasets=sets,
        archs=archs,
        attacks=("none", *(f"attack_{i}" for i in range(1, attacks))),
        defenses=names,
        seeds=seeds,
    )


def sized_run(folder: Path, cells: int = 20_000, measurements: int = 200_000, seed: int = 0) -> Path:
    """A run folder of exactly this many cells and measurements."""
    shape = shape_of(cells)
    info = {"suite": {"name": shape.suite, "title": f"{cells} made-up cells"}, "counts": {"ok": cells}, "exit": 0}
    return write_run(folder, *matrix(shape, seed, measurements, cells), plugins_of(shape), info)


BACKDOORBENCH = Shape(
    suite="field",
    datasets=("cifar10", "cifar100", "gtsrb", "tiny_imagenet"),
    archs=("preact_resnet18", "vgg19_bn", "convnext_tiny", "vit_b_16"),
    attacks=tuple(f"attack_{i}" for i in range(1, 13)),
    rates=(0.001, 0.005, 0.01, 0.05, 0.1),
    defenses=("none", *(f"defense_{i}" for i in (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 15, 16, 17, 18))),
    seeds=1,
)
"""The public leaderboard's shape: 20 tables (data set by rate) of 48 rows (network by attack) by 16 columns."""


def backdoorbench(seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Cells and measurements of that shape: in each table 57 to 175 cells, that is 171 to 525 figures, are empty.

    As on the public board, a defense now and then ruins the model and leaves neither accuracy nor attack success, and
    at the lowest rates attacks did not implant: there the undefended ASR is about 1 %, and every defense has a row.
    """
    rng = random.Random(seed)
    draw = _Draw(BACKDOORBENCH, seed)
    cells, rows = [], []
    shape = BACKDOORBENCH
    for dataset, rate in itertools.product(shape.datasets, shape.rates):
        table = list(itertools.product(shape.archs, shape.attacks, shape.defenses))
        defended = [i for i, at in enumerate(table) if at[2] != "none"]
        empty = set(rng.sample(defended, rng.randint(57, 175)))
        not_implanted = {a for a in shape.attacks if rng.random() < {0.001: 0.5, 0.005: 0.2}.get(rate, 0.0)}
        for i, (arch, attack, defense) in enumerate(table):
            cell = draw.cell(dataset, arch, attack, rate, defense, 0, i in empty)
            if attack in not_implanted:
                cell["flag"] = ";".join(f for f in (cell["flag"], "weak") if f and f != "collapsed")
                if cell["status"] == "ok":
                    cell |= {"asr_attacked": 0.0123, "o_asr": 0.0123 if defense == "none" else 0.0}
                    cell["asr"] = cell["o_asr"]
            cells.append(cell)
            rows += draw.rows(cell, 5)
    return cells, rows


def backdoorbench_run(folder: Path, seed: int = 0) -> Path:
    """A run folder of that shape."""
    return write_run(folder, *backdoorbench(seed), plugins_of(BACKDOORBENCH), {"suite": {"name": BACKDOORBENCH.suite}})


def tables_of(cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, float], list[Mapping[str, Any]]]]:
    """The public leaderboard's tables: ((data set, rate), cells)."""
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for c in cells:
        found.setdefault((c["dataset"], c["rate"]), []).append(c)
    yield from sorted(found.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Write a run folder."""
    parser = argparse.ArgumentParser(description="Write a run folder of made-up tables.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--measurements", type=int, default=0, help="0 is ten per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--like", choices=("sized", "backdoorbench", "hostile"), default="sized")
    args = parser.parse_args(argv)
    if args.like == "hostile":
        hostile_run(args.out)
    elif args.like == "backdoorbench":
        backdoorbench_run(args.out, args.seed)
    else:
        sized_run(args.out, args.cells, args.measurements or 10 * args.cells, args.seed)


if __name__ == "__main__":
    main()
