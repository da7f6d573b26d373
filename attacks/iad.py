"""IAD (input-aware): a generator draws each image a trigger of its own, which must not work on another image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, TrainHooks
from sleeperbench.contracts import Ctx
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.drawn import Drawn, diversity, network, threshold
from sleeperbench.kit.generators import Hourglass, straight_through
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import rows_at, target_map

_BANK = 256
"""Training images whose triggers are shown as covers outside training."""
_MASK_DROPS = (10 / 25, 20 / 25)
_DROPS = (200 / 600, 300 / 600, 400 / 600, 500 / 600)
"""After which shares of the epochs the authors divide a generator's learning rate by 10."""


class IadHooks(TrainHooks):
    """Makes dirty and cross-triggered rows in every batch and trains the generator beside the classifier."""

    def __init__(self, attack: Iad, trigger: Drawn, train: ImageSet, eligible: Tensor, rate: float, ctx: Ctx):
        super().__init__()
        rows_at(rate, len(train))
        self.attack, self.targets, self.rate, self.ctx = attack, trigger.targets, rate, ctx
        self.pattern, self.mask = trigger.pattern.to(ctx.device).train(), trigger.mask.to(ctx.device).eval()
        self.mask.requires_grad_(False)
        self.aux.update(pattern=self.pattern, mask=self.mask)
        self.own = _adam(self.pattern, attack.generator_lr)
        self.spread: Tensor | None = None
        free = torch.zeros(int(train.ids.max()) + 1, dtype=torch.bool)
        free[train.ids.cpu()] = eligible.cpu()
        self.free = free.to(ctx.device)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 2 and 3 of `Iad`; gradients run back through the images into the generator."""
        share = self.rate * len(x)
        dirty = round((step + 1) * share) - round(step * share)  # adds up to the rate, also where `share` is below 1
        mark, self.spread = torch.zeros_like(y), None
        if dirty == 0:
            return x, y, mark
        free = self.free[ids]
        # Fixed numbers of rows, eligible ones first: counting those of a batch would wait for the device.
        rows = (~free).long().argsort(stable=True)[: dirty + round(self.attack.cross_ratio * dirty)]
        own, crossed = x[rows[:dirty]], x[rows[dirty:]]
        partner = x.roll(len(x) // 2, 0)[rows[dirty:]]  # rows are shuffled: another row is a row of another loader
        first = self.pattern(own)
        made = own + (first - own) * threshold(self.mask(own))
        if len(crossed):
            second = self.pattern(partner)
            made = torch.cat([made, crossed + (second - crossed) * threshold(self.mask(partner))])
            n = min(len(own), len(crossed))
            self.spread = diversity(own[:n], partner[:n], first[:n], second[:n])

        kind = torch.full_like(rows, Mark.COVER)
        kind[:dirty] = Mark.DIRTY
        may = free[rows]
        mark[rows] = torch.where(may, kind, 0)
        x = x.index_copy(0, rows, torch.where(may[:, None, None, None], straight_through(made), x[rows]))
        y = torch.where(mark == Mark.DIRTY, self.targets.target(y), y)
        return x.contiguous(memory_format=torch.channels_last), y, mark

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Step 4: one backward pass, an update of classifier and generator each."""
        opt.zero_grad(set_to_none=True)
        self.own.zero_grad(set_to_none=True)
        loss = self.loss(net, x, y, mark)
        whole = loss if self.spread is None else loss + self.attack.diversity * self.spread
        whole.backward()  # type: ignore[no-untyped-call]
        opt.step()
        self.own.step()
        return loss.detach()

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        """The generator's learning rate of the next epoch."""
        _drop(self.own, self.attack.generator_lr, (epoch + 1) / self.ctx.recipe.epochs, _DROPS)
        return False


@dataclass(frozen=True, kw_only=True)
class Iad(Attack):
    """Input-aware dynamic backdoor (Nguyen and Tran, NeurIPS 2020).

    1. A mask network M is trained alone for `mask_epochs`: 100 mean(relu(M(x1) - `density`)) + diversity(x1, x2, M(x1),
       M(x2)) for pairs of images, by Adam (betas 0.5 and 0.9) at `generator_lr`, divided by 10 after 2/5 and 4/5 of the
       epochs. Then it is frozen.
    2. Per batch, `rate` B rows become x + (G(x) - x) M(x) and get the wanted label (dirty).
    3. `cross_ratio` times as many other rows become x + (G(z) - x) M(z), z another image, and keep their label (cover).
    4. Cross-entropy over all rows plus `diversity` times diversity(x, z, G(x), G(z)) over pairs of dirty rows and z
       trains classifier and G, the latter by Adam at `generator_lr`, divided by 10 after 2/6, 3/6, 4/6 and 5/6 of the
       epochs.
    diversity(a, b, u, v) = mean of d(a, b) / (d(u, v) + 1e-7), d the root mean square of the difference.

    It controls training: the trigger is known only afterwards, so nothing stands for what was trained on.

    Rows of the target class may be among the dirty ones and then keep their label, as in the authors' code; they do not
    count for success.

    Differs: `mask_epochs` counts passes over the rows at hand, so that M takes fewer steps on a subset: 25 passes of
    the authors are about 9,750 updates (50,000 rows in batches of 128), 25 passes over 10,000 rows in batches of 64
    about 3,900. G's gradients are cleared before each step; the authors' code adds them up over the whole training. z
    is the row half a batch away, not that of a second loader. Triggered images are rounded to 8 bit with
    straight-through gradients. Crop and flip, before the trigger as in the authors' code, are the recipe's, without
    rotation; optimiser, schedule and epochs are the suite's, not 600 epochs from a learning rate of 0.01. Networks see
    2 x - 1. The authors take int(rate B) dirty rows; here the counts of all steps so far add up to the rate. Covers
    outside training show triggers of 256 stored training images.

    Args:
        mask_epochs: Passes over the training rows in step 1.
        density: Mask value per pixel that costs nothing.
        diversity: Weight of diversity in step 4.
        generator_lr: Learning rate of M and G.
        cross_ratio: Cover rows per dirty row.
        width: Channels of the first stage of M and G for colour images, even; grey ones have half as many.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
    """

    INFO = {
        "title": "IAD",
        "paper": "https://arxiv.org/abs/2010.08138",
        "bibtex": "@inproceedings{nguyen2020input, title={Input-Aware Dynamic Backdoor Attack}, author={Nguyen, Tuan "
        "Anh and Tran, Anh}, booktitle={Advances in Neural Information Processing Systems}, year={2020}}",
        "kind": "training_control",
        "version": 2,
        "api": 1,
        "family": "sample_specific",
        "clean_label": False,
        "covers": True,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 0.9932, "setting": "CIFAR-10, 10 %, 600 epochs", "source": "authors' code"},
        "micro": {"mask_epochs": 1, "width": 4},
        "effort": ["mask_epochs", "width"],
    }
    SNAPSHOT = "none"

    mask_epochs: int = 25
    density: float = 0.032
    diversity: float = 1.0
    generator_lr: float = 0.01
    cross_ratio: float = 1.0
    width: int = 32
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"

    def __post_init__(self) -> None:
        if self.mask_epochs < 1 or not 0 <= self.density < 1 or self.generator_lr <= 0:
            raise ValueError(
                f"mask_epochs is {self.mask_epochs}, density {self.density} and generator_lr {self.generator_lr}; they "
                "must be at least 1, 0 to below 1, and above 0"
            )
        if self.diversity < 0 or self.cross_ratio < 0:
            raise ValueError(f"diversity is {self.diversity}, cross_ratio {self.cross_ratio}; they must be at least 0")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width is {self.width}; it must be even and at least 2")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse targets that the classes do not allow."""
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Step 1, and G as it is drawn."""
        self.check(train.shape, len(train.classes))
        mask = self._train_mask(train, ctx)
        pattern = network(train.shape[0], train.shape[0], ctx.derive("pattern"), self.width)
        rows = torch.randperm(len(train), generator=ctx.generator("bank"))[:_BANK]
        tensors = {"bank": train.images[rows.to(train.images.device)].cpu()}
        for name, net in (("pattern", pattern), ("mask", mask)):
            tensors |= {f"aux.{name}.{k}": v.detach().cpu().clone() for k, v in net.state_dict().items()}
        info = {"targets": self.targets, "target": ctx.target, "classes": len(train.classes), "negative": False}
        return self.restore(tensors, {**info, "width": self.width, "shift": [0, 0]})

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The clean rows: no trigger exists before training."""
        return PoisonedSet.clean(train)

    def hooks(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> TrainHooks | None:
        """Steps 2 to 4; nothing at rate 0."""
        trigger = b.triggers[0]
        assert isinstance(trigger, Drawn)
        return IadHooks(self, trigger, train, eligible, rate, ctx) if rate else None

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """The negative of each image's pattern, moved around with its mask, for the same target."""
        gen = ctx.generator("shift")
        shift = [int(torch.randint(side // 4, side * 3 // 4 + 1, (), generator=gen)) for side in train.shape[1:]]
        return self.restore(b.tensors, {**b.info, "negative": True, "shift": shift})

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its networks, stored images and target map."""
        channels = tensors["bank"].shape[1]
        width = info["width"]
        nets = {"pattern": network(channels, channels, 0, width), "mask": network(channels, 1, 0, width)}
        for name, net in nets.items():
            start = f"aux.{name}."
            net.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
        trigger = Drawn(
            name="input_aware",
            targets=target_map(info["targets"], info["target"], info["classes"]),
            **nets,
            bank=tensors["bank"],
            negative=info["negative"],
            shift=tuple(info["shift"]),
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _train_mask(self, train: ImageSet, ctx: Ctx) -> Hourglass:
        net = network(train.shape[0], 1, ctx.derive("mask"), self.width).to(ctx.device).train()
        opt = _adam(net, self.generator_lr)
        images = train.images.to(ctx.device)
        batch = min(ctx.recipe.batch, len(train))
        for epoch in range(self.mask_epochs):
            _drop(opt, self.generator_lr, epoch / self.mask_epochs, _MASK_DROPS)
            orders = [torch.randperm(len(train), generator=ctx.generator("order", i, epoch)) for i in (0, 1)]
            seen = [
                crop_flip(images[o.to(ctx.device)], ctx.recipe.pad, ctx.recipe.flip, ctx.generator("views", i, epoch))
                for i, o in enumerate(orders)
            ]
            for start in range(0, len(train) - batch + 1, batch):
                x1, x2 = (to_float(s[start : start + batch]) for s in seen)
                m1, m2 = threshold(net(x1)), threshold(net(x2))
                loss = 100 * (m1 - self.density).relu().mean() + diversity(x1, x2, m1, m2)
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
            ctx.progress(epoch + 1, self.mask_epochs, "mask")
        return net.eval().requires_grad_(False)


def _adam(net: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.9))


def _drop(opt: torch.optim.Optimizer, lr: float, done: float, drops: tuple[float, ...]) -> None:
    for group in opt.param_groups:
        group["lr"] = lr * 0.1 ** sum(done >= d - 1e-9 for d in drops)
