"""The one form in which images travel: uint8 pixels, labels and stable row ids."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeperbench.data.arrays import digest_arrays


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images with labels and ids.

    Args:
        images: uint8, (N, C, H, W), values 0..255.
        labels: int64, (N,), 0..len(classes)-1. In a defender's view they may be poisoned labels.
        ids: int64, (N,), stable position of each row in the source split.
        classes: Class names in label order.
        name: Data set, such as `cifar10`.
        split: `train` or `test`.
        digest: sha256 of the whole source split's pixels and labels.
        canonical: False when the pixels or labels differ from the official release or could not be compared with it.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    classes: tuple[str, ...]
    name: str
    split: str
    digest: str
    canonical: bool = True

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.ids.dtype != torch.int64:
            raise ValueError("labels and ids must be int64")
        if len(self.images) != n or len(self.ids) != n:
            raise ValueError(f"{len(self.images)} images, {n} labels and {len(self.ids)} ids do not match")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    def rows(self, index: Tensor) -> ImageSet:
        """The rows at `index` (positions or a boolean mask), in that order."""
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index], ids=self.ids[index])

    def having(self, ids: Tensor) -> ImageSet:
        """The rows whose id is in `ids`, in this set's order."""
        return self.rows(torch.isin(self.ids, ids))


def digest_of(images: Tensor, labels: Tensor) -> str:
    """sha256 over shape, pixels and labels, in row order."""
    return digest_arrays(images.cpu().numpy(), labels.to(torch.int64).cpu().numpy())
