"""PixelBackdoor: inversion by two additive patterns that can make a pixel exactly unchanged."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.anomaly import LEAST, smallness
from sleeperbench.kit.pixels import to_float

_AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Stamped images per pass through the net, at most."""
_LEVEL = 1 / 255
"""Smaller changes count as none."""


@dataclass(frozen=True, kw_only=True)
class PixelBackdoor(Defense):
    """Invert with few changed pixels; flag classes whose count is an outlier (Tao et al., CVPR 2022).

    1. For each class t, `images` clean rows of other classes are drawn; two patterns start uniform in [0, 1].
    2. Minimise mean CE(f(clip(x + clip(pos) - clip(neg))), t) + w R by Adam, with R = sum over pixels of
       max over channels of (tanh(pos / 10) / 2 + 1/2), plus the same of neg: a smooth count of changed pixels.
    3. After each pass over the rows, with s the share of hits, R its mean over the pass, and the patterns those of the
       pass's last update's loss, changes below 1/255 set to 0:
       a. s >= `success`, R below and fewer pixels changed than in any pattern kept before: the patterns are kept and
          also put in the place of the variables;
       b. w is multiplied by 1.5 after `patience` passes in a row with s >= `success`, and divided by 1.5^1.5 after as
          many below it.
    4. Size of t: the pixels that the kept pattern changes. Anomaly index as Neural Cleanse's; classes above `threshold`
       are flagged, and their patterns pos - neg claimed as additive triggers. A class for which none was kept counts
       with its last pattern in median and deviation, and is never flagged.

    All classes are optimised in one batch, each on its own rows; every class has as many rows as the class with fewest.
    Sizes and final shares of hits of all classes stand in `chosen`, and which were not inverted.

    Differs: the authors' code counts 0 pixels for a class that never succeeds, which would be the smallest. Rows that
    fill no batch sit out a pass, as there. Universal triggers only, no pairs.

    Args:
        steps: Passes over the rows.
        images: Rows per class.
        batch: Rows per update.
        lr: Learning rate of Adam, betas 0.5 and 0.9.
        weight: w at the start.
        patience: Passes before w changes.
        success: Share of rows that must reach the class.
        threshold: Anomaly index above which a class is flagged.
    """

    INFO = {
        "title": "PixelBackdoor",
        "paper": "https://openaccess.thecvf.com/content/CVPR2022/html/"
        "Tao_Better_Trigger_Inversion_Optimization_in_Backdoor_Scanning_CVPR_2022_paper.html",
        "bibtex": "@inproceedings{tao2022better, title={Better Trigger Inversion Optimization in Backdoor Scanning}, "
        "author={Tao, Guanhong and Shen, Guangyu and Liu, Yingqi and An, Shengwei and Xu, Qiuling and Ma, Shiqing and "
        "Li, Pan and Zhang, Xiangyu}, booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, "
        "year={2022}}",
        "kind": "inversion",
        "version": 2,
        "api": 1,
        "micro": {"steps": 16, "images": 16, "batch": 16, "lr": 0.15},
        "effort": ["steps", "images"],
        "traverses": True,
        "presumes": "a trigger that changes few pixels, the same on all images of all other classes",
    }
    ACCESS = Access(clean=0.05)

    steps: int = 1000
    images: int = 100
    batch: int = 32
    lr: float = 0.1
    weight: float = 1e-3
    patience: int = 10
    success: float = 0.9
    threshold: float = 2.0

    def __post_init__(self) -> None:
        if min(self.steps, self.images, self.batch, self.patience) < 1:
            raise ValueError("steps, images, batch and patience must be positive")

    def run(self, case: Case) -> Outcome:
        """The verdict, an index per class, and additive triggers of flagged classes.

        Raises:
            NotApplicable: too few classes for an outlier, or a class that all clean rows have.
        """
        classes = case.spec.classes
        if classes < LEAST:
            raise NotApplicable(f"too_few_classes: {classes}; an outlier needs {LEAST}")
        rows = victims(case.clean, classes, self.images, case.ctx)
        delta, size, share = self.invert(case.net, case.clean.images, rows, case.ctx)
        found = ~size.isnan()
        size = torch.where(found, size, (delta.abs().sum(1) > 0).flatten(1).sum(1))
        index = smallness(size, found)
        claimed = [int(t) for t in (index > self.threshold).nonzero().flatten()]
        return Outcome(
            verdict=Verdict(score=float(index.max()), threshold=self.threshold, label_scores=index),
            inverted=tuple(Inverted(target=t, delta=delta[t]) for t in claimed),
            chosen={
                "claimed": claimed,
                "sizes": [int(n) for n in size.tolist()],
                "not_inverted": (~found).nonzero().flatten().tolist(),
                "successes": [round(s, 4) for s in share.tolist()],
            },
        )

    def invert(
        self,
        net: nn.Module,
        images: Tensor,
        rows: Tensor,
        ctx: Ctx,
        *,
        targets: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Kept patterns (K, C, H, W), their sizes (K,) in pixels, and the last pass's hits (K,).

        Where none was kept the pattern is the last one and the size NaN.

        Args:
            net: Classifier of [0, 1] images; left untouched.
            images: uint8 (N, C, H, W).
            rows: int64 (K, n), the rows that are to become each class.
            ctx: Seed, device, costs, progress.
            targets: int64 (K,), the classes; None for 0 to K - 1.
            start: pos and neg to start from, (K, C, H, W) each, in place of uniform noise.
        """
        device, k = ctx.device, len(rows)
        aims = (torch.arange(k) if targets is None else targets).to(device)
        net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
        x = to_float(images.to(device))
        gen = ctx.generator("patterns")
        first = start or tuple(torch.rand(k, *x.shape[1:], generator=gen) for _ in range(2))
        pos, neg = (v.clone().to(device).requires_grad_() for v in first)
        adam = torch.optim.Adam([pos, neg], lr=self.lr, betas=(0.5, 0.9))
        kept = Kept(k, self, x.shape[1:], device)
        batch = min(self.batch, rows.shape[1])
        parts = torch.arange(k).split(max(1, _AT_ONCE.get(device.type, 256) // batch))
        updates = rows.shape[1] // batch
        order = ctx.generator("order")
        share = torch.zeros(k, device=device)
        for step in range(self.steps):
            share, size = torch.zeros(k, device=device), torch.zeros(k, device=device)
            shuffled = rows[:, torch.randperm(rows.shape[1], generator=order)].to(device)
            for i in range(updates):
                adam.zero_grad()
                now = shuffled[:, i * batch : (i + 1) * batch]
                before = [v.detach().clamp(0, 1) for v in (pos, neg)]
                for part in parts:
                    changed = x[now[part]] + (pos[part].clamp(0, 1) - neg[part].clamp(0, 1))[:, None]
                    logits = net(changed.clamp(0, 1).flatten(0, 1)).float()
                    wanted = aims[part].repeat_interleave(batch)
                    error = F.cross_entropy(logits, wanted, reduction="sum") / batch
                    smooth = pixels(pos[part]) + pixels(neg[part])
                    (error + (kept.weight[part] * smooth).sum()).backward()  # type: ignore[no-untyped-call]
                    share[part] += (logits.argmax(1) == wanted).view(-1, batch).float().mean(1) / updates
                    size[part] += smooth.detach() / updates
                adam.step()
                ctx.cost.forwards += k * batch
                ctx.cost.backwards += k * batch
            kept.after(share, size, before[0], before[1], pos, neg)
            ctx.progress(step + 1, self.steps, "invert")
        return (kept.pos - kept.neg).cpu(), torch.where(kept.count.isinf(), torch.nan, kept.count).cpu(), share.cpu()


class Kept:
    """The patterns kept for K classes, with their weights and counters; each class goes its own way."""

    def __init__(self, k: int, method: PixelBackdoor, shape: torch.Size, device: torch.device) -> None:
        self.success, self.patience = method.success, method.patience
        self.weight = torch.full((k,), method.weight, device=device)
        self.size, self.count = (torch.full((k,), torch.inf, device=device) for _ in range(2))
        self.pos, self.neg = (torch.zeros(k, *shape, device=device) for _ in range(2))
        self.good, self.bad = (torch.zeros(k, dtype=torch.int64, device=device) for _ in range(2))

    @torch.no_grad()
    def after(self, share: Tensor, size: Tensor, up: Tensor, down: Tensor, pos: Tensor, neg: Tensor) -> None:
        """Take in one pass: hits and smooth sizes (K,), the patterns it ended with, and the variables to write to."""
        up, down = (torch.where(p < _LEVEL, 0, p) for p in (up, down))
        count = ((up - down).abs().sum(1) > 0).flatten(1).sum(1).float()
        reached = share >= self.success
        better = reached & (size < self.size) & (count < self.count)
        self.size, self.count = torch.where(better, size, self.size), torch.where(better, count, self.count)
        shown = better | self.count.isinf()  # the last one where none was ever kept
        for kept, variable, new in ((self.pos, pos, up), (self.neg, neg, down)):
            kept[shown] = new[shown]
            variable[better] = new[better]
        self.good, self.bad = torch.where(reached, self.good + 1, 0), torch.where(reached, 0, self.bad + 1)
        rise, fall = self.good >= self.patience, self.bad >= self.patience
        self.weight = torch.where(rise, self.weight * 1.5, self.weight)
        self.weight = torch.where(fall, self.weight / 1.5**1.5, self.weight)
        self.good, self.bad = self.good.masked_fill(rise, 0), self.bad.masked_fill(fall, 0)


def pixels(pattern: Tensor) -> Tensor:
    """Smooth count (K,) of the pixels that patterns (K, C, H, W) change.

    The gradient goes to one of equal channels, as in the authors' code; `amax` would share it out among them.
    """
    return (torch.tanh(pattern / 10) / 2 + 0.5).max(1).values.flatten(1).sum(1)


def victims(data: ImageSet, classes: int, at_most: int, ctx: Ctx) -> Tensor:
    """Rows of other classes for every class, int64 (classes, n), drawn without replacement.

    Raises:
        NotApplicable: all rows have one class, so that there is nothing to turn into it.
    """
    labels = data.labels.cpu()
    others = [(labels != t).nonzero().flatten() for t in range(classes)]
    n = min(at_most, *map(len, others))
    if not n:
        raise NotApplicable("one_class: all clean rows have the same label")
    draw = ctx.generator("rows")
    return torch.stack([rows[torch.randperm(len(rows), generator=draw)[:n]] for rows in others])
