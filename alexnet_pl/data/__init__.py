"""Datasets as Lightning data modules, and the transforms that they apply to batches."""

from alexnet_pl.data.augmentations import AlternatingFlip, Cutout, RandAugment
from alexnet_pl.data.augmentations_2012 import SharedCropFlip, ShrinkingPCAColor
from alexnet_pl.data.cifar10 import CIFAR10DataModule
from alexnet_pl.data.digits import DigitsDataModule
from alexnet_pl.data.image_folder import ImageFolderDataModule
from alexnet_pl.data.shards.datamodule import ShardedDataModule
from alexnet_pl.data.torchvision_sets import (
    CIFAR100DataModule,
    FashionMNISTDataModule,
    ImagenetteDataModule,
    KMNISTDataModule,
    MNISTDataModule,
    STL10DataModule,
    SVHNDataModule,
)
from alexnet_pl.data.transforms import BatchTransform, Compose, PCAColor, PerImage, RandomCropFlip

__all__ = [
    "AlternatingFlip",
    "BatchTransform",
    "CIFAR100DataModule",
    "CIFAR10DataModule",
    "Compose",
    "Cutout",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageFolderDataModule",
    "ImagenetteDataModule",
    "KMNISTDataModule",
    "MNISTDataModule",
    "PCAColor",
    "PerImage",
    "RandAugment",
    "RandomCropFlip",
    "STL10DataModule",
    "SVHNDataModule",
    "ShardedDataModule",
    "SharedCropFlip",
    "ShrinkingPCAColor",
]
