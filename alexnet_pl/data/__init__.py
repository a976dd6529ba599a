"""Datasets as Lightning data modules, and the batch transforms they apply."""

from alexnet_pl.data.cifar10 import CIFAR10DataModule
from alexnet_pl.data.digits import DigitsDataModule
from alexnet_pl.data.image_folder import ImageFolderDataModule
from alexnet_pl.data.shards.datamodule import ShardedDataModule
from alexnet_pl.data.transforms import Compose, PCAColor, RandomCropFlip

__all__ = [
    "CIFAR10DataModule",
    "Compose",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "PCAColor",
    "RandomCropFlip",
    "ShardedDataModule",
]
