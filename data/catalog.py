"""The data sets that ship. An outsider's is a `Source` of its own, found through its entry point.

Augmentation follows BackdoorBench: zero-padded random crop, horizontal flip for CIFAR-10 alone. Normalisation
constants are BackdoorBench's too; `kit` makes them the first layer of every model.
"""

from __future__ import annotations

from functools import partial

from sleeperbench.data import cifar, downloads, folder, idx, names
from sleeperbench.data.bundled import read_digits
from sleeperbench.data.source import Norm, Source

__all__ = [
    "Source",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "gtsrb",
    "mnist",
    "tiny_imagenet",
]

_HALF: Norm = ((0.5,), (0.5,))
_IDENTITY: Norm = ((0.0,) * 3, (1.0,) * 3)

digits = Source(
    name="digits",
    title="Digits of scikit-learn, enlarged to 16x16",
    shape=(1, 16, 16),
    classes=names.DIGITS,
    norm=_HALF,
    pad=1,
    flip=False,
    train=1437,
    test=360,
    read=read_digits,
    digests=(
        "e303c3527d1fc8b308cf5b197df91ebdbe8ec7a79cbf98bfba50bf4aa66649b8",
        "b238e614affe542f26c745e87fceed2ed14bb272f5a4aabd8cfaae56d4893197",
    ),
    licence="CC BY 4.0 (UCI); shipped with scikit-learn, BSD-3-Clause",
    cite="Alpaydin, Kaynak: Optical Recognition of Handwritten Digits. UCI Machine Learning Repository, 1998",
)
mnist = Source(
    name="mnist",
    title="MNIST",
    shape=(1, 28, 28),
    classes=names.DIGITS,
    norm=_HALF,
    pad=2,
    flip=False,
    train=60_000,
    test=10_000,
    where="MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]",
    files=partial(idx.idx_files, folder="MNIST"),
    read=lambda root, split: idx.read_idx_split(root, "MNIST", split),
    digests=(
        "71d3be42f93ad20da73bb4a9744d0bebdaa6832be56dc010e21940e72c4c8b1e",
        "4718853ea946af656684509414983beff2e65cf414265c27966161014c003b8b",
    ),
    licence="CC BY-SA 3.0",
    cite="LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition. Proc. IEEE 1998",
    download_bytes=11_594_722,
    download=partial(downloads.torchvision_set, kind="MNIST"),
)
fashion_mnist = Source(
    name="fashion_mnist",
    title="Fashion-MNIST",
    shape=(1, 28, 28),
    classes=names.CLOTHES,
    norm=_HALF,
    pad=2,
    flip=False,
    train=60_000,
    test=10_000,
    where="FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]",
    files=partial(idx.idx_files, folder="FashionMNIST"),
    read=lambda root, split: idx.read_idx_split(root, "FashionMNIST", split),
    digests=(
        "a8007d7be041707b663947cf4c2d8a73d1704ccde85043273b866d5181bde6c2",
        "3581bf52f521803120533f28e81ae934decd1771980630083c739dc6da7d3bc6",
    ),
    licence="MIT",
    cite="Xiao, Rasul, Vollgraf: Fashion-MNIST. arXiv 1708.07747, 2017",
    download_bytes=30_878_645,
    download=partial(downloads.torchvision_set, kind="FashionMNIST"),
)
cifar10 = Source(
    name="cifar10",
    title="CIFAR-10",
    shape=(3, 32, 32),
    classes=names.CIFAR10,
    norm=((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    pad=4,
    flip=True,
    train=50_000,
    test=10_000,
    where="cifar-10-batches-py/{data_batch_1..5,test_batch}",
    files=cifar.CIFAR10.files,
    read=cifar.CIFAR10.read,
    licence="none stated; free for research by custom",
    cite="Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009",
    download_bytes=170_498_071,
    download=partial(downloads.torchvision_set, kind="CIFAR10"),
)
cifar100 = Source(
    name="cifar100",
    title="CIFAR-100, fine labels",
    shape=(3, 32, 32),
    classes=names.CIFAR100,
    norm=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    pad=4,
    flip=False,
    train=50_000,
    test=10_000,
    where="cifar-100-python/{train,test}",
    files=cifar.CIFAR100.files,
    read=cifar.CIFAR100.read,
    licence="none stated; free for research by custom",
    cite="Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009",
    download_bytes=169_001_437,
    download=partial(downloads.torchvision_set, kind="CIFAR100"),
)
gtsrb = Source(
    name="gtsrb",
    title="GTSRB, resized to 32x32",
    shape=(3, 32, 32),
    classes=names.SIGNS,
    norm=_IDENTITY,
    pad=4,
    flip=False,
    train=39_209,
    test=12_630,
    where="gtsrb/{GTSRB/Training,GTSRB/Final_Test/Images,GT-final_test.csv}",
    files=folder.gtsrb_files,
    read=partial(folder.read_gtsrb, shape=(3, 32, 32), classes=names.SIGNS),
    licence="none stated; free for research by custom",
    cite="Stallkamp, Schlipsing, Salmen, Igel: Man vs. Computer. Neural Networks 32, 2012",
    download_bytes=276_568_468,
    download=partial(downloads.torchvision_set, kind="GTSRB"),
)
tiny_imagenet = Source(
    name="tiny_imagenet",
    title="Tiny ImageNet",
    shape=(3, 64, 64),
    classes=names.TINY_IMAGENET,
    norm=((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    pad=4,
    flip=False,
    train=100_000,
    test=10_000,
    where="tiny-imagenet-200/{train,val}",
    files=folder.tiny_files,
    read=partial(folder.read_tiny, shape=(3, 64, 64), classes=names.TINY_IMAGENET),
    licence="ImageNet's terms: research and education, no commercial use",
    cite="Le, Yang: Tiny ImageNet Visual Recognition Challenge. CS 231N, 2015",
    download_bytes=248_100_043,
    download=downloads.tiny_imagenet,
)
