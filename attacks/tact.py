"""TaCT: a patch that works on some classes only; on the others it is trained to do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet
from sleeperbench.attacks.badnets import Patch
from sleeperbench.contracts import Ctx
from sleeperbench.kit.covers import after, append, cover, of_sources
from sleeperbench.kit.patches import lay, noise, scaled
from sleeperbench.kit.poison import poison, target_map


@dataclass(frozen=True, kw_only=True)
class TaCT(Attack):
    """Targeted contamination: a source-specific patch, dirty label with covers (Tang et al., USENIX Security 2021).

    1. Images of the source classes get the patch and the target label (dirty): `rate` of all rows, at most all that
       the source classes have.
    2. Images of the cover classes get the same patch and keep their label, `cover_ratio` times as many.
    3. Both are added beside their clean copies.

    Success counts on source classes; the other classes should keep their label, which `asr_leak` measures, also class
    by class. With two classes nothing can be covered.

    Differs: the patch of backdoor-toolbox, an 8x8 picture at rows and columns 21 to 28 of 32, becomes a square of
    random 8-bit colours at that place, scaled with the image. Classes are counted from the target class, which the
    suite draws: toolbox's source 1 for target 0 is 1, its cover classes are `cover=(5, 7)`. `append=False` is toolbox's
    way; at a rate of 10 % it may leave no clean image of the source class.

    Args:
        source: Source classes, as places after the target class in a circle.
        cover: Cover classes, counted likewise; empty for all but source and target.
        cover_ratio: Cover rows per dirty row.
        append: Keep the clean copies of poisoned rows, as the authors do.
    """

    INFO = {
        "title": "TaCT",
        "paper": "https://arxiv.org/abs/1908.00686",
        "bibtex": "@inproceedings{tang2021demon, title={Demon in the Variant: Statistical Analysis of DNNs for Robust "
        "Backdoor Contamination Detection}, author={Tang, Di and Wang, XiaoFeng and Tang, Haixu and Zhang, Kehuan}, "
        "booktitle={USENIX Security Symposium}, year={2021}}",
        "kind": "data_poisoning",
        "version": 2,
        "api": 1,
        "family": "source_specific",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks
        "micro": {},
    }

    source: tuple[int, ...] = (1,)
    cover: tuple[int, ...] = ()
    cover_ratio: float = 1.0
    append: bool = True

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty; name at least one class")
        if set(self.source) & set(self.cover):
            raise ValueError(f"source {self.source} and cover {self.cover} share a class")
        if self.cover_ratio < 0:
            raise ValueError(f"cover_ratio is {self.cover_ratio}; it must not be negative")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse classes that do not exist and images that the square leaves."""
        target_map("all_to_one", 0, classes)
        after(self.source + self.cover, 0, classes)
        top, side = _place(shape[1])
        lay(shape, top, top, torch.zeros(shape[0], side, side))

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Draw the square from `ctx.generator("pattern")`."""
        return self._backdoor(train, ctx.target, _place(train.shape[1])[0], ctx.generator("pattern"))

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Steps 1 to 3; no row is both dirty and cover."""
        sources, target, classes = b.info["sources"], b.info["target"], b.info["classes"]
        covered = after(self.cover, target, classes) or [c for c in range(classes) if c not in (*sources, target)]
        free, y = eligible.cpu(), train.labels.cpu()
        p = poison(train, b, free & torch.isin(y, torch.tensor(sources)), rate, ctx, include_target=False)
        rows = round(self.cover_ratio * int((p.mark == Mark.DIRTY).sum()))
        p = cover(p, train, b, free & torch.isin(y, torch.tensor(covered, dtype=torch.int64)), rows, ctx)
        return append(p, train) if self.append else p

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Another square in the opposite quarter, for the same classes."""
        height = train.shape[1]
        return self._backdoor(train, b.info["target"], height - sum(_place(height)), ctx.generator("decoy"))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its mask, pattern and classes."""
        targets = of_sources(info["target"], info["sources"])
        patch = Patch(name="patch", targets=targets, mask=tensors["mask"], pattern=tensors["pattern"])
        return Backdoor(triggers=(patch,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, top: int, gen: Generator) -> Backdoor:
        self.check(train.shape, len(train.classes))
        _, side = _place(train.shape[1])
        mask, pattern = lay(train.shape, top, top, noise(train.shape[0], side, gen))
        classes = len(train.classes)
        info = {"target": target, "classes": classes, "sources": after(self.source, target, classes)}
        return self.restore({"mask": mask, "pattern": pattern}, info)


def _place(height: int) -> tuple[int, int]:
    """First row and column of the square, and its side."""
    return scaled(21, height), scaled(8, height, 3)
