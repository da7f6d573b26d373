"""How the test files are handed out."""

from __future__ import annotations

from pathlib import Path

import pytest
from pieces import LONGEST, piece


def test_files_that_are_handed_out_first_exist() -> None:
    assert [name for name in LONGEST if not (Path(__file__).parent / name).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("tests/kit/test_pgd.py::test_a[defense/pam]", "tests/kit/test_pgd.py"),
        ("::test_contract[attack/belt:iad-shapes]", "::attack"),
        ("::test_contract[defense/anp-acts]", "::defense"),
        ("::test_contract[defense/pam-acts]", "::defense m-z"),
        ("::test_one_case_more[evaluator/ra-preact]", "::evaluator"),
        ("::test_all_are_registered", "::attack"),
        ("::test_of_another_kind[7]", "::attack"),
    ],
)
def test_methods_of_a_kind_stay_together(node: str, expected: str) -> None:
    file = f"tests/{LONGEST[0]}" if node.startswith("::") else ""
    assert piece(file + node) == (file + expected if node.startswith("::") else expected)
