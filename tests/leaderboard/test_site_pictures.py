from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from page_reader import Page
from synthetic import png, write_media

from sleeperbench.leaderboard import charts, figures, media
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views


def loaded(tmp_path: Path, index: Any, files: dict[str, bytes] | None = None) -> tuple[media.Media, dict[str, bytes]]:
    write_media(tmp_path, "cell", index, files)
    written: dict[str, bytes] = {}
    return media.load(tmp_path, "cell", written.__setitem__), written


def test_small_pictures_are_blown_up_by_whole_pixels(tmp_path: Path) -> None:
    found, written = loaded(tmp_path, None, {"trigger.png": png(16, 8, 9)})
    (picture,) = found.pictures
    assert (picture.width, picture.height, picture.enlarged) == (192, 96, True)
    assert written == {picture.file: png(16, 8, 9)}
    assert found.notes == ()
    (curve,) = found.curves
    assert next(line.label for line in curve.chart.lines) == "attacked"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("../secret.png", None),
        ("/etc/passwd", None),
        ("a/b.png", None),
        ("missing.png", None),
        ("evil.svg", b"<svg onload=alert(1)>"),
        ("evil.png", b"<svg onload=alert(1)>" + b" " * 40),
        ("other.png", b"\x89PNG\n\n\n\n" + png(2, 2, 1)[8:]),
        ("short.png", b"\x89PNG\r\n\x1a\n"),
        ("huge.png", png(1, 1, 1).replace(b"\0\0\0\1\0\0\0\1", b"\0\1\0\0\0\0\0\1", 1)),
        ("", None),
    ],
)
def test_what_is_no_plain_png_is_left_out_with_a_note(tmp_path: Path, name: str, data: bytes | None) -> None:
    (tmp_path / "secret.png").write_bytes(png(2, 2, 1))
    index = {"cell": "cell", "pictures": [{"file": name, "title": "t", "caption": ""}]}
    found, written = loaded(tmp_path, index, {} if data is None else {name: data})
    assert found.pictures == ()
    assert len(found.notes) == 1
    assert not written


def test_a_link_out_of_the_folder_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(2, 2, 1))
    write_media(tmp_path, "cell", {"cell": "cell", "pictures": [{"file": "l.png"}]}, {})
    folder = next((tmp_path / "media").iterdir())
    (folder / "l.png").symlink_to(tmp_path / "secret.png")
    written: dict[str, bytes] = {}
    assert media.load(tmp_path, "cell", written.__setitem__).pictures == ()
    assert not written


@pytest.mark.parametrize(
    "series",
    [
        [{"label": "a", "x": [1, 2], "y": [1]}],
        [{"label": "a", "x": [], "y": []}],
        [{"label": "a", "x": [1], "y": ["<script>"]}],
        [{"label": "a", "x": [1], "y": [float("nan")]}],
        [{"label": "a", "x": [1], "y": [10**400]}],
        [{"label": "a", "x": [1], "y": [1], "low": [1]}],
        None,
        [{"label": "a", "x": [True], "y": [1]}],
        [],
        "x",
        [3],
    ],
)
def test_a_curve_that_cannot_be_drawn_is_left_out_with_a_note(tmp_path: Path, series: Any) -> None:
    found, _ = loaded(tmp_path, {"cell": "cell", "pictures": 4, "curves": [{"name": "a", "series": series}]})
    assert found.curves == ()
    assert len(found.notes) == 1


def test_what_has_no_series_is_shown_as_recorded(tmp_path: Path) -> None:
    found, _ = loaded(tmp_path, {"cell": "cell", "curves": [{"name": "draws", "k": 10, "controls": {"k0": 1.0}}]})
    assert found.notes == ()
    assert found.facts == (media.Facts("draws", (("controls", '{"k0": 1.0}', ""), ("k", "10", ""))),)


def test_media_of_another_cell_or_unreadable_are_noted(tmp_path: Path) -> None:
    assert loaded(tmp_path, {"cell": "other", "pictures": []})[0].notes
    (next((tmp_path / "media").iterdir()) / "index.json").write_text("{")
    assert media.load(tmp_path, "cell", lambda p, d: None).notes
    assert media.load(tmp_path, "no such cell", lambda p, d: None) == media.Media()


@pytest.mark.parametrize(
    "values", [[0.0], [5e-324], [1e30, -1e30], [1e20, 1e20], [0.1, 0.9], [-3, 7], [1e-12, 2e-12], [0.3, 0.3000001]]
)
def test_an_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    a = charts.axis("x", values, share=False)
    slack = 1e-12 * max(map(abs, values))
    assert a.low <= min(values) + slack
    assert max(values) - slack <= a.high
    assert 2 <= len(a.ticks) <= 13
    assert a.ticks[0][0] == a.low
    assert a.ticks[-1][0] == a.high


def test_marks_stand_where_their_figures_say() -> None:
    spans = ((0.1, 0.4), (0.5, 1.0))
    points = [charts.Point("a", "a.html", "defense", 0.25, 0.75, *spans, "t")]
    drawn = charts.scatter(points, "x", "y", y_share=True)
    assert drawn is not None
    (mark,) = drawn.marks
    wide = charts.WIDTH - charts.LEFT - charts.RIGHT
    high = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert mark.x == pytest.approx(charts.LEFT + wide / 4, abs=0.06)
    assert mark.y == pytest.approx(charts.TOP + high / 4, abs=0.06)
    assert mark.x0 < mark.x < mark.x1
    assert mark.y1 == charts.TOP
    assert mark.y0 == pytest.approx(charts.TOP + high / 2, abs=0.06)


def test_labels_do_not_cover_each_other() -> None:
    points = [charts.Point(str(i), "", "defense", 0.02, 0.05, (0, 0), (0, 0), "") for i in range(15)]
    drawn = charts.scatter(points, "x", "y", y_share=True)
    assert drawn is not None
    heights = sorted(m.label_y for m in drawn.marks)
    assert all(b - a >= 12.9 for a, b in itertools.pairwise(heights))


def test_no_points_no_picture() -> None:
    assert charts.scatter([], "x", "y", y_share=True) is None


def test_a_band_runs_there_and_back() -> None:
    s = charts.Series("a", (0.0, 1.0), (0.5, 0.5), (0.0, 0.25), (1.0, 0.75))
    (line,) = charts.lines([s], "x", "y").lines
    left, right = str(float(charts.LEFT)), str(float(charts.WIDTH - charts.RIGHT))
    corners = line.band.split()
    assert [c.split(",")[0] for c in corners] == [left, right, right, left]
    assert corners[0].split(",")[1] == str(float(charts.HEIGHT - charts.BOTTOM))
    assert corners[3].split(",")[1] == str(float(charts.TOP))


LAYERS = {"title": "BEC by layer", "x_label": "layer", "y_label": "BEC"}


def test_a_series_over_names_is_drawn_as_bars(tmp_path: Path) -> None:
    ends = {"low": [0.4, -0.5, 0.9], "high": [0.6, 0.0, 1.0]}
    series = [{"label": "bec", "x": ["conv1", "layer2", "fc"], "y": [0.5, -0.25, 1.0], **ends}]
    found, _ = loaded(tmp_path, {"cell": "cell", "curves": [{"name": "bec-layers", **LAYERS, "series": series}]})
    assert found.notes == ()
    (curve,) = found.curves
    assert curve.barred
    chart = curve.chart
    assert isinstance(chart, charts.Bars)
    scale = {text: x for x, text in chart.x_ticks}
    first, second, third = chart.bars
    assert [b.group for b in chart.bars] == ["conv1", "layer2", "fc"]
    zero, one = scale["0"], scale["1"]
    assert (first.x0, first.width) == pytest.approx((zero, (one - zero) / 2), abs=0.11)
    assert second.x0 + second.width == pytest.approx(zero, abs=0.11), "a bar below 0 ends at 0"
    assert second.x0 == pytest.approx(zero - (one - zero) / 4, abs=0.11)
    assert third.high == pytest.approx(one)
    assert first.between == "0.4 to 0.6"
    assert first.y < second.y < third.y < chart.height


@pytest.mark.parametrize(
    "series",
    [
        [{"label": "a", "x": ["l1", 2], "y": [1, 2]}],
        [{"label": "a", "x": ["l1", "l1"], "y": [1, 2]}],
        [{"label": "a", "x": ["l1"], "y": [1]}, {"label": "b", "x": [1], "y": [1]}],
        [{"label": str(i), "x": [1], "y": [1]} for i in range(media.MOST_SERIES + 1)],
        [{"label": "a", "x": [str(i) for i in range(media.MOST_BARS + 1)], "y": [0] * (media.MOST_BARS + 1)}],
    ],
)
def test_bars_that_cannot_be_drawn_are_left_out_with_a_note(tmp_path: Path, series: Any) -> None:
    found, _ = loaded(tmp_path, {"cell": "cell", "curves": [{"name": "a", "series": series}]})
    assert found.curves == ()
    assert len(found.notes) == 1


def row(metric: str, qualifier: str, value: float | None, **more: Any) -> dict[str, Any]:
    base = {"evaluator": "bec", "metric": metric, "qualifier": qualifier, "value": value, "lower": None, "upper": None}
    return base | more


def test_figures_by_layer_are_drawn_from_the_measurements() -> None:
    rows = [row("bec_layerwise", f"layer=layer{i}", i / 10) for i in (1, 10, 2)]
    rows += [row("bec_layerwise", f"layer=layer{i};variant=post", i / 20) for i in (1, 2)]
    rows += [row("bec_layerwise", "layer=layer3", None), row("bec_layerwise", "layer=layer4", float("nan"))]
    (curve,) = media.measured_curves(rows, [])
    assert curve.title == "bec_layerwise by layer"
    assert isinstance(curve.chart, charts.Bars)
    assert [n for _, n in curve.chart.names] == ["layer1", "layer2", "layer10"], "numbers within names count as numbers"
    assert curve.chart.legend == ("bec_layerwise", "variant=post")
    assert {(b.group, b.label): b.text for b in curve.chart.bars}["layer10", "bec_layerwise"] == "1"


def test_figures_by_a_number_are_drawn_as_a_curve_with_its_band() -> None:
    rows = [row("asr_wake", f"k={k}", k / 50, evaluator="wake", lower=k / 60, upper=k / 40) for k in (25, 1, 10)]
    rows += [row("p_asr_ra", f"draw={k}", 0.5, evaluator="ra") for k in range(5)]
    rows += [row("asr_few", f"k={k}", 0.5, evaluator="few") for k in (1, 2)]
    (curve,) = media.measured_curves(rows, [])
    assert isinstance(curve.chart, charts.Lines)
    (line,) = curve.chart.lines
    assert [x for x, _, _ in line.values] == ["1", "10", "25"]
    assert line.band
    drawn = media.Curve("own", curve.chart, "wake-k")
    assert media.measured_curves(rows, [drawn]) == [], "an evaluator's own curve is not drawn twice"


def test_figures_for_papers_are_few_the_same_and_name_no_day(hostile_run: Path) -> None:
    views = Views(load([hostile_run]))

    def drawn() -> tuple[list[figures.Figure], dict[str, bytes]]:
        written: dict[str, bytes] = {}
        return figures.figures(views, written.__setitem__), written

    made, written = drawn()
    assert 1 <= len(made) <= figures.MOST
    assert drawn() == (made, written)
    for f in made:
        svg = written[f.svg].decode()
        assert re.fullmatch(r"downloads/figures/[a-z0-9_.-]+\.svg", f.svg)
        assert "<dc:date>" not in svg
        assert "<script" not in svg
        assert "circles" in f.caption
    pdf = written[figures.PDF].decode("latin-1")
    assert "CreationDate" not in pdf
    assert pdf.count("/Type /Page\n") + pdf.count("/Type /Page ") == len(made)
    assert [f.page for f in made] == [i + 1 for i in range(len(made))]


def test_no_more_figures_than_promised(hostile_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MOST", 1)
    assert len(figures.figures(Views(load([hostile_run])), lambda p, d: None)) == 1


def test_scattered_marks_are_drawn_unjoined_each_with_its_values(pages: dict[str, Page]) -> None:
    page = next(p for p in pages.values() if any("Anomaly index" in t.text for t in p.root.all("figcaption")))
    plane, index = (t for t in page.root.all("svg") if "chart" in t.attrs["class"])
    names = [t.name for t in plane.all("polyline")]
    assert names == ["polyline"], "of four series one is a line"
    dots = [t for t in (*plane.all("circle"), *plane.all("rect"), *plane.all("path")) if "dot" in t.attrs["class"]]
    titles = [t.all("title")[0].text for t in dots]
    # Two marks, one and one, the ends of the line, and one in the legend of each scattered series.
    assert len(dots) == 9
    assert {"b: 0.5, 0.5", "c: 0.25, 1", "curve: 0, 0"} <= set(titles)
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    (cut,) = (t for t in plane.all("path") if t.attrs["class"] == "rule")
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert cut.attrs["d"] == f"M{left} {(top + bottom) / 2}H{right}"
    assert cut.all("title")[0].text == "threshold 0.5"
    (cut,) = (t for t in index.all("path") if t.attrs["class"] == "rule")
    scale = {t.text: float(t.attrs["x"]) for t in index.all("text") if t.attrs.get("text-anchor") == "middle"}
    assert cut.attrs["d"].startswith(f"M{scale['2']} {top}V")
    assert not page.wrong


def test_only_truth_makes_marks_of_a_series_and_only_a_number_a_threshold() -> None:
    def drawn(**parts: Any) -> charts.Lines:
        series = {"label": "a", "x": [1, 2], "y": [3, 4], **parts}
        curve = media._curve({"title": "t", "series": [series], "threshold": parts.get("threshold")})
        assert curve is not None
        assert isinstance(curve.chart, charts.Lines)
        return curve.chart

    assert drawn(points=True).lines[0].points == ""
    for odd in (1, "yes", [True], None, False):
        assert drawn(points=odd).lines[0].points
    assert drawn(threshold=9).rule is not None
    for value in (True, "9", None, [9], float("nan"), 1e31):
        assert drawn(threshold=value).rule is None


def test_an_axis_holds_the_threshold() -> None:
    rule = charts.lines([charts.Series("a", (0.0, 1.0), (0.1, 0.2), (), ())], "x", "y", 5.0).rule
    assert rule is not None
    assert charts.TOP <= rule.at <= charts.HEIGHT - charts.BOTTOM
    chart = charts.bars([charts.Series("", ("a",), (1.0,), (), ())], "x", "y", -4.0)
    assert chart.rule is not None
    assert chart.rule.at == {t: x for x, t in chart.x_ticks}["-4"]


def test_a_point_series_of_many_values_keeps_its_marks() -> None:
    many = tuple(i / 100 for i in range(100))
    line, marks = charts.lines(
        [charts.Series("a", many, many, (), ()), charts.Series("b", many, many, (), (), scattered=True)], "x", "y"
    ).lines
    assert (len(line.dots), len(marks.dots)) == (0, 100)
    assert line.points and not marks.points


def test_a_caption_that_repeats_the_title_is_left_with_the_maker(tmp_path: Path) -> None:
    title = "Slices. Columns: E, slice."
    pictures = [{"file": "trigger.png", "title": title, "caption": f"{title}, by evidence"}]
    found, _ = loaded(tmp_path, {"cell": "cell", "pictures": pictures})
    assert (found.pictures[0].title, found.pictures[0].caption) == (title, "By evidence.")
