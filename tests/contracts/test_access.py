from __future__ import annotations

import pytest

from sleeperbench import Access


@pytest.mark.parametrize(
    ("access", "track"),
    [
        (Access(model="none", clean=0), "T0"),
        (Access(clean=0), "T0"),
        (Access(), "T1"),
        (Access(model="none", clean=100), "T1"),
        (Access(references=1), "T1R"),
        (Access(clean=0, references=2), "T0R"),
        (Access(clean=0, train=True), "T2"),
        (Access(train=True, control=True), "T3"),
        (Access(train=True, references=1), "T3R"),
        (Access(model="labels"), "Q"),
        (Access(model="scores", clean=0), "Q"),
        (Access(model="scores", references=1), "QR"),
        (Access(model="none", clean=0, references=1, oracle=True), "T4"),
    ],
)
def test_the_access_class(access: Access, track: str) -> None:
    assert access.track() == track
