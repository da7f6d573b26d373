"""Classifiers: built from a spec and a seed, packed into tensors, rebuilt from them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sleeperbench.contracts.models import Model, ModelSpec
from sleeperbench.errors import BadInput, BrokenPlugin, nearest
from sleeperbench.kit import wraps


class Classifier(nn.Module):
    """An image classifier on [0, 1] pixels, with its normalisation and its wraps inside.

    `body` is the architecture; it has `head` and `features(x)` (see docs/models.md). State keys are `body.<...>` and
    `wraps.<i>.<...>`; mean and standard deviation belong to the spec and are not in the state.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, body: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in spec.norm)
        if len(mean) not in (1, spec.shape[0]) or len(std) != len(mean) or not bool(torch.all(std.cpu() > 0)):
            raise ValueError(f"norm must be {spec.shape[0]} means and positive standard deviations, not {spec.norm}")
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.body = body
        self.wraps = nn.ModuleList()
        for wrap in spec.wraps:
            change = wraps.make(wrap, self, spec)
            if wrap.site:
                self.get_submodule(wrap.site).register_forward_hook(wraps.After(change))
            self.wraps.append(change)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        changes: list[wraps.Change] = list(self.wraps)  # type: ignore[arg-type]
        for change in reversed(changes):
            if change.place == wraps.INPUT:
                x = change(x)
        x = self.body((x - self.mean) / self.std)
        for change in changes:
            if change.place == wraps.LOGITS:
                x = change(x)
        return x


def build(spec: ModelSpec, seed: int) -> Classifier:
    """A new classifier on the CPU, in training mode, its weights drawn from `seed`; no global generator moves.

    Raises:
        BadInput: unknown architecture, or arguments that it does not take.
        BrokenPlugin: the architecture's module cannot be imported.
        ValueError: a wrap or a shape that cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators too.
        torch.default_generator.manual_seed(seed)
        return Classifier(spec, _body(spec, pretrained=True))


def load(model: Model, device: torch.device | str = "cpu") -> Classifier:
    """The classifier of `model`, in eval mode. Nothing is downloaded and no code comes from the model.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or type; names it.
    """
    with torch.random.fork_rng(devices=[]):
        net = Classifier(model.spec, _body(model.spec, pretrained=False))
    own = net.state_dict()
    for name in sorted(own.keys() ^ model.state.keys()):
        raise ValueError(f"`{model.spec.arch}`: tensor {name!r} is {'missing' if name in own else 'unknown'}")
    for name, tensor in own.items():
        given = model.state[name]
        if (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"`{model.spec.arch}`: tensor {name!r} is {given.dtype} {tuple(given.shape)}, "
                f"not {tensor.dtype} {tuple(tensor.shape)}"
            )
    net.load_state_dict(dict(model.state))
    return net.to(device).eval()


def pack(net: Classifier) -> Model:
    """Spec and tensors of `net`: contiguous CPU copies, keys as in `net.state_dict()`."""
    state = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in net.state_dict().items()}
    return Model(spec=net.spec, state=state)


def traits(spec: ModelSpec) -> frozenset[str]:
    """What defenses may require of an architecture: `bn` (BatchNorm2d), `conv` (Conv2d), `linear_head` (nn.Linear)."""
    with torch.device("meta"):
        body = _body(spec, pretrained=False)
    kinds = {"bn": nn.BatchNorm2d, "conv": nn.Conv2d}
    found = {name for name, kind in kinds.items() if any(isinstance(m, kind) for m in body.modules())}
    return frozenset(found | ({"linear_head"} if isinstance(body.head, nn.Linear) else set()))


def save_model(model: Model, folder: Path | str) -> None:
    """Write `model.safetensors` and `model.json`; equal models give equal bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({k: v.detach().cpu().contiguous() for k, v in model.state.items()})
    (folder / "model.safetensors").write_bytes(data)  # raises OSError when the disk is full, save_file does not
    text = json.dumps(model.spec.to_json(), sort_keys=True, indent=1, allow_nan=False)
    (folder / "model.json").write_text(text + "\n", encoding="utf-8")


def read_model(folder: Path | str) -> Model:
    """The model that `save_model` wrote."""
    folder = Path(folder)
    spec = ModelSpec.from_json(json.loads((folder / "model.json").read_text(encoding="utf-8")))
    return Model(spec=spec, state=load_file(folder / "model.safetensors"))


@functools.cache
def architectures() -> Mapping[str, EntryPoint]:
    """Registered architectures by id; one of another distribution is `dist/id`."""
    found = entry_points(group="sleeperbench.models")
    return {e.name if e.dist is None or e.dist.name == "sleeperbench" else f"{e.dist.name}/{e.name}": e for e in found}


def _body(spec: ModelSpec, *, pretrained: bool) -> Any:
    channels, size, width = spec.shape
    if size != width:
        raise ValueError(f"images must be square, not {size} x {width}")
    args = dict(spec.args)
    if spec.arch.startswith("timm:"):
        from sleeperbench.kit.nets.timm_model import TimmNet  # timm takes seconds to import

        args["pretrained"] = pretrained and bool(args.get("pretrained", False))
        return TimmNet(spec.classes, channels, size, name=spec.arch.removeprefix("timm:"), **args)
    known = architectures()
    if spec.arch not in known:
        raise BadInput(f"no architecture `{spec.arch}`: {nearest(spec.arch, [*known, 'timm:<name>'])}")
    try:
        arch = known[spec.arch].load()
    except Exception as e:
        raise BrokenPlugin(f"architecture `{spec.arch}` cannot be imported ({known[spec.arch].value}): {e}") from e
    try:
        return arch(spec.classes, channels, size, **args)
    except TypeError as e:
        raise BadInput(f"architecture `{spec.arch}` does not take the arguments {args}: {e}") from e
