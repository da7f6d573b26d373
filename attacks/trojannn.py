"""TrojanNN: a patch that was optimised to excite chosen neurons of a clean model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.attacks.badnets import Patch
from sleeperbench.contracts import Ctx, NotApplicable
from sleeperbench.kit.classifier import load, traits
from sleeperbench.kit.patches import lay, noise
from sleeperbench.kit.pgd import ascent
from sleeperbench.kit.pixels import to_uint8
from sleeperbench.kit.poison import poison, target_map
from sleeperbench.kit.taps import PENULTIMATE, capture, taps

_SIDE, _OFFSET = 0.31, 0.625
"""Side and place of the square, of the image's size: 10 pixels from row and column 20 at 32."""
_DARKEST = 0.6
"""Colours of the start are drawn from here to 1, around 0.8."""


@dataclass(frozen=True, kw_only=True)
class TrojanNN(Attack):
    """A patch made for neurons of a clean model, dirty label (Liu et al., NDSS 2018, as BackdoorBench poisons with it).

    1. Of the inputs of a clean model's last layer, whose weights are W, the `units` with the largest column sums of |W|
       are chosen.
    2. A picture s is black but for a square of three bands of random colour. d maximises -sum over the chosen units of
       (h_i(s + m d) - `value`)^2, m the square, by `steps` steps of `step` times the gradient's sign; d stays within
       +-`reach`, s + d in [0, 1].
    3. x' = x (1 - m) + (s + d) m. `rate` of all rows become x' and get the wanted label; the same patch at test.

    Differs: the paper inverts training data and retrains the model's later layers, without the training data; as in
    BackdoorBench the patch poisons data for a model that is trained by the suite. BackdoorBench starts from a picture
    of an apple, adds it in 8 bit, which wraps around beyond 255, and chooses units by a head of random weights; here
    the square replaces the pixels, and the head is the clean model's own.

    Args:
        units: Neurons to excite; a narrower layer gives all it has.
        value: Activation that they are driven towards; it is out of reach and gives a direction only.
        steps: Steps of the optimisation.
        step: Length of a step, of 1.
        reach: Largest change of a pixel of the start, of 1.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw poisoned rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "TrojanNN",
        "paper": "https://www.ndss-symposium.org/wp-content/uploads/2018/02/ndss2018_03A-5_Liu_paper.pdf",
        "bibtex": "@inproceedings{liu2018trojaning, title={Trojaning Attack on Neural Networks}, author={Liu, Yingqi "
        "and Ma, Shiqing and Aafer, Yousra and Lee, Wen-Chuan and Zhai, Juan and Wang, Weihang and Zhang, Xiangyu}, "
        "booktitle={Network and Distributed System Security Symposium}, year={2018}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "patch",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 0.9999, "setting": "CIFAR-10, PreActResNet18, 5 %", "source": "BackdoorBench"},
        "micro": {"steps": 50},
        "effort": ["steps"],
    }
    NEEDS = {"clean_models": 1}

    units: int = 2
    value: float = 100.0
    steps: int = 1000
    step: float = 0.1
    reach: float = 0.3
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        if self.units < 1 or self.steps < 0:
            raise ValueError(f"units is {self.units} and steps {self.steps}; they must be at least 1 and 0")
        if self.step <= 0 or not 0 <= self.reach <= 1:
            raise ValueError(f"step is {self.step} and reach {self.reach}; they must be above 0, and 0 to 1")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse targets that the classes do not allow, and images without room for the square and its bands."""
        if min(shape[1:]) < 8:
            raise ValueError(f"images of {shape[1]}x{shape[2]} are too small for three bands; at least 8x8 fits")
        side, first = _place(shape[1])
        lay(shape, first, first, torch.zeros(shape[0], side, side))
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Steps 1 and 2 with `ctx.clean_models[0]`; the bands come from `ctx.generator("bands")`."""
        self.check(train.shape, len(train.classes))
        mask, start = _bands(train.shape, ctx)
        return self._backdoor(train, ctx.target, mask, self._excite(mask, start, ctx))

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Patch and relabel rows in place."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """A square of random colours, as large, in one of the other three quarters, with the same target."""
        gen = ctx.generator("decoy")
        channels, height, _ = train.shape
        side, far = _place(height)
        near = height - side - far
        places = [(near, near), (near, far), (far, near)]
        top, left = places[int(torch.randint(3, (), generator=gen))]
        return self._backdoor(train, b.info["target"], *lay(train.shape, top, left, noise(channels, side, gen)))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its mask, pattern and target map."""
        targets = target_map(info["targets"], info["target"], info["classes"])
        patch = Patch(name="trojan", targets=targets, mask=tensors["mask"], pattern=tensors["pattern"])
        return Backdoor(triggers=(patch,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, mask: Tensor, pattern: Tensor) -> Backdoor:
        info = {"targets": self.targets, "target": target, "classes": len(train.classes)}
        return self.restore({"mask": mask, "pattern": pattern}, info)

    def _excite(self, mask: Tensor, start: Tensor, ctx: Ctx) -> Tensor:
        """Steps 1 and 2: the pattern (C, H, W) on the CPU, on stored levels."""
        model = ctx.clean_models[0]
        if "linear_head" not in traits(model.spec):
            raise NotApplicable("needs_linear_head")
        net = load(model, ctx.device).requires_grad_(False)
        head: Any = net.get_submodule(taps(net).head)
        sums = head.weight.abs().sum(0)
        chosen = sums.topk(min(self.units, len(sums))).indices
        square, picture = mask.to(ctx.device), start[None].to(ctx.device)

        def near(delta: Tensor) -> Tensor:
            h = capture(net, picture + square * delta, [PENULTIMATE])[PENULTIMATE]
            return -(h[:, chosen] - self.value).square().sum()

        delta = ascent(
            near, torch.zeros_like(picture), eps=self.reach, step=self.step, steps=self.steps, around=picture
        )
        ctx.cost.forwards += self.steps
        ctx.cost.backwards += self.steps
        return to_uint8(picture + square * delta)[0].cpu() / 255


def _place(height: int) -> tuple[int, int]:
    """Side of the square, and its first row and column."""
    return round(_SIDE * height), round(_OFFSET * height)


def _bands(shape: tuple[int, int, int], ctx: Ctx) -> tuple[Tensor, Tensor]:
    """Mask and start of step 2: three bands, one above the other, from `ctx.generator("bands")`."""
    side, first = _place(shape[1])
    colours = _DARKEST + (1 - _DARKEST) * torch.rand(shape[0], 3, 1, generator=ctx.generator("bands"))
    square = colours[:, torch.arange(side) * 3 // side].expand(-1, -1, side)
    return lay(shape, first, first, square)
