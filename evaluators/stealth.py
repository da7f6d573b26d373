"""How visible a trigger is: PSNR, SSIM and the largest change of a pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sleeperbench import EvalCase, Evaluator, Findings, Measurement, Metric, Needs
from sleeperbench.contracts import Rendered
from sleeperbench.kit.predict import spread

_ROWS = 500
_GALLERY = 8
_APART = {"psnr": 1.0, "ssim": 0.01}
"""Difference, in dB and of 1, from which on training rows have a picture beside that of test images. PSNR alone would
miss a faint change of the whole image under a bright patch."""


@dataclass(frozen=True, kw_only=True)
class Stealth(Evaluator):
    """Triggered test images against the same images without trigger, both as 8-bit pictures.

    Each figure is a mean over up to 500 rows spread evenly over the triggered test images. Rows that the trigger
    leaves unchanged have no finite PSNR and are left out of its mean.

    Some attacks poison with another form than they attack with: weaker, in parts, smaller, or with changes that belong
    to a single image. `form=training` are the same figures of up to 500 poisoned training rows against their originals,
    and where PSNR or SSIM are others than on test images, by 1 dB or 0.01, eight of these rows have a picture of their
    own. Where no training row is marked as poisoned, since training itself poisons, probe rows in the form of training
    stand for them.
    """

    INFO = {
        "title": "Stealth",
        "paper": "https://doi.org/10.1109/TIP.2003.819861",
        "bibtex": "@article{wang2004image, title={Image Quality Assessment: From Error Visibility to Structural "
        "Similarity}, author={Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.}, "
        "journal={IEEE Transactions on Image Processing}, volume={13}, number={4}, pages={600--612}, year={2004}}",
        "kind": "stealth",
        "version": 4,
        "api": 1,
        "micro": {},
    }
    NEEDS = Needs(scope="attack", outcome=())
    METRICS = (
        Metric(
            name="psnr",
            unit="dB",
            low=0.0,
            high=100.0,
            better="none",
            doc="Peak signal-to-noise ratio of triggered against clean images",
        ),
        Metric(
            name="ssim",
            unit="",
            low=-1.0,
            high=1.0,
            better="none",
            doc="Structural similarity of triggered and clean images",
        ),
        Metric(
            name="linf",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="Largest change of a pixel, in units of the full range",
        ),
    )

    def measure(self, case: EvalCase) -> Findings:
        """The three figures of both forms, and pictures: clean, triggered, and their difference, one row per image."""
        if case.bd_test is None:
            return Findings(
                rows=tuple(Measurement(metric=m.name, value=None, reason="no_trigger") for m in self.METRICS)
            )
        rows, sheets = figures(case.bd_test, ""), {"gallery": sheet(case.bd_test)}
        training = case.bd_probe if case.bd_train is None else case.bd_train
        if training is not None:
            trained = figures(training, "form=training")
            if apart(rows, trained):
                sheets["gallery_training"] = sheet(training)
            rows += trained
        return Findings(
            rows=tuple(rows),
            pictures={name: picture for name, (picture, _) in sheets.items()},
            curves={name: {"residual_factor": factor} for name, (_, factor) in sheets.items()},
        )


def figures(bd: Rendered, qualifier: str) -> list[Measurement]:
    """PSNR, SSIM and largest change of triggered against clean images, in this order."""
    some = spread(len(bd), _ROWS)
    clean, triggered = bd.clean.images[some].cpu(), bd.data.images[some].cpu()
    decibel = psnr(clean, triggered)
    finite = decibel[decibel.isfinite()]
    values = {
        "psnr": float(finite.mean()) if len(finite) else None,
        "ssim": float(ssim(clean, triggered).mean()),
        "linf": float(_difference(clean, triggered).abs().amax((1, 2, 3)).mean() / 255),
    }
    return [
        Measurement(metric=m, value=v, qualifier=qualifier, reason="unchanged" if v is None else "")
        for m, v in values.items()
    ]


def apart(test: list[Measurement], training: list[Measurement]) -> bool:
    """Whether training rows look unlike test images by the figures of both, in the order of `figures`."""
    return any(
        a.value is None or b.value is None or abs(a.value - b.value) >= _APART[a.metric]
        for a, b in zip(test, training, strict=True)
        if a.metric in _APART
    )


def sheet(bd: Rendered) -> tuple[Tensor, int]:
    """Contact sheet of eight of the rows, see `gallery`."""
    shown = spread(len(bd), _GALLERY)
    return gallery(bd.clean.images[shown].cpu(), bd.data.images[shown].cpu())


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """10 log10(255^2 / MSE) in dB per image of two uint8 (N, C, H, W); infinite where they are equal."""
    return 10 * torch.log10(255**2 / _difference(a, b).square().mean((1, 2, 3)))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM per image of two uint8 (N, C, H, W), each channel by itself (Wang et al. 2004).

    Gaussian window of 11x11 with deviation 1.5, no padding, K1 = 0.01, K2 = 0.03, range 255. Images smaller than
    11 pixels take the largest odd window that fits. Without padding the 5 pixels along the border hardly count.
    """
    side = min(11, a.shape[2], a.shape[3])
    side -= 1 - side % 2
    ramp = torch.arange(side, dtype=torch.float64) - side // 2
    line = torch.exp(-(ramp**2) / (2 * 1.5**2))
    line = line / line.sum()

    def local_mean(x: Tensor) -> Tensor:
        # Row after column: the window as a whole would be unfolded into 121 values per pixel, gigabytes for 500 images.
        columns = functional.conv2d(x.flatten(0, 1)[:, None], line[None, None, :, None])
        return functional.conv2d(columns, line[None, None, None, :])

    x, y = a.double(), b.double()
    mx, my = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mx * mx, local_mean(y * y) - my * my
    cov = local_mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (var_x + var_y + c2))
    return value.reshape(len(a), -1).mean(1)


def gallery(clean: Tensor, triggered: Tensor) -> tuple[Tensor, int]:
    """Contact sheet uint8 (C, H', W'): per row clean, triggered, difference around mid-grey; white lines between.

    The difference is multiplied by the largest whole number that keeps it in range; that number is returned too.
    """
    residual = _difference(clean, triggered)
    factor = max(1, int(127 // max(1.0, float(residual.abs().max()))))
    shown = (128 + factor * residual).clamp(0, 255).to(torch.uint8)
    sheet = torch.stack([clean, triggered, shown], 1)
    sheet = functional.pad(sheet, (1, 1, 1, 1), value=255)
    n, columns, channels, height, width = sheet.shape
    return sheet.permute(2, 0, 3, 1, 4).reshape(channels, n * height, columns * width), factor


def _difference(clean: Tensor, triggered: Tensor) -> Tensor:
    return triggered.double() - clean.double()
