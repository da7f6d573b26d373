from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import judging
import pytest
from page_reader import Page, Tag, board_rows, figures, read
from synthetic import SCRIPT, cell_row, measurement, write_run

from sleeperbench.leaderboard import names
from sleeperbench.leaderboard.build import build
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judging.judging_run(tmp_path_factory.mktemp("runs") / "judging")


@pytest.fixture(scope="module")
def judged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    site = build([run], tmp_path_factory.mktemp("site") / "out").parent
    return {p.relative_to(site).as_posix(): read(p) for p in sorted(site.rglob("*.html"))}


def lines(page: Page, table: str) -> dict[str, Tag]:
    rows = [r for r in page.by_id(table).all("tr") if any("data-metric" in t.attrs for t in r.all("td"))]
    return {r.all("th")[0].text.partition(" ")[0]: r for r in rows}


def order(row: Tag, metric: str) -> float:
    return float(figures(row)[metric].attrs["data-order"])


def test_judges_stand_in_no_table_of_repairs(judged: dict[str, Page]) -> None:
    repairs = {"none", "ft", "retrain:spectral", "unlearn:neural_cleanse"}
    for page, table in (("tracks.html", "board-1"), ("metrics/o_asr.html", "means-1")):
        assert set(lines(judged[page], table)) == repairs
    assert "strip" not in judged["tracks.html"].by_id("board-1").text
    left_out = [p.text for p in judged["index.html"].root.all("p") if p.text.startswith("Not drawn")]
    assert left_out
    assert not [p for p in left_out if "strip" in p or "neural_cleanse (" in p]


def test_each_track_has_the_methods_with_figures_in_it(judged: dict[str, Page]) -> None:
    page = judged["tracks.html"]
    titles = [t.text for t in page.root.all("h3")]
    tracks = ["Model detection", "Input detection", "Trigger inversion"]
    assert [t for t in titles if t in tracks] == tracks
    assert set(lines(page, "board-1-model")) == {"neural_cleanse"}
    assert set(lines(page, "board-1-input")) == {"strip"}
    assert set(lines(page, "board-1-inversion")) == {"neural_cleanse"}


def test_no_table_without_data(tmp_path: Path) -> None:
    cells, rows = judging.tables()
    kept = [r for r in rows if r["metric"].startswith("input")]
    index = read(build([write_run(tmp_path / "r", cells[:0], [])], tmp_path / "empty").parent / "tracks.html")
    assert "Input detection" not in index.text
    bare = [c | {"reasr": None, "reasr_clean": None, "apd_rel": None} for c in cells]
    index = read(
        build([write_run(tmp_path / "r", bare, kept, judging.plugins())], tmp_path / "s").parent / "tracks.html"
    )
    titles = [t.text for t in index.root.all("h3")]
    assert "Input detection" in titles
    assert not {"Model detection", "Trigger inversion"} & {*titles}
    heads = [t.attrs["data-metric"] for t in index.by_id("board-1-input").all("th") if "data-metric" in t.attrs]
    assert heads == ["input_tpr_fpr1", "input_auroc"], "a column without a figure is left out"


def test_means_of_input_detection_are_over_settings_of_means_over_seeds(judged: dict[str, Page]) -> None:
    row = lines(judged["tracks.html"], "board-1-input")["strip"]
    td = figures(row)["input_tpr_fpr1"]
    assert order(row, "input_tpr_fpr1") == pytest.approx(((0.9 + 0.7) / 2 + (0.2 + 0.4) / 2) / 2)
    assert td.text == "55.0 % range 20.0–90.0"
    assert order(row, "input_auroc") == 0.75
    assert "2 of 2" in row.text


def test_inversion_is_held_against_clean_models(judged: dict[str, Page]) -> None:
    row = lines(judged["tracks.html"], "board-1-inversion")["neural_cleanse"]
    # badnets: 0.75 twice; blended: -0.25, and 0 of the seed without a claim
    assert order(row, "reasr_net") == pytest.approx((0.75 + (-0.25 + 0.0) / 2) / 2)
    assert figures(row)["reasr_net"].text == "31.2 % range -25.0 to 75.0"
    assert order(row, "reasr") == pytest.approx((1.0 + (0.5 + 0.0) / 2) / 2)
    assert order(row, "mask_iou") == pytest.approx((0.5 + 0.25) / 2)


def test_the_roc_curve_over_many_models_stands_with_its_auroc_and_interval(judged: dict[str, Page]) -> None:
    page = judged["metrics/det_auroc.html"]
    (heading,) = [h for h in page.root.all("h3") if "AUROC" in h.text]
    assert heading.text.startswith("neural_cleanse, digits")
    assert heading.text.endswith("AUROC 87.5 % (50.0–96.9)")
    assert heading.all("a")[0].attrs["href"] == "../defenses/neural_cleanse.html"
    for where in (page, judged["defenses/neural_cleanse.html"]):
        (figure,) = [f for f in where.root.all("figure") if f.all("polyline")]
        assert "ROC curve. Models: 4 backdoored against 2 clean" in figure.text
        lines = [[tuple(map(float, p.split(","))) for p in x.attrs["points"].split()] for x in figure.all("polyline")]
        assert len(lines) == 2
        (x0, y0), (x1, y1), (x2, y2) = lines[0]
        assert x0 == x1 < x2, "straight up, then to the right"
        assert (y0 - y1) / (y0 - y2) == pytest.approx(0.75, abs=0.01), "a picture's y grows downwards"
    linked = [a.attrs["href"] for a in judged["tracks.html"].root.all("a") if a.text == "Model AUROC"]
    assert "metrics/det_auroc.html" in linked
    assert "ROC curves stand on" in " ".join(p.text for p in judged["tracks.html"].root.all("p"))


def test_model_detection_shows_counts_and_intervals_over_models(judged: dict[str, Page]) -> None:
    row = lines(judged["tracks.html"], "board-1-model")["neural_cleanse"]
    shown = figures(row)
    assert shown["det_auroc"].text == "87.5 % 50.0–96.9"
    assert shown["det_bacc"].text == "62.5 % 25.0–87.5"
    assert "95 % interval over models: 25.0–87.5 %" in shown["det_bacc"].attrs["title"]
    assert shown["det_tpr"].text == "75.0 % 3 of 4; 30.1–95.4"
    assert shown["det_fpr"].text.startswith("50.0 % 1 of 2")
    assert "3 of 4 models" in shown["det_tpr"].attrs["title"]
    # 1, 1 and 1, 0 over the attacked models; the clean models' label_fpr of 0.5 is no figure of an attack
    assert order(row, "label_tpr") == pytest.approx((1.0 + 0.5) / 2)
    assert order(row, "label_fpr") == pytest.approx(0.25)


def test_a_detectors_page_has_its_figures_per_attack(judged: dict[str, Page]) -> None:
    page = judged["defenses/neural_cleanse.html"]
    pooled, badnets = page.by_id("zoo-1").all("tbody")[0].all("tr")
    assert figures(badnets)["det_auroc"].text == "100.0 % 37.5–100.0"
    assert (pooled.all("th")[0].text, badnets.all("th")[0].text) == ("all attacks, pooled", "badnets")
    assert figures(badnets)["det_tpr"].text.startswith("100.0 % 2 of 2")
    assert figures(badnets)["det_fpr"].text == "pooled"
    assert "reduced" in page.by_id("zoo-1-caption").text
    assert "unlearn:neural_cleanse" in next(p.text for p in page.root.all("p") if p.attrs.get("class") == "note")
    headings = {t.attrs["data-metric"] for t in page.by_id("means-1").all("th") if "data-metric" in t.attrs}
    assert {"reasr_net", "mask_iou", "label_tpr"} <= headings
    assert not {"o_asr", "c_acc"} & headings
    per_attack = lines(judged["defenses/strip.html"], "means-1")
    assert order(per_attack["badnets"], "input_tpr_fpr1") == pytest.approx(0.8)
    assert figures(judged["defenses/strip.html"].by_id("zoo-1").all("tbody")[0].all("tr")[0])["det_auroc"].text == (
        "no verdict"
    )


def test_what_judges_without_a_line_have_to_say(judged: dict[str, Page]) -> None:
    (aside,) = [t for t in judged["tracks.html"].root.all("ul") if t.attrs.get("class") == "aside"]
    silent, spectral = (li.text for li in aside.all("li"))
    assert silent == "silent judges, and has no figure in these tables: failed: raised."
    assert spectral.startswith("spectral marks training rows and leaves the model as it is.")
    assert "retrain:spectral" in [a.text for a in aside.all("a")]


def test_a_judge_is_neither_purified_nor_not(judged: dict[str, Page], run: Path) -> None:
    judges = {"strip", "neural_cleanse", "spectral", "silent"}
    for row in board_rows(judged["table.html"]):
        status = next(t for t in row.all("td") if t.attrs.get("class") == "status")
        is_judge = row.attrs["data-defense"] in judges
        assert ("judges" in status.attrs["data-order"].split(";")) is is_judge
        if is_judge:
            assert "not purified" not in status.text
            assert "awake" not in row.attrs["class"].split()
    words = "48 cells: 42 measured, 6 failed, 0 collapsed, 4 not purified"
    assert words in judged["index.html"].root.text, "only the undefended models are"
    assert "In 24 of them the method judges" in judged["index.html"].root.text


def test_heat_maps_have_the_methods_that_a_metric_says_something_of(judged: dict[str, Page]) -> None:
    heads = {}
    for table in judged["heatmap.html"].root.all("table"):
        metric = next(t.attrs["data-metric"] for t in table.all("td"))
        heads[metric] = [t.text for t in table.all("thead")[0].all("th")][1:]
    assert heads["input_tpr_fpr1"] == ["strip"]
    assert heads["reasr_net"] == ["neural_cleanse"]
    assert not {"strip", "spectral", "neural_cleanse"} & {*heads["o_asr"]}


def test_a_failed_judge_counts_as_an_answer_that_says_nothing(tmp_path: Path) -> None:
    cells, rows = judging.tables()
    bad = next(c for c in cells if (c["attack"], c["defense"], c["seed"]) == ("badnets", "strip", 1))
    bad |= {"status": "timeout", "reason": "budget", "c_acc": None, "o_asr": None}
    rows = [r for r in rows if r["cell"] != bad["cell"]]
    rows.append(measurement(bad, "input_tpr_fpr1", status="timeout", reason="budget"))
    index = read(
        build([write_run(tmp_path / "r", cells, rows, judging.plugins())], tmp_path / "s").parent / "tracks.html"
    )
    row = lines(index, "board-1-input")["strip"]
    assert order(row, "input_tpr_fpr1") == pytest.approx(((0.9 + 0.0) / 2 + 0.3) / 2)
    assert order(row, "input_auroc") == pytest.approx(((0.75 + 0.5) / 2 + 0.75) / 2)
    assert "1 as nothing" in figures(row)["input_auroc"].text


def test_judges_are_known_without_plugins_json(run: Path, tmp_path: Path) -> None:
    cells, rows = judging.tables()
    index = read(build([write_run(tmp_path / "r", cells, rows)], tmp_path / "s").parent / "tracks.html")
    assert not {"strip", "neural_cleanse"} & {*lines(index, "board-1")}
    assert figures(lines(index, "board-1-input")["strip"])["input_tpr_fpr1"].text.startswith("55.0 %")


def test_a_cells_page_says_what_its_pictures_and_curves_show(judged: dict[str, Page], run: Path) -> None:
    of = {(c["attack"], c["defense"], c["seed"]): c["cell"] for c in load([run]).cells}
    page = judged[f"cells/{names.digest12(of['badnets', 'neural_cleanse', 0])}.html"]
    (caption,) = [t.text for t in page.root.all("figcaption")]
    assert caption.startswith("True and recovered triggers One row per test image: clean; with the true trigger")
    assert "multiplied by this" in page.text
    page = judged[f"cells/{names.digest12(of['badnets', 'strip', 0])}.html"]
    assert [t.text for t in page.root.all("figcaption")] == ["ROC curve. Inputs: 4 triggered against 4 clean"]
    td = figures(page.by_id("headline"))["input_tpr_fpr1"]
    assert td.text.startswith("90.0 %")
    assert "360 of 400 images" in td.attrs["title"]


def test_metrics_have_titles_and_say_how_to_be_read(judged: dict[str, Page]) -> None:
    for metric, title in (
        ("input_tpr_fpr1", "TPR at 1 % FPR"),
        ("reasr_net", "REASR net"),
        ("det_auroc", "Model AUROC"),
        ("mask_iou", "Mask IoU"),
    ):
        page = judged[f"metrics/{metric}.html"]
        assert page.root.all("h1")[0].text == title
        assert "no description" not in page.text
    assert set(lines(judged["metrics/det_auroc.html"], "means-1")) == {"neural_cleanse"}
    assert set(lines(judged["metrics/input_tpr_fpr1.html"], "means-1")) == {"strip"}


def test_judged_pages_are_well_formed_and_every_field_says_something(judged: dict[str, Page]) -> None:
    assert {name: p.wrong for name, p in judged.items() if p.wrong} == {}
    for name, page in judged.items():
        ids = [t.attrs["id"] for t in page.tags if "id" in t.attrs]
        assert len(ids) == len(set(ids)), name
        for td in page.root.all("td"):
            assert td.text, (name, td.attrs)


def test_hostile_judges_are_inert(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    cells, rows = judging.tables()
    text = json.dumps([cells, rows], default=str).replace("strip", evil.replace('"', '\\"').replace("/", "\\/"))
    cells, rows = json.loads(text)
    for r in rows:
        r["started"] = None
        r["qualifier"] = evil if r["qualifier"] == "attack=badnets" else r["qualifier"]
    kinds = judging.plugins({**judging.KINDS, evil: "detection"})
    site = build([write_run(tmp_path / "r", cells, rows, kinds)], tmp_path / "s").parent
    for path in site.rglob("*.html"):
        page = read(path)
        assert not page.wrong
        assert all(t.attrs.get("src", "").endswith(".js") for t in page.root.all("script"))
    assert lines(read(site / "tracks.html"), "board-1-input")


def test_a_judge_says_whether_it_traverses_classes_and_what_it_presumes(tmp_path: Path) -> None:
    said = {
        "strip": {"kind": "detection", "traverses": False, "presumes": SCRIPT},
        "spectral": {"kind": "cleansing", "traverses": True, "presumes": "a share known beforehand"},
        "retrain": {"kind": "in_training"},
        "odd": {"kind": "detection", "traverses": "no", "presumes": ["a list"]},
    }
    plugins = [{"kind": "defense", "id": d, "title": d, "info": info} for d, info in said.items()]
    cells = [cell_row("badnets", 0.1, d, 0, c_acc=0.9) for d in ("strip", "retrain:spectral", "odd")]
    out = build([write_run(tmp_path / "r", cells, [], plugins)], tmp_path / "s").parent

    def pairs(page: str) -> dict[str, str]:
        shown = [t for t in read(out / "defenses" / page).root.all("div") if t.all("dt")]
        return {t.all("dt")[0].text: t.all("dd")[0].text for t in shown}

    strip = pairs("strip.html")
    assert strip["Traverses classes"] == "no"
    assert strip["Presumes"] == SCRIPT, "as text, not as markup"
    retrained = pairs("retrain-spectral.html")
    assert retrained["Traverses classes"] == "yes: each in turn as a possible target"
    assert retrained["Presumes"] == "a share known beforehand"
    assert not {"Traverses classes", "Presumes"} & set(pairs("odd.html"))


SCORES = {"none": (1.0, 2.5), "badnets": (1.5, 3.0), "blended": (5.0, 5.0)}
"""Of neural_cleanse per attack and seed: with a threshold of 2 they give the figures of `judging.ZOO`."""


def kept_weak(folder: Path, **more: Any) -> Path:
    """A run that kept blended, which did not implant: its models are held against the clean ones too."""
    cells, rows = judging.tables()
    for c in cells:
        if c["attack"] == "blended":
            c["flag"] = "weak"
        if c["defense"] == "neural_cleanse":
            score = SCORES[c["attack"]][c["seed"]]
            c |= {"det_score": score, "verdict": score > 2} | more
    return write_run(folder, cells, rows, judging.plugins())


def test_figures_over_many_models_leave_weak_ones_out_where_cells_tell(tmp_path: Path) -> None:
    site = build([kept_weak(tmp_path / "r")], tmp_path / "site").parent
    line = lines(read(site / "tracks.html"), "board-1-model")["neural_cleanse"]
    assert "2 weak left out" in line.text
    shown = {
        t.attrs["data-metric"]: (t.attrs["data-order"], t.text) for t in line.all("td") if "data-metric" in t.attrs
    }
    # 1.5 is above one of the two clean models, 3.0 above both; 3.0 alone is flagged, and so is one clean model.
    assert shown["det_auroc"] == ("0.75", "75.0 % 2 models; 87.5 % with weak ones")
    assert shown["det_tpr"] == ("0.5", "50.0 % 2 models; 75.0 % with weak ones")
    assert shown["det_bacc"] == ("0.5", "50.0 % 2 models; 62.5 % with weak ones")
    assert shown["det_fpr"][1].startswith("50.0 % 1 of 2"), "clean models are what they were"
    page = read(site / "defenses" / "neural_cleanse.html")
    (zoo,) = [t for t in page.root.all("table") if t.attrs.get("id") == "zoo-1"]
    found = {r.all("th")[0].text: r.all("td")[0].text for r in zoo.all("tbody")[0].all("tr")}
    assert found["all attacks, pooled 2 weak counted"].startswith("87.5 % 50.0")
    assert found["attacks that implanted, pooled"].startswith("75.0 % 2 models")
    assert "badnets" in found, "it implanted"


@pytest.mark.parametrize("more", [{"det_score": 3.0}, {"verdict": None}], ids=["other scores", "no verdicts"])
def test_weak_models_that_figures_over_many_models_count_are_told(tmp_path: Path, more: dict[str, Any]) -> None:
    """Where single cells give other figures than were measured, nobody can say what they are without the weak."""
    site = build([kept_weak(tmp_path / "r", **more)], tmp_path / "site").parent
    line = lines(read(site / "tracks.html"), "board-1-model")["neural_cleanse"]
    assert "2 weak counted" in line.text
    assert next(t for t in line.all("td") if t.attrs.get("data-metric") == "det_auroc").attrs["data-order"] == "0.875"
    again = judging.tables()
    page = read(build([write_run(tmp_path / "s", *again)], tmp_path / "other").parent / "tracks.html")
    assert "weak" not in page.by_id("board-1-model").text


def test_scores_of_a_weak_attack_are_shown_as_weak(tmp_path: Path) -> None:
    """On pages of one attack setting a field; in no mean over attacks."""
    site = build([kept_weak(tmp_path / "r")], tmp_path / "site").parent
    page = read(site / "defenses" / "neural_cleanse.html")
    table = next(t for t in page.root.all("table") if t.attrs.get("id", "").startswith("means-"))
    rows = {r.all("th")[0].text: r for r in table.all("tbody")[0].all("tr")}
    score = {k: next(t.text for t in r.all("td") if t.attrs.get("data-metric") == "det_score") for k, r in rows.items()}
    assert score["blended at 10 %"] == "5 range 5 to 5; weak"
    assert "weak" not in score["badnets at 10 %"]
    assert [rows[k].attrs.get("class") for k in ("blended at 10 %", "badnets at 10 %")] == ["weak", None]
    heat = read(site / "heatmap.html")
    maps = [t for t in heat.root.all("table") if "det_score" in {x.attrs.get("data-metric") for x in t.all("td")}]
    (field,) = [r.all("td")[0] for r in maps[0].all("tbody")[0].all("tr") if r.all("th")[0].text.startswith("blended")]
    assert (field.attrs["class"], field.text) == ("lost", "5 weak")
    (scale,) = [u for u in heat.root.all("ul") if "1.75" in u.text]
    assert scale.all("li")[5].text.endswith("to 2.25"), "the weak attack's 5 is no end of the range"
    views = Views(load([tmp_path / "r"]))
    (board,) = views.boards
    assert views.overall(board, "neural_cleanse", "det_score").estimate.value == 2.25  # type: ignore[union-attr]
