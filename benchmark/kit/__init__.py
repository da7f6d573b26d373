"""What methods are built from: models, the trainer, fine-tuning, honest selection, poisoning, prediction, taps."""

from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.batchnorm import refresh
from sleeperbench.kit.classifier import Classifier, build, load, pack
from sleeperbench.kit.masks import optimise_masks
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.poison import poison, render
from sleeperbench.kit.predict import hits, predict
from sleeperbench.kit.select import accepts, choose, folds, held_out
from sleeperbench.kit.taps import capture, features, taps
from sleeperbench.kit.train import fit
from sleeperbench.kit.tune import tune

__all__ = [
    "Classifier",
    "accepts",
    "build",
    "capture",
    "choose",
    "crop_flip",
    "features",
    "fit",
    "folds",
    "held_out",
    "hits",
    "load",
    "optimise_masks",
    "pack",
    "poison",
    "predict",
    "refresh",
    "render",
    "taps",
    "to_float",
    "to_uint8",
    "tune",
]
