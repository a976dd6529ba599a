"""Base data module: shared settings, train/val/test loaders, augmentation and normalization on the device."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn

from alexnet_pl.data.draws import EpochDraws
from alexnet_pl.data.loaders import BatchLoader
from alexnet_pl.data.transforms import (
    VIEW_NAMES,
    apply_transform,
    center_crop,
    is_mixing,
    make_views,
    normalize,
    per_image,
    select_center_crop,
)
from alexnet_pl.runtime.errors import ConfigError, invalid_value


class ImageDataModule(LightningDataModule, ABC):
    """Stratified train/validation split and a separate test set, with batches prepared on the device.

    Batches are ``(images, labels)``: normalized float32 ``(B, 3, image_size, image_size)`` and int64 ``(B,)``. In
    evaluation, the last batch is padded with images labeled ``IGNORE_INDEX``. Only training batches are augmented. If
    their images are mixed, their labels are rows of class weights, float32 ``(B, number of classes)``. Images that are
    still larger than ``image_size`` after augmentation are center-cropped on the device.

    Args:
        image_size: side of the network's input in pixels.
        batch_size: images per step across all ranks, at least 1.
        val_fraction: fraction of the training images held out for validation, in (0, 1).
        seed: seed of the shuffling.
        split_seed: seed of the split, independent of ``seed``.
        mean, std: normalization, one number per channel on the [0, 1] pixel scale.
        augment: transform of training images on their device. Transforms that do not derive from
            :class:`~alexnet_pl.data.transforms.BatchTransform` are applied to each image separately, except for
            torchvision's ``MixUp`` and ``CutMix``, which mix the images of a batch by design.
        resize_size: side in pixels that images are resized to and stored in, at least ``image_size``; by default the
            same. The paper stores 256 for an input of 224, crops at random in training and the center in evaluation.
        test_crops: 2, 6 or 10 for test batches ``(test_crops, B, 3, image_size, image_size)``, the views of each image
            by :func:`~alexnet_pl.data.transforms.make_views`.

    Raises:
        ConfigError: a value is out of range, ``augment`` returns images that the network cannot take, or the images are
            not large enough for ten crops.
    """

    name: str
    _loaders: Mapping[str, BatchLoader]
    classes_from_files = False
    """True if ``model.num_classes`` follows the classes of the data, False if it may be larger."""

    keep_ratio = False
    """True if images are scaled by their shorter side and center-cropped, False if they are stretched to a square."""

    def __init__(
        self,
        image_size: int,
        batch_size: int,
        val_fraction: float,
        seed: int,
        split_seed: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        augment: Callable[[Tensor], Tensor] | None = None,
        resize_size: int | None = None,
        test_crops: Literal[1, 2, 6, 10] = 1,
    ):
        super().__init__()
        resize_size = image_size if resize_size is None else resize_size
        for name, value in (("batch_size", batch_size), ("image_size", image_size), ("resize_size", resize_size)):
            if not isinstance(value, int) or value < 1:
                raise invalid_value(f"data.{name}", value, "an integer, 1 or more")
        if resize_size < image_size:
            raise invalid_value("data.resize_size", resize_size, f"data.image_size={image_size} or more, or null")
        if test_crops not in (1, *VIEW_NAMES):
            raise invalid_value("data.test_crops", test_crops, f"1 or one of: {', '.join(map(str, VIEW_NAMES))}")
        if test_crops == 10 and resize_size == image_size:
            raise ConfigError(
                f"data.test_crops={test_crops} is invalid: ten crops need images larger than "
                f"data.image_size={image_size}. Set data.resize_size, to {round(image_size * 256 / 224)} for the "
                "paper's ratio."
            )
        if not 0 < val_fraction < 1:
            raise invalid_value("data.val_fraction", val_fraction, "a number above 0 and below 1")
        self.image_size, self.resize_size, self.test_crops = image_size, resize_size, test_crops
        self.batch_size, self.val_fraction = batch_size, val_fraction
        self.seed, self.split_seed = seed, split_seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = nn.Identity() if is_mixing(augment) else per_image(augment)
        self.mixing = cast(Any, augment if is_mixing(augment) else getattr(augment, "mixing", None))
        if self.mixing is not None:
            self.mixing.num_classes = None  # it receives rows of class weights
        self._try_augment()
        self._loaders = {}
        self._epoch_draws: EpochDraws | None = None
        self.description = ""

    def _try_augment(self) -> None:
        """Augment two images of noise, so that a misfit surfaces before data is read. Leaves torch's RNG untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noise = torch.randint(256, (2, 3, self.resize_size, self.resize_size), dtype=torch.uint8)
            augmented = self.augment_images(noise)
        smallest = min(augmented.shape[-2:])
        if smallest < self.image_size:
            raise ConfigError(
                f"augment is invalid: expected images of at least data.image_size={self.image_size} pixels a side, and "
                f"it leaves {smallest}."
            )
        if augmented.is_floating_point() and augmented.abs().max() <= 8:
            raise ConfigError(
                "augment is invalid: expected pixels on the 0–255 scale, and it returns them normalized. data.mean and "
                "data.std normalize them afterwards."
            )

    def augment_images(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Return ``(B, 3, H, W)`` images at positions ``(B,)`` of the dataset, augmented as in the current epoch."""
        return apply_transform(self.augment, images, None if index is None else self._draws().at(index))

    def _draws(self) -> EpochDraws:
        """Return the random numbers of the current epoch."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        if self._epoch_draws is None or self._epoch_draws.epoch != epoch:
            self._epoch_draws = EpochDraws(len(self._loaders["train"].labels), self.seed, epoch)
        return self._epoch_draws

    @property
    def class_names(self) -> Sequence[str]:
        """The classes in the order of the labels. Subclasses define them."""
        raise NotImplementedError

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        """Return True if ``root`` holds this kind of data, judged by names alone."""
        return True

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Find the images, split them, and set ``_loaders`` and ``description``. Further calls have no effect.

        Raises:
            DataError: images are missing or corrupt.
        """

    @abstractmethod
    def move_to(self, device: torch.device) -> None:
        """Prepare for training on ``device``: move the data there if it fits, or pin batches for it."""

    def counts(self) -> dict[str, int]:
        """Return the number of images in ``train``, ``val`` and ``test``."""
        return {split: len(loader.indices) for split, loader in self._loaders.items()}

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of which images form each split, in which order, and of their labels; not of their pixels.

        A run that resumes continues a position in that order, so it must be the same.
        """
        found = hashlib.sha256()
        for split in ("train", "val", "test"):
            loader = self._loaders[split]
            for values in (loader.indices, loader.labels):
                found.update(values.cpu().numpy().tobytes())
        return found.hexdigest()

    def training_images(self, most: int | None = None) -> Iterator[Tensor]:
        """Yield every training image once, in order and not augmented, as uint8 batches ``(B, 3, H, W)``.

        Args:
            most: yield only so many if there are more, evenly spaced, because some datasets are in the order of their
                classes.
        """
        loader = self._loaders["train"]
        total = len(loader.indices)
        count = min(most or total, total)
        for batch in loader.indices[torch.arange(count) * total // count].split(self.batch_size):
            yield loader.gather(batch)[0]

    def train_dataloader(self) -> BatchLoader:
        loader = self._loaders["train"]
        loader.with_index = bool(getattr(self.augment, "takes_draws", False))
        return loader

    def val_dataloader(self) -> BatchLoader:
        return self._loaders["val"]

    def test_dataloader(self) -> BatchLoader:
        return self._loaders["test"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels, *index = batch
        is_training = self.trainer is not None and self.trainer.training
        if is_training:
            images = self.augment_images(images, *index)
        if self.test_crops > 1 and self.trainer is not None and self.trainer.testing:
            images = make_views(images, self.image_size, self.test_crops)
        images = normalize(center_crop(images, self.image_size), self.mean, self.std)
        if is_training and self.mixing is not None:
            return self.mixing(images, F.one_hot(labels, len(self.class_names)).float())
        return images, labels


def plain_batches(
    data: LightningDataModule, loader: Iterable[tuple[Tensor, ...]], device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a loader's batches as evaluation sees them: on the device, normalized, not augmented, one crop each."""
    for batch in loader:
        batch = data.transfer_batch_to_device(batch, torch.device(device), 0)
        images, labels = data.on_after_batch_transfer(batch, 0)
        yield select_center_crop(images), labels


def logit_names(class_names: Sequence[str], count: int) -> list[str]:
    """Return one name per logit: the class names, then numbers for logits beyond the data's classes."""
    return [*class_names, *(f"#{index}" for index in range(len(class_names), count))]
