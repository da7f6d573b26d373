"""B3D: Neural Cleanse without gradients, by search distributions over masks and patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.anomaly import LEAST, smallness
from sleeperbench.kit.pixels import to_float

_AT_ONCE = 4096
"""Stamped images held in memory."""
_LEAST_SCORE = 1e-12
"""Smallest probability a loss is computed from: 27.6 nats."""


@dataclass(frozen=True, kw_only=True)
class B3D(Defense):
    """Black-box backdoor detection from scores (Dong et al., ICCV 2021).

    With g(z) = (tanh z + 1) / 2, for every class t:

    1. Masks are drawn as M ~ Bernoulli(g(a)), one plane, and patterns as P = g(b + sigma e), e ~ N(0, I). In each
       step, for `samples` draws j, L_j = mean over `batch` clean rows of CE(f((1 - M_j) x + M_j P_j), t).
    2. The gradient of E[L] + w |g(a)|_1 is estimated as mean_j L_j 2 (M_j - g(a)) + w 2 g(a) (1 - g(a)) for a, where
       2 (M - g(a)) is the score of the Bernoulli, and as mean_j L_j e_j / sigma for b. Adam follows it.
    3. After every `window` steps the share of hits in them is compared with `success`: at or above it w is multiplied
       by 1.2, below by 0.8.
    4. With the norms |g(a)|_1, class t is flagged if its anomaly index (below the median) exceeds `threshold`, or if
       its norm is less than a quarter of the median. Score of a class: the larger of the index and of
       `threshold` median / (4 norm), so that both rules read "above `threshold`". A class that never reached `success`
       counts with its last mask in median and deviation, and is never flagged (score at most 0).

    The authors published no code: settings come from a reproduction of the paper. `steps` is our choice; the paper
    iterates until convergence.

    Differs: L_j is taken relative to the mean of the other draws' losses, which changes no expectation and much of the
    variance. The norm of a class is the smallest g(a) at the end of a window that reached `success`. Start, which is
    not known: a = -0.5 (a quarter of all pixels drawn) and b = 0 (grey). Clean rows are real; the variant that
    synthesises them is not here, nor the rejection of inputs that the recovered trigger does not change. `drop` is for
    short runs, in which the masks of clean models hardly leave the start and their deviation is tiny.

    Args:
        steps: Updates.
        samples: Draws of mask and pattern per update and class.
        batch: Clean rows per update, at most all.
        sigma: Standard deviation of the search distribution of patterns, before g.
        lr: Learning rate of Adam.
        weight: w at the start.
        window: Updates between changes of w.
        success: Share of stamped images that must reach the class, 0..1.
        threshold: Anomaly index above which a class is flagged.
        drop: Share of the median by which the norm of a class must fall short of it, too, if its index is to flag it,
            0..1; 0 leaves the index alone.
    """

    INFO = {
        "title": "B3D",
        "paper": "https://arxiv.org/abs/2103.13127",
        "bibtex": "@inproceedings{dong2021black, title={Black-box Detection of Backdoor Attacks with Limited "
        "Information and Data}, author={Dong, Yinpeng and Yang, Xiao and Deng, Zhijie and Pang, Tianyu and Xiao, "
        "Zihao and Su, Hang and Zhu, Jun}, booktitle={IEEE/CVF International Conference on Computer Vision}, "
        "year={2021}}",
        "kind": "inversion",
        "version": 3,
        "api": 1,
        "micro": {"steps": 6, "samples": 4, "batch": 8, "window": 3, "lr": 1.0, "success": 0.1},
        "effort": ["steps", "samples", "batch"],
        "traverses": True,
        "presumes": "a small mask and pattern, the same on all images of all other classes",
    }
    ACCESS = Access(model="scores", clean=0.05)

    steps: int = 1000
    samples: int = 50
    batch: int = 128
    sigma: float = 0.1
    lr: float = 0.05
    weight: float = 0.01
    window: int = 10
    success: float = 0.99
    threshold: float = 2.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.samples < 2 or min(self.steps, self.batch, self.window) < 1:
            raise ValueError(f"samples is {self.samples}, at least 2; steps, batch and window must be at least 1")
        if not (self.sigma > 0 and self.lr > 0 and self.weight > 0):
            raise ValueError("sigma, lr and weight must be above 0")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must lie in [0, 1), not {self.drop}")

    def run(self, case: Case) -> Outcome:
        """The verdict, a score per class, and the recovered triggers of flagged classes.

        Raises:
            NotApplicable: too few classes for an outlier.
        """
        classes = case.spec.classes
        if classes < LEAST:
            raise NotApplicable(f"too_few_classes: {classes}; an outlier needs {LEAST}")
        masks, patterns, norm, _ = self.invert(case.net, case.clean.images, torch.arange(classes), case.ctx)
        found = ~norm.isnan()
        norm = torch.where(found, norm, masks.flatten(1).sum(1))
        score = suspicion(norm, found, self.threshold, self.drop)
        claimed = [int(t) for t in (score > self.threshold).nonzero().flatten()]
        return Outcome(
            verdict=Verdict(score=float(score.max()), threshold=self.threshold, label_scores=score),
            inverted=tuple(Inverted(target=t, mask=masks[t], pattern=patterns[t]) for t in claimed),
            chosen={
                "claimed": claimed,
                "norms": [round(n, 4) for n in norm.tolist()],
                "not_inverted": (~found).nonzero().flatten().tolist(),
            },
        )

    def invert(
        self,
        net: Callable[[Tensor], Tensor],
        images: Tensor,
        targets: Tensor,
        ctx: Ctx,
        *,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps 1 to 3: masks (T, 1, H, W), patterns (T, C, H, W), norms (T,) and shares of hits in their window (T,).

        A class that never reached `success` has its last mask and pattern, and a norm of NaN.

        Args:
            net: Scores (N, K) of images (N, C, H, W) in [0, 1].
            images: Clean rows, uint8 (N, C, H, W).
            targets: int64 (T,), the classes.
            ctx: Seed and progress.
            start: Masks and patterns, each strictly between 0 and 1, in place of a = -0.5 and b = 0.
        """
        x, gen = to_float(images), ctx.generator("draws")
        masks = torch.full((len(targets), 1, *x.shape[2:]), -0.5)
        patterns = torch.zeros(len(targets), *x.shape[1:])
        if start is not None:
            masks, patterns = (torch.atanh(2 * s - 1) for s in start)
        adam = torch.optim.Adam([masks, patterns], lr=self.lr)
        weight, hits, shares = (torch.full((len(targets),), w) for w in (self.weight, 0.0, 0.0))
        norm, kept = torch.full((len(targets),), torch.nan), [masks.clone(), patterns.clone()]
        for step in range(1, self.steps + 1):
            rows = x[torch.randperm(len(x), generator=gen)[: self.batch]]
            masks.grad, patterns.grad = torch.zeros_like(masks), torch.zeros_like(patterns)
            for i, t in enumerate(targets.tolist()):
                share = squash(masks[i])
                m, e = draw(share, patterns[i], self.samples, gen)
                p = squash(patterns[i] + self.sigma * e)
                loss, hit = self._losses(net, rows, m, p, t)
                hits[i] += hit
                masks.grad[i], patterns.grad[i] = estimate(loss, m, share, e, self.sigma)
                masks.grad[i] += weight[i] * 2 * share * (1 - share)
            adam.step()
            if step % self.window == 0:
                reached = hits / self.window >= self.success
                size = squash(masks).flatten(1).sum(1)
                better = reached & ~(size >= norm)  # a norm of NaN is above all
                shown = better | norm.isnan()
                shares[shown] = hits[shown] / self.window
                norm = torch.where(better, size, norm)
                kept[0][better], kept[1][better] = masks[better], patterns[better]
                weight *= torch.where(reached, 1.2, 0.8)
                hits.zero_()
            ctx.progress(step, self.steps, "invert")
        last = norm.isnan()
        kept[0][last], kept[1][last] = masks[last], patterns[last]
        return squash(kept[0]), squash(kept[1]), norm, shares

    def _losses(
        self, net: Callable[[Tensor], Tensor], x: Tensor, m: Tensor, p: Tensor, target: int
    ) -> tuple[Tensor, float]:
        """Loss (k,) of each draw on rows `x` (B, C, H, W), and the share of all stamped images that are hits."""
        losses, hits = [], 0
        each = max(1, _AT_ONCE // len(x))
        for mask, pattern in zip(m.split(each), p.split(each), strict=True):
            stamped = x + mask[:, None] * (pattern[:, None] - x)
            scores = net(stamped.flatten(0, 1))
            hits += int((scores.argmax(1) == target).sum())
            losses.append(-scores[:, target].clamp_min(_LEAST_SCORE).log().view(len(mask), len(x)).mean(1))
        return torch.cat(losses), hits / (len(m) * len(x))


def squash(z: Tensor) -> Tensor:
    """g(z) = (tanh z + 1) / 2."""
    return (z.tanh() + 1) / 2


def draw(share: Tensor, pattern: Tensor, samples: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """Masks (k, 1, H, W), each pixel 1 with probability `share`, and normal draws (k, C, H, W) for patterns."""
    m = (torch.rand(samples, *share.shape, generator=gen) < share).float()
    return m, torch.randn(samples, *pattern.shape, generator=gen)


def estimate(loss: Tensor, m: Tensor, share: Tensor, e: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Unbiased gradients of E[L] in the raw mask and the raw pattern, from k losses and their draws.

    The mean of the other k - 1 losses is taken off each: L_j - mean of others = k / (k - 1) (L_j - mean of all).
    """
    k = len(loss)
    gain = ((loss - loss.mean()) * k / (k - 1)).view(-1, 1, 1, 1)
    return (gain * 2 * (m - share)).mean(0), (gain * e).mean(0) / sigma


def suspicion(norms: Tensor, found: Tensor, threshold: float, drop: float = 0.0) -> Tensor:
    """Score (K,): the anomaly index of small norms, or `threshold` times a quarter of the median over the norm.

    Args:
        norms: (K,), all above 0.
        found: bool (K,), classes that were reached; the others get no more than 0.
        threshold: See step 4.
        drop: Where above 0 the index alone exceeds `threshold` only for a norm below (1 - drop) median.
    """
    index, size = smallness(norms, found), norms.double()
    times = size.quantile(0.5) / size.clamp_min(1e-12)  # how often the norm goes into the median
    if drop:
        index = torch.minimum(index, threshold * (1 - drop) * times)
    return torch.where(found, torch.maximum(index, threshold * times / 4), index)
