from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from page_reader import Page, Tag, read
from synthetic import SCRIPT, cell_row, measurement, png, write_media, write_run

from sleeperbench.leaderboard import charts, figures, media, words
from sleeperbench.leaderboard.build import _environment, build
from sleeperbench.leaderboard.names import digest12
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views, href


def loaded(tmp_path: Path, index: Any, files: dict[str, bytes] | None = None) -> tuple[media.Media, dict[str, bytes]]:
    write_media(tmp_path, "cell", index, files)
    written: dict[str, bytes] = {}
    return media.load((tmp_path / "media" / digest12("cell"), "cell"), written.__setitem__), written


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
    assert media.load((folder, "cell"), written.__setitem__).pictures == ()
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
    folder = next((tmp_path / "media").iterdir())
    (folder / "index.json").write_text("{")
    assert media.load((folder, "cell"), lambda p, d: None).notes
    assert media.load((tmp_path / "media" / "none", "cell"), lambda p, d: None) == media.Media()
    assert media.load(None, lambda p, d: None) == media.Media()


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
    assert curve.title == "BEC, layers' own ratios by layer"
    assert isinstance(curve.chart, charts.Bars)
    assert [n for _, n in curve.chart.names] == ["layer1", "layer2", "layer10"], "numbers within names count as numbers"
    assert curve.chart.legend == ("BEC, layers' own ratios", "variant=post")
    assert {(b.group, b.label): b.text for b in curve.chart.bars}["layer10", "BEC, layers' own ratios"] == "1"


def test_figures_by_a_number_are_drawn_as_a_curve_with_its_band() -> None:
    rows = [row("asr_wake", f"k={k}", k / 50, evaluator="wake", lower=k / 60, upper=k / 40) for k in (25, 1, 10)]
    for key in ("draw", "model", "image", "class", "trigger"):
        rows += [row("p_asr_ra", f"{key}={k}", 0.5, evaluator="ra") for k in range(5)]
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
    assert len(dots) == 6, "two marks, one and one, and the ends of the line"
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


def test_a_legend_has_whole_labels_and_a_key_of_its_own_for_each(tmp_path: Path) -> None:
    labels = [f"{what} pictures, trained on {by}" for what in ("triggered", "clean") for by in ("these", "the others")]
    labels += [f"more {i}" for i in range(14)]
    series = [{"label": t, "x": [0, 1], "y": [i, i]} for i, t in enumerate(labels)]
    curve = media._curve({"title": "t", "series": series})
    layers = media._curve({"title": "t", "series": [s | {"x": ["a", "b"]} for s in series[:7]]})
    template = _environment().from_string(
        '{% import "macros.html.j2" as m with context %}{{ m.curves("a", curve) }}{{ m.bars("b", layers) }}'
    )
    (tmp_path / "a.html").write_text(template.render(curve=curve, layers=layers, charts=charts, root="", words=words))
    page = read(tmp_path / "a.html")
    lines, bars = (t for t in page.root.all("ul") if t.attrs["class"] == "legend")
    assert [li.text for li in lines.all("li")] == labels and [li.text for li in bars.all("li")] == labels[:7]

    def look(t: Tag) -> tuple[str, str]:
        (key,) = (d for n in ("circle", "rect", "path") for d in t.all(n) if "dot" in d.attrs["class"])
        return key.name, key.attrs["class"]

    assert len({look(li) for li in lines.all("li")}) == len(labels) == 3 * charts.LOOKS
    plane, _ = (t for t in page.root.all("svg") if "chart" in t.attrs["class"])
    drawn = {d.all("title")[0].text.partition(":")[0]: (d.name, d.attrs["class"]) for d in plane_dots(plane)}
    assert drawn == {li.text: look(li) for li in lines.all("li")}, "a key looks as the marks of its series"
    assert not page.wrong and not any("..." in t.text for t in page.root.all("svg"))


def plane_dots(plane: Tag) -> list[Tag]:
    return [d for n in ("circle", "rect", "path") for d in plane.all(n) if "dot" in d.attrs["class"]]


def test_what_stands_at_one_number_is_drawn_as_bars_by_series() -> None:
    raw = {"title": "ASR after retuning", "x_label": "draw", "y_label": "ASR"}
    series = [{"label": t, "x": [0], "y": [v]} for t, v in (("this model", 0.75), ("clean_model, mean", 0.25))]
    curve = media._curve({**raw, "series": series, "threshold": 0.5})
    assert curve is not None and isinstance(curve.chart, charts.Bars)
    assert curve.title == "ASR after retuning, draw 0"
    first, second = curve.chart.bars
    assert (first.group, first.text) == ("this model", "0.75") and second.group == "clean_model, mean"
    assert first.width == pytest.approx(3 * second.width, abs=0.3) and curve.chart.rule is not None
    (alone,) = media._curve(
        {**raw, "series": [{"label": "", "x": [2], "y": [0.5], "low": [0.25], "high": [1]}]}
    ).chart.bars
    assert (alone.group, alone.between) == ("draw 2", "0.25 to 1") and alone.low < alone.x0 + alone.width < alone.high
    other = [series[0], series[1] | {"x": [1]}]
    for odd in (other, [*series, series[0]], [series[0], series[1] | {"low": [0], "high": [1]}]):
        kept = media._curve({**raw, "series": odd})
        assert kept is not None and isinstance(kept.chart, charts.Lines), "these cannot be told apart as bars"


@pytest.mark.parametrize(("axis", "joined"), [("image id", False), ("draw", False), ("iteration", True), ("k", True)])
def test_what_has_no_order_is_not_joined(axis: str, joined: bool) -> None:
    curve = media._curve({"x_label": axis, "series": [{"label": "a", "x": [3, 7, 9], "y": [1, 0, 1]}]})
    assert curve is not None and isinstance(curve.chart, charts.Lines)
    (line,) = curve.chart.lines
    assert bool(line.points) == joined and len(line.dots) == 3


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


def test_a_square_has_the_area_of_its_share() -> None:
    names = [("a", "a.html"), ("b", "b.html")]
    shares = {("a", "b"): (1.0, "ab.html", "t"), ("b", "a"): (0.25, "ba.html", "u"), ("b", "b"): (0.0, "bb.html", "v")}
    drawn = charts.matrix(names, names, shares)
    full, quarter, none = drawn.tiles
    assert (full.text, quarter.text, none.text) == ("100", "25", "0")
    assert quarter.side == pytest.approx(full.side / 2) and none.side == 0
    across, down = ({n: at for at, n, _ in some} for some in (drawn.columns, drawn.rows))
    assert (full.x, full.y + 6) == (across["b"], down["a"]) and (quarter.x, quarter.y + 6) == (across["a"], down["b"])
    assert (full.href, quarter.title) == ("ab.html", "u")
    many = [(str(i), "") for i in range(16)]
    wide = charts.matrix(many, many, {(a, b): (1.0, "", "") for a, _ in many for b, _ in many})
    assert (
        len(wide.tiles) == 256 and wide.right <= charts.WIDTH and wide.tiles[0].side < wide.columns[1][0] - charts.ASIDE
    )


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """A site of one attacked model: three defenses with figures on each other, one without, and a hostile name."""
    cells = {d: cell_row("badnets", 0.1, d, 0, o_asr=0.1) for d in ("none", "ft", "anp", "fst", "clp")}
    rows = []
    for d, on in (("ft", {"": 0.64, "anp": 0.36, "fst": 0.0}), ("anp", {"": 0.9, "ft": 0.25}), ("fst", {"": 0.5})):
        for name, value in on.items():
            more = {"qualifier": f"on={name}" if name else "", "value": value, "evaluator": "qra"}
            rows.append(measurement(cells[d], "p_asr_qra", **more))
    rows.append(measurement(cells["ft"], "p_asr_qra", qualifier="control=clean_model", value=0.01, evaluator="qra"))
    for d, source in (("ft", "anp"), ("anp", f"i_bau@{SCRIPT}")):
        rows.append(measurement(cells[d], "asr_tba", qualifier=f"source={source}", value=0.5, evaluator="tba"))
    rows.append(measurement(cells["ft"], "asr_tba", value=0.6, evaluator="tba"))
    rows.append(measurement(cells["ft"], "asr_tba", qualifier="control=guaa;source=anp", value=0.1, evaluator="tba"))
    for d, shift in (("none", 0.9), ("ft", 0.25), ("anp", -0.05)):
        rows.append(measurement(cells[d], "shift_target_net", value=shift, evaluator="target_shift"))
    rows.append(
        measurement(
            cells["ft"], "shift_target_net", value=7.0, evaluator="target_shift", qualifier="control=clean;model=0"
        )
    )
    other = cell_row("badnets", 0.1, "ft", 1, o_asr=0.1)
    rows.append(measurement(other, "p_asr_qra", qualifier="on=anp", value=0.77, evaluator="qra"))
    folder = write_run(tmp_path_factory.mktemp("run") / "r", [*cells.values(), other], rows)
    out = build([folder], tmp_path_factory.mktemp("site") / "out").parent
    found = {d: read(out / href("cells", c["cell"])) for d, c in cells.items()}
    found |= {name: read(out / f"{name}.html") for name in ("index", "tracks", "table", "heatmap")}
    return found | {"other seed": read(out / href("cells", other["cell"]))}


def test_what_carries_over_is_drawn_as_a_matrix(carried: dict[str, Page]) -> None:
    page = carried["none"]
    assert not page.wrong
    qra, tba = (t for t in page.root.all("svg") if "chart" in t.attrs["class"])
    titles = {t.text: a.attrs["href"] for a in qra.all("a") for t in a.all("title") if "tried on" in t.text}
    ft = href("cells", "digits/small_resnet/badnets@0.1/ft/s0")
    assert titles["learnt on ft, tried on anp: P-ASR (QRA) 36.0 %"] == f"../{ft}"
    assert titles["learnt on ft, tried on ft: P-ASR (QRA) 64.0 %"] == f"../{ft}"
    squares = [t for t in qra.all("rect") if t.attrs["class"] == "dot s0"]
    assert len(squares) == 6, "three of their own and three carried over; neither the control nor the other seed"
    sides = sorted(float(t.attrs["width"]) for t in squares)
    assert sides[0] == 0 and sides[1] / sides[2] == pytest.approx(0.5 / 0.6, abs=0.01)
    assert all("style" not in t.attrs for t in page.tags)
    # Of a transfer attack the row is the source, which may be of another architecture; no square for all together.
    said = {t.text for a in tba.all("a") for t in a.all("title") if "learnt on anp, " in t.text}
    assert said == {"learnt on anp, tried on ft: ASR (TBA) 50.0 %"}
    assert len(tba.all("rect")) == 2 and SCRIPT in tba.text


def test_the_matrix_stands_where_it_is_read(carried: dict[str, Page]) -> None:
    names = ("none", "ft", "anp", "fst", "clp", "other seed")
    shown = {d: sum("carried-" in t.attrs.get("id", "") for t in carried[d].tags) for d in names}
    # `fst` was only tried on, `clp` has nothing, and the other seed has one model with such figures.
    assert shown == {"none": 2, "ft": 2, "anp": 2, "fst": 0, "clp": 0, "other seed": 0}


def test_target_shift_stands_beside_bec(carried: dict[str, Page]) -> None:
    metric = "shift_target_net"
    figures_ = [t for t in carried["tracks"].by_id("board-1").all("td") if t.attrs.get("data-metric") == metric]
    assert sorted(t.attrs["data-order"] for t in figures_ if t.attrs["data-order"]) == ["-0.05", "0.25", "0.9"]
    assert any("Target shift net" in t.text for t in carried["table"].root.all("th"))
    assert carried["heatmap"].by_id(f"heat-1-{metric}")
    (picture,) = [d for d in carried["index"].root.all("details") if "Target shift net" in d.all("summary")[0].text]
    said = {t.text for a in picture.all("a") for t in a.all("title")}
    assert {t.partition(":")[0] for t in said} == {"none", "ft", "anp"} and any(
        "Target shift net 0.25" in t for t in said
    )
    assert "needs no attacked model" in picture.text and "BEC" not in picture.text
    (headline,) = [t for t in carried["ft"].by_id("headline").all("td") if t.attrs.get("data-metric") == metric]
    assert headline.text == "0.25"


def test_labels_stand_apart_and_none_above_the_picture() -> None:
    heights = charts.spread([(500.0, 20.0, 90.0)] * 6)
    assert min(heights) >= charts.HIGHEST
    assert all(b - a >= 13 for a, b in itertools.pairwise(sorted(heights)))
    assert charts.spread([(0.0, 100.0, 90.0), (91.0, 100.0, 90.0)]) == [100.0, 100.0], "the first ends before"
    assert charts.spread([(0.0, 100.0, 92.0), (91.0, 100.0, 5.0)]) != [100.0, 100.0], "the first reaches the second"


def test_labels_are_whole_at_the_right_end_and_in_front_of_all_whiskers(tmp_path: Path) -> None:
    names = ["ft_same_budget:fine_pruning", "ft_same_budget:ft_sam"]
    cells = [
        cell_row("badnets", 0.1, d, s, c_acc=0.9, o_asr=0.9 + 0.1 * s, p_asr=None, bec=0.9 + 0.1 * s)
        for d in names
        for s in (0, 1)
    ]
    build([write_run(tmp_path / "r", cells, [])], tmp_path / "site")
    svg = next(t for t in read(tmp_path / "site" / "index.html").root.all("svg") if "BEC" in t.text)
    wide = float(svg.attrs["viewbox"].split()[2])
    labels = [t for t in svg.all("text") if t.attrs["class"] == "label"]
    assert [t.text for t in labels] == names
    assert all(float(t.attrs["x"]) + charts.LETTER * len(t.text) <= wide for t in labels)
    order = [t.attrs.get("class") for t in svg.children]
    last = max(i for i, c in enumerate(order) if c == "whisker")
    assert order.index("defense") > last, "a whisker behind a label would strike it through"
