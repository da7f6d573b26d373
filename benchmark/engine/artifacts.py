"""How results lie in the store: safetensors, JSON and PNG, written and read back here alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sleeperbench.contracts.attack import Backdoor, Mark, PoisonedSet
from sleeperbench.contracts.defense import Inverted, Outcome, Verdict
from sleeperbench.contracts.evaluator import Findings, Measurement, Rendered
from sleeperbench.contracts.models import Model
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import read_model, save_model


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys; NaN is refused."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))


def read_json(path: Path) -> Any:
    """The value of `write_json`."""
    return json.loads(path.read_text())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors as safetensors on the CPU, names sorted, so that equal tensors give equal bytes."""
    ready = {k: tensors[k].detach().cpu().contiguous().clone() for k in sorted(tensors)}
    path.write_bytes(save(ready))  # safetensors' own writer does not raise OSError when the disk is full


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `write_tensors`."""
    return dict(load_file(path))


def write_images(path: Path, data: ImageSet) -> None:
    """An image set with its labels, ids and description."""
    write_tensors(path, {"images": data.images, "labels": data.labels, "ids": data.ids})
    about = {k: getattr(data, k) for k in ("classes", "name", "split", "digest", "canonical")}
    write_json(path.with_suffix(".json"), about)


def read_images(path: Path) -> ImageSet:
    """The image set of `write_images`."""
    about = read_json(path.with_suffix(".json"))
    parts: dict[str, Any] = {**read_tensors(path), **about, "classes": tuple(about["classes"])}
    return ImageSet(**parts)


def write_set(folder: Path, p: PoisonedSet) -> None:
    """A training set as its labels and marks, and only those images that differ from the data set's."""
    write_tensors(
        folder / "set.safetensors",
        {
            "ids": p.data.ids,
            "labels": p.data.labels,
            "mark": p.mark,
            "trigger_id": p.trigger_id,
            "true_labels": p.true_labels,
            "appended": p.appended,
            "images": p.data.images[p.mark != Mark.CLEAN],
        },
    )


def read_set(folder: Path, train: ImageSet) -> PoisonedSet:
    """The training set of `write_set`; `train` is the source split that it was made from."""
    t = read_tensors(folder / "set.safetensors")
    images = train.images[_places(train, t["ids"])]
    images[t["mark"] != Mark.CLEAN] = t["images"]
    data = replace(train, images=images, labels=t["labels"], ids=t["ids"])
    marks = {k: t[k] for k in ("mark", "trigger_id", "true_labels", "appended")}
    return PoisonedSet(data=data, **marks)


def read_poisoned(folder: Path, train: ImageSet) -> Rendered | None:
    """The rows of `write_set` that carry a trigger meant to work, in the set's order; covers are not among them.

    Returns:
        None where no row is marked, as where training itself poisons, or where the artifact has no set.
    """
    path = folder / "set.safetensors"
    if not path.exists():
        return None
    t = read_tensors(path)
    marked = t["mark"][t["mark"] != Mark.CLEAN]
    dirty = t["mark"] == Mark.DIRTY
    if not bool(dirty.any()):
        return None
    clean = train.rows(_places(train, t["ids"][dirty]))
    return Rendered(
        data=replace(clean, images=t["images"][marked == Mark.DIRTY]),
        clean=clean,
        targets=t["labels"][dirty],
        trigger_id=t["trigger_id"][dirty],
    )


def write_backdoor(folder: Path, b: Backdoor, attack: str) -> None:
    """All that re-applies a backdoor, and the id of the attack that can read it."""
    write_tensors(folder / "backdoor.safetensors", b.tensors)
    write_json(folder / "backdoor.json", {"attack": attack, "info": b.info})


def read_backdoor(folder: Path, attack: Any) -> Backdoor:
    """The live backdoor; `attack` is the class that made it."""
    restored = attack.restore(
        read_tensors(folder / "backdoor.safetensors"), read_json(folder / "backdoor.json")["info"]
    )
    assert isinstance(restored, Backdoor)
    return restored


def write_rendered(path: Path, r: Rendered) -> None:
    """Triggered images; their clean rows are found by id."""
    write_tensors(path, {"images": r.data.images, "ids": r.data.ids, "targets": r.targets, "trigger_id": r.trigger_id})


def read_rendered(path: Path, source: ImageSet) -> Rendered | None:
    """The triggered rows of `source`, or None when the artifact has none."""
    if not path.exists():
        return None
    t = read_tensors(path)
    clean = source.rows(_places(source, t["ids"]))
    return Rendered(
        data=replace(clean, images=t["images"]), clean=clean, targets=t["targets"], trigger_id=t["trigger_id"]
    )


def _places(source: ImageSet, ids: Tensor) -> Tensor:
    """Where the rows with these ids stand in `source`."""
    where = torch.full((int(source.ids.max()) + 1,), -1)
    where[source.ids] = torch.arange(len(source))
    return where[ids]


def write_outcome(folder: Path, o: Outcome) -> None:
    """A defense's answer."""
    tensors: dict[str, Tensor] = {}
    for name in ("keep", "relabel", "suspicion"):
        if (value := getattr(o, name)) is not None:
            tensors[name] = value
    about: dict[str, Any] = {"opaque": o.opaque, "chosen": dict(o.chosen), "path": sorted(o.path)}
    if o.verdict is not None:
        about["verdict"] = {"score": float(o.verdict.score), "threshold": float(o.verdict.threshold)}
        for name in ("label_scores", "pairs"):
            if (value := getattr(o.verdict, name)) is not None:
                tensors[f"verdict.{name}"] = value
    about["inverted"] = []
    for i, inv in enumerate(o.inverted):
        about["inverted"].append({"target": inv.target, "source": inv.source, "uses_apply": inv.uses_apply})
        for name in ("mask", "pattern", "delta"):
            if (value := getattr(inv, name)) is not None:
                tensors[f"inverted.{i}.{name}"] = value
    if o.alarm is not None:
        about["alarm"] = float(o.alarm)
    if o.state is not None:
        about["state"] = o.state[1]
        tensors |= {f"state.{k}": v for k, v in o.state[0].items()}
    if o.model is not None:
        save_model(o.model, folder)
    for i, name in enumerate(sorted(o.path)):
        (folder / f"path{i}").mkdir()
        save_model(o.path[name], folder / f"path{i}")
    write_tensors(folder / "outcome.safetensors", tensors)
    write_json(folder / "outcome.json", about)


def read_outcome(folder: Path) -> Outcome:
    """The answer of `write_outcome`."""
    about, t = read_json(folder / "outcome.json"), read_tensors(folder / "outcome.safetensors")
    verdict = None
    if "verdict" in about:
        verdict = Verdict(**about["verdict"], label_scores=t.get("verdict.label_scores"), pairs=t.get("verdict.pairs"))
    inverted = tuple(
        Inverted(
            **meta,
            mask=t.get(f"inverted.{i}.mask"),
            pattern=t.get(f"inverted.{i}.pattern"),
            delta=t.get(f"inverted.{i}.delta"),
        )
        for i, meta in enumerate(about["inverted"])
    )
    state = None
    if "state" in about:
        state = ({k[6:]: v for k, v in t.items() if k.startswith("state.")}, about["state"])
    return Outcome(
        model=read_model(folder) if (folder / "model.json").exists() else None,
        opaque=about["opaque"],
        keep=t.get("keep"),
        relabel=t.get("relabel"),
        suspicion=t.get("suspicion"),
        verdict=verdict,
        inverted=inverted,
        state=state,
        alarm=about.get("alarm"),
        chosen=about["chosen"],
        path={name: read_model(folder / f"path{i}") for i, name in enumerate(about["path"])},
    )


def write_findings(folder: Path, f: Findings) -> None:
    """An evaluator's rows, curves, pictures and models."""
    rows = [asdict(r) for r in f.rows]
    for row in rows:
        if row["value"] is not None and not math.isfinite(row["value"]):  # JSON has no word for it
            row |= {"value": None, "reason": "nan: the figure is not finite"}
    about: dict[str, Any] = {
        "rows": rows,
        "curves": dict(f.curves),
        "pictures": {},
        "models": sorted(f.models),
    }
    for i, (name, picture) in enumerate(sorted(f.pictures.items())):
        about["pictures"][name] = f"picture{i}.png"
        write_png(folder / f"picture{i}.png", picture)
    for i, name in enumerate(sorted(f.models)):
        (folder / f"model{i}").mkdir()
        save_model(f.models[name], folder / f"model{i}")
    write_json(folder / "findings.json", about)


def read_findings(folder: Path) -> Findings:
    """The findings without their pictures, which stay files."""
    about = read_json(folder / "findings.json")
    models: dict[str, Model] = {n: read_model(folder / f"model{i}") for i, n in enumerate(about["models"])}
    return Findings(rows=tuple(Measurement(**r) for r in about["rows"]), curves=about["curves"], models=models)


def write_png(path: Path, picture: Tensor) -> None:
    """A uint8 picture (C, H, W), C 1 or 3, as PNG."""
    from PIL import Image

    array = picture.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path, optimize=False)
