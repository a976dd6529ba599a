"""What every data set of this project shares: settings, three loaders, what is done to batches on the device."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from alexnet_pl.data.loaders import BatchLoader
from alexnet_pl.data.transforms import center_crop, central_view, normalize, ten_crop
from alexnet_pl.runtime.errors import ConfigError


class ImageDataModule(LightningDataModule, ABC):
    """Stratified train/validation split and a test set apart, kept as uint8 or encoded, prepared on the device.

    Batches are ``(images, labels)``: float32 ``(B, 3, image_size, image_size)``, normalised, and int64 ``(B,)``. In
    evaluation the last batch is filled up with images labelled ``IGNORE_INDEX``. Only training batches are augmented.
    Whatever is larger than ``image_size`` by then is cut to its centre, on the device.

    Args:
        image_size: side in pixels of what the network takes.
        batch_size: images a step, of all processes together, at least 1.
        val_fraction: fraction of the training images held out for validation, in (0, 1).
        seed: of the shuffling.
        split_seed: of the split, apart from ``seed``.
        mean, std: of the normalisation, one number a channel on the [0, 1] pixel scale.
        augment: applied to uint8 training batches ``(B, 3, resize_size, resize_size)`` on their device.
        resize_size: side in pixels that images are resized to and kept in, at least ``image_size`` and by default the
            same. The paper's is 256 for a network that takes 224: training crops at random, evaluation at the centre.
        test_crops: 10 makes test batches ``(10, B, 3, image_size, image_size)``, the paper's views of each image.

    Raises:
        ConfigError: a value out of range; an ``augment`` that leaves less than ``image_size``, or ten views of images
            that have no room for them.
    """

    name: str
    class_names: Sequence[str]
    classes_from_files = False
    """Whether the classes are known only once the data is looked at; ``model.num_classes`` then follows them."""

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
        test_crops: Literal[1, 10] = 1,
    ):
        super().__init__()
        resize_size = image_size if resize_size is None else resize_size
        for name, value in (("batch_size", batch_size), ("image_size", image_size), ("resize_size", resize_size)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"data.{name}={value} is not possible: it is a whole number, 1 or more.")
        if resize_size < image_size:
            raise ConfigError(
                f"data.resize_size={resize_size} is below data.image_size={image_size}, which is cut from it."
            )
        if test_crops != 1 and resize_size == image_size:
            raise ConfigError(
                f"data.test_crops={test_crops} needs images larger than data.image_size={image_size}: "
                f"set data.resize_size, to {round(image_size * 256 / 224)} for the paper's ratio."
            )
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction={val_fraction} is not possible: it is above 0 and below 1.")
        self.image_size, self.resize_size, self.test_crops = image_size, resize_size, test_crops
        self.batch_size, self.val_fraction = batch_size, val_fraction
        self.seed, self.split_seed = seed, split_seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = augment or nn.Identity()
        with torch.random.fork_rng(devices=[]):  # what does not fit is found now, and nothing is drawn for it
            kept = self.augment(torch.zeros(1, 3, resize_size, resize_size, dtype=torch.uint8)).shape[-1]
        if kept < image_size:
            raise ConfigError(
                f"augment leaves {kept} pixels a side, and the network takes data.image_size={image_size}."
            )
        self._loaders: dict[str, BatchLoader] = {}
        self.description = ""

    keep_ratio = False
    """Whether pictures are scaled by their shorter side and cut to a square, not stretched to one."""

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        """Whether ``root`` holds this kind of data. Nothing but names is looked at."""
        return True

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Find the images, split them and make ``_loaders`` and ``description``; the second call does nothing.

        Raises:
            DataError: images are missing or damaged.
        """

    @abstractmethod
    def move_to(self, device: torch.device) -> None:
        """Prepare for training on ``device``: put there, or beside it, what batches are made from."""

    def counts(self) -> dict[str, int]:
        """Number of images in ``train``, ``val`` and ``test``."""
        return {split: len(loader.indices) for split, loader in self._loaders.items()}

    def training_images(self) -> Iterator[Tensor]:
        """Every training image once, in order, as it is stored: uint8 batches ``(B, 3, H, W)``, not augmented."""
        loader = self._loaders["train"]
        for batch in loader.indices.split(self.batch_size):
            yield loader.gather(batch)[0]

    def train_dataloader(self) -> BatchLoader:
        return self._loaders["train"]

    def val_dataloader(self) -> BatchLoader:
        return self._loaders["val"]

    def test_dataloader(self) -> BatchLoader:
        return self._loaders["test"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            images = self.augment(images)
        if self.test_crops == 10 and self.trainer is not None and self.trainer.testing:
            images = ten_crop(images, self.image_size)
        return normalize(center_crop(images, self.image_size), self.mean, self.std), labels


def plain_batches(
    data: LightningDataModule, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader's batches as in evaluation: on the device, normalised, not augmented, one view of each image."""
    for batch in loader:
        batch = data.transfer_batch_to_device(batch, torch.device(device), 0)
        images, labels = data.on_after_batch_transfer(batch, 0)
        yield central_view(images), labels


def logit_names(class_names: Sequence[str], count: int) -> list[str]:
    """The class names, and a number for logits that no class of the data has."""
    return [*class_names, *(f"#{index}" for index in range(len(class_names), count))]
