from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from synthetic import png, write_media

from sleeperbench.leaderboard import charts, media


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
