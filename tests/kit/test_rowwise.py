from __future__ import annotations

import torch

from sleeperbench.kit.rowwise import uniform

MASK = 2**64 - 1


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mix(z: int) -> int:
    """SplitMix64's finaliser on Python's unbounded integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_numbers_equal_a_reference_in_unbounded_integers() -> None:
    seeds, ids = (0, 7, 2**62 + 12345), [0, 1, 99, 49_999]
    for seed in seeds:
        found = uniform(gen(seed), torch.tensor(ids), 3)
        assert found.dtype == torch.float32
        for i, row in zip(ids, found.tolist(), strict=True):
            start = mix(mix(seed) ^ i)
            expected = [(mix((start + k * 0x9E3779B97F4A7C15) & MASK) >> 40) / 2**24 for k in (1, 2, 3)]
            assert row == expected


def test_a_row_has_its_numbers_wherever_it_stands() -> None:
    ids = torch.arange(500)
    whole = uniform(gen(3), ids, 5)
    assert torch.equal(uniform(gen(3), ids.flip(0), 5).flip(0), whole)
    assert torch.equal(uniform(gen(3), ids[40:41], 5), whole[40:41])
    assert torch.equal(uniform(gen(3), ids, 2), whole[:, :2])
    used = gen(3)
    torch.rand(9, generator=used)
    assert torch.equal(uniform(used, ids, 5), whole)
    assert uniform(gen(3), ids[:0], 5).shape == (0, 5)


def test_numbers_are_uniform_and_independent() -> None:
    draws = torch.stack([uniform(gen(seed), torch.arange(2000), 4) for seed in range(20)]).double()
    assert 0 <= float(draws.min()) < 1e-3
    assert 1 - 1e-3 < float(draws.max()) < 1
    # 160,000 draws: the mean's deviation is 0.0007, each tenth holds 16,000 with a deviation of 120.
    assert abs(float(draws.mean()) - 0.5) < 0.003
    tenths = torch.histc(draws.float(), bins=10, min=0, max=1)
    assert float((tenths - 16_000).abs().max()) < 600
    z = (draws - 0.5) * 12**0.5
    for one, other in (
        (z[:, :-1], z[:, 1:]),
        (z[:-1], z[1:]),
        (z[..., :-1], z[..., 1:]),
    ):
        assert abs(float((one * other).mean())) < 0.015
