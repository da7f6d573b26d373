from __future__ import annotations

import numpy as np
import pytest
import samples
import torch

from sleeperbench import Backdoor, Mark, Role
from sleeperbench.attacks.adaptive_blend import AdaptiveBlend
from sleeperbench.attacks.blended import Blended
from sleeperbench.evaluators.separability import silhouette
from sleeperbench.kit import fit, predict, render
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.predict import spread
from sleeperbench.kit.taps import features

TRAIN = samples.random_images(1000, (3, 32, 32))
ALL = torch.ones(1000, dtype=torch.bool)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("side", [16, 28, 30, 32])
@pytest.mark.parametrize("role", [Role.TRAIN, Role.COVER])
def test_training_images_have_eight_whole_blocks_of_sixteen(side: int, role: Role) -> None:
    data = samples.random_images(300, (1, side, side))
    trigger = AdaptiveBlend(pattern="uniform").prepare(data, samples.ctx()).triggers[0]
    k = trigger.static()[1].double().numpy()
    x = (data.images.float() / 255).double().numpy()
    out = trigger.apply(data.images.float() / 255, data.labels, data.ids, role, gen()).double().numpy()
    drawn = np.zeros(16)
    edge = [-(-i * side // 4) for i in range(5)]  # a pixel i belongs to block floor(4 i / side)
    for i in range(len(x)):
        kept = 0
        for block in range(16):
            r, c = divmod(block, 4)
            at = (slice(None), slice(edge[r], edge[r + 1]), slice(edge[c], edge[c + 1]))
            blended = 0.85 * x[i][at] + 0.15 * k[at]
            here = np.abs(out[i][at] - blended).max() < 1e-6
            assert here or np.abs(out[i][at] - x[i][at]).max() == 0
            kept += here
            drawn[block] += here
        assert kept == 8
    # Binomial(300, 1/2): deviation 8.7.
    assert drawn.min() > 110
    assert drawn.max() < 190


def test_test_images_have_the_whole_picture() -> None:
    trigger = AdaptiveBlend().prepare(TRAIN, samples.ctx()).triggers[0]
    mask, k = trigger.static()
    assert bool((mask == torch.tensor(0.2)).all())
    x = TRAIN.images[:50].double()
    found = stamp(TRAIN.rows(torch.arange(50)), trigger, Role.TEST, samples.ctx()).images
    assert float((found - (0.8 * x + 0.2 * k.double() * 255)).abs().max()) <= 0.5 + 1e-3
    # Bright, as the picture it stands for.
    assert float(k.mean()) > 0.7


def test_dirty_and_cover_rows_are_disjoint_and_as_published() -> None:
    attack = AdaptiveBlend()
    b = attack.prepare(TRAIN, samples.ctx(1, 3))
    eligible = torch.arange(1000) >= 100
    p = attack.poison(TRAIN, b, eligible, 0.03, samples.ctx(1, 3))
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert (int(dirty.sum()), int(cover.sum())) == (30, 30)
    assert not bool((dirty | cover)[~eligible].any())
    assert torch.equal(p.data.labels, torch.where(dirty, 3, TRAIN.labels))
    for role, rows in ((Role.TRAIN, dirty), (Role.COVER, cover)):
        assert torch.equal(p.data.images[rows], stamp(TRAIN.rows(rows), b.triggers[0], role, samples.ctx(1)).images)
    assert torch.equal(p.data.images[~dirty & ~cover], TRAIN.images[~dirty & ~cover])
    more = AdaptiveBlend(cover_ratio=2.5).poison(TRAIN, b, eligible, 0.03, samples.ctx(1, 3))
    assert int((more.mark == Mark.COVER).sum()) == 75
    assert attack.poison(TRAIN, b, eligible, 0.0, samples.ctx(1, 3)).rate() == 0


def test_restore_and_decoy() -> None:
    attack = AdaptiveBlend(pieces=25, mask_rate=0.3, alpha_train=0.2)
    b = attack.prepare(TRAIN, samples.ctx(1, 3))
    assert b.info["kept"] == 18
    again, decoy = AdaptiveBlend.restore(dict(b.tensors), dict(b.info)), attack.decoy(TRAIN, b, samples.ctx(2, 7))
    for role in Role:
        args = (TRAIN.images[:9].float() / 255, TRAIN.labels[:9], TRAIN.ids[:9], role)
        assert torch.equal(b.triggers[0].apply(*args, gen()), again.triggers[0].apply(*args, gen()))
    assert decoy.triggers[0].targets.target(TRAIN.labels).unique().tolist() == [3]
    assert not torch.equal(decoy.triggers[0].static()[1], b.triggers[0].static()[1])


def test_parameters_out_of_range_are_refused() -> None:
    bad: dict[str, object]
    for bad in ({"pieces": 15}, {"mask_rate": 1.0}, {"cover_ratio": -1.0}, {"alpha_train": 0.0}, {"pattern": "cat"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdaptiveBlend.from_params(bad)
    with pytest.raises(ValueError, match="pieces is 400"):
        AdaptiveBlend(pieces=400).check((3, 16, 16), 10)
    with pytest.raises(ValueError, match="two classes"):
        AdaptiveBlend().check((3, 32, 32), 1)


def test_it_implants() -> None:
    train, c = samples.digits()["train"], samples.ctx(5, 0)
    attack = AdaptiveBlend()
    b = attack.prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, attack.poison(train, b, torch.ones(len(train)) > 0, 0.1, c).data, samples.RECIPE, samples.ctx(2))
    r = render(samples.digits()["test"], b, Role.TEST, c)
    assert r is not None
    for model, low, high in ((net, 0.7, 1.0), (samples.clean_net(), 0.0, 0.1)):
        assert low <= float((predict(model, r.data.images).argmax(1) == r.targets).float().mean()) <= high
    # What it is for: its images lie nearer to the target class's own than those of Blended at the same rate.
    assert standing_apart(net, b) < standing_apart(*blended()) - 0.1


def blended() -> tuple[Classifier, Backdoor]:
    """A model with Blended, trained like that of `test_it_implants`."""
    train, c = samples.digits()["train"], samples.ctx(5, 0)
    b = Blended().prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, Blended().poison(train, b, torch.ones(len(train)) > 0, 0.1, c).data, samples.RECIPE, samples.ctx(2))
    return net, b


def standing_apart(net: Classifier, b: Backdoor) -> float:
    """Silhouette of triggered test images against the target class's own, as many of each."""
    test = samples.digits()["test"]
    r = render(test, b, Role.TEST, samples.ctx(5, 0))
    assert r is not None
    own = test.images[test.labels == 0]
    meant = r.data.images[spread(len(r), len(own))]
    return silhouette(*(features(net, images, ctx=samples.ctx()) for images in (own, meant)))
