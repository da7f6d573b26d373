"""docs/check.md says of every check what the check says of itself."""

from __future__ import annotations

from pathlib import Path

from sleeperbench.testing.report import table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "check.md"


def test_the_page_has_the_table_of_all_checks() -> None:
    text = PAGE.read_text().partition("<!-- table -->\n")[2].partition("<!-- end -->")[0]
    assert text == table(), "docs/check.md: replace its table by what sleeperbench.testing.report.table() returns"
