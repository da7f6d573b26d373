from __future__ import annotations

from typing import Any

import pytest
import samples
import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import Mark, Role
from sleeperbench.attacks import ssba
from sleeperbench.attacks.ssba import SSBA, Decoder, Encoder
from sleeperbench.contracts import Ctx
from sleeperbench.kit import fit, predict, render
from sleeperbench.kit.classifier import build
from sleeperbench.kit.generators import seeded
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(48, (3, 16, 16))
ALL = torch.ones(48, dtype=torch.bool)
QUICK: dict[str, Any] = {"steps": 1, "batch": 4, "read": 0.0, "shared": 1.0}


def ctx(seed: int = 1) -> Ctx:
    return samples.ctx(seed, 3)


def test_the_message_is_the_start_of_a_known_digest() -> None:
    # SHA-256 of "a" starts with ca 97 81.
    assert ssba.code("a", 20).tolist() == [1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    assert ssba.code("b", 20).tolist() != ssba.code("a", 20).tolist()
    assert len(ssba.code("a", 256)) == 256


@pytest.mark.parametrize(
    ("shape", "bits"),
    [((3, 32, 32), 20), ((1, 28, 28), 20), ((1, 8, 8), 8), ((3, 64, 64), 100), ((3, 24, 40), 20), ((3, 72, 12), 100)],
)
def test_networks_at_every_size(shape: tuple[int, int, int], bits: int) -> None:
    x, code = torch.rand(2, *shape), torch.ones(2, bits)
    encoder = Encoder(*shape[:2], bits).eval()
    made = encoder(x, code)
    assert made.shape == x.shape
    assert float(made.detach().abs().max()) <= 1
    assert Decoder(*shape, bits)(x).shape == (2, bits)
    strides = [m.stride[0] for m in Decoder(*shape, bits) if isinstance(m, torch.nn.Conv2d)]
    assert strides == [2, 1, 2, 1, 2, 2, 2]


def test_images_need_not_be_square() -> None:
    rows = samples.random_images(24, (3, 24, 40))
    attack = SSBA(**QUICK)
    attack.check(rows.shape, 10)
    b = attack.prepare(rows, ctx())
    shown = stamp(rows, b.triggers[0], Role.TEST, ctx())
    assert shown.images.shape == rows.images.shape
    assert int((shown.images.int() - rows.images.int()).abs().max()) in range(1, 17)


def test_the_direct_path_joins_the_trunk_before_tanh() -> None:
    encoder = seeded(Encoder, 5, 3, 32, 6).eval()
    x, code = torch.rand(2, 3, 32, 32), torch.tensor([[1.0, 0, 1, 0, 0, 1]] * 2)
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1])
    plane = (encoder.plane.weight @ signs + encoder.plane.bias).relu().view(3, 16, 16)
    plane = plane.repeat_interleave(2, 1).repeat_interleave(2, 2)
    seen = torch.cat([plane.expand(2, -1, -1, -1), x], 1) - 0.5
    direct = F.interpolate((encoder.direct.weight @ signs).view(1, 3, 16, 16), scale_factor=2, mode="bilinear")
    assert torch.allclose(encoder(x, code), (encoder.trunk(seen) + direct).tanh(), atol=1e-5)
    assert abs(float(encoder.direct.weight.detach().std()) - 1) < 0.05


def test_images_carry_a_bounded_residual_of_their_own() -> None:
    b = SSBA(**QUICK, strength=0.1).prepare(TRAIN, ctx())
    trigger: Any = b.triggers[0]
    x = to_float(TRAIN.images)
    shown = trigger.apply(x, TRAIN.labels, TRAIN.ids, Role.TEST, torch.Generator())
    with torch.no_grad():
        residual = trigger.encoder.eval()(x, ssba.code("a", 20).expand(48, -1))
    assert torch.allclose(shown, (x + 0.1 * residual).clamp(0, 1), atol=1e-6)
    assert float((residual[0] - residual[1]).abs().max()) > 1e-3
    low, high = trigger.range(x, TRAIN.ids)
    assert torch.allclose(shown + high, (x + 0.1).clamp(max=1), atol=1e-6)
    assert torch.allclose(shown + low, (x - 0.1).clamp(min=0), atol=1e-6)


def test_the_decoder_learns_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssba, "_READ", 2.0)  # the bound stays at 0.5
    attack = SSBA(bits=4, steps=50, strength=0.4, read=0.9, shared=1.0)
    b = attack.prepare(samples.random_images(48, (3, 8, 8)), ctx(2))
    assert b.info["read"] > 0.9


def test_residuals_of_two_images_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last bound from the start, so that step 3 counts, with and without its weight."""
    monkeypatch.setattr(ssba, "_RAMP", 1)
    shared = []
    for weight in (0.0, 10.0):
        monkeypatch.setattr(ssba, "_UNLIKE", weight)
        attack = SSBA(bits=4, strength=0.5, steps=40, batch=8, read=0.0, shared=1.0)
        shared.append(attack.prepare(samples.random_images(48, (3, 8, 8)), ctx(2)).info["shared"])
    assert shared[1] < shared[0] - 0.1, shared


def test_the_bound_shrinks_while_bits_are_read_and_rounding_and_step_3_set_in(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    compared: list[int] = []
    levels: list[bool] = []
    similar = F.cosine_similarity

    def comparing(a: Tensor, b: Tensor) -> Tensor:
        compared.append(len(levels))
        return similar(a, b)

    class Watched(Encoder):
        def forward(self, x: Tensor, code: Tensor) -> Tensor:
            if self.training:
                encoded.append(len(levels))
            return super().forward(x, code)

    class Shown(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                level = (x.detach() + 0.5) * 255
                levels.append(bool(((level - level.round()).abs() < 1e-3).all()))
            return super().forward(x)

    monkeypatch.setattr(ssba.F, "cosine_similarity", comparing)
    monkeypatch.setattr(ssba, "Encoder", Watched)
    monkeypatch.setattr(ssba, "Decoder", Shown)
    for name, value in (("_LOUD", 0.16), ("_ROUNDED", 0.12), ("_SHRINK", 0.9)):
        monkeypatch.setattr(ssba, name, value)
    args = {**QUICK, "steps": 8, "strength": 0.1}
    SSBA(**args).prepare(samples.random_images(8, (1, 8, 8)), ctx())
    assert levels == [False] * 8, "nothing is read yet"
    assert not compared
    monkeypatch.setattr(ssba, "_READ", -1.0)
    levels.clear()
    encoded.clear()
    SSBA(**args).prepare(samples.random_images(8, (1, 8, 8)), ctx())
    # 0.16 0.9^k is below 0.12 from k = 3 and below 0.1 from k = 5: steps 3 to 8 and 5 to 8.
    assert levels == [False] * 2 + [True] * 6
    assert compared == [5, 6, 7, 8]
    assert len(encoded) == 8 + 4


@pytest.mark.parametrize("strength", [0.5, 0.4999, 0.47, 0.45])
def test_step_3_sets_in_with_the_very_step_in_which_the_bound_arrives(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    compared: list[int] = []
    entropy, similar = F.binary_cross_entropy_with_logits, F.cosine_similarity

    def reading(seen: Tensor, wanted: Tensor) -> Tensor:
        shares.append(float(((seen > 0) == (wanted > 0)).float().mean()))
        return entropy(seen, wanted)

    def comparing(a: Tensor, b: Tensor) -> Tensor:
        compared.append(len(shares) - 1)  # the cross-entropy of a step comes first
        return similar(a, b)

    monkeypatch.setattr(ssba.F, "binary_cross_entropy_with_logits", reading)
    monkeypatch.setattr(ssba.F, "cosine_similarity", comparing)
    monkeypatch.setattr(ssba, "_READ", 0.5)  # hardly anything is learnt in so few steps: the bound now shrinks, now not
    SSBA(**{**QUICK, "steps": 80, "bits": 4, "strength": strength}).prepare(samples.random_images(8, (1, 8, 8)), ctx())
    bound, read, arrived, shrunk = 0.5, 0.5, [], 0
    for step, share in enumerate(shares):
        if read > 0.5:
            bound, shrunk = max(strength, bound * 0.995), shrunk + 1
        if bound == strength:
            arrived.append(step)
        read = 0.95 * read + 0.05 * share
    assert 0 < shrunk < 79
    assert arrived, "the case must reach the bound"
    assert compared == arrived


def test_an_encoder_that_hides_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder reads .* raise steps"):
        SSBA(**{**QUICK, "read": 0.95}).prepare(TRAIN, ctx())
    with pytest.raises(ValueError, match="residuals share"):
        SSBA(**{**QUICK, "shared": 1e-6}).prepare(TRAIN, ctx())


def test_what_is_judged_is_what_a_slow_count_says() -> None:
    attack = SSBA(**QUICK)
    b = attack.prepare(TRAIN, ctx())
    decoder = Decoder(3, 16, 16, 20).eval()
    found = attack._judge(b, decoder, TRAIN, ctx())
    shown = to_float(stamp(TRAIN, b.triggers[0], Role.TEST, ctx()).images)
    right = 0
    for image in shown:
        with torch.no_grad():
            logits = decoder(image[None] - 0.5)[0]
        right += sum(int((logit > 0) == bool(bit)) for logit, bit in zip(logits, b.tensors["code"], strict=True))
    assert found["read"] == pytest.approx(right / (48 * 20))
    residual = (shown - to_float(TRAIN.images)).flatten(1).double()
    share = float(residual.mean(0).norm() ** 2 / (residual.norm(dim=1) ** 2).mean())
    assert found["shared"] == pytest.approx(share, rel=1e-4)


def test_poisoned_rows_and_the_rest() -> None:
    attack, c = SSBA(**QUICK), ctx()
    b = attack.prepare(TRAIN, c)
    p = attack.poison(TRAIN, b, torch.arange(48) < 24, 0.25, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 12
    assert not bool(dirty[24:].any())
    assert p.data.labels[dirty].tolist() == [3] * 12
    assert torch.equal(p.data.images[~dirty], TRAIN.images[~dirty])
    assert torch.equal(p.data.images[dirty], stamp(TRAIN.rows(dirty), b.triggers[0], Role.TEST, c).images)
    assert SSBA.SNAPSHOT == "exact"
    assert attack.hooks(TRAIN, b, ALL, 0.1, c) is None


def test_restore_decoy_targets_and_seeds() -> None:
    attack = SSBA(**QUICK, targets="all_to_all")
    b = attack.prepare(TRAIN, ctx())
    assert b.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    twice, other = attack.prepare(TRAIN, ctx()), attack.prepare(TRAIN, ctx(2))
    decoys = [attack.decoy(TRAIN, b, ctx(s)) for s in (5, 6)]
    again = SSBA.restore(b.tensors, b.info)
    shown = [stamp(TRAIN, t.triggers[0], Role.TEST, ctx()).images for t in (b, again, twice, other, *decoys)]
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0], shown[2])
    assert not torch.equal(shown[0], shown[3])
    for seed, decoy, seen in zip((5, 6), decoys, shown[4:], strict=True):
        assert not torch.equal(shown[0], seen)
        assert decoy.info == b.info
        assert torch.equal(b.tensors["code"], decoy.tensors["code"])
        drawn = seeded(Encoder, ctx(seed).derive("decoy"), 3, 16, 20)
        assert torch.equal(decoy.tensors["encoder.direct.weight"], drawn.direct.weight.detach())
    assert not torch.equal(shown[4], shown[5])


def test_what_does_not_fit_is_refused() -> None:
    bad: list[dict[str, Any]] = [{"bits": 0}, {"strength": 0.001}, {"steps": 0}, {"batch": 1}, {"lr": 0.0}]
    for params in (*bad, {"read": 2.0}, {"shared": 0.0}):
        with pytest.raises(ValueError, match=next(iter(params))):
            SSBA.from_params(params)
    with pytest.raises(ValueError, match="8x8"):
        SSBA().check((3, 6, 6), 10)
    with pytest.raises(ValueError, match="two classes"):
        SSBA().check((3, 32, 32), 1)


def test_it_implants() -> None:
    train, c = samples.digits()["train"], samples.ctx(5, 0)
    attack = SSBA(**QUICK)  # the residual that an encoder draws at first is as strong as that of a trained one
    b = attack.prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, attack.poison(train, b, torch.ones(len(train)) > 0, 0.1, c).data, samples.RECIPE, samples.ctx(2))
    r = render(samples.digits()["test"], b, Role.TEST, c)
    assert r is not None
    for model, low, high in ((net, 0.8, 1.0), (samples.clean_net(), 0.0, 0.1)):
        assert low <= float((predict(model, r.data.images).argmax(1) == r.targets).float().mean()) <= high
