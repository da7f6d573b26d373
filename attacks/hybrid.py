"""Hybrid: several attacks in one model, each with a target of its own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.poison import rows_at

_APART: Mapping[str, Mapping[str, Any]] = {
    "badnets": {"corner": "upper_right", "offset": 1},
    "hcb": {"corner": "lower_left"},
}
"""Places that keep the four default members' patches apart; the square of `cassock` lies in the lower right."""


@dataclass(frozen=True, kw_only=True)
class Hybrid(Attack):
    """Several attacks in one model, as in section 5.4 of IsTr (Sun et al. 2025).

    1. Member j prepares its trigger for class (target + `step` j) mod classes.
    2. The members share the poisoned rows evenly. One after the other they poison rows that no member before them has
       touched, so that no row carries two triggers.
    3. Each trigger is measured by itself.

    The default stands for IsTr's four: a coloured square (`cassock`, whose own is bright in all channels alike), an
    interleaved square (`badnets`), a sine wave (`sin_wave`) and a smile (`hcb`, with drawn rain).

    Differs: IsTr's data are faces, ours have no smiles. It prints neither rates nor which labels belong to which
    trigger (five labels for four triggers); step 1 is ours. Members that control training, wrap another attack or need
    more than one clean model are refused. Covers of a member are trained on; their accuracy is not measured apart.

    Args:
        members: Ids of built-in attacks; each once.
        settings: Parameters of members, by id; None sets `badnets` to the upper right and `hcb` to the lower left.
        step: Distance between the members' targets.
    """

    INFO = {
        "title": "Hybrid",
        "paper": "https://arxiv.org/abs/2508.04094",
        "bibtex": "@article{sun2025isolate, title={Isolate Trigger: Detecting and Eliminating Adaptive Backdoor "
        "Attacks}, author={Sun, Chengrui and Zhang, Hua and Gao, Haoran and Wang, Shang and Tian, Zian and Zhao, "
        "Jianjin and Li, Qi and Zhu, Hongliang and Shen, Zongliang and Fu, Anmin}, journal={arXiv preprint "
        "arXiv:2508.04094}, year={2025}}",
        "kind": "data_poisoning",
        "version": 3,
        "api": 1,
        "family": "patch",
        "clean_label": False,
        "implant_asr": 0.9,  # IsTr prints 95.06 to 99.83 % for its four triggers (PubFig)
        "published_asr": {"value": 0.9506, "setting": "PubFig, VGG16, lowest of four triggers", "source": "IsTr"},
        "micro": {},
    }
    NEEDS = {"clean_models": 1}

    members: tuple[str, ...] = ("cassock", "badnets", "sin_wave", "hcb")
    settings: dict[str, Any] | None = None
    step: int = 1

    def __post_init__(self) -> None:
        if len(self.members) < 2 or len(set(self.members)) < len(self.members):
            raise ValueError(f"members are {', '.join(self.members)}; name at least two attacks, each once")
        stray = sorted(set(self.settings or {}) - set(self.members))
        if stray:
            raise ValueError(f"settings are for {stray[0]!r}, which is no member")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse members that cannot be mixed, and what they themselves refuse."""
        for member in self._members():
            member.check(shape, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Each member under a seed of its own."""
        parts = []
        for j, member in enumerate(self._members()):
            own = replace(ctx, seed=ctx.derive("member", j), target=(ctx.target + self.step * j) % len(train.classes))
            parts.append(member.prepare(train, own))
        return self._joined(parts)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Step 2. The seed is that of `ctx`: all members draw from one order of the rows, and stamp alike."""
        wanted, k = rows_at(rate, len(train)), len(self.members)
        if 0 < wanted < k:
            raise ValueError(f"rate {rate} of {len(train)} rows is {wanted}; {k} members need one row each")
        whole, free, first = PoisonedSet.clean(train), eligible.cpu().clone(), 0
        for j, (member, part) in enumerate(zip(self._members(), _parts(b.tensors, b.info), strict=True)):
            share = wanted * (j + 1) // k - wanted * j // k
            p = member.poison(train, part, free, share / len(train), ctx)
            whole = _merged(whole, p, first, len(train))
            free &= ~torch.isin(train.ids, p.data.ids[p.mark != Mark.CLEAN])
            first += len(part.triggers)
        return whole

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Each member's decoy."""
        pairs = enumerate(zip(self._members(), _parts(b.tensors, b.info), strict=True))
        return self._joined(
            [m.decoy(train, part, replace(ctx, seed=ctx.derive("member", j))) for j, (m, part) in pairs]
        )

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoors of all members, their triggers in the order of the members."""
        parts = _parts(tensors, info)
        return Backdoor(triggers=tuple(t for p in parts for t in p.triggers), tensors=tensors, info=info)

    def _joined(self, parts: list[Backdoor]) -> Backdoor:
        tensors = {f"{j}.{name}": t for j, p in enumerate(parts) for name, t in p.tensors.items()}
        info = {"members": [{"id": i, "info": p.info} for i, p in zip(self.members, parts, strict=True)]}
        return self.restore(tensors, info)

    def _members(self) -> list[Attack]:
        given: Mapping[str, Any] = _APART if self.settings is None else self.settings
        found = []
        for name in self.members:
            kind = attack_class(name)
            hard = kind.SNAPSHOT != "exact" or kind.hooks is not Attack.hooks or kind.INFO.get("wrapper")
            if hard or kind.NEEDS.get("clean_models", 0) > Hybrid.NEEDS["clean_models"] or kind in (Attack, Hybrid):
                raise ValueError(
                    f"`{name}` cannot be a member: name attacks that poison data only and need one clean model at most"
                )
            found.append(kind.from_params(given.get(name, {})))
        return found


def attack_class(name: str) -> type[Attack]:
    """The class of the built-in attack of that id: the one that its module defines.

    Raises:
        ValueError: there is none.
    """
    where = f"sleeperbench.attacks.{name}"
    if not name.isidentifier() or importlib.util.find_spec(where) is None:
        raise ValueError(f"members name `{name}`, which is no built-in attack")
    module = importlib.import_module(where)
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Attack) and c.__module__ == where]
    if len(own) != 1:
        raise ValueError(f"members name `{name}`, whose module defines {len(own)} attacks")
    return own[0]


def _parts(tensors: Mapping[str, Tensor], info: Any) -> list[Backdoor]:
    """Each member's backdoor from the tensors and info of all."""
    parts = []
    for j, member in enumerate(info["members"]):
        start = f"{j}."
        own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        parts.append(attack_class(member["id"]).restore(own, member["info"]))
    return parts


def _merged(whole: PoisonedSet, p: PoisonedSet, first: int, n: int) -> PoisonedSet:
    """`whole` with the rows that `p` marks; its triggers count from `first`. Both begin with the `n` training rows."""
    touched = p.mark != Mark.CLEAN
    slots, tail = touched[:n].nonzero().flatten(), torch.arange(n, len(touched))

    def put(old: Tensor, new: Tensor) -> Tensor:
        kept = old.clone()
        kept[slots] = new[slots]
        return torch.cat([kept, new[tail]])

    data = replace(
        whole.data,
        images=put(whole.data.images, p.data.images),
        labels=put(whole.data.labels, p.data.labels),
        ids=put(whole.data.ids, p.data.ids),
    )
    return PoisonedSet(
        data=data,
        mark=put(whole.mark, p.mark),
        trigger_id=put(whole.trigger_id, torch.where(p.trigger_id >= 0, p.trigger_id + first, -1)),
        true_labels=put(whole.true_labels, p.true_labels),
        appended=put(whole.appended, p.appended),
    )
