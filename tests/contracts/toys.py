"""Toys of methods to come: each is the smallest thing of its shape. No result of theirs means anything."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from sleeperbench import (
    Access,
    Attack,
    Backdoor,
    Defense,
    EvalCase,
    Evaluator,
    Findings,
    Mark,
    Measurement,
    Metric,
    Model,
    Needs,
    Outcome,
    PoisonedSet,
    Role,
    TargetMap,
    TrainHooks,
    Verdict,
    Wrap,
)
from sleeperbench.kit import fit, hits, load, pack, predict, to_float, tune
from sleeperbench.kit.classifier import build


# ---- NPD: a layer is inserted into the model and nothing else is trained ---------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Npd(Defense):
    """Insert a layer and train it alone."""

    INFO = {"title": "toy NPD", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    ACCESS = Access(clean=0.05)
    steps: int = 3

    def run(self, case):
        wrap = Wrap(kind="insert", site="body.stage2", args={"layer": "conv1x1_bn", "channels": _channels(case)})
        net = load(_wrapped(case, wrap), case.ctx.device)
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith("wraps."))
        fit(net, case.tune, case.recipe, case.ctx, steps=self.steps)
        return Outcome(model=pack(net))


def _channels(case):
    seen = {}
    handle = case.net.body.stage2.register_forward_hook(lambda m, i, o: seen.update(c=o.shape[1]))
    case.net(to_float(case.clean.images[:2]))
    handle.remove()
    return seen["c"]


def _wrapped(case, wrap):
    spec = replace(case.spec, wraps=(wrap,))
    fresh = build(spec, seed=case.ctx.derive("wrap"))
    return Model(spec=spec, state={**pack(fresh).state, **pack(case.net).state})


# ---- STRIP: a second phase answers about inputs that the first never saw ---------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Strip(Defense):
    """Entropy of blends with clean images; low entropy is suspicious."""

    INFO = {
        "title": "toy STRIP",
        "version": 1,
        "api": 1,
        "kind": "toy",
        "paper": "",
        "bibtex": "",
        "micro": {},
        "scores": True,
    }
    ACCESS = Access(clean=0.05)

    def run(self, case):
        return Outcome(state=({"overlay": case.clean.images[:8]}, {"weight": 0.5}))

    def score(self, state, net, x):
        tensors, about = state
        overlay = to_float(tensors["overlay"]).to(x.device)
        with torch.no_grad():
            p = torch.stack([net(about["weight"] * x + (1 - about["weight"]) * o).softmax(1) for o in overlay]).mean(0)
        return (p * p.clamp_min(1e-9).log()).sum(1)


@dataclass(frozen=True, kw_only=True)
class Detect(Evaluator):
    """AUROC of a second phase's scores."""

    INFO = {"title": "toy detection", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    NEEDS = Needs(outcome=("scores",), trigger="none")
    METRICS = (Metric(name="input_auroc", unit="fraction", low=0.0, high=1.0, better="up", doc="AUROC"),)

    def measure(self, case: EvalCase):
        bad, good = case.answers[case.asked], case.answers[~case.asked]
        above = (bad[:, None] > good[None]).double() + 0.5 * (bad[:, None] == good[None]).double()
        return Findings(rows=(Measurement(metric="input_auroc", value=float(above.mean())),))


# ---- LIRA: a generator with an optimiser of its own trains beside the classifier -------------------------------------
class Generator(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return (x + 0.3 * torch.tanh(self.conv(x))).clamp(0, 1)


class LearnedTrigger:
    name = "learned"

    def __init__(self, net, target):
        self.net, self.targets = net, TargetMap.all_to_one(target)

    @torch.no_grad()
    def apply(self, x, y, ids, role: Role, gen):
        return self.net.to(x.device)(x)

    def range(self, x, ids):
        return None

    def static(self):
        return None


@dataclass(frozen=True, kw_only=True)
class Lira(Attack):
    """A generator learns the trigger while the classifier learns to obey it."""

    INFO = {"title": "toy LIRA", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    SNAPSHOT = "none"

    def prepare(self, train, ctx):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.derive("generator"))
            net = Generator(train.shape[0])
        tensors = {f"aux.generator.{k}": v for k, v in net.state_dict().items()}
        about = {"target": ctx.target, "channels": train.shape[0]}
        return Backdoor(triggers=(LearnedTrigger(net, ctx.target),), tensors=tensors, info=about)

    def poison(self, train, b, eligible, rate, ctx):
        return PoisonedSet.clean(train)

    def hooks(self, train, b, eligible, rate, ctx):
        return LiraHooks(b)

    @classmethod
    def restore(cls, tensors, info):
        net = Generator(info["channels"])
        net.load_state_dict({k.removeprefix("aux.generator."): v for k, v in tensors.items()})
        return Backdoor(triggers=(LearnedTrigger(net, info["target"]),), tensors=tensors, info=info)


class LiraHooks(TrainHooks):
    def __init__(self, b):
        super().__init__()
        self.target = b.info["target"]
        self.aux["generator"] = b.triggers[0].net
        self.own = torch.optim.SGD(self.aux["generator"].parameters(), lr=0.1)

    def batch(self, x, y, ids, step):
        return x, y, torch.full_like(y, Mark.DIRTY)  # each row is shown stamped as well

    def step(self, net, opt, x, y, mark):
        goal = torch.full_like(y, self.target)
        self.own.zero_grad()
        nn.functional.cross_entropy(net(self.aux["generator"](x)), goal).backward()
        self.own.step()
        opt.zero_grad()
        stamped = self.aux["generator"](x).detach()
        loss = nn.functional.cross_entropy(net(x), y) + nn.functional.cross_entropy(net(stamped), goal)
        loss.backward()
        opt.step()
        return loss.detach()


# ---- BELT: a wrapper around any attack that poisons data, and adds rows which keep their label -----------------------
@dataclass(frozen=True, kw_only=True)
class Plus(Attack):
    """The wrapped attack, with its trigger shown under the true label on a few rows."""

    INFO = {
        "title": "toy BELT",
        "version": 1,
        "api": 1,
        "kind": "toy",
        "paper": "",
        "bibtex": "",
        "micro": {},
        "wrapper": True,
    }
    cover: int = 5

    def prepare(self, train, ctx):
        inner = ctx.inner.prepare(train, ctx)
        return self.restore(inner.tensors, {"cover": self.cover, "inner": inner.info}, type(ctx.inner))

    def poison(self, train, b, eligible, rate, ctx):
        made = ctx.inner.poison(train, b, eligible, rate, ctx)
        rows = torch.nonzero((made.mark == 0) & eligible)[: self.cover, 0]
        made.data.images[rows] = 255 - made.data.images[rows]
        made.mark[rows] = 2
        return made

    @classmethod
    def restore(cls, tensors, info, inner):
        return replace(inner.restore(tensors, info["inner"]), info=info)

    def decoy(self, train, b, ctx):
        return ctx.inner.decoy(train, replace(b, info=b.info["inner"]), ctx)


# ---- QRA: an evaluator that reads another one's model ----------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class ToyRa(Evaluator):
    """Retune, and leave the retuned model for others."""

    INFO = {"title": "toy RA", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    METRICS = (Metric(name="p_asr_ra", unit="fraction", low=0.0, high=1.0, better="down", doc="ASR after retuning"),)

    def measure(self, case: EvalCase):
        if case.bd_probe is None:
            return Findings(rows=(Measurement(metric="p_asr_ra", value=None, reason="no_trigger"),))
        few = replace(case.bd_probe.data.rows(torch.arange(8)), labels=case.bd_probe.targets[:8])
        model = tune(case.net, few, ctx=case.ctx, lr=0.01, steps=2)
        count, total = hits(predict(load(model), case.bd_test.data.images), case.bd_test.targets)
        row = Measurement(metric="p_asr_ra", value=count / total, count=count, total=total, stage="reactivated")
        return Findings(rows=(row,), models={"draw0": model})


@dataclass(frozen=True, kw_only=True)
class Qra(Evaluator):
    """Agreement of the attacked queries with the retuned model."""

    INFO = {"title": "toy QRA", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    NEEDS = Needs(evaluators=("toys/toy_ra",))
    METRICS = (Metric(name="p_asr_qra", unit="fraction", low=0.0, high=1.0, better="down", doc="toy"),)

    def measure(self, case: EvalCase):
        models = case.evaluators["toys/toy_ra"].models
        if not models:
            return Findings(rows=(Measurement(metric="p_asr_qra", value=None, reason="ra_not_successful"),))
        teacher = predict(load(models["draw0"]), case.bd_test.data.images).argmax(1)
        own = predict(case.net, case.bd_test.data.images)
        if not bool(own.isfinite().all()):
            raise FloatingPointError("what is not finite agrees with nobody, which is no low rate")
        agree = (teacher == own.argmax(1)).double().mean()
        return Findings(rows=(Measurement(metric="p_asr_qra", value=float(agree)),))


# ---- TBA: surrogates of another architecture, and peers among the defenses, both named by the suite ------------------
@dataclass(frozen=True, kw_only=True)
class Tba(Evaluator):
    """Transfer: how often the surrogates and the peers answer like this model."""

    INFO = {"title": "toy TBA", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    METRICS = (Metric(name="asr_tba", unit="fraction", low=0.0, high=1.0, better="down", doc="toy"),)
    surrogates: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()

    def measure(self, case: EvalCase):
        if case.bd_test is None:
            return Findings(rows=(Measurement(metric="asr_tba", value=None, reason="no_trigger"),))
        rows = []
        for peer in (*case.surrogates, *case.peers):
            count, total = hits(predict(peer.net, case.bd_test.data.images), case.bd_test.targets)
            rows.append(Measurement(metric="asr_tba", value=count / total, qualifier=f"source={peer.name}"))
        return Findings(rows=tuple(rows))


# ---- spectral + retrain: a cleanser marks rows, a shared wrapper trains on what is left ------------------------------
@dataclass(frozen=True, kw_only=True)
class Spectral(Defense):
    """Drop the rows that lie farthest from the mean image of their class."""

    INFO = {"title": "toy spectral", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    ACCESS = Access(clean=0, train=True)

    def run(self, case):
        x = to_float(case.train.images).flatten(1)
        far = torch.zeros(len(x))
        for k in case.train.labels.unique():
            rows = case.train.labels == k
            far[rows] = (x[rows] - x[rows].mean(0)).norm(dim=1)
        return Outcome(keep=far <= far.quantile(0.9), suspicion=far)


@dataclass(frozen=True, kw_only=True)
class Retrain(Defense):
    """Train anew on the rows that the wrapped defense keeps."""

    INFO = {
        "title": "toy retrain",
        "version": 1,
        "api": 1,
        "kind": "toy",
        "paper": "",
        "bibtex": "",
        "micro": {},
        "wrapper": True,
    }
    ACCESS = Access(model="none", clean=0, train=True, control=True, inner="keep")
    steps: int = 5

    def run(self, case):
        # The wrapped defense's rows are these rows: what it called far is far here too.
        x = to_float(case.train.images).flatten(1)
        k = int(case.train.labels[0])
        rows = case.train.labels == k
        assert torch.allclose(case.inner.suspicion[rows], (x[rows] - x[rows].mean(0)).norm(dim=1), atol=1e-4)
        net = build(case.spec, seed=case.ctx.derive("init")).to(case.ctx.device)
        fit(net, case.train.rows(case.inner.keep), case.recipe, case.ctx, steps=self.steps)
        return Outcome(model=pack(net), chosen={"kept": int(case.inner.keep.sum())})


# ---- IsTr: needs an independent clean model --------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Istr(Defense):
    """Suspect the label whose logit differs most from a clean reference's."""

    INFO = {"title": "toy IsTr", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    ACCESS = Access(clean=0.05, references=1)

    def run(self, case):
        x = case.clean.images
        scores = (predict(case.net, x) - predict(load(case.references[0]), x)).mean(0)
        return Outcome(verdict=Verdict(score=float(scores.max()), threshold=3.0, label_scores=scores))


# ---- MNTD: what needs no model is done once for all ------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Mntd(Defense):
    """Ask every model the same random questions, drawn beforehand."""

    INFO = {
        "title": "toy MNTD",
        "version": 1,
        "api": 1,
        "kind": "toy",
        "paper": "",
        "bibtex": "",
        "micro": {},
        "prepares": True,
    }
    ACCESS = Access(model="scores", clean=0.05)

    def prepare(self, case):
        case.ctx.cost.forwards += 123
        queries = torch.rand(4, *case.spec.shape, generator=case.ctx.generator("queries"))
        return {"queries": queries}, {"rows": len(case.clean)}

    def run(self, case):
        tensors, about = case.prepared
        score = float(case.net(tensors["queries"]).max())
        chosen = {"first": float(tensors["queries"].flatten()[0]), **about}
        return Outcome(verdict=Verdict(score=score, threshold=0.5), chosen=chosen)


# ---- a defense that reaches for what it did not declare --------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Greedy(Defense):
    """Asks for the training set without saying so."""

    INFO = {"title": "toy greedy", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    ACCESS = Access(clean=0.05)

    def run(self, case):
        return Outcome(keep=case.train.labels == 0)
