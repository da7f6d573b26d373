from __future__ import annotations

import numpy as np
import pytest
from scipy.fft import dctn

from sleeperbench.kit.dct import cosines


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (12, 20)])
def test_transform_is_one_at_the_places_and_zero_elsewhere(size: tuple[int, int]) -> None:
    places = [(0, 0), (3, 0), (5, 7), (size[0] - 1, size[1] - 1)]
    expected = np.zeros(size)
    for place in places:
        expected[place] = 1
    assert np.abs(dctn(cosines(*size, places).double().numpy(), norm="ortho") - expected).max() < 1e-6


def test_places_beyond_the_transform_are_refused() -> None:
    for place in ((16, 0), (0, 12), (-1, 3)):
        with pytest.raises(ValueError, match="outside a transform of 16x12"):
            cosines(16, 12, [place])
