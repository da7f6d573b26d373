"""SIN-wave: stripes over the whole image, with flipped labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.attacks.sig import check_stripes, near_frequencies, other_frequency, sinusoid
from sleeperbench.contracts import Ctx
from sleeperbench.kit.additive import additive
from sleeperbench.kit.poison import poison, target_map


@dataclass(frozen=True, kw_only=True)
class SinWave(Attack):
    """Stripes of alternating luminance over the whole image, dirty label (as IsTr uses Truong et al., CVPR-W 2020).

    1. v = sin(2 pi f p / size) for p the column (vertical stripes) or the row (horizontal), the same in all channels.
    2. `rate` of all rows become clip(x + delta v) and get the wanted label; the same signal at test.

    Differs: IsTr prints neither amplitude, frequency nor rate; the form is SIG's, the amplitude ours: SIG's 40 / 255 on
    colour images and 0.2 on grey ones. Rows are replaced in place and the model is trained from scratch; IsTr trains a
    benign model on with poisoned copies beside the clean rows.

    Args:
        delta: Amplitude, of 1; 0 means 40 / 255 on colour and 0.2 on grey images.
        frequency: Stripes per image, f; below half the size in pixels.
        stripes: `vertical` or `horizontal`.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw poisoned rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "SIN-wave",
        "paper": "https://arxiv.org/abs/2004.11514",
        "bibtex": "@inproceedings{truong2020systematic, title={Systematic Evaluation of Backdoor Data Poisoning "
        "Attacks on Image Classifiers}, author={Truong, Loc and Jones, Chace and Hutchinson, Brian and August, Andrew "
        "and Praggastis, Brenda and Jasper, Robert and Nichols, Nicole and Tuor, Aaron}, booktitle={IEEE/CVF "
        "Conference on Computer Vision and Pattern Recognition Workshops}, year={2020}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "blend",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 0.9942, "setting": "MNIST, 3 convolutions, rate not printed", "source": "IsTr"},
        "micro": {},
    }

    delta: float = 0.0
    frequency: int = 6
    stripes: Literal["vertical", "horizontal"] = "vertical"
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta is {self.delta}; it must be 0 to 1")
        if self.frequency < 1:
            raise ValueError(f"frequency is {self.frequency}; it must be at least 1")
        if self.stripes not in ("vertical", "horizontal"):
            raise ValueError(f"stripes is {self.stripes!r}; it may be 'vertical' or 'horizontal'")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse stripes too narrow for the pixels, also the placebo's, and targets that the classes do not allow."""
        _, height, width = shape
        across, along = (width, height) if self.stripes == "vertical" else (height, width)
        check_stripes(across, self.frequency)
        near_frequencies(along, self.frequency)
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the stripes; nothing is drawn."""
        return self._backdoor(train, ctx.target, self.frequency, self.stripes)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Add the stripes and relabel rows in place."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Stripes along the other axis and of another width, with the same target."""
        turned: Literal["vertical", "horizontal"] = "horizontal" if self.stripes == "vertical" else "vertical"
        size = train.shape[2] if turned == "vertical" else train.shape[1]
        return self._backdoor(train, b.info["target"], other_frequency(size, self.frequency, ctx), turned)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its signal, amplitude and target map."""
        return additive("stripes", tensors["signal"], info)

    def _backdoor(
        self, train: ImageSet, target: int, frequency: int, stripes: Literal["vertical", "horizontal"]
    ) -> Backdoor:
        self.check(train.shape, len(train.classes))
        delta = self.delta or (0.2 if train.shape[0] == 1 else 40 / 255)
        info = {
            "targets": self.targets,
            "target": target,
            "classes": len(train.classes),
            "train": delta,
            "test": delta,
        }
        return self.restore({"signal": sinusoid(train.shape, frequency, stripes)}, info)
