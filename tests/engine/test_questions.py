"""Second phases and query-only defenses: images in, answers out, counted by the desk."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import plugins
import pytest
import torch

from sleeperbench.contracts.access import Access
from sleeperbench.contracts.context import Cost
from sleeperbench.contracts.defense import Inverted, Outcome, UndeclaredAccess
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.engine import artifacts, sandbox
from sleeperbench.engine.outcomes import Failed
from sleeperbench.engine.questions import BATCH, SOCKET, Asked, Desk
from sleeperbench.engine.worker import ForkServer
from sleeperbench.kit.pixels import to_float
from sleeperbench.testing.stage import BASE, PLANTED, Stage, stage

SPEC = ModelSpec(arch="small_cnn", classes=3, shape=(1, 4, 4), norm=((0.0,), (1.0,)))
CURIOUS = '''from dataclasses import dataclass
import os
import torch
from sleeperbench import Access, Defense, Outcome

@dataclass(frozen=True, kw_only=True)
class Curious(Defense):
    """Asks, lies about how often, and lists what it was given."""
    INFO = {"title": "Curious", "version": 1, "api": 1, "kind": "detection", "paper": "", "bibtex": "", "micro": {}}
    ACCESS = Access(model="scores", clean=0.05)

    def run(self, case):
        x = torch.linspace(0, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16)
        answer = case.net(x)
        case.ctx.cost.queries = 1
        files = [f for _, _, names in os.walk(case.ctx.scratch.parent / "in") for f in names]
        return Outcome(state=({"answer": answer}, {"files": sorted(files)}))

    def score(self, state, net, x):
        return net(x)[:, 1]
'''


PAINTER = '''from dataclasses import dataclass
from sleeperbench import Access, Defense, Inverted, Outcome

@dataclass(frozen=True, kw_only=True)
class Painter(Defense):
    """Recovers two triggers that are code, and one that is not."""
    INFO = {"title": "Painter", "version": 1, "api": 1, "kind": "inversion", "paper": "", "stamps": True, "micro": {}}
    ACCESS = Access(clean=0)

    def run(self, case):
        raise AssertionError("only its second phase is asked")

    def stamp(self, state, inv, x):
        return (1 - x) if inv.target == 2 else x.flip(-1)
'''


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ForkServer]]:
    """By level, a fork server whose children can import both defenses."""
    modules = {"curious_defense.py": CURIOUS, "painter_defense.py": PAINTER}
    points = {"sleeperbench.defenses": {"curious": "curious_defense:Curious", "painter": "painter_defense:Painter"}}
    code = plugins.install(tmp_path_factory.mktemp("code"), "asking", "1.0", modules, points)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(code))
        patch.setenv("PYTHONPATH", str(code))
        made = {n: ForkServer(n, memory=0, cuda=False, share=1.0, hidden=[]) for n in sandbox.LEVELS}
        yield made
    for server in made.values():
        if server.process is not None:
            server.process.kill()
            server.process.wait()


class Sums(torch.nn.Module):
    """Logits that tell which image was seen: its sum, its first pixel, 0."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3)."""
        return torch.stack([x.sum((1, 2, 3)), 9 * x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], 1)


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [0, 1, BATCH - 1, BATCH, 2 * BATCH + 3])
@pytest.mark.parametrize("labels", [False, True])
def test_answers_are_the_models_and_every_image_is_counted(tmp_path: Path, n: int, labels: bool) -> None:
    cost, net, x = Cost(), Sums(), images(n)
    with Desk(tmp_path, net, SPEC, labels) as desk:
        got = Asked(tmp_path / SOCKET, SPEC, labels, cost)(x)
        assert desk.queries == cost.queries == n
    expected = net(x).argmax(1) if labels else net(x).softmax(1)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got, expected.detach()) if labels else torch.allclose(got, expected, atol=1e-6)


def test_two_visitors_are_answered_side_by_side(tmp_path: Path) -> None:
    with Desk(tmp_path, Sums(), SPEC, True) as desk:
        one, two = (Asked(tmp_path / SOCKET, SPEC, True, Cost()) for _ in range(2))
        assert torch.equal(one(images(4)), two(images(4)))
        assert desk.queries == 8


@pytest.mark.parametrize("x", [torch.rand(2, 1, 4, 5), torch.rand(1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)])
def test_other_shapes_are_refused(tmp_path: Path, x: torch.Tensor) -> None:
    with Desk(tmp_path, Sums(), SPEC, False), pytest.raises(ValueError, match=r"a query is float \(N, 1, 4, 4\)"):
        Asked(tmp_path / SOCKET, SPEC, False, Cost())(x)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_pixels_outside_the_range_are_refused(tmp_path: Path, value: float) -> None:
    with Desk(tmp_path, Sums(), SPEC, False), pytest.raises(ValueError, match="outside"):
        Asked(tmp_path / SOCKET, SPEC, False, Cost())(torch.full((1, 1, 4, 4), value))


def test_a_broken_question_is_not_answered_and_the_next_visitor_is(tmp_path: Path) -> None:
    with Desk(tmp_path, Sums(), SPEC, False) as desk:
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(tmp_path / SOCKET))
            rude.sendall(struct.pack("<I", 1 << 31))
            assert rude.recv(1) == b""
        assert len(Asked(tmp_path / SOCKET, SPEC, False, Cost())(images(2))) == 2
        assert desk.queries == 2


def test_a_closed_desk_is_an_error_and_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    desk = Desk(tmp_path, Sums(), SPEC, False)
    asked = Asked(tmp_path / SOCKET, SPEC, False, Cost())
    asked(images(1))
    desk.close()
    with pytest.raises(OSError):
        asked(images(1))
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(5)
    assert not any(t.is_alive() for t in left)


@pytest.mark.parametrize("level", ["process", "bwrap"])
def test_a_child_asks_and_cannot_hide_how_often(level: str, servers: dict[str, ForkServer], tmp_path: Path) -> None:
    if level == "bwrap" and (why := sandbox.problem()):
        pytest.skip(f"allowed: {why}")
    at, access = stage(BASE), Access(model="scores", clean=0.05)
    task = at.task("curious", access, {}, None)
    before = at.fork
    try:
        at.fork = servers[level]
        folder = at.place()
        about = at._stage(task, {"curious": "curious_defense:Curious", "planted": PLANTED}, folder)
        artifacts.write_json(folder / "in" / "case.json", about | {"what": "run"})
        desk = at.desk(folder, about["access"], at.attacked)
        answer, _ = at._child(folder, tmp_path / "log", 60, desk)
        again = at.place()
        about = at._stage(task, {"curious": "curious_defense:Curious", "planted": PLANTED}, again)
        (again / "in" / "own").mkdir()
        artifacts.write_outcome(again / "in" / "own", artifacts.read_outcome(folder / "out"))
        artifacts.write_tensors(again / "in" / "asked.safetensors", {"images": at.micro.test.images[:7]})
        artifacts.write_json(again / "in" / "case.json", about | {"what": "score"})
        second, _ = at._child(again, tmp_path / "log", 60, at.desk(again, about["access"], at.attacked))
    finally:
        at.fork = before
    outcome = artifacts.read_outcome(folder / "out")
    assert outcome.state is not None
    x = torch.linspace(0, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16)
    expected = at.net(at.attacked)(x).softmax(1)
    assert torch.allclose(outcome.state[0]["answer"], expected, atol=1e-5)
    assert (answer["cost"]["queries"], second["cost"]["queries"]) == (5, 7)
    scores = artifacts.read_tensors(again / "out" / "scores.safetensors")["scores"]
    right = at.net(at.attacked)(to_float(at.micro.test.images[:7])).softmax(1)[:, 1]
    assert torch.allclose(scores, right, atol=1e-5)
    assert outcome.state[1]["files"] == [*(SOCKET, "case.json", "clean.json", "clean.safetensors", "split.safetensors")]


def test_an_inverter_stamps_test_and_probe_images_in_a_child(servers: dict[str, ForkServer], tmp_path: Path) -> None:
    at = Stage(BASE)
    mask, coded = torch.zeros(1, 16, 16), {"uses_apply": True}
    claims = (Inverted(target=0, **coded), Inverted(target=1, mask=mask, pattern=mask), Inverted(target=2, **coded))
    first = at.task("painter", Access(clean=0), {}, None)
    recovered = Outcome(inverted=claims, state=({}, {}))
    own = at.kept("recovered", {"attack": at.attacked}, lambda folder: artifacts.write_outcome(folder, recovered))
    task = replace(
        first, kind="answer", params=first.params | {"phase": "stamp"}, inputs=first.inputs | {"defense": own}
    )
    at.fork = servers["process"]
    at.run(task, {"painter": "painter_defense:Painter", "planted": PLANTED}, tmp_path / "log")
    stamps = artifacts.read_tensors(at.store.fetch(task.key) / "stamps.safetensors")
    assert sorted(stamps) == ["0.probe", "0.test", "2.probe", "2.test"]
    for part, data in (("test", at.micro.test), ("probe", at.micro.probe)):
        assert torch.equal(stamps[f"0.{part}"], data.images.flip(-1))
        assert torch.equal(stamps[f"2.{part}"], 255 - data.images)


def test_a_method_of_no_access_has_no_desk() -> None:
    at = stage(BASE)
    case: Any = at.case(at.staged(at.task("none", Access(model="none"), {}, None), PLANTED))
    with pytest.raises(UndeclaredAccess):
        _ = case.net


def test_a_staged_case_asks_the_attacked_model() -> None:
    at = stage(BASE)
    case: Any = at.case(at.staged(at.task("labels", Access(model="labels"), {}, None), PLANTED))
    x = to_float(at.micro.test.images[:20])
    assert torch.equal(case.net(x), at.net(at.attacked)(x).argmax(1))
    assert case.ctx.cost.queries == 20


@pytest.mark.parametrize("columns", [0, 1, 3, 10])
def test_statistics_beside_scores_are_kept_apart(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = stage(BASE)
    first = at.task("judge", Access(), {}, None)
    task = replace(first, kind="answer", inputs=first.inputs | {"defense": at.attacked})
    asked: list[torch.Tensor] = []

    def second(task: Any, values: Any, images: torch.Tensor, *rest: Any) -> Any:
        asked.append(images)
        sums = images.flatten(1).double().sum(1)
        return {"scores": sums if not columns else torch.stack([sums + i for i in range(columns)], 1)}, {}

    monkeypatch.setattr(at, "_second", second)
    if columns == 10:
        with pytest.raises(Failed, match="wrong_shape: scores are"):
            at._answer(task, {}, tmp_path, Cost(), tmp_path / "log")
        return
    at._answer(task, {}, tmp_path, Cost(), tmp_path / "log")
    found = artifacts.read_tensors(tmp_path / "scores.safetensors")
    sums = asked[0].flatten(1).double().sum(1)
    assert torch.equal(found["scores"], sums)
    if columns < 2:
        assert "beside" not in found
    else:
        assert torch.equal(found["beside"], torch.stack([sums + 1, sums + 2], 1))
