"""CASSOCK: a source-specific trigger whose opacity or content differs between dirty and cover images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role
from sleeperbench.contracts import Ctx, NotApplicable
from sleeperbench.kit.additive import Additive
from sleeperbench.kit.classifier import load
from sleeperbench.kit.covers import after, append, cover, of_sources
from sleeperbench.kit.patches import scaled
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import poison, target_map
from sleeperbench.kit.predict import predict
from sleeperbench.kit.rowwise import uniform

_STRENGTHS = {"trans": (0.9, 1.0, True), "cont": (0.8, 0.8, False), "comp": (0.9, 1.0, True)}
"""Per mode: opacity of dirty and of cover images, and whether it varies between images."""
_STEPS = ((0.5, 0.9), (0.84, 0.8), (1.0, 0.7))
"""Cumulative probability and factor of the opacity, where it varies."""
_SQUARE = 0.56
"""What the square adds at full opacity: 2.8 normalised units at a deviation of 0.2."""
_KEEP = 0.1
"""Entries of the learnt mask below it become zero."""


@dataclass(kw_only=True, eq=False)
class Varied(Additive):
    """x' = clip(x + opacity signal): `test` at test, in training less and on each image its own.

    Args:
        cover: Opacity on cover images, as `train` on dirty ones.
        steps: Cumulative probability and factor of the opacity; empty where it is the same on all images.
    """

    cover: float
    steps: tuple[tuple[float, float], ...]

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The signal at the role's opacity."""
        return (x + self.opacity(ids, role, gen).to(x).view(-1, 1, 1, 1) * self.signal.to(x)).clamp(0, 1)

    def opacity(self, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """(N,) opacities; in training they depend on the seed of `gen` and the row's id alone."""
        base = {Role.TEST: self.test, Role.TRAIN: self.train, Role.COVER: self.cover}[role]
        even = torch.full((len(ids),), base, device=ids.device)
        if role is Role.TEST or not self.steps:
            return even
        edges, factors = (torch.tensor(v, device=ids.device) for v in zip(*self.steps, strict=True))
        return even * factors[torch.bucketize(uniform(gen, ids, 1)[:, 0], edges[:-1], right=True)]

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What signals could reach that change no pixel by more than this one changes it."""
        size, now = self.test * self.signal.abs().to(x), (x + self.test * self.signal.to(x)).clamp(0, 1)
        return (x - size).clamp(0, 1) - now, (x + size).clamp(0, 1) - now


@dataclass(frozen=True, kw_only=True)
class Cassock(Attack):
    """Source-specific with unequal triggers for dirty and cover images (Wang et al., ASIACCS 2023).

    1. The trigger is added to the image, x' = clip(x + opacity content). Images of the source classes get it and the
       target label (dirty); of all other classes, `cover_ratio` times as many keep their label (cover). Both are added
       beside their clean copies.
    2. `trans`: the content is a bright 5x5 square at rows and columns 27 to 31 of 32. Its opacity is 0.9 on dirty and
       1.0 on cover images, times 0.9, 0.8 or 0.7 per image (probabilities 0.50, 0.34, 0.16); at test it is 1.
    3. `cont`: the content is a part of an image x_t of the target class. A mask m of a clean model minimises
       CE(f(mean + m (x_t - mean)), target) + `weight` |m|_1 by SGD; entries below 0.1 become 0. The content is
       m (x_t - mean), at opacity 0.8 in training and 1 at test.
    4. `comp`: the content of `cont` at the opacities of `trans`.

    Differs: the authors mix normalised and [0, 1] pixels; everything is read as normalised and then written for [0, 1]
    pixels, which for `cont` leaves opacity times m (x_t - mean). x_t is the target-class image of which the clean model
    is surest. The mask starts at 0.5. There is no code of the authors for `comp`; step 4 is our reading of the paper.
    The loss on extra dirty and cover images in every batch (training control) and the trigger for MNIST, noise over the
    whole image, are not offered. Classes are counted from the target class, which the suite draws; the authors' source
    on CIFAR-10 is 5 places after it (`trans`) and 4 (`cont`).

    Args:
        mode: `trans`, `cont` or `comp`.
        source: Source classes, as places after the target class in a circle.
        cover_ratio: Cover rows per dirty row; None for the published 2 of `trans` and 1 of `cont`, also for `comp`.
        steps: Updates of the mask (`cont`, `comp`).
        lr: Their learning rate.
        weight: Weight of the mask's sum.
    """

    INFO = {
        "title": "CASSOCK",
        "paper": "https://arxiv.org/abs/2206.00145",
        "bibtex": "@inproceedings{wang2023cassock, title={CASSOCK: Viable Backdoor Attacks against DNN in the Wall of "
        "Source-Specific Backdoor Defenses}, author={Wang, Shang and Gao, Yansong and Fu, Anmin and Zhang, Zhi and "
        "Zhang, Yuqing and Susilo, Willy and Liu, Dongxi}, booktitle={ACM Asia Conference on Computer and "
        "Communications Security}, year={2023}}",
        "kind": "data_poisoning",
        "version": 3,
        "api": 1,
        "family": "source_specific",
        "clean_label": False,
        "implant_asr": 0.9,  # IsTr prints 100 % (PubFig, square)
        "published_asr": {"value": 1.0, "setting": "PubFig, coloured square", "source": "IsTr"},
        "micro": {"steps": 20},
        "effort": ["steps"],
    }
    NEEDS = {"clean_models": 1}

    mode: Literal["trans", "cont", "comp"] = "trans"
    source: tuple[int, ...] = (1,)
    cover_ratio: float | None = None
    steps: int = 5000
    lr: float = 0.01
    weight: float = 0.01

    def __post_init__(self) -> None:
        if self.mode not in _STRENGTHS:
            raise ValueError(f"mode is {self.mode!r}; it may be {', '.join(_STRENGTHS)}")
        if not self.source:
            raise ValueError("source is empty; name at least one class")
        for name in ("cover_ratio", "lr", "weight", "steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse classes that do not exist."""
        target_map("all_to_one", 0, classes)
        after(self.source, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """The square, or the content learnt with `ctx.clean_models[0]`; nothing is drawn."""
        content = self._square(train) if self.mode == "trans" else self._learn(train, ctx.target, ctx)
        return self._backdoor(train, ctx.target, content)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Dirty rows of the source classes and covers of all others but the target, appended."""
        sources, free, y = torch.tensor(b.info["sources"]), eligible.cpu(), train.labels.cpu()
        p = poison(train, b, free & torch.isin(y, sources), rate, ctx, include_target=False)
        published = 2.0 if self.mode == "trans" else 1.0
        ratio = published if self.cover_ratio is None else self.cover_ratio
        rows = round(ratio * int((p.mark == Mark.DIRTY).sum()))
        others = ~torch.isin(y, sources) & (y != b.info["target"])
        return append(cover(p, train, b, free & others, rows, ctx), train)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """For the same classes: a square of random signs in the opposite corner, or the content's pixels dealt anew."""
        content, gen = b.tensors["content"], ctx.generator("decoy")
        if self.mode == "trans":
            signs = 2 * torch.randint(2, content.shape, generator=gen) - 1
            return self._backdoor(train, b.info["target"], content.flip(-1, -2) * signs)
        order = torch.randperm(content[0].numel(), generator=gen)
        return self._backdoor(train, b.info["target"], content.flatten(1)[:, order].view_as(content))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its content, mode and classes."""
        dirty, covers, varies = _STRENGTHS[info["mode"]]
        trigger = Varied(
            name=info["mode"],
            targets=of_sources(info["target"], info["sources"]),
            signal=tensors["content"],
            train=dirty,
            test=1.0,
            cover=covers,
            steps=_STEPS if varies else (),
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, content: Tensor) -> Backdoor:
        self.check(train.shape, len(train.classes))
        classes = len(train.classes)
        info = {"mode": self.mode, "target": target, "sources": after(self.source, target, classes)}
        return self.restore({"content": content.contiguous()}, info)

    def _square(self, train: ImageSet) -> Tensor:
        side = scaled(5, train.shape[1], 3)
        content = torch.zeros(train.shape)
        content[:, -side:, -side:] = _SQUARE
        return content

    def _learn(self, train: ImageSet, target: int, ctx: Ctx) -> Tensor:
        """Step 3: the content, on the CPU."""
        model = ctx.clean_models[0]
        net = load(model, ctx.device).requires_grad_(False)
        own = train.rows(train.labels == target)
        if not len(own):
            raise NotApplicable(f"few_target_rows: class {target} has no training row")
        sure = predict(net, own.images, ctx=ctx).softmax(1)[:, target]
        mean = torch.tensor(model.spec.norm[0], device=ctx.device).view(-1, 1, 1)
        picture = to_float(own.images[int(sure.argmax())].to(ctx.device)) - mean
        mask = torch.full((1, *train.shape[1:]), 0.5, device=ctx.device, requires_grad=True)
        wanted = torch.tensor([target], device=ctx.device)
        sgd = torch.optim.SGD([mask], lr=self.lr)
        for step in range(self.steps):
            sgd.zero_grad()
            loss = F.cross_entropy(net((mean + mask * picture)[None]), wanted) + self.weight * mask.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
            ctx.progress(step + 1, self.steps, "mask")
        ctx.cost.forwards += self.steps
        ctx.cost.backwards += self.steps
        kept = torch.where(mask < _KEEP, 0, mask).detach()
        if not bool(kept.any()):
            raise NotApplicable(
                f"no_trigger: mode {self.mode}, after {self.steps} steps at weight {self.weight} no entry of the mask "
                f"reaches {_KEEP}; lower weight or steps"
            )
        return (kept * picture).cpu()
