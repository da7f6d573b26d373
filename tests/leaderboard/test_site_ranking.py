from __future__ import annotations

import csv
import json
import random
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from page_reader import Page, Tag, figures, read
from synthetic import cell_row, measurement, write_run

from sleeperbench.contracts.access import Access
from sleeperbench.leaderboard import boards, methods, paging, ranking, stats, summary
from sleeperbench.leaderboard import figures as paper_figures
from sleeperbench.leaderboard.build import build
from sleeperbench.leaderboard.paging import Section
from sleeperbench.leaderboard.ranking import Contest
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views

FAMILIES = {"square": "patch", "stripe": "patch", "bend": "warp"}
LEFT = {"best": 0.05, "good": 0.3, "alike": 0.31, "poor": 0.9}
"""What a repair leaves of the attack, by defense."""
STATIC = Path(boards.__file__).parent / "static"


def tables(seeds: int = 3) -> list[dict[str, Any]]:
    """Four repairs of one access class against three attacks of two families, with a little luck per seed."""
    cells = []
    for attack in ("none", *FAMILIES):
        rate = None if attack == "none" else 0.1
        for seed in range(seeds):
            before = {"c_acc_attacked": 0.95, "asr_attacked": None if attack == "none" else 1.0}
            asr = before["asr_attacked"]
            cells.append(cell_row(attack, rate, "none", seed, c_acc=0.95, o_asr=asr, asr=asr, p_asr_net=asr, **before))
            for d, left in LEFT.items():
                luck = random.Random(f"{attack}{d}{seed}").uniform(-0.02, 0.02)
                o = None if attack == "none" else left + 0.02 * seed + luck
                net = None if o is None else o - 0.01
                cost = 0.05 if d == "poor" else 0.01
                cells.append(
                    cell_row(attack, rate, d, seed, c_acc=0.95 - cost, o_asr=o, asr=o, p_asr=o, p_asr_net=net, **before)
                )
    return cells


BARS = {"implant_asr": 0.9, "published_asr": {"value": 0.9928, "setting": "CIFAR-10, 5 %", "source": "a table"}}


def plugins(families: Mapping[str, str] = FAMILIES) -> list[dict[str, Any]]:
    found = [{"kind": "attack", "id": a, "info": {"family": f} | BARS} for a, f in families.items()]
    return found + [{"kind": "defense", "id": d, "info": {"kind": "repair"}} for d in LEFT]


def only(folder: Path, cells: list[dict[str, Any]], rows: Any = (), known: Any = None) -> Contest:
    views = Views(load([write_run(folder, cells, list(rows), plugins() if known is None else known)]))
    (board,) = views.boards
    (found,) = ranking.contests(views, board)
    return found


def of(cells: list[dict[str, Any]], attack: str, defense: str, seed: int) -> dict[str, Any]:
    return next(c for c in cells if (c["attack"], c["defense"], c["seed"]) == (attack, defense, seed))


def test_scores_are_means_over_families_of_net_p_der(tmp_path: Path) -> None:
    cells = tables()
    c = only(tmp_path / "r", cells)
    assert (c.id, c.title) == ("repair-t1", "Repair, T1: clean rows and at most the weights")
    per = {}
    for attack in FAMILIES:
        mine = [x for x in cells if (x["attack"], x["defense"]) == (attack, "good")]
        per[attack] = sum((1 + (1 - x["o_asr"]) - 0.01) / 2 for x in mine) / 3
    mean = c.mean("good")
    assert mean is not None
    assert mean.value == pytest.approx(((per["square"] + per["stripe"]) / 2 + per["bend"]) / 2)
    assert mean.kind == "t"
    assert c.ranks == {"best": (1, 1), "good": (2, 3), "alike": (2, 3), "poor": (4, 4)}
    assert list(c.scores) == sorted(LEFT), "neither controls nor clean models compete"


def test_a_supplied_clean_model_is_a_contest_of_its_own(tmp_path: Path) -> None:
    cells = tables()
    for x in cells:
        if x["defense"] == "good":
            x["access"] = Access(clean=0.05, references=1).track()
    views = Views(load([write_run(tmp_path / "r", cells, [], plugins())]))
    (board,) = views.boards
    found = {c.access: list(c.scores) for c in ranking.contests(views, board)}
    assert found == {"T1": ["alike", "best", "poor"], "T1R": ["good"]}
    assert [c.id for c in ranking.contests(views, board)] == ["repair-t1", "repair-t1r"]
    assert board.defenses == ["alike", "best", "poor", "good", "none"], "classes in their order, controls last"
    titles = [title for title, _ in views.by_track(board, ["p_der"], board.repairs)]
    assert "Repair, T1R: weights, clean rows and supplied clean models" in titles


@pytest.mark.parametrize(
    ("bad", "score"),
    [
        ({"status": "failed", "reason": "raised: x", "c_acc": None, "o_asr": None, "p_asr_net": None}, 0.5),
        ({"status": "timeout", "reason": "budget", "c_acc": 0.65, "p_asr_net": None}, (1 - 0.3) / 2),
        (
            {
                "status": "not_run",
                "reason": "withheld: not for the public",
                "c_acc": None,
                "o_asr": None,
                "p_asr_net": None,
            },
            0.5,
        ),
        ({"flag": "collapsed", "c_acc": 0.1, "o_asr": 0.0, "p_asr_net": 0.0}, 0.5),
        ({"flag": "collapsed", "c_acc": 0.1, "o_asr": 0.0, "p_asr_net": 0.9}, (1 + 0.1 - 0.85) / 2),
        ({"flag": "collapsed", "c_acc": 0.1, "o_asr": 0.0, "p_asr_net": None}, (1 - 0.85) / 2),
    ],
)
def test_a_lost_cell_scores_as_no_defense_does_at_most(tmp_path: Path, bad: dict[str, Any], score: float) -> None:
    cells = tables()
    of(cells, "bend", "best", 1).update(bad)
    c = only(tmp_path / "r", cells)
    assert c.scores["best"]["bend at 10 %", 1] == pytest.approx(score)
    assert c.lost["best"] == {("bend at 10 %", 1)}
    assert "best" in c.complete
    worst = ranking.standing(Views(load([tmp_path / "r"])), c, "best")
    assert worst.badges[0][0] == "1 failed or collapsed"
    assert worst.worst.startswith("warp: ")


def test_a_picture_shows_what_was_measured_and_ruined_models_apart(tmp_path: Path) -> None:
    """What a ranking counts a ruined model with is no mark: it would stand where no defense does."""
    cells = tables()
    for x in cells:
        x["p_asr"] = x["o_asr"] and 0.5
    of(cells, "bend", "best", 1).update({"flag": "collapsed", "c_acc": 0.1, "o_asr": 0.125, "p_asr": 0.75})
    of(cells, "bend", "alike", 0).update({"status": "failed", "reason": "raised: x", "o_asr": None, "p_asr": None})
    for x in cells:
        if x["defense"] == "good" and x["attack"] != "none":
            x.update({"flag": "collapsed", "c_acc": 0.1, "o_asr": 0.0, "p_asr": 0.25})
        if x["defense"] == "poor" and x["attack"] != "none":
            x.update({"flag": "collapsed", "p_asr": None, "reasons": json.dumps({"p_asr": "no_valid_budget"})})
    run = write_run(tmp_path / "r", cells, [], plugins())
    views = Views(load([run]))
    (board,) = views.boards
    assert views.overall(board, "good", "o_asr").estimate.value == 1.0  # type: ignore[union-attr]
    (picture, *_) = boards.pictures(views, board)
    marks = {(m.point.name, m.point.collapsed): (m.point.x, m.point.y) for m in picture["chart"].marks}
    seeds = {a: [s for s in range(3) if (a, s) != ("bend", 1)] for a in FAMILIES}
    means = [sum(of(cells, a, "best", s)["o_asr"] for s in s_) / len(s_) for a, s_ in seeds.items()]
    assert marks.keys() == {("best", False), ("best", True), ("good", True)}, "alike and poor were never purified"
    assert marks["best", False] == pytest.approx((sum(means) / 3, 0.5))
    assert marks["best", True] == (0.125, 0.75)
    assert marks["good", True] == (0.0, 0.25)
    told = {(name, why) for name, _, why in picture["left_out"] if not name.startswith("none")}
    assert told == {
        ("alike", "1 of 9 cells failed"),
        ("alike", "not purified"),
        ("poor, collapsed", "not purified"),
    }
    page = read(build([run], tmp_path / "site"))
    figure = page.root.all("figure")[0]
    (crossed,) = {m.attrs["class"] for m in figure.all("svg")[0].all("path") if "collapsed" in m.attrs["class"]}
    assert crossed == "mark defense collapsed"
    assert "collapsed: the models that a defense ruined" in figure.text
    (axes,) = paper_figures._draw(paper_figures._marks(views, board, "p_asr"), "p_asr", share=True).axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["defense", "defense, collapsed"]
    drawn = {x for line in axes.lines for x in line.get_xdata()}
    assert {x for x, _ in marks.values()} <= drawn
    (paper,) = [p for p in read(tmp_path / "site" / "figures.html").root.all("figcaption") if "P-ASR" in p.text]
    assert "Means of 2 defenses" in paper.text and "hollow are the models that collapsed" in paper.text


def test_without_ruin_no_legend_speaks_of_it(tmp_path: Path) -> None:
    cells = tables()
    for x in cells:
        x["p_asr"] = x["o_asr"] and 0.5
    build([write_run(tmp_path / "r", cells, [], plugins())], tmp_path / "site")
    (figure, *_) = read(tmp_path / "site" / "index.html").root.all("figure")
    assert "collapsed:" not in figure.text
    assert not any("collapsed" in t.attrs.get("class", "") for t in figure.all("path"))
    assert "hollow" not in read(tmp_path / "site" / "figures.html").root.text


def test_ruin_wins_no_rank_and_no_duel(tmp_path: Path) -> None:
    """A defense that ruins every model stands below one that does nothing, whatever its own figures are."""
    cells = tables()
    for x in cells:
        if x["defense"] == "poor" and x["attack"] != "none":
            x |= {"c_acc": 0.95, "o_asr": 1.0, "p_asr": 1.0, "p_asr_net": 1.0}  # as no defense: 50 %
        if x["defense"] == "best" and x["attack"] != "none":
            gone = x["attack"] == "square"  # own figure above 50 % on one attack, below it on the others
            x |= {"flag": "collapsed", "c_acc": 0.55, "o_asr": 0.0, "p_asr": 0.9, "p_asr_net": 0.0 if gone else 0.9}
    c = only(tmp_path / "r", cells)
    assert sorted(c.scores["best"].values()) == pytest.approx([(1 + 0.1 - 0.4) / 2] * 6 + [0.5] * 3)
    assert set(c.scores["poor"].values()) == {0.5}
    assert c.wins["best"] == 0.0, "a failure loses ties"
    pair = c.pair("best", "poor")
    assert (pair["wins"], pair["losses"], pair["ties"]) == (0, 9, 0)
    ruined, idle = c.mean("best"), c.mean("poor")
    assert ruined is not None
    assert idle is not None
    assert ruined.value < idle.value
    assert c.ranks["best"][1] == 4
    (all_in_one,) = ranking.comparisons(Views(load([tmp_path / "r"])), c.board)
    assert all_in_one.wins["best"] == 0.0


def test_what_is_missing_is_not_ranked_and_says_so(tmp_path: Path) -> None:
    cells = tables()
    of(cells, "bend", "best", 1).update(
        {"status": "not_applicable", "reason": "needs_bn", "o_asr": None, "p_asr_net": None}
    )
    c = only(tmp_path / "r", cells)
    assert set(c.ranks) == {"good", "alike", "poor"}
    views = Views(load([tmp_path / "r"]))
    made = ranking.ranking(views, c)
    assert [s.name for s in made.standings][-1] == "best"
    last = made.standings[-1]
    assert (last.rank, last.order) == ("not ranked", "")
    assert last.badges[0][0] == "1 of 9 missing"
    assert any("1 of 4 contestants lack a score" in n for n in made.notes)


def test_fewer_than_three_seeds_rank_nobody_and_show_ranges(tmp_path: Path) -> None:
    c = only(tmp_path / "r", tables(2))
    assert c.ranks == {}
    made = ranking.ranking(Views(load([tmp_path / "r"])), c)
    assert made.notes[0].startswith("Nothing is ranked: every attack setting has fewer than 3 seeds.")
    assert [s.name for s in made.standings] == sorted(LEFT)
    assert all(s.score.note.startswith("range ") for s in made.standings)


def test_an_attack_without_a_family_is_said_so(tmp_path: Path) -> None:
    cells = tables()
    c = only(tmp_path / "r", cells, known=plugins({"square": "patch", "stripe": "patch"}))
    made = ranking.ranking(Views(load([tmp_path / "r"])), c)
    assert made.notes == ("No family is declared for bend: each counts as a family of its own.",)
    mean = c.mean("good")
    assert mean is not None
    assert mean.value == pytest.approx(sum(c.by_family("good").values()) / 2)


def test_an_attack_that_did_not_implant_or_that_nobody_has_a_score_on_is_left_out(tmp_path: Path) -> None:
    cells = tables()
    for x in cells:
        if x["attack"] == "stripe":
            x["flag"] = "weak"
        if x["attack"] == "bend" and x["defense"] != "none":
            x |= {"p_asr_net": None, "reasons": json.dumps({"p_asr_net": "no_valid_budget"})}
    of(cells, "bend", "poor", 0).update({"status": "failed", "reason": "raised: x"})
    c = only(tmp_path / "r", cells)
    assert c.settings == ["square at 10 %"]
    assert len(c.complete) == 4, "a failure where nobody has a score tells nobody apart"
    made = ranking.ranking(Views(load([tmp_path / "r"])), c)
    assert "Over 1 of the board's 2 attack settings: no contestant has a score under bend at 10 %." in made.notes


def test_judges_are_scored_by_their_tracks(tmp_path: Path) -> None:
    import judging

    views = Views(load([judging.judging_run(tmp_path / "r")]))
    (board,) = views.boards
    found = {c.rule.id: c for c in ranking.contests(views, board)}
    assert found["input"].scores["strip"]["badnets at 10 %", 0] == judging.INPUTS["badnets"][0]
    assert found["inversion"].scores["neural_cleanse"]["blended at 10 %", 0] == pytest.approx(0.5 - 0.75)
    assert not found["input"].rule.families, "families count for repairs alone"


def test_model_detection_is_scored_by_clean_models_below(tmp_path: Path) -> None:
    cells = []
    for attack, scores in (("none", (0.1, 0.2, 0.3)), ("square", (0.25, 0.4, 0.2)), ("bend", (0.0, 0.9, 0.9))):
        for seed, s in enumerate(scores):
            rate = None if attack == "none" else 0.1
            more = {"det_score": s, "c_acc": 0.9, "reasons": json.dumps({"p_asr": "model_unchanged"})}
            cells.append(cell_row(attack, rate, "none", seed, c_acc=0.9))
            cells.append(cell_row(attack, rate, "scan", seed, **more))
    c = only(tmp_path / "r", cells, known=[{"kind": "defense", "id": "scan", "info": {"kind": "detection"}}])
    assert c.by_setting("scan")["square at 10 %"] == pytest.approx((2 / 3 + 1 + 1.5 / 3) / 3)
    assert c.by_setting("scan")["bend at 10 %"] == pytest.approx((0 + 1 + 1) / 3)


# On pages.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = tables()
    rows = []
    for x in cells:
        if x["defense"] == "none" and x["attack"] != "none":
            rows += [measurement(x, "psnr", value=30.0 + x["seed"], scope="attack"), measurement(x, "linf", value=0.5)]
            rows.append(measurement(x, "psnr", qualifier="form=training", value=20.0 + x["seed"], scope="attack"))
    info = {"suite": {"name": "quick", "title": "T", "gate": {"implant_asr": 0.8, "implant_asr_low": 0.6}}}
    folder = write_run(tmp_path_factory.mktemp("runs") / "ranked", cells, rows, plugins(), info)
    for seed in (1, 2):
        cell = of(cells, "bend", "none", seed)["cell"]
        pictures = [{"file": "trigger.png", "title": "gallery", "caption": "gallery, by stealth"}]
        pictures.append({"file": "trigger.png", "title": "gallery_training", "caption": "gallery_training, by stealth"})
        factors = [{"name": f"stealth-gallery{n}", "residual_factor": f} for n, f in (("", 3), ("_training", 7))]
        synthetic.write_media(folder, cell, {"cell": cell, "pictures": pictures, "curves": factors})
    return folder


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build([run], tmp_path_factory.mktemp("site") / "out").parent


@pytest.fixture(scope="module")
def shown(made: Path) -> dict[str, Page]:
    return {p.relative_to(made).as_posix(): read(p) for p in sorted(made.rglob("*.html"))}


def body(page: Page, table: str) -> list[list[str]]:
    rows = page.by_id(table).all("tbody")[0].all("tr")
    return [[t.text for t in r.children] for r in rows]


@pytest.mark.parametrize("page", ["index.html", "tracks.html"])
def test_the_top_of_each_track_has_shared_ranks(shown: dict[str, Page], page: str) -> None:
    lines = body(shown[page], "board-1-rank-repair-t1")
    assert [(x[0], x[1]) for x in lines] == [("1", "best"), ("2–3", "good"), ("2–3", "alike"), ("4", "poor")]
    assert lines[0][3] == "100.0 %", "it wins every duel"
    assert "warp" in lines[0][4] or "patch" in lines[0][4]


def test_what_a_repair_costs_on_clean_models_is_a_column(shown: dict[str, Page]) -> None:
    table = shown["tracks.html"].by_id("board-1")
    rows = {r.all("th")[0].text: r for b in table.all("tbody") for r in b.all("tr") if figures(r)}
    assert figures(rows["poor"])["cost"].text.startswith("5.0 points")
    assert float(figures(rows["best"])["cost"].attrs["data-order"]) == pytest.approx(0.01)
    assert "controls" in table.all("tbody")[-1].attrs["class"]


def test_stealth_is_shown_and_never_ranked(shown: dict[str, Page]) -> None:
    lines = body(shown["tracks.html"], "board-1-stealth")
    assert [x[:2] for x in lines] == [
        ["bend at 10 %", "warp"],
        ["square at 10 %", "patch"],
        ["stripe at 10 %", "patch"],
    ]
    assert lines[0][2] == "31 3 seeds"
    heads = [t.text for t in shown["tracks.html"].by_id("board-1-stealth").all("thead")[0].all("th")]
    assert heads == ["Attack", "Family", "PSNR", "Largest pixel change", "O-ASR", "C-Acc"]


def test_heat_map_fields_lead_to_the_row_that_links_the_cells(shown: dict[str, Page], made: Path) -> None:
    table = next(t for t in shown["heatmap.html"].root.all("table") if t.all("td")[0].attrs["data-metric"] == "o_asr")
    names = [t.text for t in table.all("thead")[0].all("th")][1:]
    row = next(r for r in table.all("tbody")[0].all("tr") if r.all("th")[0].text == "bend at 10 %")
    td = row.all("td")[names.index("best")]
    path, _, anchor = td.all("a")[0].attrs["href"].partition("#")
    assert path == "defenses/best.html"
    target = shown[path].by_id(anchor)
    assert target.all("th")[0].text == "bend at 10 %"
    cells = tables()
    links = [a.attrs["href"] for a in target.all("a") if "cells/" in a.attrs["href"]]
    from sleeperbench.leaderboard.names import digest12

    assert links == [f"../cells/{digest12(of(cells, 'bend', 'best', s)['cell'])}.html" for s in range(3)]


def test_an_attacks_page_has_bars_families_robust_accuracy_and_a_contact_sheet(
    shown: dict[str, Page], made: Path
) -> None:
    page = shown["attacks/bend.html"]
    (line,) = body(page, "gate")
    assert line[2:5] == ["90.0 %", "80.0 %", "99.28 % (CIFAR-10, 5 %; a table)"]
    assert line[5].startswith("100.0 %")
    assert line[6] == "yes"
    assert line[8] == "95.0 %"
    assert [a.text for a in page.by_id("gate").all("a")] == ["0", "1", "2"]
    assert "warp" in next(t.text for t in page.root.all("dl"))
    img, trained = page.root.all("img")
    assert (made / "attacks" / img.attrs["src"]).is_file()
    assert "seed 1" in img.attrs["alt"], "the lowest seed that has a picture"
    assert img.attrs["alt"].endswith("columns: clean, poisoned, residual × 3")
    assert (img.attrs["width"], img.attrs["height"]) == ("192", "192"), "12 times 16 pixels; twice that has no room"
    figure, other = page.root.all("figure")
    assert [t.text for t in figure.all("text")] == ["clean", "poisoned", "residual × 3"]
    # As poisoned, where that is another form, with figures of its own.
    assert trained.attrs["alt"].endswith("as poisoned in training; columns: clean, poisoned, residual × 7")
    assert [(d.all("dt")[0].text, d.all("dd")[0].text) for d in other.all("div")] == [("PSNR", "21 dB")]
    assert [(d.all("dt")[0].text, d.all("dd")[0].text) for d in figure.all("div")] == [
        ("PSNR", "31 dB"),
        ("Largest pixel change", "0.5 (128 of 255)"),
    ]


def test_the_bars_have_columns_for_what_an_attack_has_apart(tmp_path: Path) -> None:
    cells = [
        cell_row(a, 0.1, "none", seed, c_acc=0.95, o_asr=0.9, asr=0.9, c_acc_attacked=0.95, asr_attacked=0.9)
        for a in ("belt:bend", "square")
        for seed in (0, 1)
    ]
    rows = []
    for x in cells:
        if x["attack"] == "belt:bend":
            each = (
                ("trigger=0", 1.0),
                ("trigger=1", 0.6 + 0.1 * x["seed"]),
                ("stat=min", 0.1),
                ("class=1;trigger=0", 0.0),
            )
            rows += [measurement(x, "asr", value=v, qualifier=q) for q, v in each]
            rows += [measurement(x, "asr_leak", value=0.02), measurement(x, "asr_leak", value=0.9, qualifier="class=1")]
            rows.append(measurement(x, "cover_acc", value=0.8))
    told = {"value": 0.97, "setting": "CIFAR-10", "source": "a table"}
    known = [
        {"kind": "attack", "id": "belt", "info": {"implant_asr": 0.9, "published_asr": {"bend": told}}},
        {"kind": "attack", "id": "bend", "info": {"implant_asr": 0.5, "published_asr": 0.3, "clean_label": True}},
        {"kind": "attack", "id": "square", "info": BARS},
    ]
    info = {"suite": {"name": "quick", "gate": {"implant_asr": 0.8, "implant_asr_low": 0.6}}}
    views = Views(load([write_run(tmp_path / "r", cells, rows, known, info)]))
    apart = methods._apart(views)
    (line,) = methods._gate(views, "belt:bend", apart)
    assert {k: v.partition(" (")[0] for k, v in line["apart"].items()} == {
        "asr_leak": "2.0 %",
        "cover_acc": "80.0 %",
        "worst_trigger": "65.0 %",
        "worst_class": "",
    }
    assert (line["declared"], line["gate"]) == ("50.0 %", "60.0 %"), "what is wrapped is clean-label, and asks for less"
    assert line["published"] == "97 % (CIFAR-10; a table)", "the wrapper's own figure, for what it wraps"
    (plain,) = methods._gate(views, "square", apart)
    assert not any(plain["apart"].values())
    assert (plain["declared"], plain["gate"]) == ("90.0 %", "80.0 %")


@pytest.mark.parametrize("value", ["0.9", 1.2, {"value": 1.2}, {"value": True}, {"setting": "CIFAR-10"}, {}, None])
def test_what_is_no_published_figure_is_not_recorded(value: object) -> None:
    assert methods._published(value) == "not recorded"
    assert methods._published(0.9) == "90 %", "a bare share has no setting to show"


def test_a_defenses_page_says_where_it_stands(shown: dict[str, Page]) -> None:
    page = shown["defenses/good.html"]
    (line,) = body(page, "standings")
    assert line[2] == "2–3 of 4"
    text = page.root.all("dl")[0].text
    for word in ("repair", "T1", "heldout", "0, 1, 2", "median 1.5 s"):
        assert word in text


def test_all_pairs_of_a_small_board_stand_without_scripts(shown: dict[str, Page], made: Path) -> None:
    rows = body(shown["compare.html"], "compare-1-repair-pairs")
    assert len(rows) == 6
    with (made / "downloads" / "pairs.csv").open(newline="", encoding="utf-8") as f:
        listed = list(csv.DictReader(f))
    assert [(r["a"], r["b"]) for r in listed] == [(x[0], x[1]) for x in rows]
    cells = tables()
    pair = next(r for r in listed if (r["a"], r["b"]) == ("best", "poor"))
    gap = {
        a: [(of(cells, a, "poor", s)["o_asr"] - of(cells, a, "best", s)["o_asr"] + 0.04) / 2 for s in range(3)]
        for a in FAMILIES
    }
    e = stats.mean_over_attacks(gap, share=False, weights={"square": 0.25, "stripe": 0.25, "bend": 0.5})
    assert e is not None
    assert [float(pair[k]) for k in ("difference", "low", "high")] == pytest.approx([e.value, e.low, e.high])
    assert (pair["models"], pair["wins"], pair["losses"], pair["interval"]) == ("9", "9", "0", "t")


def test_the_critical_difference_diagram_has_a_linked_mark_per_defense(shown: dict[str, Page]) -> None:
    svg = next(t for t in shown["compare.html"].root.all("svg"))
    links = {a.attrs["href"]: a.all("title")[0].text for a in svg.all("a")}
    assert links["defenses/best.html"] == "best: average rank 1.00 of 4"
    assert links["defenses/poor.html"] == "poor: average rank 4.00 of 4"
    cd = stats.critical_difference(4, 3)
    assert f"critical difference {cd:.2f}" in svg.text
    cliques = [t for t in svg.all("path") if t.attrs.get("class") == "clique"]
    assert cliques, "with three attacks the neighbours are not told apart"


def test_the_script_of_comparisons_agrees_with_the_site(made: Path, run: Path) -> None:
    (data,) = (made / "data").glob("compare.*.js")
    program = """
const window = {};
eval(require('fs').readFileSync(process.argv[1], 'utf8'));
const d = window.sleeperbenchCompare, c = require(process.argv[2]), g = d.groups[0], n = g.names.length;
const pairs = [], duels = [];
for (let a = 0; a < n; a++) for (let b = 0; b < n; b++) if (a !== b) {
  const p = c.pair(g, a, b);
  pairs.push([g.names[a], g.names[b], p.value, p.low, p.high]);
  duels.push([1, -1, 0].map((x) => c.duels(g, a, b).filter((y) => y === x).length));
}
const lines = c.bySetting(g, [0, 1, 2, 3]);
const state = c.parse(d, 'board=0&defense=poor&defense=best&defense=nobody&defense=poor');
console.log(JSON.stringify({ pairs, duels,
  ranks: c.averageRanks(lines, 4), cd: c.critical(d.q[4], 4, lines.length), state,
  back: c.format(d, state), odd: c.parse(d, 'board=7&defense=x'), names: g.names, most: d.most,
  many: c.parse({ most: 2, groups: [{ names: ['a', 'b', 'c'] }] }, 'defense=a&defense=b&defense=c').chosen }));
"""
    done = subprocess.run(
        ["node", "-e", program, str(data), str(STATIC / "compare.js")], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    views = Views(load([run]))
    (c,) = ranking.comparisons(views, views.boards[0])
    assert said["names"] == list(c.scores)
    assert len(said["duels"]) == 12
    for (a, b, *_), duels in zip(said["pairs"], said["duels"], strict=True):
        pair = c.pair(a, b)
        assert duels == [pair["wins"], pair["losses"], pair["ties"]]
    for a, b, *ends in said["pairs"]:
        e = stats.paired(c.scores[a], c.scores[b], c.weights)
        assert e is not None
        assert ends == pytest.approx([e.value, e.low, e.high], abs=2e-6)
    ranks = stats.average_ranks({d: c.by_setting(d) for d in c.scores})
    assert said["ranks"] == pytest.approx([ranks[d] for d in said["names"]])
    assert said["cd"] == pytest.approx(stats.critical_difference(4, 3), abs=1e-5)
    assert [said["names"][i] for i in said["state"]["chosen"]] == ["poor", "best"]
    assert said["back"] == "defense=poor&defense=best"
    assert said["odd"] == {"group": 0, "chosen": []}
    assert said["many"] == [0, 1]


# Pages of any size.


def test_sections_are_cut_where_a_page_is_full() -> None:
    def section(n: int, count: int) -> Section:
        return Section(n, "x", f"s{n}", None, list(range(count)), [100] * count, 50)

    pages = paging.cut([section(1, 3), section(2, 12), section(3, 0)], room=600)
    assert [[(s.id, list(s.lines), s.part) for s in p] for p in pages] == [
        [("s1", [0, 1, 2], 1), ("s2", [0, 1], 1)],
        [("s2-2", [2, 3, 4, 5, 6], 2)],
        [("s2-3", [7, 8, 9, 10, 11], 3), ("s3", [], 1)],
    ]
    assert paging.cut([]) == [[]]
    huge = Section(1, "x", "s", None, ["a", "b"], [9999, 9999], 50)
    assert [len(p) for p in paging.cut([huge], room=100)] == [1, 1], "a line larger than a page has one of its own"
    assert paging.files("tracks", 2) == ["tracks.html", "tracks-2.html"]


def test_the_made_up_matrix_has_the_size_that_was_asked_for() -> None:
    shape = synthetic.shape_of(700)
    cells, rows = synthetic.matrix(shape, 3, 5000, 700)
    assert (len(cells), len(rows)) == (700, 5000)
    assert len({c["cell"] for c in cells}) == 700
    assert synthetic.matrix(shape, 3, 5000, 700)[0] == cells
    assert {c["status"] for c in cells} == {"ok", "failed", "timeout", "out_of_memory", "not_applicable", "not_run"}
    for c in cells:
        assert c["status"] == "ok" or c["reason"]


def test_the_public_leaderboards_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic._Draw, "rows", lambda *_: [])
    cells, _ = synthetic.backdoorbench(0)
    assert len(cells) == 15_360
    found = list(synthetic.tables_of(cells))
    assert len(found) == 20
    for _, table in found:
        empty = sum(
            3 for c in table if c["status"] != "ok" and c["reason"].partition(":")[0] != "attack_did_not_implant"
        )
        assert len(table) == 48 * 16
        assert 171 <= empty <= 525
    weak = [c for c in cells if "weak" in c["flag"] and c["defense"] == "none" and c["rate"] == 0.001]
    assert weak
    assert max(c["asr_attacked"] for c in weak) < 0.35


@pytest.fixture(scope="module")
def stress_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables of the public leaderboard's shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "BACKDOORBENCH", replace(synthetic.BACKDOORBENCH, collapsed=0.1))
        cells, rows = synthetic.backdoorbench(1)
    mine = {
        c["cell"] for c in cells if c["dataset"] == "cifar10" and c["rate"] in (0.001, 0.1) and c["arch"] == "vgg19_bn"
    }
    kept = [c for c in cells if c["cell"] in mine], [r for r in rows if r["cell"] in mine]
    return write_run(tmp_path_factory.mktemp("bb") / "r", *kept, synthetic.plugins_of(synthetic.BACKDOORBENCH))


@pytest.fixture(scope="module")
def stress(stress_run: Path) -> dict[str, Page]:
    site = build([stress_run], stress_run.parent / "s").parent
    return {p.relative_to(site).as_posix(): read(p) for p in sorted(site.rglob("*.html")) if p.parent.name != "cells"}


def test_under_stress_every_empty_field_says_why_and_no_page_is_large(stress: dict[str, Page]) -> None:
    fields = 0
    for name, page in stress.items():
        assert not page.wrong, name
        assert len(page.text.encode()) < 300_000, name
        for td in page.root.all("td"):
            assert td.text, name
            fields += 1
    assert fields > 20_000


def test_under_stress_what_is_no_success_never_looks_like_one(stress: dict[str, Page]) -> None:
    text = stress["tracks.html"].root.text
    assert "Nothing is ranked: every attack setting has fewer than 3 seeds." in text
    weak = {
        li.text.partition(":")[0]
        for ul in stress["tracks.html"].root.all("ul")
        if ul.attrs.get("class") == "weak"
        for li in ul.all("li")
    }
    assert weak
    maps = [t for n, p in stress.items() if n.startswith("heatmap") for t in p.root.all("table")]
    table: Tag = next(t for t in maps if t.all("td")[0].attrs["data-metric"] == "o_asr")
    for row in table.all("tbody")[0].all("tr"):
        name = row.all("th")[0].children[0].text
        if name in weak:
            assert row.attrs.get("class") == "weak"
            assert {td.attrs["class"] for td in row.all("td")} == {"lost", "empty"}
            assert all(td.text.endswith("weak") for td in row.all("td") if td.attrs["class"] == "lost")


def ruined(run: Path) -> list[dict[str, Any]]:
    """The collapsed cells of contestants, as the tables have them."""
    found = [c for c in load([run]).cells if "collapsed" in c["flags"] and "weak" not in c["flags"]]
    assert len(found) >= 8
    return found


def undefended(run: Path) -> dict[str, dict[str, Any]]:
    """Attack setting -> the cell without a defense; there is one seed."""
    return {summary.setting(c): c for c in load([run]).cells if c["defense"] == "none"}


def test_under_stress_ruin_never_raises_a_score_or_wins_a_tie(stress_run: Path) -> None:
    views = Views(load([stress_run]))
    (board,) = views.boards
    seen = 0
    for c in [*ranking.contests(views, board), *ranking.comparisons(views, board)]:
        for cell in ruined(stress_run):
            unit = summary.setting(cell), cell["seed"]
            score = c.scores.get(cell["defense"], {}).get(unit)
            if score is None:
                continue
            seen += 1
            left = max(cell["o_asr"], cell["p_asr_net"])
            gain = max(0.0, cell["asr_attacked"] - left)
            own = (1 + gain - max(0.0, cell["c_acc_attacked"] - cell["c_acc"])) / 2
            assert score == pytest.approx(min(own, 0.5))
            assert unit in c.lost[cell["defense"]]
            for other, scores in c.scores.items():
                if unit in scores and unit not in c.lost[other] and scores[unit] >= 0.5:
                    alone = {d: {unit: c.scores[d][unit]} for d in (cell["defense"], other)}
                    won = stats.win_rates(alone, {unit[0]: 1.0}, c.lost)
                    assert won == {cell["defense"]: 0.0, other: 1.0}
    assert seen >= 8


def test_under_stress_means_count_the_worse_figure_of_what_is_ruined(stress: dict[str, Page], stress_run: Path) -> None:
    plain, cells = undefended(stress_run), load([stress_run]).cells
    rows = {r.all("th")[0].text: figures(r) for r in stress["tracks.html"].by_id("board-1").all("tr") if figures(r)}
    defenses = {c["defense"] for c in ruined(stress_run)}
    worst = {"c_acc": min, "r_acc": min, "p_der": min, "o_asr": max, "bec": max}
    checked = 0
    for d in defenses:
        for metric, pick in worst.items():
            counted = []
            for c in cells:
                other = plain[summary.setting(c)][metric]
                if c["defense"] != d or "weak" in c["flags"] or c["reason"].startswith("attack_did_not_implant"):
                    continue
                if "collapsed" in c["flags"]:
                    counted.append(pick(c[metric], other) if other is not None else None)
                elif c["status"] in ("failed", "timeout", "out_of_memory"):
                    counted.append(other)
                elif c["status"] == "ok":
                    counted.append(c[metric])
            counted = [v for v in counted if v is not None]
            td = rows[d][metric]
            if metric == "c_acc":
                assert "collapsed" in td.text
            if td.attrs["data-order"]:
                assert float(td.attrs["data-order"]) == pytest.approx(sum(counted) / len(counted)), (d, metric)
                checked += 1
    assert checked >= 3 * len(defenses)


def test_under_stress_a_heat_map_marks_what_is_ruined(stress: dict[str, Page], stress_run: Path) -> None:
    plain = undefended(stress_run)
    fields: dict[tuple[str, str, str], Tag] = {}
    for name, page in stress.items():
        for table in page.root.all("table") if name.startswith("heatmap") else []:
            defenses = [t.text for t in table.all("thead")[0].all("th")][1:]
            for row in table.all("tbody")[0].all("tr"):
                for d, td in zip(defenses, row.all("td"), strict=True):
                    fields[td.attrs["data-metric"], row.all("th")[0].children[0].text, d] = td
    for cell in ruined(stress_run):
        at = summary.setting(cell)
        asr, accuracy = fields["o_asr", at, cell["defense"]], fields["c_acc", at, cell["defense"]]
        assert asr.attrs["class"] == accuracy.attrs["class"] == "lost", "no shade of a success"
        assert float(asr.attrs["data-order"]) == plain[at]["o_asr"]
        assert asr.text == f"{100 * plain[at]['o_asr']:.1f} % 1 as none"
        assert "count with the undefended model's figure" in asr.attrs["title"]
        assert accuracy.text == f"{100 * cell['c_acc']:.1f} % 1 collapsed", "its own accuracy is the worse one"
    whole = [td for td in fields.values() if td.attrs["class"].startswith("h")]
    assert len(whole) > 300
    assert not [td for td in whole if "none" in td.text or "collapsed" in td.text]


def test_a_comparison_says_where_a_model_is_ruined(tmp_path: Path) -> None:
    cells = tables()
    for seed in (0, 1):
        of(cells, "bend", "best", seed).update({"flag": "collapsed", "c_acc": 0.1, "o_asr": 0.0, "p_asr_net": 0.0})
    folder = write_run(tmp_path / "r", cells, [], plugins())
    page = read(build([folder], tmp_path / "s").parent / "compare.html")
    table = page.by_id("compare-1-repair-scores")
    names = [t.text for t in table.all("thead")[0].all("th")][2:]
    found = {}
    for row in table.all("tbody")[0].all("tr"):
        for d, td in zip(names, row.all("td")[1:], strict=True):
            found[row.all("th")[0].text, d] = td
    marked = {at for at, td in found.items() if "lost" in td.attrs["class"].split()}
    assert marked == {("bend at 10 %", "best")}
    td = found["bend at 10 %", "best"]
    whole = of(cells, "bend", "best", 2)
    mean = (0.5 + 0.5 + (1 + 1 - whole["o_asr"] - 0.01) / 2) / 3
    assert td.text == f"{100 * mean:.1f} % 2 failed or collapsed"
    assert not td.all("strong")
    assert {d for d in names if found["bend at 10 %", d].all("strong")} <= {"good", "alike"}
    (pair,) = [x for x in body(page, "compare-1-repair-pairs") if (x[0], x[1]) == ("best", "poor")]
    assert "points" in pair[2], "a difference of shares is in percentage points"
    assert "%" not in pair[2]


def test_a_defense_that_calls_itself_a_control_is_shown_and_not_ranked(tmp_path: Path) -> None:
    def entry(defense: str, **more: bool) -> dict[str, Any]:
        return {"kind": "defense", "id": defense, "info": {"kind": "repair", **more}}

    told = [entry("good"), entry("poor", control=False), entry("best", control=True)]
    views = Views(load([write_run(tmp_path / "run", tables(), [], told)]))
    (board,) = views.boards
    (contest,) = ranking.contests(views, board)
    assert {"good", "alike", "poor"} <= set(contest.scores) and "best" not in contest.scores
    assert summary.role(board.of_defense["best"][0]) == "control"
    assert "best" in board.repairs
