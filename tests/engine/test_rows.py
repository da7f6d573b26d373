"""Rows and tables: intervals, missing figures, headlines, flags, and files that are equal for equal rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sleeperbench.contracts.access import Needs
from sleeperbench.engine import rows
from sleeperbench.engine.plan import Cell, Evaluation
from sleeperbench.errors import BadInput
from sleeperbench.schema import CELLS, HEADLINE_METRICS, MEASUREMENTS

# scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
KNOWN = {
    (0, 10): (0.0, 0.27753279986288926),
    (5, 10): (0.236593090512564, 0.763406909487436),
    (10, 10): (0.7224672001371109, 1.0),
    (1, 100): (0.001767432064140647, 0.054486196178705315),
}


@pytest.mark.parametrize("case", KNOWN)
def test_wilson_known_values(case: tuple[int, int]) -> None:
    assert rows.wilson(*case) == pytest.approx(KNOWN[case], abs=1e-12)


@pytest.mark.parametrize(("count", "total"), [(1, 3), (5, 10), (7, 300), (299, 300), (4000, 9000)])
def test_wilson_solves_its_equation(count: int, total: int) -> None:
    """Both ends p satisfy |k/n - p| = z sqrt(p (1 - p) / n); found here by bisection."""

    def excess(p: float) -> float:
        return abs(count / total - p) - 1.959963984540054 * math.sqrt(p * (1 - p) / total)

    def root(outside: float, inside: float) -> float:
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
        return inside

    assert rows.wilson(count, total) == pytest.approx((root(0.0, count / total), root(1.0, count / total)), abs=1e-12)


def test_wilson_without_trials() -> None:
    assert rows.wilson(0, 0) == (0.0, 1.0)


def identity(name: str) -> dict[str, Any]:
    ds, arch, attack, defense, seed = name.split("/")
    return {
        "suite": "t",
        "protocol": "1",
        "dataset": ds,
        "data_digest": "d",
        "arch": arch,
        "attack": attack.partition("@")[0],
        "attack_params": "{}",
        "rate": float(attack.partition("@")[2]),
        "rate_actual": None,
        "defense": defense,
        "defense_params": "{}",
        "clean_source": "heldout",
        "access": "T1",
        "seed": int(seed[1:]),
        "cell": name,
    }


def figures(name: str, key: str = "", evaluator: str = "accuracy", **values: Any) -> list[dict[str, Any]]:
    """Rows of one task on one cell; a value is a figure, a (count, total) pair, or a reason."""
    control = name.split("/")[3] == "none"
    cell = Cell(
        identity=identity(name),
        attack_key="a",
        defense_key="d",
        attack_group="g",
        clean_cell="",
        is_control=control,
    )
    found = []
    for metric, v in values.items():
        row: dict[str, Any] = {"metric": metric, "value": v, "count": None, "total": None}
        row |= {"reason": "", "qualifier": "", "stage": ""}
        if isinstance(v, tuple):
            row |= {"value": v[0] / v[1], "count": v[0], "total": v[1]}
        elif isinstance(v, str):
            row |= {"value": None, "reason": v}
        found.append(row)
    manifest = {
        "key": key or f"k-{name}-{evaluator}",
        "env": {"torch": "1"},
        "task": {"version": 3, "numerics": {"threads": 1, "precision": "fp32"}},
        "result": {
            "seconds": 2.0,
            "cpu_seconds": 1.0,
            "peak_mb": 3.0,
            "device": "cpu",
            "started": 1.7e9,
            "cost": {"forwards": 1, "backwards": 2, "queries": 3},
        },
    }
    facts = {"rate_actual": 0.1, "flag": "", "dist": "sleeperbench", "dist_version": "0", "defense_version": 5}
    evaluation = Evaluation(evaluator=evaluator, needs=Needs(), key=manifest["key"])
    return rows.measured(cell, evaluation, {"rows": found}, manifest, facts)


def failed(name: str, status: str, reason: str, evaluator: str = "ra", metrics: tuple[str, ...] = ("p_asr_ra",)) -> Any:
    made = figures(name, evaluator=evaluator, **dict.fromkeys(metrics, "x"))
    return [r | {"status": status, "reason": reason} for r in made]


BAD, FT, CM = (
    "digits/net/badnets@0.1/none/s0",
    "digits/net/badnets@0.1/ft/s0",
    "digits/net/badnets@0.1/clean_model/s0",
)


def table(found: list[dict[str, Any]], points: float = 10) -> dict[str, dict[str, Any]]:
    return {line["cell"]: line for line in rows.cells_table(found, points)}


def test_a_share_gets_its_interval() -> None:
    (row,) = figures(FT, asr=(5, 10))
    assert (row["value"], row["count"], row["total"], row["status"]) == (0.5, 5, 10, "ok")
    assert (row["lower"], row["upper"]) == rows.wilson(5, 10)
    assert (row["stage"], row["method_version"], row["dist"], row["forwards"]) == ("defended", 3, "sleeperbench", 1)
    (row,) = figures(BAD, bec=0.3)
    assert (row["lower"], row["upper"], row["stage"]) == (None, None, "attacked")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_figure_that_is_not_finite_has_failed(value: float) -> None:
    (row,) = figures(FT, bec=value)
    assert (row["value"], row["status"], row["lower"]) == (None, "failed", None)
    assert row["reason"].startswith("nan")


def test_a_figure_that_is_not_finite_survives_the_store(tmp_path: Path) -> None:
    """The evaluator's other figures stay; only this one becomes a row that failed."""
    from sleeperbench import Findings, Measurement
    from sleeperbench.engine import artifacts

    findings = Findings(rows=(Measurement(metric="bec", value=math.nan), Measurement(metric="asr", value=0.5)))
    artifacts.write_findings(tmp_path, findings)
    read = json.loads((tmp_path / "findings.json").read_text())
    cell = Cell(identity=identity(FT), attack_key="", defense_key="", attack_group="", clean_cell="", is_control=False)
    manifest: dict[str, Any] = {"key": "k", "env": {}, "task": {"version": 1, "numerics": {"threads": 1}}}
    manifest["task"]["numerics"]["precision"] = "fp32"
    manifest["result"] = dict.fromkeys(("seconds", "cpu_seconds", "peak_mb", "device", "started"))
    manifest["result"]["cost"] = {"forwards": 0, "backwards": 0, "queries": 0}
    made = rows.measured(cell, Evaluation(evaluator="e", needs=Needs()), read, manifest, {"flag": ""})
    assert [(r["metric"], r["status"], r["reason"].partition(":")[0]) for r in made] == [
        ("bec", "failed", "nan"),
        ("asr", "ok", ""),
    ]


def test_missing_rows_name_every_metric() -> None:
    cell = Cell(identity=identity(FT), attack_key="a", defense_key="", attack_group="", clean_cell="", is_control=False)
    made = rows.missing(
        cell, Evaluation(evaluator="ra", needs=Needs()), ["x", "y"], "timeout", "budget: 3 s", {"flag": ""}
    )
    assert [(r["metric"], r["status"], r["reason"], r["value"]) for r in made] == [
        ("x", "timeout", "budget: 3 s", None),
        ("y", "timeout", "budget: 3 s", None),
    ]
    assert made[0]["task_key"] == made[1]["task_key"] != ""
    assert set(made[0]) >= {c.name for c in MEASUREMENTS}


def test_rows_of_planned_tasks_supersede_older_ones() -> None:
    old, new = figures(FT, key="old", asr=0.1, c_acc=0.2), figures(FT, key="new", asr=0.3)
    other, beside = figures(BAD, key="old2", asr=0.4), figures(FT, key="ra-old", evaluator="ra", p_asr_ra=0.5)
    kept = rows.supersede([*old, *new, *other, *beside], {"new"})
    assert kept == [*new, *other, *beside]


def test_relations_between_cells() -> None:
    found = figures(BAD, c_acc=0.9, asr=0.95) + figures(FT, c_acc=0.85, asr=0.1, der=0.7)
    found += figures(FT, evaluator="ra", p_asr_ra=0.4, p_asr_net=0.3, c_acc_ra=0.8)
    found += figures(FT, evaluator="qra", p_asr_qra=0.6, p_asr_qra_net=0.5)
    line = table(found)[FT]
    assert (line["c_acc_attacked"], line["asr_attacked"], line["o_asr"]) == (0.9, 0.95, 0.1)
    assert (line["p_asr"], line["p_asr_set"], line["p_asr_net"]) == (0.6, "qra;ra", 0.5)
    assert line["p_der"] == pytest.approx((1 + (0.95 - 0.5) - (0.9 - 0.85)) / 2)
    assert (line["der"], line["method_version"], line["seconds"]) == (0.7, 5, 6.0)
    assert (line["status"], line["reason"], line["flag"]) == ("ok", "", "")
    nulls = {m for m in HEADLINE_METRICS if line[m] is None}
    assert json.loads(line["reasons"]).keys() == nulls
    assert all(json.loads(line["reasons"]).values())


@pytest.mark.parametrize(
    ("asr", "net", "c_acc", "want"),
    [
        (0.0, 0.0, 0.9, (1 + 0.95) / 2),
        (0.95, 0.95, 0.9, 0.5),
        (0.99, 0.0, 0.9, 0.5),
        (0.0, 0.0, 0.95, (1 + 0.95) / 2),
        (0.2, 0.5, 0.9, (1 + 0.45) / 2),
        (0.5, 0.2, 0.9, (1 + 0.45) / 2),
    ],
)
def test_p_der(asr: float, net: float, c_acc: float, want: float) -> None:
    found = figures(BAD, c_acc=0.9, asr=0.95) + figures(FT, c_acc=c_acc, asr=asr)
    found += figures(FT, evaluator="ra", p_asr_ra=net, p_asr_net=net)
    assert table(found)[FT]["p_der"] == pytest.approx(want)


def test_p_asr_of_one_probe() -> None:
    line = table(figures(FT, evaluator="qra", p_asr_qra=0.2))[FT]
    assert (line["p_asr"], line["p_asr_set"], line["p_asr_ra"]) == (0.2, "qra", None)
    line = table(figures(FT, asr=0.2))[FT]
    assert (line["p_asr"], line["p_asr_set"]) == (None, "")
    assert json.loads(line["reasons"])["p_asr"].startswith("not_run")


@pytest.mark.parametrize(
    ("ra", "qra", "net", "reason"),
    [
        ({"p_asr_ra": 0.4, "p_asr_net": 0.3}, {"p_asr_qra": 0.6, "p_asr_qra_net": 0.2}, 0.3, ""),
        ({"p_asr_ra": 0.4, "p_asr_net": 0.3}, {}, 0.3, ""),
        ({"p_asr_ra": 0.1, "p_asr_net": 0.0}, {"p_asr_qra": "ra_not_successful"}, 0.0, ""),
        ({"p_asr_ra": 0.4, "p_asr_net": 0.3}, {"p_asr_qra": 0.6, "p_asr_qra_net": "x"}, None, "control_missing"),
        ({"p_asr_ra": 0.4, "p_asr_net": "y"}, {"p_asr_qra": 0.6, "p_asr_qra_net": 0.2}, None, "y"),
    ],
)
def test_the_net_figure_is_the_larger_one_of_the_probes_that_woke(
    ra: dict[str, Any], qra: dict[str, Any], net: float | None, reason: str
) -> None:
    line = table(figures(FT, evaluator="ra", **ra) + figures(FT, evaluator="qra", **qra))[FT]
    assert line["p_asr_net"] == net
    assert json.loads(line["reasons"]).get("p_asr_net", "").startswith(reason)


def test_variants_of_a_metric_are_no_headline() -> None:
    found = figures(FT, asr=0.5)
    assert table([*found, found[0] | {"qualifier": "trigger=1", "value": 0.9}])[FT]["asr"] == 0.5


@pytest.mark.parametrize(
    ("c_acc", "r_acc", "points", "collapsed"),
    [
        (0.80, 0.9, 10, False),  # exactly 10 points
        (0.79, 0.9, 10, True),
        (0.79, 0.9, 12, False),
        (0.89, 0.9, 0, True),
        (0.90, 0.40, 10, False),  # exactly half of what the clean model reaches
        (0.90, 0.39, 10, True),
    ],
)
def test_collapsed(c_acc: float, r_acc: float, points: float, collapsed: bool) -> None:
    found = figures(BAD, c_acc=0.9, asr=1.0, r_acc=0.0) + figures(CM, c_acc=0.5, asr=0.0, r_acc=0.8)
    found += figures(FT, c_acc=c_acc, asr=0.0, r_acc=r_acc)
    lines = table(found, points)
    assert lines[FT]["flag"] == ("collapsed" if collapsed else "")
    assert lines[BAD]["flag"] == lines[CM]["flag"] == ""


def test_the_worst_status_of_its_rows_is_the_cells() -> None:
    ok = figures(FT, c_acc=0.9)
    order = ["failed", "timeout", "out_of_memory", "not_run"]
    for i, status in enumerate(order):
        worse = [r for s in reversed(order[i:]) for r in failed(FT, s, f"{s}: why", s)]
        line = table(ok + worse)[FT]
        assert (line["status"], line["reason"]) == (status, f"{status}: why")
    assert table(ok + figures(FT, evaluator="ra", p_asr_ra="no_trigger"))[FT]["status"] == "ok"
    line = table(figures(FT, evaluator="ra", p_asr_ra="no_trigger"))[FT]
    assert (line["status"], line["reason"]) == ("not_applicable", "no_trigger")


def test_a_verdict_needs_its_score() -> None:
    assert table(figures(FT, det_score=0.5, det_flag=1.0))[FT]["verdict"] is True
    assert table(figures(FT, det_score=0.5, det_flag=0.0))[FT]["verdict"] is False
    assert table(figures(FT, asr=0.5))[FT]["verdict"] is None


@pytest.fixture
def found() -> list[dict[str, Any]]:
    made = figures(BAD, c_acc=(9, 10), asr=(5, 10)) + figures(FT, c_acc=(8, 10), asr="no_trigger")
    return made + figures(CM, asr=math.nan)


def test_tables_have_the_schema(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    rows.write_tables(tmp_path, found)
    names = {"str": "string", "f64": "double", "i64": "int64", "bool": "bool", "timestamp": "timestamp[us, tz=UTC]"}
    for file, columns in (("measurements", MEASUREMENTS), ("cells", CELLS)):
        schema = pq.read_schema(tmp_path / f"{file}.parquet")
        assert schema.metadata[b"sleeperbench.schema"] == b"1"
        assert [(f.name, str(f.type)) for f in schema] == [(c.name, names[c.type]) for c in columns]
        for field, c in zip(schema, columns, strict=True):
            assert field.metadata == {b"doc": c.doc.encode(), b"unit": c.unit.encode()}
        info = pq.ParquetFile(tmp_path / f"{file}.parquet").metadata.row_group(0).column(0)
        assert info.compression == "SNAPPY"
    read = rows.read_table(tmp_path / "measurements.parquet")
    assert [r["metric"] for r in read if r["cell"] == BAD] == ["asr", "c_acc"]
    assert all((r["value"] is None) == (r["status"] != "ok") for r in read)


def test_equal_rows_give_equal_bytes(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    for name, order in (("one", found), ("two", list(reversed(found)))):
        (tmp_path / name).mkdir()
        rows.write_tables(tmp_path / name, order)
    for file in ("measurements.parquet", "cells.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saved_rows_come_back_and_damaged_files_count_as_absent(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    (tmp_path / "rows").mkdir()
    rows.save(tmp_path, "k1", found[:2])
    rows.save(tmp_path, "k2", found[2:3])
    for name, text in {"a": "[{", "b": "null", "c": '[{"cell": 1}]', "d": "[3]", "e": "\x00"}.items():
        (tmp_path / "rows" / f"{name}.json").write_text(text)
    assert rows.load_all(tmp_path) == found[:3]


def test_files_of_superseded_rows_are_removed(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    rows.save(tmp_path, "old", figures(FT, key="old", asr=0.1))
    new = figures(FT, key="new", asr=0.2)
    rows.save(tmp_path, "new", new)
    rows.drop_superseded(tmp_path, new)
    assert rows.load_all(tmp_path) == new


@pytest.mark.parametrize("content", [b"", b"PAR1 not parquet", None])
def test_a_table_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "cells.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match="cannot read the table"):
        rows.read_table(file)


def test_a_table_of_another_schema(tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"cell": ["x"]}), tmp_path / "cells.parquet")
    with pytest.raises(BadInput, match="has schema none, this version reads 1"):
        rows.read_table(tmp_path / "cells.parquet")
