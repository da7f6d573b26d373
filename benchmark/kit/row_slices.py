"""IsTr's slices row by row (Sun et al. 2025): a map E, thresholds and a slice for every image, T <- Steps(x) * E.

    found = isolate_rows(case, reference, Settings(slices="adaptive", delta="invert"))

`sleeperbench.kit.slices.isolate` gives the rows that turn into a label one map, the mean of theirs, and one slice. Here
each keeps its own, as equations 6 and 7 have it: they are written for one image x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sleeperbench.contracts.defense import Case
from sleeperbench.kit.predict import evaluating, spread
from sleeperbench.kit.slices import (
    AREAS,
    FEASIBLE,
    FITTED,
    FIXED,
    LEAST,
    MUTATED,
    QUANTILES,
    ROUNDING,
    SUCCESS,
    TRIES,
    Isolation,
    Look,
    Settings,
    Slice,
    gap_maps,
    judged,
    label_scores,
    middle,
    mutation,
)

_ELEMENTS = 2**22
"""Numbers in one set of pixels of all candidates of the rows that are searched at once: 32 MiB."""
_BENIGN = 0.05
"""Share of the pixels in the benign slice where {E_s >= t2} is too small."""


def row_thresholds(gaps: Tensor, benign: Tensor) -> Tensor:
    """The pairs (t1, t2) that eq. 7 finds best for each row, of those that `slices.thresholds` compares.

    Args:
        gaps: Maps E of rows, (R, H, W).
        benign: Their maps E_s, (R, H, W).

    Returns:
        (R, 8, 2), the best pair first; NaN where a row has fewer: no pixel lies between those.
    """
    pairs = torch.combinations(torch.arange(QUANTILES), 2)
    rows = max(1, _ELEMENTS // (len(pairs) * gaps[0].numel())) if len(gaps) else 1
    parts = [_searched(e, s, pairs.to(gaps.device)) for e, s in zip(gaps.split(rows), benign.split(rows), strict=True)]
    return torch.cat(parts)


def _searched(gaps: Tensor, benign: Tensor, pairs: Tensor) -> Tensor:
    """`row_thresholds` of few rows, for all pairs (P, 2) of quantiles at once."""
    at = torch.cartesian_prod(*(torch.arange(n, device=gaps.device).double() for n in gaps.shape[1:]))
    e, s = gaps.flatten(1), benign.flatten(1)
    points = torch.linspace(0.2, 0.98, QUANTILES, dtype=e.dtype, device=e.device)
    cuts = e.masked_fill(e <= 0, torch.nan).nanquantile(points, dim=1)
    low, high = cuts.T[:, pairs].unbind(-1)
    above = high[:, :, None]
    upper, between = e[:, None] >= above, (e[:, None] > low[:, :, None]) & (e[:, None] < above)
    theirs = s[:, None] >= above
    few = theirs.sum(2, keepdim=True) < LEAST
    theirs = torch.where(few, tops(benign, _BENIGN).flatten(1)[:, None], theirs)
    (centre, radius), *others = (_shape(part, at) for part in (between, upper, theirs))
    cost = torch.zeros_like(radius)
    for c, spread_of in others:
        d, r = (c - centre).norm(dim=2), (spread_of - radius).abs()
        cost += (d + r) / (d * r + 1e-6)
    usable = torch.stack([part.sum(2) for part in (upper, between, theirs)]).amin(0) >= LEAST
    usable &= (e > 0).sum(1, keepdim=True) >= 3 * LEAST
    # Of equal quantiles the first stands for all.
    fresh = cuts.T.diff(dim=1, prepend=torch.full_like(cuts[:1].T, -1)) > 0
    usable &= fresh[:, pairs].all(2)
    cost, order = cost.masked_fill(~usable, torch.inf).sort(dim=1, stable=True)
    found = torch.stack([low.gather(1, order), high.gather(1, order)], 2)
    return found.masked_fill(cost.isinf()[:, :, None], torch.nan)[:, :TRIES]


def _shape(part: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids (R, P, 2) and mean radii (R, P) of sets of pixels, bool (R, P, H W), at (H W, 2)."""
    weight = part.double()
    weight /= weight.sum(2, keepdim=True).clamp_min(1)
    centre = weight @ at
    away = torch.cdist(centre, at, compute_mode="donot_use_mm_for_euclid_dist")
    return centre, (weight * away).sum(2)


def tops(gaps: Tensor, share: float) -> Tensor:
    """`slices.top` of each row: bool (R, H, W), the ceil(share H W) largest pixels of each map, of equals the first."""
    order = gaps.flatten(1).argsort(dim=1, descending=True, stable=True)
    first = order[:, : math.ceil(share * order.shape[1])]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, first, True).view_as(gaps)


def middles(gaps: Tensor, pairs: Tensor) -> Tensor:
    """`slices.middle` of each row: bool (R, H, W), t1 < E < t2 with its own of pairs (R, 2); empty where NaN."""
    low, high = pairs[:, :, None, None].unbind(1)
    return (gaps > low) & (gaps < high)


class _Rows(Look):
    """A look that slices every row by itself."""

    def maps(self, reference: nn.Module, rows: Tensor, label: int) -> tuple[Tensor, Tensor, Tensor]:
        """T by Steps in the whole image, (R, C, H, W), and the rows' maps E and E_s, (R, H, W) each."""
        x, moved = self.x[rows], self.climb(self.net, rows, label)
        delta = moved if self.settings.delta == "steps" else 1 - 2 * x
        found = [gap_maps(self.net, reference, x[i : i + 1], delta[i : i + 1], self.ctx) for i in range(len(rows))]
        gaps, benign = (torch.stack(m) for m in zip(*found, strict=True))
        return moved, gaps, benign

    def masks(
        self, gaps: Tensor, benign: Tensor, rows: Tensor, moved: Tensor, label: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Slices of the rows, bool (R, H, W), with their thresholds (R, 2), in the order of trying."""
        kind = self.settings.slices
        if kind == "topdown":
            yield from ((tops(gaps, share), None) for share in AREAS)
        elif kind == "fixed":
            yield middle(gaps, *FIXED), gaps.new_tensor(FIXED).expand(len(gaps), 2)
        else:
            pairs = row_thresholds(gaps, benign)
            kept = torch.full_like(pairs[:, 0], torch.nan)
            for pair in pairs.unbind(1):
                works = self.lands(rows, moved, middles(gaps, pair), label) & kept.isnan().all(1)
                kept = torch.where(works[:, None], pair, kept)
            yield middles(gaps, kept), kept

    def lands(self, rows: Tensor, moved: Tensor, inside: Tensor, label: int) -> Tensor:
        """Rows that T turns into the label inside their slices alone, bool (R,)."""
        return self.answers(self.net, self.x[rows] + moved * inside[:, None]) == label

    def sliced(self, reference: nn.Module, hits: Tensor, label: int) -> tuple[Slice, Tensor]:
        """The label's universal trigger from its rows' slices, and which of all its rows still turn into it, bool (N,).

        A trial's mask is all that the slices of the rows behind its trigger cover, its area the share of that, and its
        thresholds are the medians of these rows'.
        """
        rows = hits[:, label].nonzero().flatten()
        moved, gaps, benign = self.maps(reference, rows, label)
        fitted = int((rows < self.fitted).sum())  # `tune` rows come first
        few = spread(fitted, FITTED).to(rows.device)
        goal = SUCCESS if self.settings.slices == "topdown" else FEASIBLE
        trials, landed = [], []
        for inside, pairs in self.masks(gaps, benign, rows, moved, label):
            works = self.lands(rows, moved, inside, label)
            mine = few[works[few]]
            cover = inside[mine].any(0)
            part = moved[mine] * inside[mine][:, None]
            told = None
            if pairs is not None and len(mine):
                low, high = pairs[mine].median(0).values.tolist()
                told = low, high
            trials.append(self.trial(rows[mine], label, cover, float(cover.double().mean()), part, told))
            landed.append(rows[works])
            if trials[-1].success >= goal:
                break
        found = Slice(
            label=label, gaps=gaps[few].mean(0).cpu(), trials=tuple(trials), goal=goal, benign=benign[few].mean(0).cpu()
        )
        best = max(range(len(trials)), key=lambda i: trials[i].success)  # that which `Slice.kept` takes
        still = torch.zeros_like(hits[:, label])
        still[landed[best]] = True
        return found, still


def isolate_rows(case: Case, reference: nn.Module, settings: Settings) -> Isolation:
    """`slices.isolate`, but that every row has a slice of its own.

    Rows are those that Steps turn into a label that is looked at. The trigger inside a row's slice is its T times the
    slice; a label's universal trigger is the mean of those with which rows still turn into it. Of the eight best pairs
    of eq. 7 a row takes the first inside which it does; where none is, its slice is empty. Pairs are from label
    mutation inside the slices.

    Args:
        case: As there.
        reference: The benign model.
        settings: See there; `dms` is not asked.
    """
    look = _Rows(case, settings)
    with evaluating(look.net), evaluating(reference):
        hits, kept = look.screen(look.net)
        benign, right = look.screen(reference)
        rates, theirs = mutation(hits, look.y, kept), mutation(benign, look.y, right)
        counts = hits[: look.fitted].sum(0)
        order = counts.argsort(descending=True, stable=True)[: settings.labels].tolist()
        chosen = [n for n in order if int(counts[n]) >= MUTATED]
        found, inside = [], torch.zeros_like(hits)
        for i, n in enumerate(chosen):
            one, inside[:, n] = look.sliced(reference, hits, n)
            found.append(one)
            case.ctx.progress(i + 1, len(chosen), "slice")
    scores = label_scores(rates, theirs, found, targeted=settings.targeted)
    last = mutation(inside, look.y, kept)
    return judged(scores, 1 - ROUNDING, rates, theirs, last, tuple(found))
