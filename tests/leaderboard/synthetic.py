"""Run folders of made-up tables, drawn from a seed: every status, every kind of empty field, hostile strings."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
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
    return folder
