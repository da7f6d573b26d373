from __future__ import annotations

import pytest
import torch

from sleeperbench.engine.loading import be_deterministic


@pytest.mark.parametrize(("device", "asked"), [("cuda", True), ("cpu", False)])
def test_an_accelerator_is_asked_for_repeatable_float32(device: str, asked: bool) -> None:
    was = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    try:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32 = True
        be_deterministic(device)
        assert torch.are_deterministic_algorithms_enabled() is asked
        assert torch.backends.cudnn.allow_tf32 is not asked
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.backends.cudnn.allow_tf32 = was[1]
