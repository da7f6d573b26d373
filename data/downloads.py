"""Downloads, run only when a person asks for one: torchvision's, with torchvision's checksums."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from sleeperbench.data.errors import DataError

TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def torchvision_set(root: Path, kind: str) -> None:
    """Download one of torchvision's sets into the layout it reads itself.

    Args:
        root: Data root; created when missing.
        kind: `MNIST`, `FashionMNIST`, `CIFAR10`, `CIFAR100` or `GTSRB`.

    Raises:
        DataError: No network, a checksum that does not fit, or a folder that cannot be written.
    """
    with _told(root):
        from torchvision import datasets

        if kind == "GTSRB":
            for split in ("train", "test"):
                datasets.GTSRB(root, split=split, download=True)
        else:
            getattr(datasets, kind)(root, download=True)


def tiny_imagenet(root: Path) -> None:
    """Download and unpack the course archive of Tiny ImageNet into `<root>/tiny-imagenet-200`."""
    with _told(root):
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(TINY_URL, str(root), md5=TINY_MD5)


@contextlib.contextmanager
def _told(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):  # torchvision reports on stdout, which is for results
            yield
    except (OSError, RuntimeError) as e:  # URLError is an OSError; torchvision raises RuntimeError for bad checksums
        reason = " ".join(str(e).split())
        raise DataError(
            f"the download into {root} failed ({reason}): check the network and that the folder can be written, or put "
            "the files there by hand"
        ) from None
