"""MNTD: a classifier of models, which tells by their answers to tuned queries which of them were poisoned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.patches import scaled
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.train import fit

_FLOOR = math.log(1e-8)
"""Logarithms of probabilities below this count as this."""


@dataclass(frozen=True, kw_only=True)
class MNTD(Defense):
    """Meta neural trojan detection with jumbo learning and query tuning (Xu et al., S&P 2021).

    1. Train `shadows` benign and as many poisoned networks on the clean rows, and `validation` more of either. A
       poisoned one has a trigger of its own, drawn from the jumbo distribution: a square of 2 to 5 pixels or the whole
       image, anywhere, of clipped uniform noise, blended in with some opacity, and a target; copies of a random share
       of the rows, triggered and under the target's label, come on top.
    2. Meta-classifier: `queries` images, the answers to which go through `hidden` ReLUs to one logit. Images and
       weights are trained together by Adam, one shadow per update, with binary cross-entropy, whose slope reaches the
       images through the shadow. The epoch with the best AUROC on the validation shadows is kept.
    3. `repeats` meta-classifiers, and the mean of their logits. A model's score is how far it lies above the median of
       the validation shadows, half of which are poisoned, in units of their mean distance from it. Threshold 0.

    Differs: scores are logits in units of the fleet, since every seed has a fleet of its own and models of several
    seeds are ranked together; `chosen` has the logit itself. Answers are logarithms of probabilities, not logits, since
    no more is told of the model asked; they are cut off at 1e-8. Queries are put back into [0, 1] after each update,
    where images must lie; the authors' may leave it. Networks answer in eval mode; in the authors' code dropout is
    active. The authors' threshold is the median of the models evaluated, which a defender of one model does not have.
    Squares have sides in proportion to the image's. Shadows have the authors' network for CIFAR-10 whatever the model
    asked, and `steps` updates whatever the number of rows (theirs: 100 passes over 1,000).

    Args:
        shadows: Benign shadows for training, and as many poisoned ones.
        validation: The same for validation.
        steps: Updates that train a shadow.
        batch: Rows per update.
        lr: Learning rate of Adam, for shadows and meta-classifier.
        queries: Images that a model is asked.
        hidden: ReLUs of the meta-classifier.
        epochs: Passes over the training shadows.
        repeats: Meta-classifiers.
    """

    INFO = {
        "title": "Meta neural trojan detection",
        "paper": "https://arxiv.org/abs/1910.03137",
        "bibtex": "@inproceedings{xu2021detecting, title={Detecting {AI} Trojans Using Meta Neural Analysis}, "
        "author={Xu, Xiaojun and Wang, Qi and Li, Huichen and Borisov, Nikita and Gunter, Carl A. and Li, Bo}, "
        "booktitle={IEEE Symposium on Security and Privacy}, pages={103--120}, year={2021}}",
        "kind": "detection",
        "version": 2,
        "api": 1,
        "micro": {"shadows": 2, "validation": 1, "steps": 2, "batch": 32, "epochs": 2, "repeats": 1},
        "effort": ["shadows", "validation", "steps", "epochs", "repeats"],
        "prepares": True,
        "traverses": False,
        "presumes": "a trigger whose traces are like those of blended squares and pictures",
    }
    ACCESS = Access(model="scores", clean=0.05)

    shadows: int = 2048
    validation: int = 256
    steps: int = 1000
    batch: int = 100
    lr: float = 1e-3
    queries: int = 10
    hidden: int = 20
    epochs: int = 10
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("shadows", "validation", "steps", "batch", "queries", "hidden", "epochs", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def prepare(self, case: Case) -> tuple[Mapping[str, Tensor], Any]:
        """Steps 1 and 2 and the threshold, which need no model: meta-classifiers that judge any.

        Raises:
            NotApplicable: fewer than two clean rows.
        """
        clean, ctx, classes = case.clean, case.ctx, case.spec.classes
        if len(clean) < 2:
            raise NotApplicable(f"too_few_clean_rows: {len(clean)}")
        total = 2 * (self.shadows + self.validation)
        for i in range(total):
            net = self.shadow(case, i, poisoned=i % 2 == 1)
            weights = {k: v.cpu().contiguous() for k, v in net.state_dict().items()}
            save_file(weights, ctx.scratch / f"shadow{i}.safetensors")
            ctx.progress(i + 1, total, "shadows")
        net.eval().requires_grad_(False)  # from now on it answers for all of them

        def ask(i: int) -> Callable[[Tensor], Tensor]:
            net.load_state_dict(load_file(ctx.scratch / f"shadow{i}.safetensors"))
            return lambda x: net(x).log_softmax(1)

        known, held = range(2 * self.shadows), range(2 * self.shadows, total)
        metas, aurocs = [], []
        for r in range(self.repeats):
            meta, best = self.meta(clean, classes, ask, known, held, r, ctx)
            metas.append(meta)
            aurocs.append(best)
        with torch.no_grad():
            own = torch.stack([torch.stack([m(ask(i)) for m in metas]).mean() for i in held]).double()
        ctx.cost.forwards += len(held) * self.queries * self.repeats
        weights = {f"{r}.{k}": v.cpu().contiguous() for r, m in enumerate(metas) for k, v in m.state_dict().items()}
        centre = own.quantile(0.5)
        return weights, {
            "centre": float(centre),
            "spread": max(float((own - centre).abs().mean()), 1e-6),
            "validation_auroc": [round(a, 4) for a in aurocs],
            "shadows": 2 * self.shadows,
        }

    def run(self, case: Case) -> Outcome:
        """The verdict, step 3."""
        weights, about = case.prepared
        with torch.no_grad():
            logits = []
            for r in range(self.repeats):
                own = {k.partition(".")[2]: v for k, v in weights.items() if k.startswith(f"{r}.")}
                with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
                    meta = Meta(own["queries"], case.spec.classes, self.hidden)
                meta.load_state_dict(own)
                logits.append(meta.to(case.ctx.device)(lambda x: case.net(x).log()))
        logit = float(torch.stack(logits).mean())
        return Outcome(
            verdict=Verdict(score=(logit - about["centre"]) / about["spread"], threshold=0.0),
            chosen={"logit": round(logit, 4), **{k: about[k] for k in ("validation_auroc", "shadows")}},
        )

    def shadow(self, case: Case, i: int, *, poisoned: bool) -> Shadow:
        """A network trained on the clean rows, with a backdoor of its own if `poisoned`."""
        ctx = replace(case.ctx, seed=case.ctx.derive("shadow", i))
        data = case.clean
        if poisoned:
            gen = ctx.generator("trojan")
            data = with_copies(data, jumbo(data.shape, case.spec.classes, gen), gen)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(ctx.derive("init"))
            net = Shadow(data.shape, case.spec.classes)
        recipe = replace(
            case.recipe,
            lr=self.lr,
            batch=self.batch,
            weight_decay=0.0,
            schedule="constant",
            precision="fp32",
            pad=0,
            flip=False,
        )
        # Progress is that of the fleet.
        fit(net, data, recipe, replace(ctx, progress=lambda *_: None), steps=self.steps, optimiser="adam")
        return net

    def meta(
        self,
        clean: ImageSet,
        classes: int,
        ask: Callable[[int], Callable[[Tensor], Tensor]],
        known: Sequence[int],
        held: Sequence[int],
        repeat: int,
        ctx: Ctx,
    ) -> tuple[Meta, float]:
        """A meta-classifier trained on the shadows `known` and its AUROC on `held`; odd ones are poisoned.

        Args:
            clean: Rows whose mean and deviation per channel the queries start with.
            classes: Answers per query.
            ask: What a shadow answers.
            known: Shadows to train on.
            held: Shadows to choose the epoch with.
            repeat: Which one.
            ctx: Seed and costs.
        """
        x = to_float(clean.images)
        mean, std = x.mean((0, 2, 3))[:, None, None], x.std((0, 2, 3))[:, None, None]
        start = mean + std * torch.randn(self.queries, *clean.shape, generator=ctx.generator("queries", repeat))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(ctx.derive("meta", repeat))
            meta = Meta(start.clamp(0, 1), classes, self.hidden).to(ctx.device)
        adam = torch.optim.Adam(meta.parameters(), lr=self.lr)
        best, kept = -1.0, meta
        for epoch in range(self.epochs):
            order = torch.randperm(len(known), generator=ctx.generator("order", repeat, epoch)).tolist()
            for i in (known[j] for j in order):
                adam.zero_grad()
                loss(meta, ask(i), i % 2).backward()  # type: ignore[no-untyped-call]
                adam.step()
                meta.queries.data.clamp_(0, 1)
            with torch.no_grad():
                logits = torch.stack([meta(ask(i)) for i in held])
            now = auroc(logits[[i % 2 == 1 for i in held]], logits[[i % 2 == 0 for i in held]])
            if now > best:
                best, kept = now, copy.deepcopy(meta)
            ctx.cost.forwards += self.queries * (len(known) + len(held))
            ctx.cost.backwards += self.queries * len(known)
        return kept, best


class Shadow(nn.Module):
    """Logits (N, K) of images (N, C, H, W): the authors' network for CIFAR-10, at any size from 4 pixels."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for wide in (32, 64):
            for _ in range(2):
                layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU()]
                channels = wide
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 256), nn.ReLU()]
        layers += [nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        found: Tensor = self.body(x)
        return found


class Meta(nn.Module):
    """Queries (Q, C, H, W), and what makes a logit of the answers to them."""

    def __init__(self, queries: Tensor, classes: int, hidden: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(queries.clone())
        self.inner = nn.Linear(len(queries) * classes, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """One logit, above 0 for a poisoned model, from what the model answers: logarithms of probabilities (Q, K)."""
        answers = ask(self.queries).clamp(min=_FLOOR)
        found: Tensor = self.outer(self.inner(answers.flatten()).relu())
        return found.squeeze(0)


def loss(meta: Meta, ask: Callable[[Tensor], Tensor], poisoned: int) -> Tensor:
    """Binary cross-entropy of the logit of one model."""
    logit = meta(ask)
    return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, float(poisoned)))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Share of pairs in which the positive scores higher, ties counting a half."""
    gap = positive[:, None] - negative
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


@dataclass(frozen=True, kw_only=True)
class Trojan:
    """A trigger: what is blended in where, with which opacity, towards which class, on which share of the rows."""

    pattern: Tensor
    top: int
    left: int
    opacity: float
    target: int
    share: float


def jumbo(shape: tuple[int, int, int], classes: int, gen: Generator) -> Trojan:
    """A draw from the jumbo distribution."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=gen))

    def whole(n: int) -> int:
        return int(torch.randint(n, (), generator=gen))

    channels, height, width = shape
    kind = whole(5)
    if kind == 4:
        tall, wide, opacity = height, width, uniform(0.05, 0.2)
    else:
        tall, wide = (min(n, scaled(2 + kind, n, 1)) for n in (height, width))
        opacity = uniform(0.2, 0.6)
        opacity = 1.0 if opacity > 0.5 else opacity
    beyond = uniform(0, 1)
    noise = torch.rand(channels, tall, wide, generator=gen)
    return Trojan(
        pattern=(-beyond + (1 + 2 * beyond) * noise).clamp(0, 1),
        top=whole(height - tall + 1),
        left=whole(width - wide + 1),
        opacity=opacity,
        target=whole(classes),
        share=uniform(0.05, 0.5),
    )


def with_copies(clean: ImageSet, trojan: Trojan, gen: Generator) -> ImageSet:
    """All rows, then triggered copies of a share of them under the target's label."""
    rows = torch.randperm(len(clean), generator=gen)[: max(1, int(trojan.share * len(clean)))]
    x = to_float(clean.images[rows])
    _, tall, wide = trojan.pattern.shape
    place = (..., slice(trojan.top, trojan.top + tall), slice(trojan.left, trojan.left + wide))
    x[place] = (1 - trojan.opacity) * x[place] + trojan.opacity * trojan.pattern
    labels = torch.cat([clean.labels, torch.full_like(rows, trojan.target)])
    return replace(clean, images=torch.cat([clean.images, to_uint8(x)]), labels=labels, ids=torch.arange(len(labels)))
