"""Runs one defense in the process that was forked for it.

It sees one folder: `in/` holds what was declared, `out/` takes the answer.

Imports neither attacks nor evaluators nor the store. Only an oracle, which declares the true backdoor, may import the
attack that reads it.
"""

from __future__ import annotations

import errno
import importlib.abc
import json
import os
import random
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPEN = (
    "sleeperbench.contracts",
    "sleeperbench.kit",
    "sleeperbench.errors",
    "sleeperbench.defenses",
    "sleeperbench.data.images",
    "sleeperbench.engine.artifacts",
    "sleeperbench.engine.cases",
    "sleeperbench.engine.loading",
    "sleeperbench.engine.questions",
)
"""What a defense may import of this package."""


class _Fence(importlib.abc.MetaPathFinder):
    """Refuses imports that a defense has no business with."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = tuple(allowed)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Raise for what is closed; leave the rest to the ordinary finders."""
        if not fullname.startswith("sleeperbench."):
            return
        if not any(f"{fullname}.".startswith(f"{a}.") or f"{a}.".startswith(f"{fullname}.") for a in self.allowed):
            raise ImportError(f"a defense may not import {fullname}")


def open_case(folder: Path, about: dict[str, Any]) -> Any:
    """The case in `folder/in`, as a defense sees it."""
    import torch

    from sleeperbench.contracts.context import Cost, Ctx, Recipe
    from sleeperbench.contracts.models import ModelSpec
    from sleeperbench.engine import artifacts
    from sleeperbench.engine.cases import DEFENSE_PARTS, Declared
    from sleeperbench.engine.loading import load_attack
    from sleeperbench.engine.questions import queried
    from sleeperbench.kit.classifier import load, read_model

    box, access = folder / "in", about["access"]
    device = torch.device(about["device"])
    recipe = Recipe(**about["recipe"])
    ctx = Ctx(
        seed=about["seed"],
        recipe=recipe,
        scratch=folder / "scratch",
        device=device,
        cost=Cost(),
        progress=_progress(folder / "progress"),
    )
    parts: dict[str, Any] = {
        "spec": lambda: ModelSpec.from_json(about["spec"]),
        "recipe": lambda: recipe,
        "ctx": lambda: ctx,
    }
    if access["model"] == "weights":
        parts["net"] = lambda: load(read_model(box / "model"), device)
    elif queried(access):
        parts["net"] = lambda: asked(folder, about, ctx.cost)
    if access["clean"]:
        parts["clean"] = lambda: artifacts.read_images(box / "clean.safetensors")
        split = artifacts.read_tensors(box / "split.safetensors")
        parts["tune"] = lambda: parts["clean"]().rows(split["tune"])
        parts["val"] = lambda: parts["clean"]().rows(split["val"])
    if access["train"]:
        parts["train"] = lambda: artifacts.read_images(box / "train.safetensors")
    if access["references"]:
        parts["references"] = lambda: tuple(read_model(box / f"reference{i}") for i in range(access["references"]))
    if access["oracle"]:
        parts["oracle"] = lambda: artifacts.read_backdoor(box / "oracle", load_attack(about["oracle"]))
    if access["oracle"] and access["train"]:
        parts["marks"] = lambda: artifacts.read_tensors(box / "marks.safetensors")["mark"]
    if access["inner"]:
        parts["inner"] = lambda: artifacts.read_outcome(box / "inner")
    if access["inner"] == "cost":
        parts["spent"] = lambda: Cost(**about["spent"])
    parts["prepared"] = lambda: _prepared(box)
    return Declared(f"ACCESS of {about['plugin']}", parts, DEFENSE_PARTS)


def _prepared(box: Path) -> Any:
    from sleeperbench.contracts.defense import UndeclaredAccess
    from sleeperbench.engine import artifacts

    # Asked for when it is opened: the judge of methods stages it in between.
    if not (box / "prepared").is_dir():
        raise UndeclaredAccess('prepared is there for methods alone whose INFO says `"prepares": True`')
    return artifacts.read_outcome(box / "prepared").state


def asked(folder: Path, about: dict[str, Any], cost: Any) -> Any:
    """The model of a query-only defense: its desk is open while the case is."""
    from sleeperbench.contracts.models import ModelSpec
    from sleeperbench.engine.questions import SOCKET, Asked

    labels = about["access"]["model"] == "labels"
    return Asked(folder / "in" / SOCKET, ModelSpec.from_json(about["spec"]), labels, cost)


def _scores(folder: Path, method: Any, about: dict[str, Any], cost: Any) -> Any:
    """Second phase: the defense's scores for the images in `in/asked.safetensors`."""
    from sleeperbench.engine import artifacts
    from sleeperbench.engine.questions import queried
    from sleeperbench.kit.classifier import load, read_model
    from sleeperbench.kit.pixels import to_float

    state = artifacts.read_outcome(folder / "in" / "own").state
    images = artifacts.read_tensors(folder / "in" / "asked.safetensors")["images"]
    if queried(about["access"]):
        return method.score(state, asked(folder, about, cost), to_float(images).to(about["device"]))
    net = load(read_model(folder / "in" / "judged"), about["device"])

    def count(module: Any, args: tuple[Any, ...], out: Any) -> None:
        cost.forwards += len(out)

    net.register_forward_hook(count)
    return method.score(state, net, to_float(images).to(about["device"]))


def _stamps(folder: Path, method: Any, about: dict[str, Any]) -> dict[str, Any]:
    """Second phase of an inverter: uint8 images of `in/asked.safetensors` with each recovered trigger asked for."""
    import torch

    from sleeperbench.engine import artifacts
    from sleeperbench.kit.pixels import to_float, to_uint8

    own = artifacts.read_outcome(folder / "in" / "own")
    images = artifacts.read_tensors(folder / "in" / "asked.safetensors")["images"]
    found = {}
    for i in about["claims"]:
        parts = (to_float(part).to(about["device"]) for part in images.split(1000))
        found[str(i)] = torch.cat([to_uint8(method.stamp(own.state, own.inverted[i], x)).cpu() for x in parts])
    return found


def _progress(path: Path) -> Any:
    def report(done: int, total: int, what: str) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps([done, total, what]))
        os.replace(part, path)

    return report


def _write(folder: Path, outcome: Any) -> None:
    from sleeperbench.contracts.defense import Outcome
    from sleeperbench.engine import artifacts

    if not isinstance(outcome, Outcome):
        raise TypeError(f"run returned {type(outcome).__name__}, not an Outcome")
    try:
        artifacts.write_outcome(folder, outcome)
    except ValueError as e:
        if "not JSON compliant" in str(e):
            raise FloatingPointError("a figure of the answer is not finite") from e
        raise


def main(folder: Path, share: float) -> None:
    """Run the defense described by `folder/in/case.json`; writes `folder/out` and, last, `folder/done.json`.

    Args:
        folder: The case.
        share: Share of the device's memory that may be taken.
    """
    about = json.loads((folder / "in" / "case.json").read_text())
    done: dict[str, Any] = {"status": "ok", "reason": ""}
    try:
        import numpy as np
        import torch

        from sleeperbench.contracts.defense import Outcome
        from sleeperbench.contracts.method import NotApplicable
        from sleeperbench.engine import artifacts
        from sleeperbench.engine.loading import be_deterministic, load_class

        # After the imports above, which stand on more than a defense may ask for.
        sys.meta_path.insert(0, _Fence([*OPEN, "sleeperbench.attacks"] if about["access"]["oracle"] else OPEN))
        if about["device"] != "cpu":
            torch.cuda.set_per_process_memory_fraction(share)
        random.seed(about["seed"])
        np.random.seed(about["seed"] % 2**32)
        torch.manual_seed(about["seed"])
        be_deterministic(about["device"])
        try:
            case = open_case(folder, about)
            method = load_class(about["value"]).from_params(about["method"])
            if about["what"] == "run":
                _write(folder / "out", method.run(case))
            elif about["what"] == "prepare":
                _write(folder / "out", Outcome(state=method.prepare(case)))
            elif about["what"] == "stamp":
                artifacts.write_tensors(folder / "out" / "stamps.safetensors", _stamps(folder, method, about))
            else:
                scores = _scores(folder, method, about, case.ctx.cost)
                artifacts.write_tensors(folder / "out" / "scores.safetensors", {"scores": scores})
            done["cost"] = vars(case.ctx.cost)
        except NotApplicable as e:
            done = {"status": "not_applicable", "reason": str(e)}
    except BaseException as e:
        traceback.print_exc()
        done = describe(e)
    (folder / "done.part").write_text(json.dumps(done))
    os.replace(folder / "done.part", folder / "done.json")


def describe(e: BaseException) -> dict[str, Any]:
    """Status and reason of an exception, as rows show them."""
    from sleeperbench.contracts.defense import UndeclaredAccess

    text = " ".join(str(e).split())[:300]
    if isinstance(e, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return {"status": "out_of_memory", "reason": "out_of_memory: " + text}
    if isinstance(e, FloatingPointError):
        return {"status": "failed", "reason": "nan: " + text}
    if (isinstance(e, OSError) and e.errno == errno.EFBIG) or "os error 27" in text:
        return {"status": "failed", "reason": "budget: a file is larger than the memory limit allows: " + text}
    if isinstance(e, UndeclaredAccess):
        return {"status": "failed", "reason": "undeclared_access: " + text}
    return {"status": "failed", "reason": f"raised: {type(e).__name__}: {text}"}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(Path(sys.argv[1]), float(sys.argv[2]))
