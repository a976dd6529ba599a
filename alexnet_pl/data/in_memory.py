"""Datasets that fit into memory: decoded and resized once, split, and gathered from tensors on the device."""

import logging
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.data.loaders import EpochShuffle, TensorLoader
from alexnet_pl.data.splits import stratified_split
from alexnet_pl.distributed.environment import get_world

log = logging.getLogger(__name__)


MAX_DEVICE_FRACTION = 0.5
"""Fraction of a GPU's free memory that images may occupy. The network and its activations need the rest."""


@dataclass(frozen=True)
class LabeledImages:
    """``images`` is ``(N, H, W, 3)`` uint8, ``labels`` is ``(N,)`` int64 in ``range(len(class_names))``."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ImageSource:
    """A dataset as found on disk. ``train`` is not split yet; ``description`` goes into the log and result.json."""

    train: LabeledImages
    test: LabeledImages
    description: str


def resized(images: Tensor, side: int) -> Tensor:
    """Return images ``(N, 3, H, W)`` uint8 stretched to ``(N, 3, side, side)``, bilinearly with antialiasing."""
    found = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    # In slices, because the resize makes float copies, which would take gigabytes for all of CIFAR-10.
    for start in range(0, len(images), 2048):
        found[start : start + 2048] = resize(images[start : start + 2048], [side, side], antialias=True)
    return found


class TensorDataModule(ImageDataModule):
    """Images as uint8 tensors ``(N, 3, resize_size, resize_size)``, in host memory or on the device.

    Resizing matches PIL's bilinear filter to within two gray levels.
    """

    _loaders: dict[str, TensorLoader]

    @abstractmethod
    def load(self) -> ImageSource:
        """Read the dataset into memory.

        Raises:
            DataError: images are missing or corrupt.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load, split and resize the images. Further calls have no effect."""
        if self._loaders:
            return
        source = self.load()
        self.description = source.description
        train, val = stratified_split(source.train.labels, self.val_fraction, self.split_seed)
        images, labels = self._tensors(source.train)
        test_images, test_labels = self._tensors(source.test)
        shuffle, group = EpochShuffle(len(train), self.seed), get_world()
        test = np.arange(len(test_labels))
        self._loaders = {
            "train": TensorLoader(images, labels, torch.from_numpy(train), self.batch_size, shuffle, group),
            "val": TensorLoader(images, labels, torch.from_numpy(val), self.batch_size, group=group),
            "test": TensorLoader(test_images, test_labels, torch.from_numpy(test), self.batch_size, group=group),
        }

    def _tensors(self, labeled: LabeledImages) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(labeled.images).permute(0, 3, 1, 2)
        return resized(images, self.resize_size), torch.from_numpy(labeled.labels)

    def move_to(self, device: torch.device) -> None:
        """Move the images to ``device`` if they fit, so that batches are gathered there.

        Otherwise they stay in host memory, every batch is copied over, and a log line says so.
        """
        if device.type == "cpu":
            return
        tensors = {id(t): t for loader in self._loaders.values() for t in (loader.images, loader.labels)}
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if device.type == "cuda" and needed > MAX_DEVICE_FRACTION * (free := torch.cuda.mem_get_info(device)[0]):
            log.info(f"        images stay in host memory: {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free on {device}")
            return
        moved = {key: tensor.to(device) for key, tensor in tensors.items()}  # splits share their tensors
        for loader in self._loaders.values():
            loader.images, loader.labels = moved[id(loader.images)], moved[id(loader.labels)]
