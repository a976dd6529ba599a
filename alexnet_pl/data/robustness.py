"""Robustness sets: CIFAR-10.1 and CIFAR-10-C in their published files, and corruptions that are made on the spot."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.data.in_memory import resized
from alexnet_pl.data.loaders import TensorLoader
from alexnet_pl.data.transforms import center_crop, normalize
from alexnet_pl.runtime.errors import DataError, one_line

SEVERITIES = (1, 2, 3, 4, 5)

KINDS = ("cifar10_1", "cifar10_c")
"""Robustness sets with published files."""

MAX_BYTES = 2**30
"""Size of the arrays in one file. Those of CIFAR-10-C have 154 MB."""


@dataclass(frozen=True)
class TestSet:
    """One part of a robustness set.

    Attributes:
        corruption: its name; "" of a set without corruptions.
        severity: 1 to 5; 0 without corruption.
        images: ``(N, 3, H, W)`` uint8.
        labels: ``(N,)`` int64.
    """

    __test__ = False  # not pytest's

    corruption: str
    severity: int
    images: Tensor
    labels: Tensor


class ArrayDataModule(LightningDataModule):
    """Test images in memory, prepared as a run prepares its own: resized, center-cropped, normalized.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        labels: ``(N,)`` int64.
        preprocess: of the run.
        batch_size: at least 1.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, class_names: Sequence[str], preprocess: Preprocess, batch_size: int
    ):
        super().__init__()
        self.class_names, self.preprocess, self.description = class_names, preprocess, ""
        side = preprocess.resize_size or preprocess.image_size
        self.loader = TensorLoader(resized(images, side), labels, torch.arange(len(labels)), batch_size)

    def setup(self, stage: str | None = None) -> None:
        """Do nothing: everything is in memory."""

    def test_dataloader(self) -> TensorLoader:
        return self.loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return normalize(
            center_crop(images, self.preprocess.image_size), self.preprocess.mean, self.preprocess.std
        ), labels


# --- published files ------------------------------------------------------------------------------------------------


def read_published(kind: str, folder: Path, num_classes: int) -> Iterator[TestSet]:
    """Yield the parts of a published robustness set, one at a time. Nothing in the files is executed.

    Args:
        kind: ``cifar10_1`` (Recht et al. 2018): ``cifar10.1_v6_data.npy`` and ``cifar10.1_v6_labels.npy``, or v4's.
            ``cifar10_c`` (Hendrycks and Dietterich 2019): ``labels.npy`` and a file per corruption, each with the
            test set in five severities.
        folder: directory of the files.
        num_classes: labels are below it.

    Raises:
        DataError: a file is not found, corrupt, or has another shape.
    """
    if kind == "cifar10_1":
        version = next((v for v in ("v6", "v4") if (folder / f"cifar10.1_{v}_data.npy").is_file()), "v6")
        images = _read_array(folder / f"cifar10.1_{version}_data.npy", 4)
        labels = _labels(folder / f"cifar10.1_{version}_labels.npy", len(images), num_classes)
        yield TestSet("", 0, _channels_first(images), labels)
        return
    files = sorted(path for path in folder.glob("*.npy") if path.name != "labels.npy")
    if not files:
        raise DataError(
            f"{folder} holds no CIFAR-10-C. Expected labels.npy and a file per corruption, such as fog.npy."
        )
    shapes = [_read_array(path, 4).shape for path in files]  # all of them, before the first takes its time
    labels = _labels(folder / "labels.npy", shapes[0][0], num_classes)
    for path, shape in zip(files, shapes, strict=True):
        if shape[0] != len(labels) or shape[0] % len(SEVERITIES):
            raise DataError(f"{path} is corrupt: {shape[0]:,} images, expected {len(labels):,}, in five severities.")
    count = len(labels) // len(SEVERITIES)
    for path in files:
        images = _read_array(path, 4)
        for severity in SEVERITIES:
            part = slice((severity - 1) * count, severity * count)
            yield TestSet(path.stem, severity, _channels_first(images[part]), labels[part])


def _read_array(path: Path, dimensions: int) -> np.ndarray:
    """Return a ``.npy`` file, mapped into memory: images ``(N, H, W, 3)`` uint8, or labels ``(N,)``.

    Raises:
        DataError: not found, corrupt, pickled, or of another shape.
    """
    if not path.is_file():
        raise DataError(f"{path} not found. Expected the published .npy files.")
    try:
        found: np.ndarray = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except (OSError, ValueError, EOFError, OverflowError, TypeError, MemoryError) as error:
        raise DataError(f"{path} is corrupt: {one_line(error)[:200]}") from error
    if found.nbytes > MAX_BYTES:
        raise DataError(f"{path} is corrupt: {found.nbytes:,} bytes, expected at most {MAX_BYTES:,}.")
    is_image = found.ndim == 4 and found.dtype == np.uint8 and found.shape[3] == 3
    is_label = found.ndim == 1 and found.dtype.kind in "iu"
    if not found.size or not (is_image if dimensions == 4 else is_label):
        raise DataError(f"{path} is corrupt: {found.dtype} {found.shape}.")
    return found


def _labels(path: Path, count: int, num_classes: int) -> Tensor:
    labels = torch.from_numpy(np.array(_read_array(path, 1)).astype(np.int64))
    if len(labels) != count or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{path} is corrupt: expected {count:,} labels from 0 to {num_classes - 1}.")
    return labels


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


# --- corruptions ----------------------------------------------------------------------------------------------------

SMALL = 64
"""Images of up to this many pixels a side get the severities of CIFAR-10-C, larger ones those of ImageNet-C."""

STRENGTHS = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""Corruption → its parameter per severity in CIFAR-10-C and in ImageNet-C (Hendrycks and Dietterich 2019)."""


def corrupted(images: Tensor, labels: Tensor) -> Iterator[TestSet]:
    """Yield the images under every corruption and severity, the same on every call.

    The parameters are those of the published sets. The images differ from those, because the noise is drawn anew and
    the libraries are others.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        labels: ``(N,)`` int64.
    """
    scale = 0 if max(images.shape[-2:]) <= SMALL else 1
    for corruption, strengths in STRENGTHS.items():
        for severity in SEVERITIES:
            act = partial(CORRUPTIONS[corruption], strength=strengths[scale][severity - 1])
            generator = torch.Generator().manual_seed(severity)
            parts = [act(part, generator=generator) for part in images.cpu().split(1000)]
            yield TestSet(corruption, severity, torch.cat(parts), labels)


def _to_uint8(values: Tensor) -> Tensor:
    """Return values on the [0, 1] scale as uint8, cut off as in the published sets."""
    return (values.clamp(0, 1) * 255).to(torch.uint8)


def add_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of a standard deviation on the [0, 1] scale."""
    return _to_uint8(images / 255 + strength * torch.randn(images.shape, generator=generator))


def blur(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Blur with a Gaussian of ``strength`` pixels, cut off at four standard deviations."""
    size = 2 * max(1, round(4 * strength)) + 1
    size = min(size, 2 * min(images.shape[-2:]) - 1)  # reflection needs a border smaller than the image
    return _to_uint8(v2.gaussian_blur(images / 255, [size, size], [strength, strength]))


def reduce_contrast(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale each channel of each image around its mean."""
    values = images / 255
    means = values.mean((2, 3), keepdim=True)
    return _to_uint8((values - means) * strength + means)


def compress(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Encode and decode each image as JPEG of quality ``strength``."""
    parts = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(strength))
        parts.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)


CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": add_noise,
    "gaussian_blur": blur,
    "contrast": reduce_contrast,
    "jpeg": compress,
}
