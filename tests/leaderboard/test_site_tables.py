from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import cell_row, measurement, tables, write_run

from sleeperbench.errors import BadInput
from sleeperbench.leaderboard.names import digest12
from sleeperbench.leaderboard.tables import load
from sleeperbench.schema import CELLS, arrow


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first", *tables(1, ["badnets"], ["none", "ft"], 2))


def test_the_first_of_two_runs_counts_and_a_note_says_so(run: Path, tmp_path: Path) -> None:
    cells, rows = tables(2, ["badnets"], ["none", "ft", "anp"], 2)
    second = write_run(tmp_path / "second", cells, rows)
    first, merged = load([run]), load([run, second])
    assert len(merged.cells) == 6
    by_cell = {c["cell"]: c for c in merged.cells}
    for c in first.cells:
        assert by_cell[c["cell"]]["c_acc"] == c["c_acc"]
        assert merged.owner[c["cell"]].name == "first"
        assert merged.measured(c["cell"]) == first.measured(c["cell"])
    assert {merged.owner[c].name for c in by_cell if "/anp/" in c} == {"second"}
    assert [n for n in merged.notes if n.startswith("4 cells of run second")]
    assert len(merged.measurements) == len(rows), "each measurement is there once"


def test_cells_that_two_suites_call_alike_are_both_there(run: Path, tmp_path: Path) -> None:
    """A cell's name has no suite: behind that of the later one stands its suite, in cells and measurements."""
    cells, rows = tables(2, ["badnets"], ["none", "ft", "anp"], 2)
    zoo = measurement(cells[0], "det_auroc", cell="digits/zoo", scope="zoo", value=0.9)
    for r in [*cells, *rows, zoo]:
        r["suite"] = "other"
    second = write_run(tmp_path / "second", cells, [*rows, zoo])
    third = write_run(tmp_path / "third", cells, [zoo | {"value": 0.1}])
    first, alone, merged = load([run]), load([second]), load([run, second, third])
    own = merged.alone
    assert sorted(own) == [f"{c['cell']} of other" for c in first.cells]
    by_cell = {c["cell"]: c for c in merged.cells}
    assert len(by_cell) == len(first.cells) + len(alone.cells)
    for c in alone.cells:
        here = f"{c['cell']} of other" if "/anp/" not in c["cell"] else c["cell"]
        assert by_cell[here] == c | {"cell": here}
        assert merged.owner[here].name == "second"
        assert merged.measured(here) == alone.measured(c["cell"]) != []
    for c in first.cells:
        assert by_cell[c["cell"]] == c
        assert merged.measured(c["cell"]) == first.measured(c["cell"])
    assert [m["value"] for m in merged.measured("digits/zoo")] == [0.9]
    (note,) = [n for n in merged.notes if "run second" in n]
    assert note.startswith("4 cells of run second are called as cells of another suite")
    assert [n for n in merged.notes if n.startswith("6 cells of run third stand in an earlier run too")]


def test_media_are_those_of_a_cell_of_the_same_suite(run: Path, tmp_path: Path) -> None:
    cells, rows = tables(2, ["badnets"], ["none", "ft"], 2)
    for r in [*cells, *rows]:
        r["suite"] = "other"
    second = write_run(tmp_path / "second", cells, rows)
    name = cells[0]["cell"]
    (second / "media" / digest12(name)).mkdir(parents=True)
    merged = load([run, second])
    assert merged.drawn(name) is None
    assert merged.drawn(f"{name} of other") == (second / "media" / digest12(name), name)


def test_rows_of_a_zoo_are_kept_though_no_cell_is_called_so(run: Path, tmp_path: Path) -> None:
    cells, rows = tables(1, ["badnets"], ["none"], 1)
    zoo = measurement(cells[0], "det_auroc", cell="digits/zoo", scope="zoo", value=0.9)
    other = write_run(tmp_path / "zoo", cells, [*rows, zoo])
    again = write_run(tmp_path / "again", cells, [zoo | {"value": 0.1}])
    assert [m["value"] for m in load([run, other, again]).measured("digits/zoo")] == [0.9]


def test_a_cell_takes_no_measurement_from_a_run_that_does_not_own_it(tmp_path: Path) -> None:
    cells, rows = tables(1, ["badnets"], ["none"], 1)
    bare, full = write_run(tmp_path / "bare", cells, []), write_run(tmp_path / "full", cells, rows)
    assert load([bare, full]).measured(cells[0]["cell"]) == []
    assert load([full, bare]).measured(cells[0]["cell"])


def test_a_method_of_two_versions_is_noted(tmp_path: Path) -> None:
    made = tables(1, ["badnets"], ["none"], 1)
    a = write_run(tmp_path / "a", *made, [{"kind": "defense", "id": "ft", "method_version": 1}])
    b = write_run(tmp_path / "b", *made, [{"kind": "defense", "id": "ft", "method_version": 2}])
    assert any("defense ft is of version 1 in one run and of version 2 in run b" in n for n in load([a, b]).notes)


def test_a_figure_that_is_not_finite_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [cell_row("badnets", 0.1, "ft", 0, c_acc=float("nan"), o_asr=float("inf"))], [])
    (cell,) = load([run]).cells
    assert cell["c_acc"] is None
    assert cell["o_asr"] is None


def _without(path: Path, column: str) -> None:
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


def _version(path: Path, version: bytes) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"sleeperbench.schema": version}), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "cells.parquet").unlink(), "no cells.parquet in .*: give a run folder"),
        (lambda r: (r / "measurements.parquet").unlink(), "no measurements.parquet in "),
        (lambda r: (r / "cells.parquet").write_bytes(b"PAR1 no"), "cannot read .*cells.parquet"),
        (lambda r: _version(r / "cells.parquet", b"2"), "has table schema 2, this sleeperbench reads 1"),
        (lambda r: _without(r / "cells.parquet", "o_asr"), "lacks the column o_asr"),
        (lambda r: (r / "plugins.json").write_text("{"), "cannot read .*plugins.json"),
        (lambda r: (r / "plugins.json").write_text('"x"'), "plugins.json must hold a list"),
        (lambda r: (r / "run.json").write_bytes(b"\xff"), "cannot read .*run.json"),
    ],
)
def test_what_cannot_be_read_is_named(run: Path, spoil, message: str) -> None:
    spoil(run)
    with pytest.raises(BadInput, match=message) as e:
        load([run])
    assert len(str(e.value).splitlines()) == 1


def test_a_column_of_another_type_is_named(run: Path) -> None:
    table = pq.read_table(run / "cells.parquet")
    at = table.column_names.index("o_asr")
    words = pa.array(["many"] * len(table))
    pq.write_table(table.set_column(at, "o_asr", words), run / "cells.parquet")
    with pytest.raises(BadInput, match=re.escape("cells.parquet has a column of another type")):
        load([run])


def test_plugins_and_run_json_may_be_missing(run: Path) -> None:
    (run / "plugins.json").unlink()
    (run / "run.json").unlink()
    assert load([run]).plugins == {}


def test_later_columns_are_left_out(run: Path) -> None:
    table = pq.read_table(run / "cells.parquet")
    pq.write_table(table.append_column("later", pa.array([1] * len(table))), run / "cells.parquet")
    assert load([run]).cells_table.schema.names == arrow(CELLS).names
