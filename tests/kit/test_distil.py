from __future__ import annotations

import copy

import samples
import torch

from sleeperbench.kit.distil import OUTPUT, Taught
from sleeperbench.kit.pixels import to_float


def test_a_teacher_answers_in_eval_mode_without_a_graph_and_is_counted() -> None:
    teacher = copy.deepcopy(samples.badnets_net()).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    ctx, x = samples.ctx(), to_float(samples.digits()["pool"].images[:12])
    found = Taught(teacher, ["body.stage4", OUTPUT], ctx).answers(x)
    with torch.no_grad():
        wanted = samples.badnets_net().eval()(x)
    assert list(found) == ["body.stage4", OUTPUT] and torch.equal(found[OUTPUT], wanted)
    assert not any(t.requires_grad for t in found.values())
    assert teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert (ctx.cost.forwards, ctx.cost.backwards) == (12, 0)
