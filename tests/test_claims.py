"""The page of claims: what it says of runs that are held against a paper."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import DOCS, script

from sleeperbench.engine import rows
from sleeperbench.published import paper as published
from sleeperbench.schema import MEASUREMENTS

PAPER = """
schema = 1
title = "T"
source = "https://example.org"
suites = ["smoke"]
[[table]]
id = "1"
what = "w"
row = "defense"
column = "attack"
columns = ["badnets"]
metrics = ["asr", "p_asr_ra"]
unit = "%"
[table.rows]
ft = ["2/80"]
nad = ["3/70"]
[table.setting]
dataset = "digits"
arch = "net"
rate = 0.1
epochs = 100
[[claim]]
id = "wakes"
says = "It wakes | soon."
where = "table 1"
table = "1"
ours = "half"
metric = "p_asr_ra"
attack = "badnets"
defense = ["ft", "nad"]
test = ">"
value = 0.5
[[claim]]
id = "ft-first"
says = "It wakes first."
where = "table 1"
table = "1"
metric = "p_asr_ra"
attack = "badnets"
defense = "ft"
test = ">"
than = { defense = "nad" }
[[claim]]
id = "never-run"
says = "PAM sleeps."
where = "table 1"
metric = "p_asr_ra"
defense = "pam"
test = "<"
value = 0.1
"""
ABOUT = {
    "suite": {"name": "tiny", "recipe": {"epochs": 8}, "dataset_rows": {}},
    "protocol": 1,
    "host": {},
    "datasets": {"digits": {"rows": {"train": 1437}}},
}


@pytest.fixture(scope="module")
def claims() -> Any:
    return script("claims")


def run(folder: Path, seed: int, **values: float) -> Path:
    """A run folder of one seed with P-ASR by defense."""
    blank: dict[str, Any] = {c.name: "" if c.type == "str" else None for c in MEASUREMENTS}
    made = []
    for defense, value in values.items():
        told = {"dataset": "digits", "arch": "net", "attack": "badnets", "rate": 0.1, "defense": defense, "seed": seed}
        told |= {"cell": f"digits/net/badnets@0.1/{defense}/s{seed}", "attack_params": "{}", "defense_params": "{}"}
        told |= {"status": "ok", "flag": "weak" if defense == "nad" else "", "started": 0.0}
        told |= {"env": '{"torch": "2", "machine": "m", "cpu": "c"}', "cpu_seconds": 2.0}
        for metric, figure, evaluator in (
            ("p_asr_ra", value, "ra"),
            ("asr", 0.3 * seed, "accuracy"),
            ("bec", 1, "bec"),
        ):
            own = {"metric": metric, "value": float(figure), "evaluator": evaluator, "method_version": 1 + seed % 2}
            made.append(blank | told | own | {"task_key": f"{evaluator}-{defense}-{seed}"})
    folder.mkdir()
    rows.write_tables(folder, made)
    (folder / "run.json").write_text(json.dumps(ABOUT | {"suite": ABOUT["suite"] | {"seeds": [seed]}}))
    used = [{"kind": "defense", "id": d, "method_version": 3} for d in ("ft", f"seed{seed}")]
    used += [{"kind": "evaluator", "id": "bec", "method_version": 9}]
    (folder / "plugins.json").write_text(json.dumps(used))
    return folder


@pytest.fixture
def written(claims: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    monkeypatch.setattr(published, "papers", lambda: {"p": published.read("p", PAPER)})
    monkeypatch.setattr(claims, "DOCS", tmp_path)
    (tmp_path / "measured").mkdir()
    runs = [run(tmp_path / str(i), i, ft=0.7 + i / 10, nad=nad) for i, nad in enumerate((0.5, 0.4))]
    monkeypatch.setattr(sys, "argv", ["claims.py", "tiny", "p", "the command", *map(str, runs)])
    assert claims.main() == 0
    data = json.loads((tmp_path / "measured" / "claims-tiny.json").read_text())
    return (tmp_path / "claims.md").read_text(), data


def test_a_claim_stands_with_its_verdict_and_its_figures(written: tuple[str, dict[str, Any]]) -> None:
    page, data = written
    assert data["counts"] == {"holds": 1, "does not hold": 1, "not run": 1}
    assert (data["seeds"], data["rows"]) == ([0, 1], {"digits": 1437})
    assert [(c["id"], c["verdict"]) for c in data["claims"]] == [
        ("wakes", "does not hold"),
        ("ft-first", "holds"),
        ("never-run", "not run"),
    ]
    lines = page.splitlines()
    assert "| tiny | p | tiny | 3 | 1 | 1 | 1 |" in lines
    assert "| `wakes` It wakes \\| soon. (table 1) | does not hold | 1 | 1 | 0 | 0 |" in lines
    ft = "| `wakes` | digits/net/badnets@0.1/ft | yes | 0.75 (0.7 to 0.8) | > 0.5 | 0.8 (table 1) |  |"
    nad = "| `wakes` | digits/net/badnets@0.1/nad | no | 0.45 (0.4 to 0.5) | > 0.5 | 0.7 (table 1) | weak |"
    assert ft in lines and nad in lines
    (both,) = [line for line in lines if line.startswith("| `ft-first` | ")]
    assert "> 0.45 (0.4 to 0.5), digits/net/badnets@0.1/nad: p_asr_ra" in both.replace("&gt;", ">")
    assert "0.8 against 0.7 (table 1)" in both
    assert "`wakes`: half" in page and "epochs 8 instead of 100" in page and "`the command`" in page


def test_provenance_is_that_of_all_runs_and_of_the_evaluators_that_were_used(
    written: tuple[str, dict[str, Any]],
) -> None:
    _, data = written
    # `asr` and `bec` stand in no claim. Seed 0 was measured with version 1 of ra, seed 1 with version 2.
    assert data["about"]["methods"] == {"defense/ft": 3, "defense/seed0": 3, "defense/seed1": 3, "evaluator/ra": [1, 2]}
    assert data["about"]["evaluation_core_seconds"] == 2 * 2 * 3 * 2


def test_seeds_that_are_in_no_figure_are_named(
    claims: Any, written: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = PAPER.replace("value = 0.5\n", 'value = 0.5\ngiven = [{ metric = "asr", test = "<=", value = 0.2 }]\n', 1)
    monkeypatch.setattr(published, "papers", lambda: {"p": published.read("p", given)})
    data = claims.held("p", [tmp_path / "0", tmp_path / "1"])
    assert data["about"]["methods"]["evaluator/accuracy"] == [1, 2]
    data = json.loads(json.dumps({"command": "c"} | data))
    row = "| `wakes` | digits/net/badnets@0.1/ft | yes | 0.7; without seed 1: asr 0.3, not &lt;= 0.2 | > 0.5 | "
    assert row in "\n".join(claims.section("tiny", data))


def test_what_was_not_run_is_named_with_its_reason(written: tuple[str, dict[str, Any]]) -> None:
    page, _ = written
    assert "Not run at all, 1 of 3:" in page
    assert "- `never-run` PAM sleeps. (table 1): no such cell in the run" in page


def test_reasons_are_cut_short(claims: Any) -> None:
    assert claims.short({"a; b; c; d": 2, "e": 1}) == "a; b; and 2 more"
    assert (claims.short({"a": 1}), claims.short({})) == ("a", "")


def test_what_rests_on_bec_says_so(written: tuple[str, dict[str, Any]], claims: Any) -> None:
    page, data = written
    assert "beside its controls" not in page
    data["claims"][0]["metric"] = "bec"
    assert "On BEC alone: `wakes`." in "\n".join(claims.section("tiny", data))


def test_the_page_is_that_of_the_stored_claims(claims: Any) -> None:
    names = sorted((DOCS / "measured").glob("claims-*.json"))
    assert names
    found = {p.stem.removeprefix("claims-"): json.loads(p.read_text()) for p in names}
    assert "\n".join(claims.page(found)) + "\n" == (DOCS / "claims.md").read_text()
    for run in found.values():
        counted = {v: sum(c["verdict"] == v for c in run["claims"]) for v in claims.VERDICTS}
        assert counted == run["counts"]
