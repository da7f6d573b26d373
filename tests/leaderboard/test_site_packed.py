"""The cells packed for the table's script, and that script's reading of them, run by node where it is installed."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic
from page_reader import Page, board_rows, figures, read
from synthetic import HOSTILE_DEFENSE, SCRIPT

from sleeperbench.leaderboard import names, packed, words
from sleeperbench.leaderboard.build import build
from sleeperbench.leaderboard.summary import LOST
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views

SCRIPTS = Path(packed.__file__).parent / "static"

Node = Callable[[str, Any], Any]


@pytest.fixture(scope="module")
def views(hostile_run: Path) -> Views:
    return Views(load([hostile_run]))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Runs an expression over `t` (the table's functions) and `x` (what is given) in node; returns what it gives."""
    if shutil.which("node") is None:
        pytest.skip("allowed: no node on this machine; the tests in a browser run the same script")

    def run(expression: str, given: Any) -> Any:
        (tmp_path / "given.json").write_text(json.dumps(given))
        code = (
            f"const t = require({json.dumps(str(SCRIPTS / 'table.js'))});"
            f"const x = JSON.parse(require('fs').readFileSync({json.dumps(str(tmp_path / 'given.json'))}));"
            f"process.stdout.write(JSON.stringify((() => {{ {expression} }})()));"
        )
        done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_script_is_plain_ascii_that_ends_no_string_early(views: Views) -> None:
    data = packed.script(packed.cells(views)).decode("ascii")
    head, tail = "window.sleeperbenchCells = JSON.parse('", "');\n"
    assert data.startswith(head)
    assert data.endswith(tail)
    inner = data[len(head) : -len(tail)]
    assert "'" not in inner
    assert "<" not in inner
    assert "\n" not in inner
    text = inner.replace("\\u0027", "'").replace("\\u003c", "<").replace("\\\\", "\\")
    assert json.loads(text) == json.loads(json.dumps(packed.cells(views)))


def test_a_share_is_packed_as_its_count_and_comes_back_exactly(views: Views) -> None:
    made = packed.cells(views)
    column = next(m for m in made["metrics"] if m["name"] == "c_acc")
    totals = [t for t, n in zip(column["total"][::2], column["total"][1::2], strict=True) for _ in range(n)]
    found = [x / t if t else x for x, t in zip(column["x"], totals, strict=True)]
    assert found == [r.cell["c_acc"] for r in views.rows if r.cell["c_acc"] is not None]
    assert sum(t > 0 for t in totals) > len(totals) / 2


def test_the_script_shows_what_the_pages_show(views: Views, pages: dict[str, Page], node: Node) -> None:
    shown = node(
        "const c = new t.Cells(x); return Array.from({length: c.count}, (_, i) => [c.name(i), c.page(i),"
        " Object.fromEntries([...c.metrics.keys()].map((m) => [m, c.figure(m, i)]))]);",
        packed.cells(views),
    )
    rows = board_rows(pages["table.html"])
    assert [name for name, _, _ in shown] == [r.attrs["data-cell"] for r in rows]
    seen = 0
    for (name, page, found), row in zip(shown, rows, strict=True):
        assert page in pages[f"cells/{page}.html"].text or page
        assert row.all("a")[0].attrs["href"] == f"cells/{page}.html", name
        for metric, td in figures(row).items():
            f = found[metric]
            assert f"{f['text']} {f['note']}".strip() == td.text, (name, metric)
            assert f["empty"] == (td.attrs["data-order"] == "")
            if not f["empty"]:
                assert float(f["order"]) == float(td.attrs["data-order"])
                seen += 1
    assert seen > 500


def test_shares_are_printed_as_beforehand(node: Node) -> None:
    rng = random.Random(0)
    values = [k / n for n in (8, 16, 80, 400, 1000, 9000) for k in range(0, n + 1, max(1, n // 400))]
    values += [rng.uniform(-1, 2) for _ in range(3000)] + [k / 2000 for k in range(2001)]
    printed = node("return x.map(t.percent);", values)
    wrong = [(v, p) for v, p in zip(values, printed, strict=True) if f"{p} %" != words.number(v, True)]
    assert wrong == []


def test_sort_keeps_contestants_first_and_empty_fields_last(views: Views, node: Node) -> None:
    columns = ["o_asr", "p_asr", "defense", "seed", "rate", "status"]
    found = node(
        "const c = new t.Cells(x.data); return x.columns.flatMap((sort) => [true, false].map((down) =>"
        " c.select({...c.parse(''), sort, down}).found));",
        {"data": packed.cells(views), "columns": columns},
    )
    lost: set[float] = set()
    for k, column in enumerate(columns):
        for down, order in ((True, found[2 * k]), (False, found[2 * k + 1])):
            rows = [views.rows[i] for i in order]
            assert sorted(order) == list(range(len(views.rows)))
            roles = [r.role == "defense" for r in rows]
            assert roles == sorted(roles, reverse=True)
            if column == "status":
                continue
            for part in (True, False):
                mine = [r for r in rows if (r.role == "defense") is part]
                values = [r.cell[column] for r in mine]
                filled = [v for v in values if v is not None]
                assert values == filled + [None] * (len(values) - len(filled)), "empty fields come last either way"
                shown = [names.clean(v) if isinstance(v, str) else v for v in filled]
                if column not in ("o_asr", "p_asr"):
                    assert shown == sorted(shown, reverse=down)
                    continue
                void = [not {"weak", "lost"}.isdisjoint(r.css.split()) for r in mine][: len(filled)]
                assert void == sorted(void), "what is no success comes after what is one, either way"
                real = void.count(False)
                assert filled[:real] == sorted(filled[:real], reverse=down)
                assert filled[real:] == sorted(filled[real:], reverse=down)
                lost |= {v for v in filled[real:] if column == "o_asr"} if part else set()
    assert 0.0 in lost, "some defense ruined a model and left an ASR of 0"


def test_the_first_column_sorts_as_it_reads(views: Views, node: Node) -> None:
    order = node(
        "const c = new t.Cells(x); return c.select({...c.parse(''), sort: 'cell', down: false}).found;",
        packed.cells(views),
    )
    read = [
        (r.role != "defense", names.clean(r.cell["defense"]), names.clean(r.cell["attack"]))
        for r in (views.rows[i] for i in order)
    ]
    assert read == sorted(read)


def test_columns_that_say_nothing_are_hidden_at_first(tmp_path: Path, node: Node) -> None:
    made = synthetic.tables(1, ["badnets", "wanet"], ["none", "ft", "anp"], 2)
    views = Views(load([synthetic.write_run(tmp_path / "r", *made)]))
    assert {"dataset", "arch", "attack", "defense", "c_acc_attacked"} <= views.off
    assert views.off.isdisjoint({"seed", "status", "c_acc", "o_asr", "p_asr", "p_der"})
    usual, given, filed = node(
        "const c = new t.Cells(x); return [c.parse('').columns, c.format(c.parse('')),"
        " c.filed(c.parse('columns=cell,c_acc').columns)];",
        packed.cells(views),
    )
    assert set(usual) == {"cell", "rate", "access", "seed", "status", *(h.metric for h in views.heads)} - views.off
    assert given == "", "the usual columns need no word in the address"
    assert {"cell", "dataset", "attack", "defense", "c_acc"} <= set(filed), "a file says what the page says otherwise"
    assert "p_asr" not in filed
    one = Views(load([synthetic.write_run(tmp_path / "one", made[0][:1], [])]))
    assert one.off == {"access", "attack", "defense"}, "of a single row everything would be hidden"


def test_facets_and_search_act_on_all_rows(views: Views, node: Node) -> None:
    states = [
        "q=badnets+s1&defense=ft",
        f"defense={names.clean(HOSTILE_DEFENSE)}".replace("&", "%26").replace("+", "%2B"),
        "access=T1&attack=wanet&rate=10+%25",
        "q=nothing-like-this",
        "status=not+run",
    ]
    found = node(
        "const c = new t.Cells(x.data); return x.states.map((s) => { const state = c.parse(s), r = c.select(state);"
        " return [r.found, r.counts.map((n, k) => Object.fromEntries([...n.keys()].map((i) =>"
        " [c.data.text[t.FACETS[k]].values[i], n[i]]))), c.format(state)]; });",
        {"data": packed.cells(views), "states": states},
    )

    def count(hit: Callable[[Any], bool]) -> list[int]:
        return [i for i, r in enumerate(views.rows) if hit(r)]

    wanted = [
        count(lambda r: r.cell["defense"] == "ft" and "badnets" in r.cell["cell"] and "/s1" in r.cell["cell"]),
        count(lambda r: r.cell["defense"] == HOSTILE_DEFENSE),
        count(lambda r: (r.cell["access"], r.cell["attack"], r.rate) == ("T1", "wanet", "10 %")),
        [],
    ]
    assert [f for f, _, _ in found[:4]] == wanted
    assert all(wanted[:3])
    # A facet's counts are those under the other choices: what choosing another value would show.
    counts = found[2][1]
    others = count(lambda r: (r.cell["attack"], r.rate) == ("wanet", "10 %"))
    assert sum(counts[5].values()) == len(others)
    assert counts[2]["badnets"] == len(
        count(lambda r: (r.cell["access"], r.cell["attack"], r.rate) == ("T1", "badnets", "10 %"))
    )


def test_the_hash_keeps_the_whole_state_and_takes_no_nonsense(views: Views, node: Node) -> None:
    state = "q=a+b&dataset=digits&sort=p_asr%3Adown&columns=cell%2Cdefense%2Cp_asr&page=3"
    nonsense = "dataset=nowhere&sort=__proto__%3Aup&columns=toString&page=-1&page=9e9&q=%3Cscript%3E"
    kept, left, empty = node(
        "const c = new t.Cells(x.data); return x.states.map((s) => c.format(c.parse(s)));",
        {"data": packed.cells(views), "states": [state, nonsense, ""]},
    )
    assert kept == state
    assert left == "q=%3Cscript%3E"
    assert empty == ""


def test_the_csv_holds_what_is_shown(views: Views, node: Node) -> None:
    columns = ["cell", "defense", "rate", "status", "o_asr", "p_asr"]
    text = node(
        "const c = new t.Cells(x.data), s = {...c.parse(''), sort: 'o_asr', down: true};"
        " return c.csv(c.select(s).found, x.columns);",
        {"data": packed.cells(views), "columns": columns},
    )
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert list(rows[0]) == [*columns[:5], "o_asr_low", "o_asr_high", "p_asr", "empty_because"]
    cells = {names.clean(r.cell["cell"]): r for r in views.rows}
    assert len(rows) == len(cells)
    for row in rows:
        own = cells[row["cell"].removeprefix("'")]
        for metric in ("o_asr", "p_asr"):
            value = own.cell[metric]
            assert (row[metric] == "") == (value is None)
            assert value is None or float(row[metric]) == value
            assert (f"{metric}: " in row["empty_because"]) == (value is None)
        if row["o_asr_low"]:
            assert float(row["o_asr_low"]) <= own.cell["o_asr"] + 0.0005 <= float(row["o_asr_high"]) + 0.001
    assert any(r["o_asr_low"] for r in rows)


@pytest.mark.parametrize(
    ("text", "quoted"),
    [("=1+1", '"\'=1+1"'), ("-5", '"-5"'), ("@x", '"\'@x"'), ('a"b', '"a""b"'), ("\tx", '"\'\tx"'), ("ok", '"ok"')],
)
def test_a_spreadsheet_takes_no_text_for_a_formula(text: str, quoted: str, node: Node) -> None:
    assert node("return t.quote(x);", text) == quoted


def test_bibtex_is_of_what_is_shown_each_entry_once(tmp_path: Path, node: Node) -> None:
    plugins = [
        {"kind": "attack", "id": "badnets", "bibtex": "@misc{badnets}"},
        {"kind": "defense", "id": "ft", "bibtex": "@misc{ft}"},
        {"kind": "defense", "id": "unlearn", "bibtex": "@misc{unlearn}"},
        {"kind": "defense", "id": "anp", "bibtex": SCRIPT},
    ]
    made = synthetic.tables(1, ["badnets"], ["none", "ft", "unlearn:ft", "anp"], 2)
    data = packed.cells(Views(load([synthetic.write_run(tmp_path / "r", *made, plugins)])))
    one, both, all_ = node(
        "const c = new t.Cells(x); return ['defense=ft', 'defense=unlearn%3Aft', ''].map((s) =>"
        " c.bibtex(c.select(c.parse(s)).found));",
        data,
    )
    assert one.startswith("@misc{sleeperbench,")
    assert one.endswith("\n\n@misc{badnets}\n\n@misc{ft}\n")
    assert both.endswith("\n\n@misc{badnets}\n\n@misc{ft}\n\n@misc{unlearn}\n")
    assert SCRIPT in all_
    assert all_.count("@misc{ft}") == 1


def test_a_cell_with_an_odd_name_keeps_it(tmp_path: Path, node: Node) -> None:
    odd = synthetic.cell_row("badnets", 0.1, "ft", 0, cell="a name of its own", o_asr=0.1)
    plain = synthetic.cell_row("badnets", 1e-05, "ft", 1, o_asr=0.1)
    data = packed.cells(Views(load([synthetic.write_run(tmp_path / "r", [odd, plain], [])])))
    assert list(data["names"].values()) == ["a name of its own"]
    found = node("const c = new t.Cells(x); return [c.name(0), c.name(1)];", data)
    assert sorted(found) == sorted([odd["cell"], plain["cell"]])


def test_the_table_names_its_data(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "r", *synthetic.tables(1, ["badnets"], ["none", "ft"], 1))
    out = build([run], tmp_path / "s").parent
    source = read(out / "table.html").by_id("board").attrs["data-source"]
    assert (out / source).is_file()
    assert [p.relative_to(out).as_posix() for p in (out / "data").glob("cells.*.js")] == [source]


def test_the_public_leaderboards_shape(tmp_path: Path, node: Node) -> None:
    run = synthetic.backdoorbench_run(tmp_path / "run")
    views = Views(load([run]))
    assert len(views.rows) == 15_360
    data = packed.cells(views)
    empty = 0
    for head in views.heads:
        for r in views.rows:
            if r.cell[head.metric] is None:
                empty += 1
                assert words.reason_word("") != r.figures[views.heads.index(head)].text
    assert empty > 5 * 171
    c_acc = next(m for m in data["metrics"] if m["name"] == "c_acc")
    empty_rows = sum(n for reason, n in zip(c_acc["runs"][::2], c_acc["runs"][1::2], strict=True) if reason >= 0)
    assert empty_rows == sum(r.cell["c_acc"] is None for r in views.rows) > 0
    assert all(word and title for word, title in data["reasons"])
    # What ruined the model, or had no backdoor to remove, is grey in every order, and no row hides its flag.
    status = data["text"]["status"]
    for r, k in zip(views.rows, status["at"], strict=True):
        css = status["css"][k].split()
        assert ("lost" in css) == ("collapsed" in r.cell["flags"] or r.cell["status"] in LOST)
        if "collapsed" in r.cell["flags"]:
            assert "collapsed" in status["badges"][k]
        if "weak" in r.cell["flags"]:
            assert "weak" in css
            assert "weak" in status["badges"][k]
    seconds = node(
        "const c = new t.Cells(x); c.select(c.parse('q=a')); const took = {};"
        " const states = {sort: 'sort=c_acc:down', facet: 'defense=' + c.data.text.defense.values[3]};"
        " for (const [k, s] of Object.entries(states))"
        " { const a = performance.now(); c.select(c.parse(s)); took[k] = performance.now() - a; } return took;",
        data,
    )
    assert max(seconds.values()) < 200, "milliseconds for all rows, before drawing"
