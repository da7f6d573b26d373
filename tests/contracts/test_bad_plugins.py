"""Every check has a plugin that fails it and nothing else, and says how to mend it."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import bad_attacks
import bad_defenses
import bad_evaluators
import plugins
import pytest

from sleeperbench.cli import main
from sleeperbench.testing import (
    CheckFailed,
    Subject,
    check_attack,
    check_defense,
    check_evaluator,
    defenses,
    general,
    purpose,
    second,
)
from sleeperbench.testing.base import CHECKS, Failed, Skipped
from sleeperbench.testing.report import Result, perform, results
from sleeperbench.testing.stage import BASE, Variant, stage

GENTLE = '''from dataclasses import dataclass
from sleeperbench import Access, Defense, Outcome
from sleeperbench.kit import tune
@dataclass(frozen=True, kw_only=True)
class Gentle(Defense):
    """Fine-tune with a small step."""
    INFO = {"title": "Gentle", "version": 1, "api": 1, "kind": "repair", "paper": "", "bibtex": "", "micro": {"epochs": 1}}
    ACCESS = Access(clean=0.05)
    epochs: int = 5
    lr: float = 0.001
    def run(self, case):
        return Outcome(model=tune(case.net, case.tune, epochs=self.epochs, lr=self.lr, ctx=case.ctx))
'''  # noqa: E501
BAD = [
    ("metadata", bad_defenses.Unpublished, "bibtex"),
    ("metadata", bad_defenses.Unsaid, "INFO['presumes'] is ' '"),
    ("metadata", bad_defenses.Perhaps, "INFO['traverses'] is 'no'"),
    ("metadata", bad_defenses.ShrinksBatch, "sets 'batch', which INFO['effort'] does not name"),
    ("metadata", bad_defenses.LowersNothing, "lowers nothing"),
    ("metadata", bad_defenses.NamesNothing, "'stepps', which is no parameter"),
    ("parameters", bad_defenses.TakesAnything, "parameter that does not exist"),
    ("runs", bad_defenses.Raises, "ZeroDivisionError"),
    ("runs", bad_defenses.Declines, "too_few_rows"),
    ("outputs", bad_defenses.RepairsNothing, "needs a model"),
    ("outputs", bad_defenses.KeepsTooFew, "wrong_shape: keep is (7,)"),
    ("outputs", bad_defenses.Silent, "INFO['scores']"),
    ("outputs", bad_defenses.AlarmsInVain, "score() is not written"),
    ("outputs", bad_attacks.ShortMarks, "PoisonedSet.mark"),
    ("outputs", bad_evaluators.Reasonless, "neither of a value and a reason"),
    ("deterministic", bad_defenses.Unseeded, "body.head.bias differs"),
    ("inputs_untouched", bad_defenses.InPlace, "net.tensors.body.head.weight differs"),
    ("inputs_untouched", bad_defenses.SwitchesMode, "net.mode"),
    ("process_untouched", bad_defenses.Seeds, "numpy's global generator"),
    ("process_untouched", bad_defenses.StopsGradients, "the grad mode"),
    ("process_untouched", bad_defenses.CountsInDoubles, "the default dtype"),
    ("process_untouched", bad_defenses.SeeksKernels, "cudnn's flags"),
    ("process_untouched", bad_defenses.TakesThreads, "the number of threads"),
    ("access", bad_defenses.Greedy, "train is not declared"),
    ("access", bad_defenses.Idle, "declares references"),
    ("access", bad_defenses.PreparesInVain, "never opens `prepared`"),
    ("access", bad_defenses.PreparesTooMuch, "net is not declared"),
    ("access", bad_evaluators.Nosy, "attacked is not declared"),
    ("architectures", bad_defenses.NeedsNorm, "on micro_nobn"),
    ("shapes", bad_defenses.Rgb, "no snake_case word"),
    ("shapes", bad_defenses.ScoresTenLabels, "Verdict.label_scores is (10,), not (2,)"),
    ("shapes", bad_defenses.ScoresColours, "on micro_bn, 1 x 16 x 16, 2 classes: score() raises IndexError"),
    ("shapes", bad_defenses.StampsColours, "on micro_bn, 1 x 16 x 16, 2 classes: stamp() raises IndexError"),
    ("shapes", bad_defenses.ScoresGrudgingly, "its reason 'Only colour images, please!' is no snake_case word"),
    ("acts", bad_defenses.LeavesAlone, "it leaves the model as it is: 120 rows are too few"),
    ("acts", bad_defenses.GivesBack, "as the one that it was handed, to 0 in a logit"),
    ("acts", bad_defenses.Rounds, "as the one that it was handed"),
    ("acts", bad_defenses.KeepsAll, "it keeps all rows"),
    ("acts", bad_defenses.SuspectsAllAlike, "the same score"),
    ("acts", bad_defenses.FindsNothing, "each of 10 labels has the score 0"),
    ("acts", bad_defenses.AlmostAllAlike, "each of 10 labels has the score 0.5"),
    ("acts", bad_defenses.AcquitsAll, "its verdict is 0 of the attacked model, and 0 of a clean one"),
    ("acts", bad_defenses.AcquitsOne, "its verdict is 0 of the attacked model, and 0 of a clean one"),
    ("acts", bad_defenses.CountsClasses, "of a clean one"),
    ("acts", bad_evaluators.Reticent, "no figure of an attacked model (repaired): c_acc (too_few_rows)"),
    ("acts", bad_evaluators.UndefendedOnly, "no figure of an attacked model (repaired): c_acc (defended)"),
    ("save_load", bad_defenses.KeysOfNumbers, "chosen.accuracy has '1' only once"),
    ("score_rows", bad_defenses.Transductive, "in batches of 7"),
    ("stamp_images", bad_defenses.TooBright, "pixels from"),
    ("trigger_pixels", bad_attacks.OutOfRange, "run from 0.5 to 1.5"),
    ("trigger_pixels", bad_attacks.Invisible, "after rounding 0 of 80 images differ"),
    ("trigger_rows", bad_attacks.MixesRows, "in batches of 7"),
    ("trigger_rows", bad_attacks.DrawsPerBatch, "in reverse order"),
    ("trigger_static", bad_attacks.WrongStatic, "off `apply` at test"),
    ("trigger_range", bad_attacks.WideRange, "image plus low"),
    ("target_map", bad_attacks.CountsAll, "already the wanted one"),
    ("poisoned_ids", bad_attacks.MovesRows, "not the training rows in order"),
    ("poisoned_rows", bad_attacks.TakesPool, "not eligible"),
    ("poisoned_labels", bad_attacks.Mislabels, "mislabelled"),
    ("poisoned_pixels", bad_attacks.OtherPixels, "not its stamp"),
    ("poison_rate", bad_attacks.Doubles, "are marked DIRTY"),
    ("poison_rate", bad_attacks.LeavesClean, "is no row, but is not refused: 0 are marked DIRTY"),
    ("poison_rate", bad_attacks.Overdraws, "poison() at rate 1 raises IndexError"),
    ("snapshot", bad_attacks.Undeclared, "the hooks poison batches"),
    ("snapshot", bad_attacks.BrightBatches, "batch returns images"),
    ("snapshot", bad_attacks.FaintBatches, "0.25 of a level off"),
    ("restore", bad_attacks.Forgets, "after reading"),
    ("decoy", bad_attacks.SameDecoy, "is that trigger"),
    ("metrics", bad_evaluators.Forgetful, "no row for c_loss"),
    ("bounds", bad_evaluators.Percent, "outside 0..1"),
    ("qualifiers", bad_evaluators.Disordered, "not in order"),
    ("no_trigger", bad_evaluators.WantsTrigger, "TypeError"),
    ("nan_model", bad_evaluators.Gullible, "perfect in asr"),
    ("nan_model", bad_evaluators.Comparing, "perfect in unsure"),
    ("save_load", bad_evaluators.KeysOfCurves, "curves.c_acc has '1' only once"),
]
CHECK = {"attack": check_attack, "defense": check_defense, "evaluator": check_evaluator}


@pytest.mark.parametrize(("name", "cls", "seen"), BAD, ids=[f"{n}-{c.__name__}" for n, c, _ in BAD])
def test_a_broken_promise_fails_its_own_check_alone(name: str, cls: type, seen: str) -> None:
    subject = Subject(cls)
    with pytest.raises(CheckFailed) as caught:
        CHECK[subject.kind](subject)
    heading, found, mend = str(caught.value).split("\n")
    assert heading.startswith(f"{subject} fails 1 of")
    assert found.startswith(f"{name}: ")
    assert seen in found
    assert mend.startswith("    mend: ")
    assert len(mend) > 40


def test_a_slow_micro_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general, "SECONDS", 0.02)
    failed = [r for r in results(Subject(bad_defenses.Slow)) if r.status == "failed"]
    assert [r.check.name for r in failed] == ["micro"]
    assert "0.2 processor seconds" in failed[0].message


def in_a_child(cls: type) -> tuple[list[str], Result]:
    """The other checks that fail, and how check `child` went."""
    (check,) = [c for c in CHECKS if c.name == "child"]
    subject = Subject(cls)
    return [r.check.name for r in results(subject) if r.status == "failed"], perform(subject, check)


@pytest.fixture(scope="module")
def importable() -> Iterator[None]:
    """A fork server that finds the bad plugins, in place of one that other tests of this process have started."""

    def end() -> None:
        process = stage(BASE).server.process
        if process is not None:
            process.kill()
            process.wait()

    end()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield
    end()


def test_the_bad_plugins_know_the_base_case() -> None:
    assert (BASE.spec.arch, BASE.classes, BASE.channels) == bad_defenses.BASE


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("cls", "seen"),
    [
        (bad_defenses.Peeks, "a defense may not import sleeperbench.engine.store"),
        (bad_defenses.Hoards, "out_of_memory: out_of_memory"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_works_here_and_not_in_the_child_process_fails(cls: type, seen: str) -> None:
    others, refused = in_a_child(cls)
    assert (others, refused.status) == ([], "failed")
    assert seen in refused.message
    assert len(refused.check.remedy) > 40


@pytest.mark.usefixtures("importable")
def test_the_child_process_is_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defenses, "CHILD_SECONDS", 2.0)
    others, ended = in_a_child(bad_defenses.Hangs)
    assert (others, ended.status) == ([], "failed")
    assert ended.message.startswith("timeout: ")


@pytest.mark.usefixtures("importable")
def test_the_child_process_answers_as_this_one_does() -> None:
    others, good = in_a_child(bad_defenses.Halved)
    assert (others, good.status) == ([], "ok")


GOOD = [
    bad_defenses.Halved,
    bad_defenses.Scored,
    bad_defenses.Stamping,
    bad_defenses.TellsClean,
    bad_defenses.ScoresOnlyColours,
    bad_defenses.StampsOnlyColours,
    bad_attacks.Tinted,
    bad_attacks.PerImage,
    bad_evaluators.Right,
    bad_evaluators.ComparesTwins,
]


@pytest.mark.parametrize("cls", GOOD, ids=lambda c: c.__name__)
def test_what_the_bad_ones_are_made_from_is_good(cls: type) -> None:
    assert [(r.check.name, r.message) for r in results(Subject(cls)) if r.status == "failed"] == []


@pytest.mark.parametrize("cls", [bad_defenses.ScoresOnlyColours, bad_defenses.StampsOnlyColours])
def test_a_second_phase_may_decline(cls: type) -> None:
    remark = general.tried(Subject(cls), [Variant(channels=1, classes=2)])
    assert remark == "micro_bn, 1 x 16 x 16, 2 classes: declined, needs_colour: three channels"


def test_a_fault_of_the_checker_is_not_taken_for_the_method_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_):
        raise KeyError("a fault of the checker")

    monkeypatch.setattr(second, "surroundings", type("Broken", (), {"look": broken})())
    for at in (purpose.acts, lambda s: general.tried(s, [])):
        with pytest.raises(KeyError, match="a fault of the checker"):
            at(Subject(bad_defenses.Scored))


def test_what_score_did_is_looked_at_once_and_dies_with_the_method() -> None:
    asked = []

    class Fails(bad_defenses.Scored):
        def score(self, state, net, x):
            asked.append(len(x))
            raise ValueError("not today")

    subject = Subject(Fails)
    for _ in range(2):
        with pytest.raises(Failed, match=r"score\(\) raises ValueError: not today"):
            second.scored(subject, BASE)
    assert len(asked) == 1
    gone = weakref.ref(subject)
    del subject
    gc.collect()
    assert gone() is None


def test_training_anew_is_no_proof_of_anything() -> None:
    class Anew(bad_defenses.Halved):
        INFO = {**bad_defenses.Halved.INFO, "kind": "in_training"}

    with pytest.raises(Skipped, match="trained anew"):
        purpose.acts(Subject(Anew))


def test_every_check_is_failed_by_a_bad_plugin() -> None:
    assert {c.name for c in CHECKS} == {name for name, _, _ in BAD} | {"micro", "child"}


@pytest.fixture
def outsiders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (Path(__file__).parent / "bad_defenses.py").read_text()
    raising = GENTLE.replace("Gentle", "Raising") + "raise RuntimeError('not today')\n"
    modules = {"gentle.py": GENTLE, "outsiders_bad.py": source, "raising.py": raising}
    points = {"gentle": "gentle:Gentle", "forgetful": "outsiders_bad:KeysOfNumbers", "raising": "raising:Raising"}
    folder = plugins.install(tmp_path, "outsiders", "1.0", modules, {"sleeperbench.defenses": points})
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.usefixtures("outsiders")
def test_the_smallest_defense_of_an_outsider_passes(capsys: pytest.CaptureFixture) -> None:
    assert main(["-q", "check", "outsiders/gentle", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["status"] for r in rows} == {"ok", "skipped"}
    assert all({"check", "status", "seconds", "message"} <= set(r) for r in rows)
    assert {r["check"] for r in rows} == {c.name for c in CHECKS if "defense" in c.kinds and not c.full}


@pytest.mark.usefixtures("outsiders")
def test_the_command_says_what_failed_and_how_to_mend_it(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "outsiders/forgetful"]) == 4
    out, err = capsys.readouterr()
    assert "  FAIL  save_load" in out
    assert "  ok    deterministic" in out
    assert out.rstrip().split("\n")[-2].startswith("save_load: after writing and reading")
    assert out.rstrip().split("\n")[-1].startswith("    mend: ")
    assert err.rstrip().endswith("checks failed")


@pytest.mark.usefixtures("outsiders")
def test_unknown_and_broken_ids(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "outsiders/gentel"]) == 2
    assert "did you mean `outsiders/gentle`" in capsys.readouterr().err
    assert main(["check", "outsiders/raising"]) == 3
    assert "not today" in capsys.readouterr().err
    assert main(["check", "outsiders/gentle:outsiders/gentle"]) == 2
    assert "is no wrapper" in capsys.readouterr().err


def test_an_id_of_several_kinds_is_checked_in_each(capsys: pytest.CaptureFixture) -> None:
    from sleeperbench.testing.report import subjects

    assert [str(s) for s in subjects("none")] == ["attack/none", "defense/none"]
    assert [str(s) for s in subjects("defense:none")] == ["defense/none"]
    with pytest.raises(Exception, match="no evaluator `none`"):
        subjects("evaluator:none")


def test_a_class_of_another_kind_is_refused() -> None:
    with pytest.raises(Exception, match="use check_attack"):
        check_defense(bad_attacks.Tinted)
    with pytest.raises(Exception, match="no class derived from"):
        check_defense(dict)
