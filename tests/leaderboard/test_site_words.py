from __future__ import annotations

import pytest
from page_reader import Page
from synthetic import cell_row, measurement

from sleeperbench.engine.registry import Registry
from sleeperbench.leaderboard import terms, words


def test_every_metric_has_a_heading_in_words() -> None:
    found = {m.name for p in Registry.discover("none").of("evaluator") for m in p.blueprint.metrics}
    assert {"asr", "excl", "cka", "p_asr_qra_net"} <= found
    assert found - terms.LABELS.keys() == set()
    assert len({*terms.LABELS.values()}) == len(terms.LABELS), "no two share one"


def test_what_is_read_in_words_names_no_column() -> None:
    raw = {m for m in terms.LABELS if "_" in m}
    named = {m: [r for r in raw if r in text.split()] for m, text in terms.READING.items()}
    assert {m: r for m, r in named.items() if r} == {}
    assert not terms.READING.keys() - terms.LABELS.keys()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (40_700.0, "40,700"),
        (9_999.4, "9999"),
        (9_999.5, "10,000"),
        (-123_456.7, "-123,457"),
        (999_999_999.0, "999,999,999"),
        (1e9, "1.000e+09"),
        (1234.5, "1234"),
        (0.12345, "0.1235"),
        (0.0, "0"),
        (5e-4, "5.000e-04"),
    ],
)
def test_large_counts_are_whole_numbers_with_commas(value: float, text: str) -> None:
    assert words.number(value, False) == text


def test_a_change_of_a_pixel_is_no_share_whoever_declares_it() -> None:
    assert words.is_share("asr_leak", {"asr_leak": "fraction", "linf": "fraction"})
    assert not words.is_share("linf", {"asr_leak": "fraction", "linf": "fraction"})


def test_a_row_about_a_surrogate_says_so() -> None:
    cell = cell_row("badnets", 0.1, "ft", 0, o_asr=0.03)
    empty = {"value": None, "status": "not_applicable", "reason": "not_purified"}
    own, other = (
        words.status_text(measurement(cell, "asr_tba", qualifier=q, **empty)) for q in ("model=0", "k=1;source=ft")
    )
    assert "O-ASR stays above" in own and "awake" in own
    assert "the model that the qualifier names" in other and "awake" not in other and "O-ASR" not in other
    shared = words.status_text(measurement(cell, "asr_tba", **empty | {"qualifier": "source=a", "reason": "nan"}))
    assert terms.REASONS["nan"] in shared, "reasons of no other meaning keep theirs"
    assert "awake" in words.status_text(cell | {"status": "failed", "reason": "not_purified"}), (
        "a cell has no qualifier"
    )


def test_without_a_verdict_the_reason_is_that_none_is_given() -> None:
    assert words.missing("verdict", "").text == "no verdict"
    assert "no reason was recorded" in words.missing("asr", "").title
    assert words.missing("verdict", "raised").text == "raised"


def test_the_protocol_explains_the_probes_that_have_columns(pages: dict[str, Page]) -> None:
    page = pages["protocol.html"]
    (heading,) = [t for t in page.root.all("h2") if t.attrs.get("id") == "probes"]
    told = " ".join(t.text for t in page.root.all("dt"))
    assert heading.text == "Other probes"
    for word in ("Excl", "LMC", "TAC", "CKA", "gUAA", "BEC", "WBA", "BBA", "TBA", "Target shift"):
        assert word in told, word
