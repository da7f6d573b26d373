"""Pictures over what a suite varies: which sweeps are found, what stands in them, and how they are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic
from page_reader import Page, Tag, read

from sleeperbench.leaderboard import sweeps
from sleeperbench.leaderboard.build import build
from sleeperbench.leaderboard.names import digest12
from sleeperbench.leaderboard.summary import Board
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views

RATES = {"fine_pruning": 0.5, "fine_pruning~aaaaaa": 0.1, "fine_pruning~bbbbbb": 0.9}
BELT = {"badnets": 0.9, "belt:badnets": 0.5, "beltpp:badnets": 0.2}
"""How much ASR a pruned channel takes."""


def cell(attack: str, defense: str, seed: int = 0, /, **more: Any) -> dict[str, Any]:
    told = {"attack_params": "{}", "defense_params": "{}", "c_acc": 0.9, "o_asr": 0.9, "flag": ""}
    return synthetic.cell_row(attack, 0.05, defense, seed, **(told | more))


def pruned() -> list[dict[str, Any]]:
    """Figure 10 of BELT: accuracy and ASR over the pruning rate, two seeds."""
    cells = [cell(a, "none", s) for a in BELT for s in (0, 1)]
    for a, slope in BELT.items():
        for d, rate in RATES.items():
            for s in (0, 1):
                figures = {"c_acc": 0.9 - 0.5 * rate + 0.02 * s, "o_asr": 1 - slope * rate, "p_asr": 0.75}
                given = {"defense_params": json.dumps({"rate": rate, "steps": 0, "fixed": False})}
                collapsed = "collapsed" if rate == 0.9 else ""
                cells.append(cell(a, d, s, **figures, **given, flag=collapsed))
    return cells


def built(folder: Path, *runs: list[dict[str, Any]]) -> tuple[Views, Page]:
    made = [synthetic.write_run(folder / f"r{i}", cells, []) for i, cells in enumerate(runs)]
    build(made, folder / "site")
    return Views(load(made)), read(folder / "site" / "sweeps.html")


def lines(page: Page, part: str) -> list[Tag]:
    table = next(t for t in page.root.all("table") if part in t.all("caption")[0].text)
    return table.all("tbody")[0].all("tr")


def found(board: Board) -> dict[tuple[str, str], list[tuple[str, Any]]]:
    return {(s.defense, s.over): [(d.line, d.x) for d in s.dots] for s in sweeps.of_board(board)}


def test_a_swept_parameter_of_a_defense_has_a_line_per_attack(tmp_path: Path) -> None:
    views, page = built(tmp_path, pruned())
    (board,) = views.boards
    assert found(board) == {("fine_pruning", "rate"): [(f"{a} at 5 %", x) for a in BELT for x in (0.1, 0.5, 0.9)]}
    figures = {f.all("figcaption")[0].text: f for f in page.root.all("figure")}
    assert list(figures) == [f"{m} of fine_pruning over rate" for m in ("C-Acc", "O-ASR", "P-ASR")]
    for title, figure in figures.items():
        marks = [a for a in figure.all("svg")[0].all("a") if a.all("title")]
        # P-ASR is that of purified models alone: of BadNets at 0.9.
        assert len(figure.all("polyline")) == (1 if title.startswith("P-ASR") else 3), title
        assert len(marks) == (1 if title.startswith("P-ASR") else 9)
        assert {a.attrs["href"] for a in marks} == {"defenses/fine_pruning.html"}, "a mark of two seeds"
        assert not any("style" in t.attrs for t in figure.all("svg")[0].children)
    assert "badnets at 5 %: 0.9, 19" in figures["O-ASR of fine_pruning over rate"].text


def test_the_table_has_the_same_numbers_as_measured(tmp_path: Path) -> None:
    _, page = built(tmp_path, pruned())
    rows = [[t.text for t in (*r.all("th"), *r.all("td"))] for r in lines(page, "fine_pruning over rate")]
    assert len(rows) == 9
    # Ruined models are drawn with what was measured, not with the undefended model's figures: that is the picture.
    assert rows[2][:3] == ["badnets at 5 %", "0.9", "46.0 % range 45.0–47.0"]
    assert rows[2][3].startswith("19.0 %") and rows[2][4].startswith("75.0 %")
    assert rows[5][3].startswith("55.0 %") and rows[5][4] == "not purified"
    assert rows[0][-1] == "0 1"


def test_one_seed_leads_to_its_cell(tmp_path: Path) -> None:
    cells = [c for c in pruned() if c["seed"] == 0]
    _, page = built(tmp_path, cells)
    figure = page.root.all("figure")[0]
    wanted = {f"cells/{digest12(c['cell'])}.html" for c in cells if c["defense"] != "none"}
    assert {a.attrs["href"] for a in figure.all("a")} == wanted


def test_poison_rates_and_parameters_of_attacks(tmp_path: Path) -> None:
    cells = []
    for label, mask in (("belt:badnets", 0.2), ("belt:badnets~cccccc", 0.8)):
        for rate in (0.05, 0.1):
            given = {"attack_params": json.dumps({"mask_rate": mask, "inner": {"size": 6}}), "o_asr": mask}
            cells += [cell(label, d, rate=rate, cell=f"{label}{d}{rate}", **given) for d in ("none", "ft")]
    cells.append(cell("none", "ft", rate=0.0, o_asr=None))
    views, page = built(tmp_path, cells)
    (board,) = views.boards
    over_mask = [("belt:badnets at 5 %", 0.2), ("belt:badnets at 5 %", 0.8)]
    over_mask += [("belt:badnets at 10 %", 0.2), ("belt:badnets at 10 %", 0.8)]
    over_rate = [(f"belt:badnets (mask_rate {x})", r) for x in (0.2, 0.8) for r in (0.05, 0.1)]
    assert found(board) == {
        (d, over): wanted
        for d in ("ft", "none")
        for over, wanted in (("mask_rate", over_mask), (sweeps.RATE, over_rate))
    }
    rows = lines(page, "ft over poison rate")
    assert [r.all("td")[0].text for r in rows] == ["5 %", "10 %", "5 %", "10 %"]


def test_what_differs_in_more_than_one_value_is_no_sweep() -> None:
    def keys(*params: dict[str, Any]) -> list[tuple[str, list[float | str]]]:
        variants = {f"p~{i}": p for i, p in enumerate(params)}
        return [(key, list(by_value)) for key, _, by_value in sweeps.varied(variants)]

    assert keys({"a": 1, "b": 1}, {"a": 2, "b": 2}) == []
    assert keys({"a": 1, "b": "x"}, {"a": 2, "b": "x"}) == [("a", [1.0, 2.0])]
    assert keys({"a": None}, {"a": 1}) == keys({"a": "1"}, {"a": 1}) == keys({"a": [1]}, {"a": [2]}) == []
    assert keys({"a": True}, {"a": False}) == [("a", ["off", "on"])]
    assert keys({"a": "noise"}, {"a": "mask"}, {"a": None}) == [("a", ["mask", "noise"])]
    assert keys({"a": 1}, {"a": 2}, {"a": "auto"}, {"a": "most"}) == [("a", [1.0, 2.0]), ("a", ["auto", "most"])]
    grid = [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)]
    assert keys(*grid) == [("a", [1.0, 2.0]), ("a", [1.0, 2.0]), ("b", [3.0, 4.0]), ("b", [3.0, 4.0])]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": 1, "inner": {"a": 2, "inner": {"b": 3}}}', {"a": 1, "inner.a": 2, "inner.inner.b": 3}),
        ("no json", {}),
        ("[1]", {}),
        ("", {}),
    ],
)
def test_parameters_are_flattened(text: str, wanted: dict[str, Any]) -> None:
    assert sweeps.flat(text) == wanted


def test_words_stand_side_by_side_too(tmp_path: Path) -> None:
    """Kinds of BELT's covers: a bar each, with exclusivity where it was measured."""
    kinds = {"belt:badnets": "mask", "belt:badnets~aaaaaa": "noise", "belt:badnets~bbbbbb": "sampling"}
    cells = [
        cell(label, "none", s, attack_params=json.dumps({"cover": kind}), excl=0.1 * i + 0.02 * s)
        for i, (label, kind) in enumerate(kinds.items())
        for s in (0, 1)
    ]
    _, page = built(tmp_path, cells)
    rows = lines(page, "none over cover")
    assert [[t.text for t in (*r.all("th"), *r.all("td"))][:2] for r in rows] == [
        ["belt:badnets", kind] for kind in ("mask", "noise", "sampling")
    ]
    figure = next(f for f in page.root.all("figure") if "Excl of none" in f.text)
    bars = [a.all("title")[0].text for a in figure.all("a")]
    assert [b.split(":")[0].split(",")[0] for b in bars] == ["mask", "noise", "sampling"]


def test_what_cells_have_no_column_for_is_drawn_too(tmp_path: Path) -> None:
    """Accuracy on cover images and the silhouette, with the reason of a figure that is missing."""
    kinds = {"belt:badnets": "mask", "belt:badnets~aaaaaa": "noise", "belt:badnets~bbbbbb": "sampling"}
    cells, rows = [], []
    for i, (label, kind) in enumerate(kinds.items()):
        c = cell(label, "none", attack_params=json.dumps({"cover": kind}), flag="weak" * (kind == "noise"))
        cells.append(c)
        known = {"value": 0.25 * i} if i else {"status": "not_applicable", "reason": "no_such_rows"}
        rows.append(synthetic.measurement(c, "cover_acc", **known))
        rows.append(synthetic.measurement(c, "silhouette", value=0.125 * i, scope="attack"))
        rows.append(
            synthetic.measurement(c, "silhouette", value=9.0, qualifier="layer=1", scope="attack", task_key="q")
        )
    run = synthetic.write_run(tmp_path / "r", cells, rows)
    build([run], tmp_path / "site")
    page = read(tmp_path / "site" / "sweeps.html")
    found = [[t.text.split(" 1 cell")[0] for t in r.all("td")] for r in lines(page, "none over cover")]
    assert [x[3:5] for x in found] == [["no such rows", "0"], ["25.0 %", "0.125"], ["50.0 %", "0.25"]]
    assert [x[2].endswith("weak") for x in [[t.text for t in r.all("td")] for r in lines(page, "none over cover")]] == [
        False,
        True,
        False,
    ]
    assert [f.all("figcaption")[0].text.split(" of ")[0] for f in page.root.all("figure")][-2:] == [
        "Cover accuracy",
        "Silhouette",
    ]


def test_values_stand_for_digests(tmp_path: Path) -> None:
    """Of attacks and defenses with several settings; a digest that no value tells apart stays."""
    rates = {"ft": 0.1, "ft~aaaaaa": 0.2}
    masks = {"belt:badnets": "mask", "belt:badnets~cccccc": "noise"}
    cells = [
        cell(
            a,
            d,
            rate=rate,
            cell=f"{a}{d}{rate}",
            attack_params=json.dumps({"cover": cover, "size": 6}),
            defense_params=json.dumps({"lr": lr}),
        )
        for a, cover in masks.items()
        for d, lr in rates.items()
        for rate in (0.05, 0.1)
    ]
    views, page = built(tmp_path, cells)
    assert sweeps.spoken(cells, "attack") == {a: ("belt:badnets", f"cover {c}") for a, c in masks.items()}
    made = list(sweeps.of_board(views.boards[0]))
    assert {(s.defense, s.over, s.fixed) for s in made} == {
        ("ft", "lr", ""),
        *(("ft", over, f"lr {lr}") for over in ("cover", sweeps.RATE) for lr in (0.1, 0.2)),
    }
    over_lr = next(s for s in made if s.over == "lr")
    assert {d.line for d in over_lr.dots} == {
        f"belt:badnets (cover {c}) at {r} %" for c in ("mask", "noise") for r in (5, 10)
    }
    assert "~" not in page.root.text
    alike = [cell("a", "ft"), cell("a~aaaaaa", "ft"), cell("b~bbbbbb", "ft")]
    assert sweeps.spoken(alike, "attack") == {}


def test_a_legend_has_whole_names_below_the_picture(tmp_path: Path) -> None:
    cells = [cell(a, d, defense_params=json.dumps({"rate": r})) for a in BELT for d, r in RATES.items()]
    _, page = built(tmp_path, cells)
    (figure, *_) = page.root.all("figure")
    assert [li.text for li in figure.all("li")] == [f"{a} at 5 %" for a in BELT]


def test_architectures_stand_side_by_side(tmp_path: Path) -> None:
    runs = []
    for i, arch in enumerate(("small_cnn", "small_resnet")):
        some = [("badnets", "none"), ("badnets", "ft"), ("blended", "ft")]
        runs.append([cell(a, d, arch=arch, cell=f"{arch}/{a}/{d}", o_asr=0.2 + 0.3 * i) for a, d in some])
    views, page = built(tmp_path, *runs)
    assert [found(b) for b in views.boards] == [{}, {}]
    rows = lines(page, "ft over architecture")
    assert [[t.text.split(" range")[0] for t in (*r.all("th"), *r.all("td"))][:2] for r in rows] == [
        ["badnets at 5 %", "small_cnn"],
        ["badnets at 5 %", "small_resnet"],
        ["blended at 5 %", "small_cnn"],
        ["blended at 5 %", "small_resnet"],
    ]
    figure = next(f for f in page.root.all("figure") if "O-ASR of ft" in f.text)
    bars = {a.all("title")[0].text: a for a in figure.all("a")}
    assert len(bars) == 4
    (key,) = [t for t in bars if t.startswith("small_resnet, blended at 5 %: 50")]
    assert bars[key].attrs["href"] == f"cells/{digest12('small_resnet/blended/ft')}.html"


def test_a_run_that_varies_nothing_says_so(tmp_path: Path) -> None:
    _, page = built(tmp_path, [cell("badnets", "none"), cell("badnets", "ft")])
    assert "Nothing is varied in these runs." in page.root.text
    assert any(a.attrs["href"] == "sweeps.html" and a.text == "Sweeps" for a in page.root.all("a"))


def test_many_sweeps_are_cut_into_pages(tmp_path: Path) -> None:
    cells = []
    for i in range(60):
        for rate in (0.01, 0.05, 0.1, 0.2):
            cells += [cell(a, f"d{i}", rate=rate, cell=f"{a}{i}{rate}") for a in ("badnets", "blended", "sig")]
    run = synthetic.write_run(tmp_path / "r", cells, [])
    build([run], tmp_path / "site")
    files = sorted((tmp_path / "site").glob("sweeps*.html"))
    assert len(files) > 1
    assert all(f.stat().st_size < 300_000 for f in files)
    wrong = {f.name: read(f).wrong for f in files}
    assert not any(wrong.values())
    links = [a.attrs["href"] for a in read(tmp_path / "site" / "sweeps.html").root.all("a")]
    for link in (x for x in links if "#sweep-" in x):
        file, _, name = link.partition("#")
        assert f'id="{name}"' in (tmp_path / "site" / file).read_text()
