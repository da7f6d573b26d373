"""MOTH, model orthogonalization: push classes apart by training against the small triggers between pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.tune import tune


@dataclass(frozen=True, kw_only=True)
class MOTH(Defense):
    """Model orthogonalization (Tao et al., S&P 2022), with the settings of the authors' PyTorch code.

    The distance from class a to b is the size (sum) of the smallest mask that, with a pattern, sends images of a to b.
    Each training step first finds triggers and puts them on rows of its batch, which keep their true labels:

    1. Warm-up, a step per class t: one trigger for all other classes is inverted on `per_class` rows of each. Its size
       is the first distance of every pair (a, t); S[a, t] is by which share the cross-entropy of a's rows fell from the
       first step to the best mask. If the mask is smaller than a quarter of the image, it goes on half of the batch's
       rows that are not t.
    2. Pairs: a new pair every three steps, with probability 0.3 any two classes, else the largest of
       (1 - alpha) (S + S^T) + alpha (D + D^T), alpha = min(1, 0.1 steps / 100) with the steps since the warm-up. D
       starts as the distances over the largest of them; after three steps of a pair D <- (D + growth) / 2 in both
       directions, growth the relative change of the distance, itself the mean over these steps.
    3. Triggers a -> b and b -> a are inverted together on the batch's rows of a and b, from those of the largest masks
       found so far (as the authors keep them), then from those of the step before: 200 inversion steps at a weight of
       1e-3 in a pair's first step, then 50 at 1e-2, or 200 at 1e-3 again after a failure. They go on
       int(0.1 min(n_a, n_b)) rows, at least one, unless the mask is not small or has failed.
    4. A step of all weights on cross-entropy.

    Inversion: Adam with betas 0.5 and 0.9 at rate 0.1 on mask and pattern through tanh, on all rows at once; the loss
    is cross-entropy (mean in 1, sum per direction in 3) + weight times mask sum. A smaller mask whose share of hits
    reaches 0.99 (step 1) or 0.9 (3) is kept, and the search goes on from it plus uniform noise of 0.01. After ten
    steps in a row that reach the share the weight grows by 1.5, after ten that do not it falls by 1.5^1.5.

    BatchNorm normalises by running statistics, which stay: the authors' inversion leaves the network in eval mode. It
    stops after `steps` and keeps the last weights. Images are not augmented. Costs count every inversion pass.

    Differs: the authors train on all clean training rows; here on the defender's, with the published two epochs of
    50,000 rows kept as steps. At least one row per direction is stamped, where theirs stamps none with few rows per
    class; a batch without one of the classes trains as it is. Plain momentum instead of Nesterov's. A trigger is
    remembered per direction, where their keys mix up both. A distance that no inversion gave counts from its first
    measurement on, and no class pairs with itself. Classes without a clean row are left out. Step 1's inversion takes
    all its rows in one update, where theirs takes batches of 32. S is that of their Keras code; the PyTorch one loses
    the last loss where there is more than one batch, so that S is 1.

    Args:
        steps: Updates, warm-up included.
        lr: Learning rate, constant; momentum 0.9.
        batch: Rows per update; all rows where there are fewer.
        warm_inversion: Inversion steps of step 1.
        first_inversion: Inversion steps of a pair's first step.
        next_inversion: Inversion steps of its others.
        per_class: Rows per class in step 1, at most.
        warm_share: Share of the other classes' rows that step 1 stamps.
        share: Share of the scarcer class's rows that step 3 stamps in each direction.
    """

    INFO = {
        "title": "MOTH",
        "paper": "https://openreview.net/forum?id=VcebbNLX0sb",
        "bibtex": "@inproceedings{tao2022model, title={Model Orthogonalization: Class Distance Hardening in Neural "
        "Networks for Better Security}, author={Tao, Guanhong and Liu, Yingqi and Shen, Guangyu and Xu, Qiuling and "
        "An, Shengwei and Zhang, Zhuo and Zhang, Xiangyu}, booktitle={IEEE Symposium on Security and Privacy}, "
        "year={2022}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"steps": 14, "batch": 64, "warm_inversion": 3, "first_inversion": 3, "next_inversion": 2},
        "effort": ["steps", "warm_inversion", "first_inversion", "next_inversion"],
        "presets": {"reduced": {"steps": 690, "warm_inversion": 440}},
    }
    ACCESS = Access(clean=0.05)

    steps: int = 782
    lr: float = 1e-4
    batch: int = 128
    warm_inversion: int = 500
    first_inversion: int = 200
    next_inversion: int = 50
    per_class: int = 10
    warm_share: float = 0.5
    share: float = 0.1

    def run(self, case: Case) -> Outcome:
        """The hardened model.

        Raises:
            NotApplicable: fewer than two classes have clean rows.
        """
        hooks = Hardening(self, case.clean, case.spec.classes, case.ctx)
        model = tune(
            case.net,
            case.clean,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            augment=False,
            statistics="running",
            hooks=hooks,
        )
        chosen = {
            "stamped": hooks.stamped,
            "inversions": hooks.inversions,
            "failed": hooks.failed,
            "pairs": len(hooks.seen),
            "distance_first": hooks.warm,
            "distance_last": hooks.pairs.mean(),
        }
        return Outcome(model=model, chosen=chosen)


class Pairs:
    """Which two classes to push apart next: S, D and distances, all (K, K) from row to column.

    Args:
        known: Classes that may be picked, at least two.
        classes: K.
    """

    def __init__(self, known: list[int], classes: int) -> None:
        self.known = known
        self.speed, self.growth = torch.zeros(classes, classes), torch.zeros(classes, classes)
        self.distance = torch.full((classes, classes), torch.nan)

    def warmed(self, target: int, size: float, speed: Tensor) -> None:
        """Step 1 for one class: its mask's size, NaN where it failed, and the speed (K,) per source."""
        for source in self.known:
            if source != target:
                self.distance[source, target], self.speed[source, target] = size, speed[source]

    def start(self) -> None:
        """After the warm-up: D is the distances over the largest."""
        sizes = self.distance.nan_to_num(nan=0.0)
        self.growth = sizes / sizes.max().clamp_min(1e-12)

    def pick(self, step: int, gen: Generator) -> tuple[int, int]:
        """The pair for the three steps from `step` (0 after the warm-up) on."""
        if float(torch.rand(1, generator=gen)) < 0.3:
            order = torch.randperm(len(self.known), generator=gen)
            return self.known[order[0]], self.known[order[1]]
        alpha = min(0.1 * step / 100, 1.0)
        score = (1 - alpha) * (self.speed + self.speed.T) + alpha * (self.growth + self.growth.T)
        part = score[self.known][:, self.known].fill_diagonal_(-torch.inf)
        a, b = divmod(int(part.argmax()), len(self.known))
        return self.known[a], self.known[b]

    def measured(self, a: int, b: int, sizes: list[float]) -> None:
        """After a pair's steps: the mean sizes of a -> b and b -> a, NaN where nothing was found."""
        for (i, j), size in zip(((a, b), (b, a)), sizes, strict=True):
            before = float(self.distance[i, j])
            if size != size:
                continue
            if before == before and before > 0:
                self.growth[i, j] = (self.growth[i, j] + (size - before) / before) / 2
            self.distance[i, j] = size

    def mean(self) -> float | None:
        """Mean distance of the pairs that have one."""
        known = self.distance[~self.distance.isnan()]
        return float(known.mean()) if len(known) else None


@dataclass(frozen=True, kw_only=True)
class Triggers:
    """What `invert` found, J at once.

    Args:
        mask: (J, 1, H, W) in [0, 1]; zeros where the share was never reached.
        pattern: (J, C, H, W) in [0, 1]; likewise.
        size: (J,), sum of the mask; infinite where the share was never reached.
        fall: (N,), by which share each row's cross-entropy fell from the first step to the mask kept last; 0 without.
    """

    mask: Tensor
    pattern: Tensor
    size: Tensor
    fall: Tensor


def invert(
    net: nn.Module,
    x: Tensor,
    aim: Tensor,
    which: Tensor,
    *,
    start: tuple[Tensor, Tensor],
    steps: int,
    weight: float,
    success: float,
    mean: bool,
    gen: Generator,
) -> Triggers:
    """The smallest masks that send rows to their aims.

    Args:
        net: In the mode that the caller wants; its weights get no gradient.
        x: float32 [0, 1] (N, C, H, W).
        aim: int64 (N,), the wanted classes.
        which: int64 (N,), which of the J triggers goes on the row; each on at least one.
        start: Masks (J, 1, H, W) and patterns (J, C, H, W) to begin with.
        steps: Adam steps.
        weight: Of the mask's sum, at first.
        success: Share of a trigger's rows.
        mean: Cross-entropy is averaged over a trigger's rows, not summed.
        gen: Source of the noise.
    """
    u, v = _raw(start[0]).requires_grad_(), _raw(start[1]).requires_grad_()
    adam = torch.optim.Adam([u, v], lr=0.1, betas=(0.5, 0.9))
    count, device = len(u), x.device
    mine = F.one_hot(which, count).to(x)
    cost = torch.full((count,), weight, device=device)
    best = torch.full((count,), torch.inf, device=device)
    good, bad = torch.zeros(count, device=device), torch.zeros(count, device=device)
    kept_mask, kept_pattern = torch.zeros_like(u), torch.zeros_like(v)
    first, last = None, torch.full((len(x),), torch.nan, device=device)
    for _ in range(steps):
        mask, pattern = _squash(u), _squash(v)
        logits = net(x + mask[which] * (pattern[which] - x)).float()
        error = F.cross_entropy(logits, aim, reduction="none")
        size = mask.flatten(1).sum(1)
        summed = error @ mine / (mine.sum(0) if mean else 1)
        u.grad, v.grad = torch.autograd.grad((summed + cost * size).sum(), [u, v])
        adam.step()
        with torch.no_grad():
            first = error.detach() if first is None else first
            reached = (logits.argmax(1) == aim).to(x) @ mine / mine.sum(0) >= success
            better = reached & (size < best)
            best = torch.where(better, size, best)
            at = better[:, None, None, None]
            kept_mask, kept_pattern = torch.where(at, mask, kept_mask), torch.where(at, pattern, kept_pattern)
            last = torch.where(better[which], error, last)
            jitter = [0.02 * torch.rand(t.shape, generator=gen).to(device) - 0.01 for t in (u, v)]
            u.copy_(torch.where(at, _raw((mask + jitter[0]).clamp(0, 1)), u))
            v.copy_(torch.where(at, _raw((pattern + jitter[1]).clamp(0, 1)), v))
            good, bad = torch.where(reached, good + 1, 0), torch.where(reached, 0, bad + 1)
            cost = torch.where(good >= 10, cost * 1.5, torch.where(bad >= 10, cost / 1.5**1.5, cost))
            good, bad = torch.where(good >= 10, 0, good), torch.where(bad >= 10, 0, bad)
    assert first is not None
    fall = ((first - last) / first).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return Triggers(mask=kept_mask.detach(), pattern=kept_pattern.detach(), size=best.detach(), fall=fall)


class Hardening(TrainHooks):
    """Steps 1 to 3 in front of every update."""

    def __init__(self, settings: MOTH, data: ImageSet, classes: int, ctx: Ctx) -> None:
        super().__init__()
        self.settings, self.ctx, self.classes = settings, ctx, classes
        self.gen = ctx.generator("triggers")
        known = data.labels.unique().tolist()
        if len(known) < 2:
            raise NotApplicable(f"too_few_classes: clean rows of {len(known)}")
        self.pairs = Pairs(known, classes)
        order = torch.randperm(len(data), generator=ctx.generator("warm rows"))
        few = [order[data.labels[order] == k][: settings.per_class] for k in known]
        self.few = data.rows(torch.cat(few))
        self.limit = data.images.shape[2] * data.images.shape[3] / 4
        self.best: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.now: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.sizes: list[list[float]] = []
        self.seen: set[tuple[int, int]] = set()
        self.done = self.stamped = self.inversions = self.failed = 0
        self.pair, self.again = (0, 0), False
        self.warm: float | None = None

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Stamp, then update."""
        with evaluating(net):
            warm = self.done < len(self.pairs.known)
            x = self.universal(net, x, y) if warm else self.between(net, x, y, self.done - len(self.pairs.known))
        self.done += 1
        return super().step(net, opt, x, y, mark)

    def universal(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Step 1 for the next class; returns the stamped batch."""
        target = self.pairs.known[self.done]
        rows = self.few.rows(self.few.labels != target)
        source, seen = rows.labels.to(x.device), to_float(rows.images.to(x.device))
        found = invert(
            net,
            seen,
            torch.full_like(source, target),
            torch.zeros_like(source),
            start=self.fresh(1, x),
            steps=self.settings.warm_inversion,
            weight=1e-3,
            success=0.99,
            mean=True,
            gen=self.gen,
        )
        self.inversions += 1
        failed = not bool(found.size.isfinite())
        self.failed += failed
        speed = torch.zeros(self.classes)
        for k in self.pairs.known:
            if k != target:
                speed[k] = found.fall[source == k].mean().cpu()
                if not failed:
                    self.best[k, target] = found.mask[0], found.pattern[0]
        self.pairs.warmed(target, float("nan") if failed else float(found.size[0]), speed)
        others = (y != target).nonzero().flatten()
        if failed or float(found.size[0]) >= self.limit:
            return x
        return self.stamp(x, others, int(len(others) * self.settings.warm_share), found.mask[0], found.pattern[0])

    def between(self, net: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
        """Steps 2 and 3; returns the stamped batch."""
        if step == 0:
            self.pairs.start()
            self.warm = self.pairs.mean()
        if step % 3 == 0:
            self.pair, self.again, self.sizes = self.pairs.pick(step, self.gen), True, []
            a, b = self.pair
            self.seen.add((min(a, b), max(a, b)))
            self.now = {k: self.best[k] for k in ((a, b), (b, a)) if k in self.best}
        a, b = self.pair
        rows = [(y == k).nonzero().flatten() for k in (a, b)]
        few = min(len(r) for r in rows)
        if few:
            x = self.opposed(net, x, rows, max(1, int(self.settings.share * few)))
        if step % 3 == 2 and self.sizes:
            self.pairs.measured(a, b, torch.tensor(self.sizes).nanmean(0).tolist())
        return x

    def opposed(self, net: nn.Module, x: Tensor, rows: list[Tensor], count: int) -> Tensor:
        """Step 3 for the batch's rows of both classes."""
        a, b = self.pair
        ways = ((a, b), (b, a))
        both = torch.cat(rows)
        which = torch.cat([torch.full_like(r, i) for i, r in enumerate(rows)])
        mask, pattern = self.fresh(2, x)
        for i, way in enumerate(ways):
            if way in self.now:
                mask[i], pattern[i] = self.now[way]
        found = invert(
            net,
            x[both],
            torch.where(which == 0, b, a),
            which,
            start=(mask, pattern),
            steps=self.settings.first_inversion if self.again else self.settings.next_inversion,
            weight=1e-3 if self.again else 1e-2,
            success=0.9,
            mean=False,
            gen=self.gen,
        )
        self.inversions += 2
        self.again = not bool(found.size.isfinite().all())
        for i, way in enumerate(ways):
            size = float(found.size[i])
            if size == float("inf"):
                self.failed += 1
                continue
            self.now[way] = found.mask[i], found.pattern[i]
            if way not in self.best or size > float(self.best[way][0].sum()):
                self.best[way] = self.now[way]
            if size < self.limit:
                x = self.stamp(x, rows[i], count, found.mask[i], found.pattern[i])
        self.sizes.append([float(self.now[way][0].sum()) if way in self.now else float("nan") for way in ways])
        return x

    def stamp(self, x: Tensor, rows: Tensor, count: int, mask: Tensor, pattern: Tensor) -> Tensor:
        """The batch with the trigger on `count` of the rows."""
        chosen = rows[torch.randperm(len(rows), generator=self.gen)[:count].to(rows.device)]
        seen = x[chosen]
        self.stamped += len(chosen)
        return x.index_copy(0, chosen, (seen + mask * (pattern - seen)).clamp(0, 1))

    def fresh(self, count: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Masks and patterns drawn uniform in [0, 1]."""
        _, c, h, w = x.shape
        mask, pattern = (torch.rand(count, n, h, w, generator=self.gen) for n in (1, c))
        return mask.to(x.device), pattern.to(x.device)


def _raw(share: Tensor) -> Tensor:
    """What `_squash` turns into `share`; 0 and 1 themselves lie at infinity."""
    return torch.atanh((2 * share.detach() - 1).clamp(-1 + 1e-6, 1 - 1e-6))


def _squash(raw: Tensor) -> Tensor:
    return (raw.tanh() + 1) / 2
