"""UNICORN: inversion in a space that is learnt together with the trigger."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.generators import seeded
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.taps import behind, capture, taps
from sleeperbench.kit.unet import UNet

_CLAIMS = 2
"""Labels claimed at most, since each claim carries two networks."""
_TOGETHER = {"cpu": 4, "cuda": 16}
"""Labels inverted side by side; each holds what its U-Nets answer to a batch."""


@dataclass(frozen=True, kw_only=True)
class Unicorn(Defense):
    """Unified backdoor trigger inversion (Wang, Mei, Zhai, Ma, ICLR 2023), for every label.

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

    Labels share the net alone. `together` of them are inverted side by side, each as if it were by itself.

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
        depth: How often the U-Nets halve the image.
        success: Share of hits wanted, 0..1.
        distance: Largest 1 - SSIM.
        deviation: Largest standard deviation of masked features.
        space: Largest share of the space that m covers.
        features: Largest share of the features that M keeps.
        together: Labels side by side; 0 takes as many as the device likes. It changes the result by rounding alone.
    """

    INFO = {
        "title": "UNICORN",
        "paper": "https://openreview.net/forum?id=Mj7K4lglGyj",
        "bibtex": "@inproceedings{wang2023unicorn, title={{UNICORN}: A Unified Backdoor Trigger Inversion Framework}, "
        "author={Wang, Zhenting and Mei, Kai and Zhai, Juan and Ma, Shiqing}, booktitle={International Conference on "
        "Learning Representations}, year={2023}}",
        "kind": "inversion",
        "version": 2,
        "api": 1,
        "stamps": True,
        "micro": {
            "pretrain": 1,
            "epochs": 1,
            "rounds": 1,
            "batch": 120,
            "width": 2,
            "depth": 1,
            "distance": 0.9999,
            "together": 10,
        },
        "effort": ["pretrain", "epochs", "rounds", "width", "depth"],
        "traverses": True,
        "presumes": "a small mask and pattern in a space that can be learnt, which works through few features",
    }
    ACCESS = Access(clean=0.01)

    pretrain: int = 500
    epochs: int = 1000
    rounds: int = 10
    batch: int = 64
    width: int = 32
    depth: int = 4
    success: float = 0.9
    distance: float = 0.15
    deviation: float = 1.0
    space: float = 0.15
    features: float = 0.15
    together: int = 0

    def __post_init__(self) -> None:
        if min(self.pretrain, self.epochs, self.rounds, self.width, self.depth) < 1 or self.batch < 2:
            raise ValueError("pretrain, epochs, rounds, width and depth must be positive, batch at least 2")
        if self.together < 0:
            raise ValueError(f"together is {self.together}; it counts labels")

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
        for targets in torch.arange(k).split(self.together or _TOGETHER.get(case.ctx.device.type, 4)):
            engine = Engine(net, x, targets.tolist(), means[targets.to(x.device)], self, case.ctx)
            engine.pretrain()
            for epoch in range(self.epochs):
                engine.epoch()
                done = int(targets[0]) * self.epochs + (epoch + 1) * len(targets)
                case.ctx.progress(done, k * self.epochs, "invert")
            for i, t in enumerate(targets.tolist()):
                share, near = engine.success(i, x[(labels != t).to(x.device)])
                shares.append([round(share, 4), round(near, 4)])
                scores[t] = share if 1 - near <= self.distance else 0.0
                if scores[t] > self.success:
                    best = sorted([*best, (share, t, engine.tensors(i))], key=lambda b: -b[0])[:_CLAIMS]
        flagged = [int(t) for t in (scores > self.success).nonzero().flatten()]
        claimed = sorted(t for _, t, _ in best)
        state = {f"{t}.{name}": v for _, t, tensors in best for name, v in tensors.items()}
        return Outcome(
            verdict=Verdict(score=float(scores.max()), threshold=self.success, label_scores=scores),
            inverted=tuple(Inverted(target=t, uses_apply=True) for t in claimed),
            state=(state, {"width": self.width, "depth": self.depth}),
            chosen={"claimed": claimed, "flagged": flagged, "success_and_ssim": shares},
        )

    def stamp(self, state: tuple[Mapping[str, Tensor], Any], inv: Inverted, x: Tensor) -> Tensor:
        """Images with the claimed label's trigger."""
        own = {n.partition(".")[2]: v.to(x.device) for n, v in state[0].items() if n.startswith(f"{inv.target}.")}
        form = seeded(UNet, 0, x.shape[1], x.shape[1], state[1]["width"], state[1]["depth"]).to(x.device).eval()
        return wear(own, form, x)


class Stack:
    """U-Nets of T labels, run side by side."""

    def __init__(self, nets: Sequence[UNet]) -> None:
        self.form = nets[0]
        self.parameters, self.buffers = stack_module_state(list(nets))

    def __call__(self, x: Tensor) -> Tensor:
        """Answers (T, B, ...) to images (T, B, C, H, W), the i-th network's to the i-th batch."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], rows: Tensor) -> Any:
            return functional_call(self.form, (parameters, buffers), (rows,))

        answers: Tensor = vmap(one)(self.parameters, self.buffers, x)
        return answers

    def train(self, on: bool) -> None:
        """Mode, and whether weights get gradients."""
        self.form.train(on)
        for p in self.parameters.values():
            p.requires_grad_(on)

    def state(self, i: int) -> dict[str, Tensor]:
        """State of the i-th network."""
        return {n: v[i].detach() for n, v in {**self.parameters, **self.buffers}.items()}


class Adams:
    """Adam on tensors (T, ...), in which each label counts its own updates: where nothing moves it, it stays."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, betas: tuple[float, float]) -> None:
        self.parameters, self.lr, self.betas = parameters, lr, betas
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self.updates = torch.zeros(len(parameters[0]), device=parameters[0].device)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], moving: Tensor) -> None:
        """One update of the labels that are `moving`, bool (T,)."""
        self.updates += moving
        a, b = self.betas
        for p, g, first, second in zip(self.parameters, gradients, self.first, self.second, strict=True):
            yes, n = (v.view(-1, *[1] * (p.dim() - 1)) for v in (moving, self.updates))
            first.copy_(torch.where(yes, a * first + (1 - a) * g, first))
            second.copy_(torch.where(yes, b * second + (1 - b) * g * g, second))
            move = first / (1 - a**n) / ((second / (1 - b**n)).sqrt() + 1e-8)
            p.copy_(torch.where(yes, p - self.lr * move, p))


class Engine:
    """Networks, triggers and feature masks of T labels, with their three optimisers."""

    def __init__(
        self, net: Classifier, x: Tensor, targets: Sequence[int], means: Tensor, method: Unicorn, ctx: Ctx
    ) -> None:
        self.net, self.x, self.targets, self.means, self.m, self.ctx = net, x, targets, means, method, ctx
        form, device = (x.shape[1], x.shape[1], method.width, method.depth), x.device
        self.into, self.back = (
            Stack([seeded(UNet, ctx.derive(side, t), *form).to(device) for t in targets]) for side in ("into", "back")
        )
        # m and p start at (tanh(1) + 1) / 2 and 1/2; so does M at the former.
        self.u, self.v = (
            torch.full((len(targets), *x.shape[1:]), f, device=device).requires_grad_() for f in (1.0, 0.0)
        )
        self.w = torch.ones_like(means).requires_grad_()
        nets = [*self.into.parameters.values(), *self.back.parameters.values()]
        self.nets = torch.optim.Adam(nets, lr=1e-3, betas=(0.5, 0.9))
        self.trigger = Adams([self.u, self.v], lr=0.1, betas=(0.5, 0.9))
        self.part = torch.optim.Adam([self.w], lr=0.1, betas=(0.5, 0.9))
        self.more = {n: torch.ones(len(targets), device=device) for n in ("hits", "distance", "deviation")}
        self.gens = [ctx.generator("batches", t) for t in targets]

    def pretrain(self) -> None:
        """Step 1."""
        for _ in range(self.m.pretrain):
            for x in self._batches():
                self.nets.zero_grad()
                self._identity(x).sum().backward()  # type: ignore[no-untyped-call]
                self.nets.step()

    def epoch(self) -> None:
        """Steps 3 and 4 over all rows once."""
        hits, distances, deviations = [], [], []
        for x in self._batches():
            shuffled = torch.stack([rows[_order(len(rows), gen)] for rows, gen in zip(x, self.gens, strict=True)])
            with torch.no_grad():
                other = self._features(shuffled)
            self._train(True)
            self.nets.zero_grad()
            loss, seen = self.loss(x, other, floor=0.0)
            (loss + 200 * self._identity(x)).sum().backward()  # type: ignore[no-untyped-call]
            self.nets.step()
            hits.append(seen["hits"])
            self._train(False)
            for _ in range(self.m.rounds):
                loss, seen = self.loss(x, other, floor=0.5)
                size = squash(self.u).flatten(1).sum(1)
                large = size.detach() > self.m.space * self.u[0].numel()
                gradients = torch.autograd.grad((loss + 10 * large * size).sum(), [self.u, self.v])
                # A label stays where every bound holds.
                self.trigger.step(gradients, seen["broken"] | large)
                hits.append(seen["hits"])
            distances.append(seen["distance"])
            deviations.append(seen["deviation"])
            with torch.no_grad():
                features = self._features(self.worn(x))
            for _ in range(self.m.rounds):
                self.part.zero_grad()
                kept = squash(self.w)
                error = self._errors(self._answer(_mixed(kept, features, other)))
                size = kept.flatten(1).sum(1)
                large = size.detach() > int(self.m.features * kept[0].numel())
                (error + large * size).sum().backward()  # type: ignore[no-untyped-call]
                self.part.step()
        m = self.m
        self.more = {
            "hits": (m.success - torch.stack(hits).mean(0)).clamp(min=0) / m.success,
            "distance": (torch.stack(distances).mean(0) - m.distance).clamp(min=0) / m.distance,
            "deviation": (torch.stack(deviations).mean(0) - m.deviation).clamp(min=0) / m.deviation,
        }

    def loss(self, x: Tensor, other: Tensor, *, floor: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The sums (T,) of terms whose bounds are broken, and what was seen: hits, distance, deviation, any broken."""
        worn, kept = self.worn(x), squash(self.w).detach()
        features = self._features(worn)
        logits = self._answer(_mixed(kept, features, other))
        distance = 1 - ssim(worn.flatten(0, 1), x.flatten(0, 1)).view(len(x), -1).mean(1)
        deviation = (features * kept[:, None]).std(1).flatten(1).sum(1) / kept.flatten(1).sum(1)
        alike = F.cosine_similarity(self.means.flatten(1), features.mean(1).flatten(1), dim=1)
        seen = {
            "hits": (logits.argmax(2) == self._wanted(logits)).float().mean(1),
            "distance": distance.detach(),
            "deviation": deviation.detach(),
        }
        terms = [
            (alike, alike.detach() >= floor),
            (10 * (1 + self.more["deviation"]) * deviation, seen["deviation"] > self.m.deviation),
            (10 * (1 + self.more["distance"]) * distance, seen["distance"] > self.m.distance),
            ((1 + self.more["hits"]) * self._errors(logits), seen["hits"] < self.m.success),
        ]
        seen["broken"] = torch.stack([broken for _, broken in terms]).any(0)
        return torch.stack([torch.where(broken, term, 0) for term, broken in terms]).sum(0), seen

    def worn(self, x: Tensor) -> Tensor:
        """Images (T, B, C, H, W) with the triggers as they are now, within the extremes of their own batch."""
        z = self.into(x)
        low, high = (f(z, (1, 2, 3, 4), keepdim=True) for f in (torch.amin, torch.amax))
        return self.back(stamped(z, squash(self.u)[:, None], squash(self.v)[:, None], low, high)).clamp(0, 1)

    @torch.no_grad()
    def success(self, i: int, x: Tensor) -> tuple[float, float]:
        """Share of images that get the i-th label, and mean SSIM; 0 and 1 where there are none."""
        if not len(x):
            return 0.0, 1.0
        tensors = {n: v.to(x.device) for n, v in self.tensors(i).items()}
        hits, near = 0, 0.0
        for part in x.split(256):
            worn = wear(tensors, self.into.form, part)
            hits += int((self.net(worn).argmax(1) == self.targets[i]).sum())
            near += float(ssim(worn, part).sum())
            self.ctx.cost.forwards += len(part)
        return hits / len(x), near / len(x)

    @torch.no_grad()
    def tensors(self, i: int) -> dict[str, Tensor]:
        """What `wear` needs for the i-th label, on the CPU."""
        own = {f"into.{n}": v for n, v in self.into.state(i).items()}
        own |= {f"back.{n}": v for n, v in self.back.state(i).items()}
        form = self.into.form.eval()
        spread = [(z.min(), z.max()) for z in (side(own, "into", form, part) for part in self.x.split(256))]
        found = torch.tensor(spread)
        own |= {"mask": squash(self.u[i]), "pattern": squash(self.v[i])}
        own |= {"extremes": torch.stack([found[:, 0].min(), found[:, 1].max()])}
        return {n: v.detach().cpu().clone() for n, v in own.items()}

    def _batches(self) -> list[Tensor]:
        orders = torch.stack([_order(len(self.x), gen) for gen in self.gens]).to(self.x.device)
        return [self.x[rows] for rows in orders.split(self.m.batch, 1) if rows.shape[1] > 1 or orders.shape[1] == 1]

    def _train(self, on: bool) -> None:
        for nets in (self.into, self.back):
            nets.train(on)

    def _identity(self, x: Tensor) -> Tensor:
        return (self.back(self.into(x)) - x).square().flatten(1).mean(1)

    def _wanted(self, logits: Tensor) -> Tensor:
        return torch.tensor(self.targets, device=logits.device)[:, None].expand(logits.shape[:2])

    def _errors(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy (T,) of logits (T, B, K) to the labels."""
        return F.cross_entropy(logits.transpose(1, 2), self._wanted(logits), reduction="none").mean(1)

    def _features(self, x: Tensor) -> Tensor:
        self.ctx.cost.forwards += x.shape[0] * x.shape[1]
        self.ctx.cost.backwards += x.shape[0] * x.shape[1] if torch.is_grad_enabled() else 0
        return features_of(self.net, x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _answer(self, features: Tensor) -> Tensor:
        """Logits (T, B, K) where the last stage answers these features."""
        return behind(self.net, taps(self.net).stages[-1], features.flatten(0, 1)).unflatten(0, features.shape[:2])


def _order(n: int, gen: Generator) -> Tensor:
    return torch.randperm(n, generator=gen)


def _mixed(kept: Tensor, features: Tensor, other: Tensor) -> Tensor:
    """Features (T, B, ...) in the parts (T, ...) that are kept, and those of other images in the rest."""
    return kept[:, None] * features + (1 - kept[:, None]) * other


def stamped(z: Tensor, mask: Tensor, pattern: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(1 - m) z + m p in the scale of `low` and `high`."""
    scale = (high - low).clamp(min=1e-12)
    return ((1 - mask) * (z - low) / scale + mask * pattern) * scale + low


@torch.no_grad()
def wear(tensors: Mapping[str, Tensor], form: UNet, x: Tensor) -> Tensor:
    """Images (N, C, H, W) with one label's trigger, Q((1 - m) P(x) + m p), within the extremes that it came with."""
    low, high = tensors["extremes"]
    z = stamped(side(tensors, "into", form, x), tensors["mask"], tensors["pattern"], low, high)
    return side(tensors, "back", form, z).clamp(0, 1)


def side(tensors: Mapping[str, Tensor], name: str, form: UNet, x: Tensor) -> Tensor:
    """Answer of one of the two networks, whose `form` is in eval mode."""
    own = {n.partition(".")[2]: v for n, v in tensors.items() if n.startswith(f"{name}.")}
    answer: Tensor = functional_call(form, own, (x,), strict=True)
    return answer


def squash(raw: Tensor) -> Tensor:
    """Half the hyperbolic tangent plus a half: in (0, 1)."""
    return raw.tanh() / 2 + 0.5


def features_of(net: Classifier, x: Tensor) -> Tensor:
    """Answer of the last stage."""
    site = taps(net).stages[-1]
    return capture(net, x, [site])[site]


@torch.no_grad()
def class_means(net: Classifier, x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean features (K, ...) of each label's rows; of all rows for a label without any."""
    features = torch.cat([features_of(net, part) for part in x.split(256)])
    rows = [(labels == t).to(x.device) for t in range(classes)]
    return torch.stack([features[r].mean(0) if bool(r.any()) else features.mean(0) for r in rows])


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
