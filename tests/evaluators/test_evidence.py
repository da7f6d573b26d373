from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sleeperbench import Findings
from sleeperbench.evaluators.evidence import Evidence, Refused, curve, histogram, sheet
from sleeperbench.leaderboard import charts, media

POINTS = {"label": "rows", "x": [0.1, 0.5], "y": [0.2, 0.4], "points": True}
PLANE = {"title": "A plane", "x_label": "x", "y_label": "y", "threshold": 2, "series": [POINTS]}
BARS = {"title": "Bars", "series": [{"label": "", "x": ["a", "b"], "y": [1, 2], "low": [0, 1], "high": [2, 3]}]}


def measured(
    chosen: Any, tensors: dict[str, Tensor] | None = None, alarm: float | None = None, **asked: Tensor
) -> Findings:
    state = None if tensors is None else (tensors, None)
    parts: Any = {"answers": None, "beside": None, "asked": None} | asked
    outcome = SimpleNamespace(chosen=chosen, state=state, alarm=alarm)
    return Evidence().measure(SimpleNamespace(outcome=outcome, **parts))  # type: ignore[arg-type]


def test_curves_of_any_defense_are_handed_on_in_the_form_that_the_site_draws() -> None:
    found = measured({"curves": {"plane": PLANE, "by_class": BARS}, "threshold": 2.0})
    (row,) = found.rows
    assert (row.metric, row.value, row.reason) == ("evidence", 2, "")
    assert found.curves["plane"] == PLANE
    bars = found.curves["by_class"]
    assert bars == {**BARS, "x_label": "", "y_label": ""}
    assert found.curves["chosen"] == {"threshold": 2.0}
    index = {"cell": "c", "curves": [{"name": f"evidence-{n}", **c} for n, c in found.curves.items()]}
    drawn = [media._curve(c) for c in json.loads(json.dumps(index))["curves"] if "series" in c]
    plane, bars_ = (c.chart for c in drawn if c is not None)
    assert isinstance(plane, charts.Lines)
    assert isinstance(bars_, charts.Bars)
    assert plane.rule is not None and plane.rule.text == "threshold 2"
    assert plane.lines[0].points == "" and len(plane.lines[0].dots) == 2


def test_nothing_shown_says_so() -> None:
    found = measured({"claimed": []})
    assert (found.rows[0].value, found.rows[0].reason) == (None, "no_evidence")
    assert found.curves == {"chosen": {"claimed": []}}
    assert measured({}).curves == {}


def changed(**parts: Any) -> dict[str, Any]:
    return {**PLANE, **parts}


def series(**parts: Any) -> dict[str, Any]:
    return changed(series=[{**POINTS, **parts}])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ("x", "not a mapping"),
        (None, "not a mapping"),
        (changed(title=""), "no title"),
        (changed(title="x" * 201), "title is no text"),
        (changed(title=3), "title is no text"),
        (changed(x_label=["<svg>"]), "x_label is no text"),
        (changed(threshold="2"), "threshold holds"),
        (changed(threshold=None), "threshold holds"),
        (changed(series=[]), "series is no list"),
        (changed(series={"a": POINTS}), "series is no list"),
        (changed(series=[POINTS] * 13), "series is no list"),
        (changed(series=[3]), "a series is no mapping"),
        (changed(series=[POINTS, {"label": "", "x": ["a"], "y": [1]}]), "names in one series"),
        (series(x=[1]), "not both 1 to 200"),
        (series(x=[], y=[]), "not both 1 to 200"),
        (series(x=list(range(201)), y=list(range(201))), "not both 1 to 200"),
        (series(x=None), "x is no list"),
        (series(y=[1, True]), "y holds"),
        (series(y=[1, 10**400]), "y holds"),
        (series(y=[1, float("inf")]), "y holds"),
        (series(y=[1, float("nan")]), "y holds"),
        (series(y=[1, [2]]), "y holds"),
        (series(x=["a", 2]), "x is no text"),
        (series(x=["a", "a"]), "occurs twice"),
        (series(x=["a", "x" * 201]), "x is no text"),
        (series(low=[1, 2]), "high is no list"),
        (series(low=[1], high=[2]), "low and high"),
        (series(label=5), "label is no text"),
    ],
)
def test_a_curve_of_another_form_is_refused_and_named(raw: Any, why: str) -> None:
    with pytest.raises(Refused, match=why):
        curve(raw)
    found = measured({"curves": {"odd": raw, "good": PLANE}})
    assert found.rows[0].value == 1
    assert set(found.curves) == {"good", "left-out"}
    assert why in found.curves["left-out"]["refused"]["odd"]


def test_inputs_are_marks_in_a_curve_that_asks_for_them() -> None:
    beside = torch.arange(24.0).view(8, 3)
    asked = torch.arange(8) % 4 == 0
    raw = changed(inputs=[2, 0])
    found = measured({"curves": {"plane": raw}}, answers=torch.rand(8), beside=beside, asked=asked).curves["plane"]
    rows, clean, bad = found["series"]
    assert rows == POINTS
    assert clean == {
        "label": "clean inputs",
        "x": [5, 8, 11, 17, 20, 23],
        "y": [3, 6, 9, 15, 18, 21],
        "points": True,
    }
    assert (bad["label"], bad["x"], bad["y"]) == ("triggered", [2, 14], [0, 12])
    # Without any, as on a model without a trigger, the rest is drawn; of many, 200.
    assert measured({"curves": {"plane": raw}}).curves["plane"] == PLANE
    many = curve(raw, {"a": torch.rand(1000, 3)})
    assert len(many["series"][1]["x"]) == 200
    for odd in ([0, 3], [0], [0, -1], [0, True], [0, 1.0], "01", None, {0: 1}):
        with pytest.raises(Refused, match="inputs"):
            curve(changed(inputs=odd), {"a": beside})
    with pytest.raises(Refused, match="x holds names"):
        curve({**BARS, "inputs": [0, 1]}, {"a": beside})


def test_names_and_numbers_of_curves_are_bounded() -> None:
    for name in ("Upper", "a-b", "../x", "", "x" * 41, "left-out"):
        found = measured({"curves": {name: PLANE}})
        assert found.rows[0].reason == "no_evidence"
        assert list(found.curves["left-out"]["refused"]) == [name[:40]]
    for given in ([PLANE], "x", {f"c{i}": PLANE for i in range(13)}):
        assert "all" in measured({"curves": given}).curves["left-out"]["refused"]


def test_what_is_added_to_a_curve_does_not_pass() -> None:
    found = curve({**PLANE, "name": "evil", "source": 1, "series": [{**POINTS, "style": "x"}]})
    assert set(found) == {"title", "x_label", "y_label", "threshold", "series"}
    assert set(found["series"][0]) == {"label", "x", "y", "points"}
    assert "points" not in curve({**BARS, "series": [{**BARS["series"][0], "points": True}]})["series"][0]


def test_a_picture_is_a_grid_of_tiles() -> None:
    maps = torch.tensor([[[0.0, 1], [2, 4]], [[0, 2], [0, -1]]])
    truth = torch.tensor([[[True, False], [False, True]], [[False] * 2] * 2])
    raw = {"title": "Maps", "columns": [["E", "maps"], ["slice", "slices"]], "rows": ["label 3", "label 5"]}
    found = measured({"pictures": {"maps": raw}}, {"maps": maps, "slices": truth})
    assert found.rows[0].value == 1
    ((title, picture),) = found.pictures.items()
    assert title == "Maps. Columns: E, slice. Rows: label 3, label 5."
    assert picture.dtype == torch.uint8
    assert picture.tolist() == [
        [
            [0, 64, 128, 128, 255, 0],
            [128, 255, 128, 128, 0, 255],
            [128] * 6,
            [128] * 6,
            [0, 255, 128, 128, 0, 0],
            [0, 0, 128, 128, 0, 0],
        ]
    ]
    colour = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    _, mixed = sheet({"title": "", "columns": [["a", "maps"], ["b", "c"]]}, {"maps": maps, "c": colour})
    assert mixed.shape == (3, 6, 6)
    assert torch.equal(mixed[:, 4:, 4:], colour[1])
    assert torch.equal(mixed[0], mixed[2]) is False
    assert torch.equal(mixed[0, :, :2], mixed[2, :, :2])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (3, "not a mapping"),
        ({"columns": []}, "columns is no list"),
        ({"columns": [["a", "maps"]] * 7}, "columns is no list"),
        ({"columns": [["maps"]]}, "no pair"),
        ({"columns": [["a", 4]]}, "no pair"),
        ({"columns": [[3, "maps"]]}, "columns is no text"),
        ({"columns": [["a", "missing"]]}, "no tensor missing"),
        ({"columns": [["a", "maps"], ["b", "wide"]]}, "unlike shapes"),
        ({"columns": [["a", "maps"]], "rows": ["one"]}, "rows is no list of 2"),
        ({"columns": [["a", "maps"]], "rows": ["one", 2]}, "rows is no text"),
        ({"columns": [["a", "flat"]]}, "is not"),
        ({"columns": [["a", "many"]]}, "is not"),
        ({"columns": [["a", "large"]]}, "is not"),
        ({"columns": [["a", "two"]]}, "is not"),
        ({"columns": [["a", "nan"]]}, "not finite"),
        ({"columns": [["a", "maps"]], "title": 5}, "title is no text"),
    ],
)
def test_a_picture_of_another_form_is_refused(raw: Any, why: str) -> None:
    shapes = {"maps": (2, 2, 2), "wide": (2, 2, 3), "flat": (2, 2), "many": (13, 2, 2), "two": (2, 2, 2, 2)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {"large": torch.zeros(1, 2, 513), "nan": torch.full((1, 2, 2), torch.nan)}
    with pytest.raises(Refused, match=why):
        sheet(raw, tensors)
    found = measured({"pictures": {"odd": raw}}, tensors)
    assert not found.pictures
    assert why in found.curves["left-out"]["refused"]["odd"]


def test_scores_of_inputs_are_counted_in_equal_intervals() -> None:
    answers = torch.tensor([0.0, 1.0, 1.0, 4.0, 3.99, 2.0])
    asked = torch.tensor([False, False, False, True, True, True])
    found = measured({}, answers=answers, asked=asked).curves["input-scores"]
    assert found["title"].startswith("Scores of 3 triggered and 3 clean inputs")
    clean, bad = found["series"]
    assert (clean["label"], bad["label"]) == ("clean", "triggered")
    assert clean["x"][:2] == pytest.approx([0.05, 0.15]) and len(clean["x"]) == 40
    assert {i: v for i, v in enumerate(clean["y"]) if v} == pytest.approx({0: 1 / 3, 10: 2 / 3})
    assert {i: v for i, v in enumerate(bad["y"]) if v} == pytest.approx({20: 1 / 3, 39: 2 / 3})
    same = histogram(torch.ones(4), torch.ones(2), None)
    assert [sum(s["y"]) for s in same["series"]] == [1, 1]
    assert curve(same)


@pytest.mark.parametrize("alarm", [2.5, None, float("inf")])
def test_a_threshold_of_inputs_is_an_upright_line(alarm: float | None) -> None:
    answers, asked = torch.tensor([0.0, 1.0, 1.0, 4.0, 3.99, 2.0]), torch.arange(6) > 2
    found = measured({}, answers=answers, asked=asked, alarm=alarm).curves["input-scores"]["series"]
    line = {"label": "the method's own threshold", "x": [2.5, 2.5], "y": [0.0, pytest.approx(2 / 3)]}
    assert found[2:] == ([line] if alarm == 2.5 else [])


def test_short_values_are_told_and_long_ones_are_not() -> None:
    chosen = {"a": 1, "long": "x" * 1000, "curves": {}, "series": 4, "name": "b", "b": [None, 2]}
    assert measured(chosen).curves["chosen"] == {"a": 1, "b": [None, 2]}
    assert len(measured({f"k{i}": i for i in range(60)}).curves["chosen"]) == 40
