from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Findings, Inverted, Outcome, Role
from sleeperbench.contracts import NotApplicable
from sleeperbench.evaluators.accuracy import answers, headline
from sleeperbench.evaluators.inversion import Inversion
from sleeperbench.kit.masks import apply
from sleeperbench.kit.pixels import to_float, to_uint8


def digits_case(*inverted: Inverted, **parts: Any) -> Any:
    given = {
        "outcome": Outcome(inverted=inverted, chosen={"claimed": [i.target for i in inverted]}),
        "attacked": samples.badnets_net(),
        "test": samples.digits()["test"],
        "probe": samples.digits()["probe"],
        "bd_test": samples.badnets_rendered("test", Role.TEST),
        "oracle": samples.badnets(),
        "clean_models": (samples.clean_net(), samples.badnets_net()),
        "ctx": samples.ctx(),
        "stamps": {},
        "inner": None,
    }
    return SimpleNamespace(**given | parts)


def true_claim() -> Inverted:
    patch = samples.badnets().triggers[0]
    return Inverted(target=0, mask=patch.mask, pattern=patch.pattern)


def rows(findings: Findings) -> dict[tuple[str, str], Any]:
    found = {(r.metric, r.qualifier): r for r in findings.rows}
    assert len(found) == len(findings.rows)
    return found


def test_the_true_trigger_reaches_asr_at_no_distance() -> None:
    case = digits_case(true_claim())
    found = rows(Inversion().measure(case))
    truth = case.bd_test.clean.labels
    shares = []
    for net in (case.attacked, case.clean_models[0]):
        plain, with_it = (answers(net, x.images, case.ctx) for x in (case.bd_test.clean, case.bd_test.data))
        right = plain == truth
        assert 0 < int(right.sum()) < len(truth)
        shares.append((int((with_it == 0)[right].sum()), int((with_it != truth)[right].sum()), int(right.sum())))
    (hits, wrong, total), clean = shares
    assert hits / total > 0.9 and clean[0] / clean[2] < 0.1
    assert (found["reasr", ""].count, found["reasr", ""].total) == (hits, total)
    assert found["reasr", "label=0"].value == found["reasr", ""].value == hits / total
    assert (found["reasr_any", ""].count, found["reasr_any", ""].total) == (wrong, total)
    assert found["reasr_clean", ""].value == pytest.approx((clean[0] / clean[2] + hits / total) / 2)
    assert [found[m, ""].value for m in ("apd", "apd_rel", "apd_raw", "mask_iou")] == [0, 0, 0, 1]
    assert found["apd", "trigger=none"].value > 0
    after = found.pop(("reasr_after", ""))
    assert (after.value, after.reason, after.stage) == (None, "no_repair", "defended")
    assert {r.stage for r in found.values()} == {"attacked"}


def test_an_empty_trigger_has_the_true_ones_energy() -> None:
    shape = (1, 16, 16)
    patch = samples.badnets().triggers[0]
    nothing = Inverted(target=0, mask=torch.zeros(shape), pattern=torch.ones(shape))
    case = digits_case(nothing)
    found = rows(Inversion().measure(case))
    every = torch.linspace(0, len(case.bd_test) - 1, 100).round().long()
    gap = case.bd_test.data.images[every].double() - case.bd_test.clean.images[every].double()
    energy = float(gap.abs().mean()) / 255
    assert found["apd", ""].value == found["apd", "trigger=none"].value == pytest.approx(energy)
    assert found["apd_rel", ""].value == 1
    assert found["apd_raw", ""].value == pytest.approx(float(patch.pattern.sum()) / 256)
    assert found["mask_iou", ""].value == 0
    assert found["reasr_any", ""].value == 0
    assert found["reasr", ""].count == 0
    # Less than half a grey level is no change of a stored image; an addition has no mask to compare.
    faint = rows(Inversion().measure(digits_case(Inverted(target=0, delta=torch.full(shape, 0.4 / 255)))))
    assert faint["apd_rel", ""].value == 1
    assert faint["reasr_any", ""].value == 0
    assert {faint[m, ""].reason for m in ("apd_raw", "mask_iou")} == {"no_mask"}


def test_images_that_the_inverter_made_count_like_those_of_a_mask() -> None:
    masked = digits_case(true_claim())
    made = {
        f"0.{part}": torch.cat([to_uint8(apply(true_claim(), to_float(getattr(masked, part).images)))])
        for part in ("test", "probe")
    }
    coded = digits_case(Inverted(target=0, uses_apply=True), stamps=made)
    expected, found = rows(Inversion().measure(masked)), rows(Inversion().measure(coded))
    for metric in ("reasr", "reasr_any", "reasr_clean", "apd", "apd_rel"):
        assert found[metric, ""] == expected[metric, ""]
    assert {found[m, ""].reason for m in ("apd_raw", "mask_iou")} == {"no_mask"}
    # Of two claims for a label the better on the probe rows counts, which are looked up as such.
    poor = {f"1.{part}": getattr(masked, part).images for part in ("test", "probe")}
    both = (Inverted(target=0, uses_apply=True), Inverted(target=0, uses_apply=True))
    found = rows(Inversion().measure(digits_case(*both, stamps=made | poor)))
    assert found["reasr", ""] == expected["reasr", ""]
    swapped = {f"{1 - int(n[0])}{n[1:]}": t for n, t in (made | poor).items()}
    assert rows(Inversion().measure(digits_case(*both, stamps=swapped)))["reasr", ""] == expected["reasr", ""]
    # What works on the test images alone is not what counts: the choice is made on the probe rows.
    crossed = {
        "0.test": made["0.test"],
        "0.probe": poor["1.probe"],
        "1.test": poor["1.test"],
        "1.probe": made["0.probe"],
    }
    assert rows(Inversion().measure(digits_case(*both, stamps=crossed)))["reasr", ""].value < 0.2


def test_no_claim_under_attack_is_the_worst_answer() -> None:
    case = digits_case()
    found = rows(Inversion().measure(case))
    assert [found[m, ""].value for m in ("reasr", "reasr_any", "reasr_clean", "apd_rel", "mask_iou")] == [0, 0, 0, 1, 0]
    assert found["apd", ""].value == found["apd", "trigger=none"].value
    assert not Inversion().measure(case).pictures


def test_a_defense_that_recovers_no_triggers_is_left_alone() -> None:
    findings = Inversion().measure(SimpleNamespace(outcome=Outcome(chosen={"triggers": []}), inner=None))
    repair = ("reasr_before", "reasr_after")
    assert {(r.metric, r.value, r.reason) for r in findings.rows} == {
        (m.name, None, "no_repair" if m.name in repair else "no_inversion") for m in Inversion.METRICS
    }
    coded = Inversion().measure(digits_case(Inverted(target=0, uses_apply=True)))
    assert {r.reason.split(":")[0] for r in coded.rows if r.metric not in repair} == {"needs_stamp"}


def repaired_case(*inverted: Inverted, **parts: Any) -> Any:
    """A wrapper's cell: what it wraps claims these triggers; its own model answers 7, or what the first pixel says."""
    inner = Outcome(inverted=inverted, chosen={"claimed": [i.target for i in inverted]})
    given = {"outcome": Outcome(chosen={"triggers": [5]}), "inner": inner, "net": Always(7), "bd_test": None}
    return reading_case(**given | parts)


def test_a_repair_is_measured_with_the_triggers_that_it_was_made_with() -> None:
    found = rows(Inversion().measure(repaired_case(paints(5), paints(7, value=6))))
    # Of the images 1, 2, 3, 4, 5, 9 one is of class 5, none of class 7, and 4 is taken for a 3 without any trigger.
    counts = {q: [(found[m, q].count, found[m, q].total) for m in ("reasr_before", "reasr_after")] for q in LABELS}
    assert counts == {"label=5": [(4, 4), (0, 4)], "label=7": [(0, 5), (5, 5)]}
    assert (found["reasr_before", ""].value, found["reasr_after", ""].value) == (0.5, 0.5)
    assert {found["reasr_before", q].stage for q in (*LABELS, "")} == {"attacked"}
    assert {found["reasr_after", q].stage for q in (*LABELS, "")} == {"defended"}
    assert found["reasr", ""].reason == "no_inversion", "they are another method's"
    one = rows(Inversion().measure(repaired_case(paints(5))))
    assert (one["reasr_after", ""].count, one["reasr_after", ""].total, one["reasr_after", ""].stage) == (
        0,
        4,
        "defended",
    )
    untouched = rows(Inversion().measure(repaired_case(paints(5), net=samples.ReadsPixel())))
    assert untouched["reasr_after", ""].value == untouched["reasr_before", ""].value == 1


def test_repairs_that_have_no_such_figures() -> None:
    def reasons(**parts: Any) -> set[str]:
        found = rows(Inversion().measure(repaired_case(**parts)))
        return {found[m, ""].reason for m in ("reasr_before", "reasr_after")}

    assert reasons() == {"no_claim"}
    assert reasons(inner=Outcome(chosen={"dropped": 3})) == {"no_repair"}
    (reason,) = reasons(inner=Outcome(inverted=(Inverted(target=0, uses_apply=True),)))
    assert reason.startswith("needs_stamp: ")


LABELS = ("label=5", "label=7")


def paints(label: int, value: int | None = None, source: int | None = None) -> Inverted:
    """A claim for `label` that makes `ReadsPixel` answer `value`."""
    mask, pattern = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    mask[:, 0, 0] = 1
    pattern[:, 0, 0] = (label if value is None else value) / 255
    return Inverted(target=label, source=source, mask=mask, pattern=pattern)


class Shapes:
    def __init__(self, claim: Inverted) -> None:
        self.claim = claim

    def static(self) -> tuple[Tensor, Tensor]:
        assert self.claim.mask is not None and self.claim.pattern is not None
        return self.claim.mask, self.claim.pattern


def reading_case(*inverted: Inverted, **parts: Any) -> Any:
    """Two triggers, to labels 5 and 9, on images whose first pixel says what the net answers."""
    data = samples.answering([1, 2, 3, 3, 5, 9], [1, 2, 3, 4, 5, 9])
    bd = samples.rendered([5, 5, 9, 9], [1, 2, 3, 4], [5, 5, 9, 9], [0, 0, 1, 1])
    given = {
        "attacked": samples.ReadsPixel(),
        "test": data,
        "probe": data,
        "bd_test": bd,
        "oracle": SimpleNamespace(triggers=(Shapes(paints(5)), Shapes(paints(9)))),
        "clean_models": (samples.ReadsPixel(), Always(5), Always(0)),
    }
    return digits_case(*inverted, **given | parts)


class Always(nn.Module):
    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(10)[torch.full((len(x),), self.label)]


class Deaf(samples.ReadsPixel):
    """Never answers 5."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        return logits * (torch.arange(10) != 5)


def test_a_true_target_without_claim_counts_as_an_empty_trigger() -> None:
    findings = Inversion().measure(reading_case(paints(5), paints(7, value=6)))
    found = rows(findings)
    assert (found["reasr", "label=5"].count, found["reasr", "label=5"].total) == (4, 4)
    assert found["reasr", "label=9"].value == 0
    assert found["reasr", "label=7"].value == 0
    assert found["reasr_any", "label=7"].value == 1
    assert headline(findings)["reasr"] == 0.5
    # Of the clean models the first always answers 5 with the trigger; the others are right on no such image without it.
    # 9 was not recovered; 7 is no target, counts nowhere.
    assert headline(findings)["reasr_clean"] == pytest.approx(1 / 2)
    assert found["apd", "label=5"].value == 0
    assert found["apd", "label=9"].value == pytest.approx(9 / 255 / 256)
    assert headline(findings)["apd"] == pytest.approx(4.5 / 255 / 256)
    assert found["apd", "trigger=none"].value == pytest.approx((5 + 9) / 2 / 255 / 256)
    assert headline(findings)["apd_rel"] == pytest.approx(9 / 14)
    assert found["apd_rel", "label=9"].value == 1
    assert headline(findings)["mask_iou"] == 0.5
    assert headline(findings)["apd_raw"] == pytest.approx(4.5 / 255 / 256)


def test_of_several_claims_the_most_successful_counts_not_the_nearest() -> None:
    near = replace(paints(5), mask=paints(5).mask * 0.5)
    both = torch.zeros(1, 16, 16)
    both[:, 0, :2] = 1
    far = Inverted(target=5, mask=both, pattern=both * 5 / 255)
    for order in ((near, far), (far, near)):
        found = rows(Inversion().measure(reading_case(*order)))
        assert found["reasr", "label=5"].value == 1
        assert found["apd", "label=5"].value == pytest.approx(5 / 255 / 256)
        assert found["mask_iou", "label=5"].value == 0.5
    # Chosen on probe rows, whose images all give 5 by themselves: the first of equals stands.
    easy = samples.answering([5, 5], [1, 2])
    assert rows(Inversion().measure(reading_case(near, far, probe=easy)))["reasr", "label=5"].value < 1


def test_what_is_misclassified_without_a_trigger_is_no_success_of_one() -> None:
    nothing = Inverted(target=3, mask=torch.zeros(1, 16, 16), pattern=torch.zeros(1, 16, 16))
    found = rows(Inversion().measure(reading_case(nothing)))
    # The image of class 4 gets 3 by itself.
    for metric in ("reasr", "reasr_any"):
        assert (found[metric, "label=3"].count, found[metric, "label=3"].total) == (0, 4)
    assert found["reasr_clean", "label=3"].value == 0, "of clean models that answer 5 or 0 throughout, too"
    blind = reading_case(nothing, attacked=Always(0), clean_models=(Always(0), Always(7)))
    found = rows(Inversion().measure(blind))
    told = {(found[m, "label=3"].value, found[m, "label=3"].reason) for m in ("reasr", "reasr_any", "reasr_clean")}
    assert told == {(None, "none_right")}
    repaired = rows(Inversion().measure(repaired_case(paints(5), attacked=Always(0))))
    assert {repaired[m, ""].reason for m in ("reasr_before", "reasr_after")} == {"none_right"}


def test_a_source_specific_claim_is_measured_on_its_source() -> None:
    found = rows(Inversion().measure(reading_case(paints(5, source=3))))
    assert (found["reasr", "label=5"].count, found["reasr", "label=5"].total) == (1, 1)


def test_without_attack_claims_are_natural_backdoors() -> None:
    nets = (samples.ReadsPixel(), samples.ReadsPixel(), Deaf())
    case = reading_case(paints(5), paints(7, value=6), bd_test=None, oracle=None, clean_models=nets)
    findings = Inversion().measure(case)
    found = rows(findings)
    assert found["reasr", ""].value == 0.5
    # The first clean model is the model itself: it answers 5 here, of the others only one does.
    assert found["reasr_clean", "label=5"].value == 0.5
    assert found["reasr_clean", ""].value == 0.25
    assert {found[m, ""].reason for m in ("apd", "apd_rel", "apd_raw", "mask_iou")} == {"no_trigger"}
    nothing = rows(Inversion().measure(reading_case(bd_test=None, oracle=None)))
    assert {nothing[m, ""].reason for m in ("reasr", "reasr_any", "reasr_clean")} == {"no_claim"}


def test_sample_specific_triggers_have_no_shape() -> None:
    class Moving:
        def static(self) -> None:
            return None

    class Pictures:
        @property
        def triggers(self) -> Any:
            raise NotApplicable("no_trigger: an imported record has pictures only")

    for oracle in (SimpleNamespace(triggers=(Shapes(paints(5)), Moving())), Pictures()):
        found = rows(Inversion().measure(reading_case(paints(5), paints(9), oracle=oracle)))
        assert {found[m, ""].reason for m in ("apd_raw", "mask_iou")} == {"no_static_trigger"}
        assert found["apd", ""].value == 0


def test_picture() -> None:
    claim = Inverted(target=5, mask=torch.full((1, 16, 16), 0.5), pattern=torch.full((1, 16, 16), 40 / 255))
    case = reading_case(claim)
    findings = Inversion().measure(case)
    sheet = findings.pictures["recovered"]
    # Two rows per target, five columns, a white line around each.
    assert sheet.shape == (1, 4 * 18, 5 * 18)
    cell = sheet[0].unfold(0, 18, 18).unfold(1, 18, 18)[:, :, 1:17, 1:17]
    assert torch.equal(cell[0, 0], case.bd_test.clean.images[0, 0])
    assert torch.equal(cell[1, 1], case.bd_test.data.images[1, 0])
    assert cell[0, 2].unique().tolist() == [20]
    factor = findings.curves["recovered"]["residual_factor"]
    assert factor == 127 // 20
    assert int(cell[0, 3, 0, 0]) == 128 + factor * (20 - 5)
    assert int(cell[0, 3, 5, 5]) == 128 + factor * 20
    assert cell[0, 4].unique().tolist() == [128]
    # Nothing is claimed for 9.
    assert torch.equal(cell[2, 2], cell[2, 0])
    assert cell[2, 4].unique().tolist() == [0]
    assert bool((sheet[:, 0] == 255).all())
    natural = Inversion().measure(reading_case(replace(claim, mask=None, delta=torch.zeros(1, 16, 16)), bd_test=None))
    assert natural.pictures["recovered"].shape == (1, 5 * 18, 5 * 18)
