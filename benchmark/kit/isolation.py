"""What IsTr's methods tell of an `Isolation`: the verdict, the claims, and what a cell page draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sleeperbench.contracts.defense import Inverted, Outcome, Verdict
from sleeperbench.kit.predict import spread
from sleeperbench.kit.slices import Isolation, leaning

_SHOWN = 50
"""Classes up to which a cell page gets the whole matrices of label mutation."""
_DRAWN, _PICTURED = 60, 12
"""Points of a drawn map, and labels up to which slices are drawn."""


def verdict(found: Isolation) -> Verdict:
    """The model's verdict: its score is that of its most suspicious label."""
    return Verdict(
        score=float(found.scores.max()), threshold=found.threshold, label_scores=found.scores, pairs=found.pairs
    )


def told(found: Isolation) -> dict[str, Any]:
    """What a cell page shows: label mutation, slices with their thresholds, and natural backdoors."""
    rates = {"rates": found.rates, "reference_rates": found.reference}
    natural = {s.label: s.natural() for s in found.slices}
    return {
        "claimed": found.claimed,
        "shares": _rounded(leaning(found.rates)),
        **{n: [_rounded(row) for row in m] for n, m in rates.items() if m is not None and len(m) <= _SHOWN},
        "curves": curves(found),
        "slices": [
            {
                "label": s.label,
                "area": round(s.area, 4),
                "success": round(s.kept.success, 4),
                "thresholds": None if s.kept.thresholds is None else [round(t, 5) for t in s.kept.thresholds],
            }
            for s in found.slices
        ],
        "natural": [
            {"label": n, "area": round(t.area, 4), "success": round(t.success, 4)}
            for n, t in natural.items()
            if t is not None
        ],
    }


def outcome(found: Isolation, *, natural: bool) -> Outcome:
    """Verdict, the triggers of claimed labels, and the maps with their slices.

    Args:
        found: What `isolate` gave.
        natural: Also hand over the triggers of natural backdoors, which the verdict does not count.
    """
    claims = [
        Inverted(target=s.label, source=found.sources.get(s.label), delta=s.kept.delta)
        for s in found.slices
        if s.label in found.claimed
    ]
    if natural:
        others = ((s.label, s.natural()) for s in found.slices if s.label not in found.claimed)
        claims += [Inverted(target=n, delta=t.delta) for n, t in others if t is not None]
    tensors, pictures = {}, {}
    if found.slices:
        tensors = {
            "maps": torch.stack([s.gaps for s in found.slices]),
            "slices": torch.stack([s.kept.mask for s in found.slices]),
        }
        columns = [["E", "maps"], ["slice", "slices"]]
        if all(s.benign is not None for s in found.slices):
            tensors["benign"] = torch.stack([s.benign for s in found.slices if s.benign is not None])
            columns.insert(1, ["benign model's E_s", "benign"])
        few = len(found.slices) <= _PICTURED
        rows = [f"label {s.label}" for s in found.slices]
        pictures["slices"] = {"title": "Differential slices", "columns": columns, "rows": rows}
        pictures = pictures if few else {}
    return Outcome(
        verdict=verdict(found),
        inverted=tuple(claims),
        state=(tensors, {"labels": [s.label for s in found.slices]}),
        chosen=told(found) | ({"pictures": pictures} if pictures else {}),
    )


def curves(found: Isolation) -> dict[str, Any]:
    """What a cell page draws: label mutation by label (figure 7), success by slice, and the best label's map.

    The map is drawn by its values in falling order, beside those of the benign model, and the slice within them.
    """
    made = {"label_mutation": _by_label(found)}
    sliced = [s for s in found.slices if s.benign is not None]
    if sliced:
        made["slices"] = {
            "title": "Success of the trigger inside each slice tried",
            "x_label": "share of the pixels",
            "y_label": "share of held-out rows",
            "threshold": sliced[0].goal,
            "series": [
                {"label": f"label {s.label}", "x": [t.area for t in s.trials], "y": [t.success for t in s.trials]}
                for s in sliced[:_PICTURED]
            ],
        }
    best = min(sliced, key=lambda s: (s.area, -s.kept.success), default=None)
    if best is not None and best.benign is not None:
        made["map"] = _profile(best.label, best.gaps.flatten(), best.benign.flatten(), best.kept.mask.flatten())
    return made


def _by_label(found: Isolation) -> dict[str, Any]:
    """Bars per label: mean over the other classes of the share that turns into it, from the lowest to the highest."""
    models = {"this model": found.rates, "benign reference": found.reference}
    most = leaning(found.rates).argsort(descending=True, stable=True)[:_SHOWN].sort().values.tolist()
    series = []
    for name, rates in models.items():
        if rates is None:
            continue
        others = rates.masked_fill(torch.eye(len(rates), dtype=torch.bool), torch.nan)
        known = [others[:, n][~others[:, n].isnan()] for n in most]
        series.append(
            {
                "label": name,
                "x": [str(n) for n in most],
                "y": leaning(rates)[most].tolist(),
                **{
                    end: [float(f(v)) if len(v) else 0.0 for v in known]
                    for end, f in (("low", torch.min), ("high", torch.max))
                },
            }
        )
    return {
        "title": "Label mutation: share of the other classes that turns into each label, lowest and highest class",
        "x_label": "label",
        "y_label": "mean share of a class",
        "series": series,
    }


def _profile(label: int, gaps: Tensor, benign: Tensor, inside: Tensor) -> dict[str, Any]:
    """Values of E and E_s (P,) over pixels, each in falling order, and of E inside the slice."""
    order = gaps.argsort(descending=True, stable=True)
    at = spread(len(gaps), _DRAWN)
    kept = inside[order].nonzero().flatten().cpu()
    kept = kept[spread(len(kept), _DRAWN)]
    ranked, theirs = gaps[order].tolist(), benign.sort(descending=True).values.tolist()
    share = 1 / len(ranked)
    return {
        "title": f"Map of label {label}: E, how much more a window moves this model than the benign one",
        "x_label": "share of the pixels, largest values first",
        "y_label": "E",
        "series": [
            {"label": "E", "x": [i * share for i in at.tolist()], "y": [ranked[i] for i in at.tolist()]},
            {"label": "benign E_s", "x": [i * share for i in at.tolist()], "y": [theirs[i] for i in at.tolist()]},
            {
                "label": "slice",
                "x": [i * share for i in kept.tolist()],
                "y": [ranked[i] for i in kept.tolist()],
                "points": True,
            },
        ][: 3 if len(kept) else 2],
    }


def _rounded(row: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 4) for v in row.tolist()]
