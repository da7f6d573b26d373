"""Gaussian noise on the input: the adaptive defense that BELT's authors tried against their own attack."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, Wrap
from sleeperbench.contracts.models import Model
from sleeperbench.kit.classifier import load, pack
from sleeperbench.kit.select import choose, right

SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


@dataclass(frozen=True, kw_only=True)
class InputNoise(Defense):
    """Add Gaussian noise to every input before the unchanged model sees it (Qiu et al., S&P 2024, adaptive defense).

    1. The model answers to clamp(x + sigma n), n standard normal.
    2. sigma, unless given, is the largest of 0.05, 0.10 ... 0.30 that the benchmark's honest rule accepts on the clean
       rows; none accepted leaves the model as it is. All of them are kept in the outcome's path.

    No weight changes and nothing is trained: whoever holds the model takes the noise off again.

    Differs: an image's noise is one of 256 fixed draws picked by its own pixels, so that a row's answer repeats and
    depends on no other row; the authors draw anew at each query. They show C-Acc and ASR over sigma and choose none.

    Args:
        sigma: Standard deviation in pixels of [0, 1], above 0; None for the honest choice.
    """

    INFO = {
        "title": "Input noise",
        "paper": "https://arxiv.org/abs/2312.04902",
        "bibtex": "@inproceedings{qiu2024belt, title={{BELT}: Old-School Backdoor Attacks can Evade the "
        "State-of-the-Art Defense with Backdoor Exclusivity Lifting}, author={Qiu, Huming and Sun, Junjie and Zhang, "
        "Mi and Pan, Xudong and Yang, Min}, booktitle={IEEE Symposium on Security and Privacy}, year={2024}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {},
    }
    ACCESS = Access(clean=0.05)

    sigma: float | None = None

    def __post_init__(self) -> None:
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma is {self.sigma}; it must be above 0, or be left out")

    def run(self, case: Case) -> Outcome:
        """The wrapped model and, where sigma was chosen, all candidates."""
        plain = pack(case.net)
        seed = case.ctx.derive("noise")
        if self.sigma is not None:
            return Outcome(model=noisy(plain, self.sigma, seed), chosen={"sigma": self.sigma})
        path = {sigma: noisy(plain, sigma, seed) for sigma in SIGMAS}
        before = right(case.net, case.clean, ctx=case.ctx)
        after = {s: right(load(m, case.ctx.device), case.clean, ctx=case.ctx) for s, m in path.items()}
        best = choose(SIGMAS[::-1], after.__getitem__, before)
        accuracy = {name(s): float(a.double().mean()) for s, a in after.items()}
        return Outcome(
            model=None if best is None else path[best],
            path={name(s): m for s, m in path.items()},
            chosen={"sigma": best, "accuracy_before": float(before.double().mean()), "candidates": accuracy},
        )


def noisy(model: Model, sigma: float, seed: int) -> Model:
    """The model behind a noise wrap; its draws come from `seed`, so they are no part of its state."""
    wrap = Wrap(kind="noise", args={"sigma": sigma, "seed": seed})
    return replace(model, spec=replace(model.spec, wraps=(*model.spec.wraps, wrap)))


def name(sigma: float) -> str:
    """A candidate's name in the outcome's path."""
    return f"sigma={sigma:.2f}"
