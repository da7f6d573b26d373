"""UNICORN: inversion in a space that is learnt together with the trigger."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.generators import seeded
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.taps import taps
from sleeperbench.kit.unet import UNet

_CLAIMS = 2
"""Labels claimed at most, since each claim carries two networks."""


@dataclass(frozen=True, kw_only=True)
class Unicorn(Defense):
    """Unified backdoor trigger inversion (Wang, Mei, Zhai, Ma, ICLR 2023), for every label in turn.

    1. Two U-Nets P (into a space) and Q (back) are trained to be the identity together, by the squared error.
    2. A trigger is a mask m and pattern p in that space: x' = Q((1 - m) z + m p), z = P(x) brought to [0, 1] by the
       batch's extremes and, stamped, back. The net's last stage answers f(x'), of which a feature mask M keeps a part
       and the features of other clean images give the rest: M f(x') + (1 - M) f(x), x shuffled.
    3. Per batch, one update of P and Q, `rounds` of m and p, `rounds` of M, each by its own Adam. The first two
       minimise a sum of terms of which each counts only while its bound is broken:
       - CE(answer, t) (1 + w_a) while the hits on the batch are below `success`;
       - 10 (1 - SSIM(x, x')) (1 + w_s) while that is above `distance`;
       - 10 (standard deviation of M f(x') over the batch, per unit of M) (1 + w_d) while that is above `deviation`;
       - cosine of the mean f(x') and the mean features of clean rows of t, while above 0 (P, Q) or 0.5 (m, p);
       P and Q also 200 times the error of the identity; m and p 10 |m|_1 above `space` of its size. M minimises CE plus
       |M|_1 above `features` of its size.
    4. w_a, w_s and w_d are by how much the epoch's means broke their bounds, relative to these.
    5. A label's score is the share of clean rows of other classes that its trigger sends there if 1 - SSIM is within
       its bound, else 0. Labels above `success` are flagged; the two best are claimed. A claim is P, Q, m and p.

    Differs: the authors invert a given label. U-Nets see pixels in [0, 1], and images are cut to them. The means of
    features are those of the clean rows at hand, a label without any has the mean of all. Claims and scores take the
    extremes of z over all clean rows, so that an image's trigger does not depend on its batch. The clean images whose
    features fill up are shuffled once per batch.

    Args:
        pretrain: Epochs of step 1.
        epochs: Epochs of step 3.
        rounds: Updates of the trigger, and of the feature mask, per update of the U-Nets.
        batch: Rows per update.
        width: Filters of the U-Nets' first level.
        success: Share of hits wanted, 0..1.
        distance: Largest 1 - SSIM.
        deviation: Largest standard deviation of masked features.
        space: Largest share of the space that m covers.
        features: Largest share of the features that M keeps.
    """

    INFO = {
        "title": "UNICORN",
        "paper": "https://openreview.net/forum?id=Mj7K4lglGyj",
        "bibtex": "@inproceedings{wang2023unicorn, title={{UNICORN}: A Unified Backdoor Trigger Inversion Framework}, "
        "author={Wang, Zhenting and Mei, Kai and Zhai, Juan and Ma, Shiqing}, booktitle={International Conference on "
        "Learning Representations}, year={2023}}",
        "kind": "inversion",
        "version": 1,
        "api": 1,
        "stamps": True,
        "micro": {"pretrain": 1, "epochs": 1, "rounds": 1, "width": 2},
        "effort": ["pretrain", "epochs", "rounds", "width"],
        "traverses": True,
        "presumes": "a small mask and pattern in a space that can be learnt, which works through few features",
    }
    ACCESS = Access(clean=0.01)

    pretrain: int = 500
    epochs: int = 1000
    rounds: int = 10
    batch: int = 64
    width: int = 32
    success: float = 0.9
    distance: float = 0.15
    deviation: float = 1.0
    space: float = 0.15
    features: float = 0.15

    def __post_init__(self) -> None:
        if min(self.pretrain, self.epochs, self.rounds) < 1 or self.batch < 2:
            raise ValueError("pretrain, epochs and rounds must be positive, batch at least 2")

    def run(self, case: Case) -> Outcome:
        """The verdict, a score per label, and the best triggers.

        Raises:
            NotApplicable: a single clean row.
        """
        k, labels = case.spec.classes, case.clean.labels.cpu()
        net = copy.deepcopy(case.net).to(case.ctx.device).eval().requires_grad_(False)
        x = to_float(case.clean.images.to(case.ctx.device))
        if len(x) < 2:
            raise NotApplicable("too_few_rows: batch norm and deviations need two")
        means = class_means(net, x, labels, k)
        case.ctx.cost.forwards += len(x)
        scores = torch.zeros(k, dtype=torch.float64)
        best: list[tuple[float, int, dict[str, Tensor]]] = []
        shares = []
        for t in range(k):
            engine = Engine(net, x, t, means[t], self, case.ctx)
            engine.pretrain()
            for epoch in range(self.epochs):
                engine.epoch(epoch)
                case.ctx.progress(t * self.epochs + epoch + 1, k * self.epochs, "invert")
            share, near = engine.success(x[(labels != t).to(x.device)])
            shares.append([round(share, 4), round(near, 4)])
            scores[t] = share if 1 - near <= self.distance else 0.0
            if scores[t] > self.success:
                best = sorted([*best, (share, t, engine.tensors())], key=lambda b: -b[0])[:_CLAIMS]
        flagged = [int(t) for t in (scores > self.success).nonzero().flatten()]
        claimed = sorted(t for _, t, _ in best)
        state = {f"{t}.{name}": v for _, t, tensors in best for name, v in tensors.items()}
        return Outcome(
            verdict=Verdict(score=float(scores.max()), threshold=self.success, label_scores=scores),
            inverted=tuple(Inverted(target=t, uses_apply=True) for t in claimed),
            state=(state, {"channels": case.spec.shape[0], "width": self.width}),
            chosen={"claimed": claimed, "flagged": flagged, "success_and_ssim": shares},
        )

    def stamp(self, state: tuple[Mapping[str, Tensor], Any], inv: Inverted, x: Tensor) -> Tensor:
        """Images with the claimed label's trigger."""
        own = {n.split(".", 1)[1]: v.to(x.device) for n, v in state[0].items() if n.startswith(f"{inv.target}.")}
        nets = []
        for side in ("into", "back"):
            unet = UNet(state[1]["channels"], state[1]["channels"], state[1]["width"]).to(x.device)
            unet.load_state_dict({n.split(".", 1)[1]: v for n, v in own.items() if n.startswith(f"{side}.")})
            nets.append(unet.eval())
        with torch.no_grad():
            return wear(nets[0], nets[1], own["mask"], own["pattern"], x, own["extremes"])


class Engine:
    """One label's networks, trigger and feature mask, with their three optimisers."""

    def __init__(self, net: Classifier, x: Tensor, target: int, mean: Tensor, method: Unicorn, ctx: Ctx) -> None:
        self.net, self.x, self.target, self.mean, self.m, self.ctx = net, x, target, mean, method, ctx
        channels = x.shape[1]
        self.into, self.back = (
            seeded(UNet, ctx.derive(side, target), channels, channels, method.width).to(ctx.device)
            for side in ("into", "back")
        )
        # m and p start at (tanh(1) + 1) / 2 and 1/2; so does M at the former.
        self.u, self.v = (torch.full(x.shape[1:], f, device=x.device).requires_grad_() for f in (1.0, 0.0))
        self.w = torch.ones_like(mean).requires_grad_()
        nets = [*self.into.parameters(), *self.back.parameters()]
        self.nets = torch.optim.Adam(nets, lr=1e-3, betas=(0.5, 0.9))
        self.trigger = torch.optim.Adam([self.u, self.v], lr=0.1, betas=(0.5, 0.9))
        self.part = torch.optim.Adam([self.w], lr=0.1, betas=(0.5, 0.9))
        self.more = {"hits": 1.0, "distance": 1.0, "deviation": 1.0}
        self.gen = ctx.generator("batches", target)

    def pretrain(self) -> None:
        """Step 1."""
        for _ in range(self.m.pretrain):
            for x in self._batches():
                self.nets.zero_grad()
                F.mse_loss(self.back(self.into(x)), x).backward()  # type: ignore[no-untyped-call]
                self.nets.step()

    def epoch(self, number: int) -> None:
        """Steps 3 and 4 over all rows once."""
        hits, distances, deviations = [], [], []
        for x in self._batches():
            shuffled = x[torch.randperm(len(x), generator=self.gen).to(x.device)]
            with torch.no_grad():
                other, _ = self._features(shuffled)
            self._train(True)
            self.nets.zero_grad()
            loss, seen = self.loss(x, other, floor=0.0)
            (loss + 200 * F.mse_loss(self.back(self.into(x)), x)).backward()  # type: ignore[no-untyped-call]
            self.nets.step()
            hits.append(seen["hits"])
            self._train(False)
            for _ in range(self.m.rounds):
                self.trigger.zero_grad()
                loss, seen = self.loss(x, other, floor=0.5)
                size = squash(self.u).sum()
                if float(size.detach()) > self.m.space * self.u.numel():
                    loss = loss + 10 * size
                if loss.requires_grad:  # not where every bound holds
                    loss.backward()  # type: ignore[no-untyped-call]
                    self.trigger.step()
                hits.append(seen["hits"])
            distances.append(seen["distance"])
            deviations.append(seen["deviation"])
            with torch.no_grad():
                features, _ = self._features(self.worn(x))
            for _ in range(self.m.rounds):
                self.part.zero_grad()
                kept = squash(self.w)
                loss = F.cross_entropy(self._answer(x, kept * features + (1 - kept) * other), self._wanted(x))
                if float(kept.detach().sum()) > int(self.m.features * kept.numel()):
                    loss = loss + kept.sum()
                loss.backward()  # type: ignore[no-untyped-call]
                self.part.step()
        m, n = self.m, len(distances)
        self.more = {
            "hits": max(m.success - sum(hits) / len(hits), 0.0) / m.success,
            "distance": max(sum(distances) / n - m.distance, 0.0) / m.distance,
            "deviation": max(sum(deviations) / n - m.deviation, 0.0) / m.deviation,
        }

    def loss(self, x: Tensor, other: Tensor, *, floor: float) -> tuple[Tensor, dict[str, float]]:
        """The terms whose bounds are broken, and what was seen: hits, distance, deviation."""
        worn, kept = self.worn(x), squash(self.w).detach()
        features, _ = self._features(worn)
        logits = self._answer(x, kept * features + (1 - kept) * other)
        wanted = self._wanted(x)
        distance = 1 - ssim(worn, x).mean()
        deviation = (features * kept).std(0).sum() / kept.sum()
        alike = F.cosine_similarity(self.mean.flatten(), features.mean(0).flatten(), dim=0)
        seen = {
            "hits": float((logits.argmax(1) == wanted).float().mean()),
            "distance": float(distance.detach()),
            "deviation": float(deviation.detach()),
        }
        loss = alike if float(alike.detach()) >= floor else torch.zeros((), device=x.device)
        if seen["deviation"] > self.m.deviation:
            loss = loss + 10 * (1 + self.more["deviation"]) * deviation
        if seen["distance"] > self.m.distance:
            loss = loss + 10 * (1 + self.more["distance"]) * distance
        if seen["hits"] < self.m.success:
            loss = loss + (1 + self.more["hits"]) * F.cross_entropy(logits, wanted)
        return loss, seen

    def worn(self, x: Tensor) -> Tensor:
        """Images with the trigger as it is now, within the extremes of their own batch."""
        return wear(self.into, self.back, squash(self.u), squash(self.v), x, None)

    @torch.no_grad()
    def success(self, x: Tensor) -> tuple[float, float]:
        """Share of images that get the label, and mean SSIM; 0 and 1 where there are none."""
        if not len(x):
            return 0.0, 1.0
        tensors = self.tensors()
        mask, pattern, extremes = (tensors[n].to(x.device) for n in ("mask", "pattern", "extremes"))
        hits, near = 0, 0.0
        for part in x.split(256):
            worn = wear(self.into.eval(), self.back.eval(), mask, pattern, part, extremes)
            hits += int((self.net(worn).argmax(1) == self.target).sum())
            near += float(ssim(worn, part).sum())
            self.ctx.cost.forwards += len(part)
        return hits / len(x), near / len(x)

    def tensors(self) -> dict[str, Tensor]:
        """What `wear` needs, on the CPU."""
        with evaluating(self.into), torch.no_grad():
            spread = [torch.stack([z.min(), z.max()]) for z in (self.into(part) for part in self.x.split(256))]
        found = torch.stack(spread)
        own = {f"into.{n}": v for n, v in self.into.state_dict().items()}
        own |= {f"back.{n}": v for n, v in self.back.state_dict().items()}
        own |= {"mask": squash(self.u), "pattern": squash(self.v)}
        own |= {"extremes": torch.stack([found[:, 0].min(), found[:, 1].max()])}
        return {n: v.detach().cpu().clone() for n, v in own.items()}

    def _batches(self) -> list[Tensor]:
        order = torch.randperm(len(self.x), generator=self.gen).to(self.x.device)
        return [self.x[rows] for rows in order.split(self.m.batch) if len(rows) > 1 or len(order) == 1]

    def _train(self, on: bool) -> None:
        for net in (self.into, self.back):
            net.train(on).requires_grad_(on)

    def _wanted(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.target, device=x.device)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.ctx.cost.forwards += len(x)
        self.ctx.cost.backwards += len(x) if torch.is_grad_enabled() else 0
        return features_of(self.net, x)

    def _answer(self, x: Tensor, features: Tensor) -> Tensor:
        """Logits where the last stage answers these features."""
        site = taps(self.net).stages[-1]
        handle = self.net.get_submodule(site).register_forward_hook(lambda module, inputs, output: features)
        try:
            logits: Tensor = self.net(x[:1])
        finally:
            handle.remove()
        return logits.float()


def wear(into: nn.Module, back: nn.Module, mask: Tensor, pattern: Tensor, x: Tensor, extremes: Tensor | None) -> Tensor:
    """Q((1 - m) z + m p) in [0, 1], z = P(x) scaled by `extremes` (low, high), by default its own."""
    z = into(x)
    low, high = (z.min(), z.max()) if extremes is None else (extremes[0], extremes[1])
    scale = (high - low).clamp(min=1e-12)
    stamped = (1 - mask) * (z - low) / scale + mask * pattern
    out: Tensor = back(stamped * scale + low)
    return out.clamp(0, 1)


def squash(raw: Tensor) -> Tensor:
    """Half the hyperbolic tangent plus a half: in (0, 1)."""
    return raw.tanh() / 2 + 0.5


def features_of(net: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Answer of the last stage, and logits, of one pass."""
    found: list[Tensor] = []
    site = net.get_submodule(taps(net).stages[-1])
    handle = site.register_forward_hook(lambda module, inputs, output: found.append(output.clone()))
    try:
        logits = net(x).float()
    finally:
        handle.remove()
    return found[0], logits


@torch.no_grad()
def class_means(net: Classifier, x: Tensor, labels: Tensor, classes: int) -> list[Tensor]:
    """Mean features of each label's rows; of all rows for a label without any."""
    features = torch.cat([features_of(net, part)[0] for part in x.split(256)])
    rows = [(labels == t).to(x.device) for t in range(classes)]
    return [features[r].mean(0) if bool(r.any()) else features.mean(0) for r in rows]


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) of images in [0, 1]: Gaussian windows of 11 x 11, deviation 1.5, no border.

    Images smaller than the window get one of their own size (odd).
    """
    size = min(11, *(s - 1 + s % 2 for s in a.shape[2:]))
    along = torch.arange(size, device=a.device, dtype=a.dtype) - size // 2
    line = torch.exp(-along.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line[None, :]).expand(a.shape[1], 1, size, size)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=x.shape[1])

    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return found.flatten(1).mean(1)
