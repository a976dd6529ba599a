"""Datasets in one word by torchvision: MNIST, Fashion-MNIST, KMNIST, CIFAR-100, SVHN, STL-10, Imagenette.

Download, checksums and parsing are torchvision's. The validation split, tensors, cache and errors are this package's.
"""

import os
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torchvision.datasets import CIFAR100, KMNIST, MNIST, STL10, SVHN, FashionMNIST, Imagenette
from torchvision.datasets.utils import download_url

from alexnet_pl.data.array_cache import Arrays, cache_name, cached_arrays, fingerprint
from alexnet_pl.data.class_folders import nearby_root
from alexnet_pl.data.downloads import WAYS_OUT, announce, install, is_copy, unpack
from alexnet_pl.data.image_io import central_square, read_image
from alexnet_pl.data.in_memory import ImageSource, LabeledImages, TensorDataModule
from alexnet_pl.data.splits import take_turns
from alexnet_pl.data.torchvision_internals import imagenette_archive
from alexnet_pl.runtime.errors import DataError, one_line

CACHE_VERSION = 1


class TorchvisionDataModule(TensorDataModule):
    """One of torchvision's datasets with its official test set. Gray images get three equal channels.

    ``model.num_classes`` follows the dataset.

    Args:
        root: directory in torchvision's layout; what is missing is downloaded into it.
        **settings: see :class:`alexnet_pl.data.datamodule.ImageDataModule`.

    Attributes:
        title: of the dataset, for messages.
        megabytes: size of the download.
        products: files and directories in ``root`` that the dataset consists of.
        is_cached: keep the parsed arrays in the cache directory, because parsing takes longer than reading them.
    """

    classes_from_files = True

    title: ClassVar[str]
    megabytes: ClassVar[int]
    products: ClassVar[tuple[str, ...]]
    is_cached: ClassVar[bool] = False

    def __init__(self, root: str | Path, **settings: Any):
        super().__init__(**settings)
        self.root = Path(root).expanduser()

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        return all((Path(root).expanduser() / product).exists() for product in cls.products)

    def prepare_data(self) -> None:
        """Download the dataset if it is not there.

        Raises:
            DataError: the data is one directory level away, there is no network, or an archive is corrupt.
        """
        if self.is_in(self.root):
            return
        if hint := nearby_root(self.root, self.is_in):
            raise DataError(f"{self.root} does not hold {self.title}. {hint}")
        install(self.root, self.name, self.title, self.products, self.download)

    @abstractmethod
    def download(self, scratch: Path) -> None:
        """Download into ``scratch``, with the names of ``products``."""

    @abstractmethod
    def read(self, is_train: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return images, ``(N, H, W)`` or ``(N, H, W, 3)`` uint8, and labels ``(N,)`` of a split."""

    def load(self) -> ImageSource:
        if self.is_cached:
            name = cache_name(f"{self.name}-{self.resize_size}", self.root)
            arrays = cached_arrays(name, self._fingerprint(), self._parse)
        else:
            arrays = self._parse()
        train, test = (LabeledImages(arrays[split], arrays[f"{split}_labels"]) for split in ("train", "test"))
        return ImageSource(train, test, f"{self.title} in {self.root.resolve()}")

    def _parse(self, cache: Path | None = None) -> Arrays:
        """Read both splits.

        Raises:
            DataError: a file is not found or corrupt.
        """
        if cache is not None:
            print(f"decoding {self.title} once, to {cache}")
        arrays = {}
        for split in ("train", "test"):
            try:
                images, labels = self.read(split == "train")
                arrays[split], arrays[f"{split}_labels"] = self._checked(images, labels)
            except Exception as error:  # torchvision, NumPy and SciPy raise anything on a corrupt file
                places = ", ".join(str(self.root / product) for product in self.products)
                raise DataError(
                    f"{self.title} in {self.root} is incomplete or corrupt ({split}: {one_line(error)[:200]}). "
                    f"Delete it to download it again: {places}. {WAYS_OUT}"
                ) from error
        return arrays

    def _checked(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return contiguous RGB images ``(N, H, W, 3)`` and int64 labels.

        Raises:
            ValueError: another shape or type, labels out of range, or no images.
        """
        if images.ndim == 3:
            images = np.repeat(images[..., np.newaxis], 3, axis=3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != (len(images),):
            raise ValueError(f"images {images.dtype} {images.shape}, labels {labels.shape}")
        labels = labels.astype(np.int64)
        if not len(labels) or labels.min() < 0 or labels.max() >= len(self.class_names):
            raise ValueError(f"{len(labels)} labels, expected 0 to {len(self.class_names) - 1}")
        return np.ascontiguousarray(images), labels

    def _fingerprint(self) -> str:
        """Return a digest of names, sizes and modification times of all files."""
        files = [
            os.path.relpath(path, self.root)
            for product in self.products
            for path in sorted([self.root / product, *(self.root / product).rglob("*")])
            if path.is_file()
        ]
        return fingerprint(self.root, [(path, 0) for path in files], f"{self.name} {CACHE_VERSION}")


# --- gray images in IDX files ---------------------------------------------------------------------------------------

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class MNISTDataModule(TorchvisionDataModule):
    """70,000 handwritten digits of 28×28 pixels (LeCun et al. 1998); 10,000 form the test set."""

    name, title, megabytes = "mnist", "MNIST", 12
    class_names: Sequence[str] = tuple("0123456789")
    source: ClassVar[type[MNIST]] = MNIST
    products = tuple(f"MNIST/raw/{name}" for name in IDX_FILES)

    def download(self, scratch: Path) -> None:
        folder = Path(self.products[0]).parent
        (scratch / folder).mkdir(parents=True)
        hint = "If it was only packed anew, unpack it with gunzip: its content is used as it is."
        copies = [name for name, md5 in self.source.resources if is_copy(self.root / folder / name, md5, hint)]
        if len(copies) < len(self.source.resources):
            announce(self.title, self.megabytes, self.root)
        for name in copies:  # torchvision downloads the others
            shutil.copyfile(self.root / folder / name, scratch / folder / name)
        self.source(scratch, download=True)

    def read(self, is_train: bool) -> tuple[np.ndarray, np.ndarray]:
        found = self.source(self.root, train=is_train)
        return found.data.numpy(), found.targets.numpy()


class FashionMNISTDataModule(MNISTDataModule):
    """70,000 gray images of clothes of 28×28 pixels (Xiao et al. 2017); 10,000 form the test set."""

    name, title, megabytes = "fashion_mnist", "Fashion-MNIST", 31
    class_names = tuple(FashionMNIST.classes)
    source = FashionMNIST
    products = tuple(f"FashionMNIST/raw/{name}" for name in IDX_FILES)


class KMNISTDataModule(MNISTDataModule):
    """70,000 cursive Japanese characters of 28×28 pixels (Clanuwat et al. 2018); 10,000 form the test set."""

    name, title, megabytes = "kmnist", "KMNIST", 21
    class_names = tuple(KMNIST.classes)
    source = KMNIST
    products = tuple(f"KMNIST/raw/{name}" for name in IDX_FILES)


# --- color images ---------------------------------------------------------------------------------------------------


class CIFAR100DataModule(TorchvisionDataModule):
    """60,000 color images of 32×32 pixels in 100 classes (Krizhevsky 2009); 10,000 form the test set."""

    name, title, megabytes = "cifar100", "CIFAR-100", 169
    class_names = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
        "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
        "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
        "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
        "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
        "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
        "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip
    products = (str(CIFAR100.base_folder),)

    def download(self, scratch: Path) -> None:
        source = CIFAR100
        unpack(self.root, scratch, self.title, self.megabytes, source.url, source.filename, source.tgz_md5)

    def read(self, is_train: bool) -> tuple[np.ndarray, np.ndarray]:
        found = CIFAR100(self.root, train=is_train)  # verifies every MD5 before anything is unpickled
        if tuple(found.classes) != self.class_names:
            raise ValueError("its classes are not CIFAR-100's")
        return found.data, np.array(found.targets)


class SVHNDataModule(TorchvisionDataModule):
    """99,289 house-number digits of 32×32 pixels (Netzer et al. 2011), without ``extra``; 26,032 form the test set."""

    name, title, megabytes = "svhn", "SVHN", 246
    class_names = tuple("0123456789")
    products = tuple(SVHN.split_list[split][1] for split in ("train", "test"))

    def download(self, scratch: Path) -> None:
        files = [SVHN.split_list[split] for split in ("train", "test")]
        copies = [name for _, name, md5 in files if is_copy(self.root / name, md5)]
        if len(copies) < len(files):
            announce(self.title, self.megabytes, self.root)
        for url, name, md5 in files:
            if name in copies:
                shutil.copyfile(self.root / name, scratch / name)
            else:
                download_url(url, str(scratch), name, md5)

    def read(self, is_train: bool) -> tuple[np.ndarray, np.ndarray]:
        found = SVHN(self.root, split="train" if is_train else "test")
        return found.data.transpose(0, 2, 3, 1), found.labels


class STL10DataModule(TorchvisionDataModule):
    """13,000 labeled color images of 96×96 pixels in ten classes (Coates et al. 2011); 8,000 form the test set.

    The 5,000 training images are used whole, not in the ten folds of the original protocol; the 100,000 unlabeled
    images are downloaded with the archive and not used.
    """

    name, title, megabytes = "stl10", "STL-10", 2640
    class_names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    products = (str(STL10.base_folder),)
    is_cached = True  # torchvision computes the MD5 of 3 GB first

    def download(self, scratch: Path) -> None:
        unpack(self.root, scratch, self.title, self.megabytes, STL10.url, STL10.filename, STL10.tgz_md5)

    def read(self, is_train: bool) -> tuple[np.ndarray, np.ndarray]:
        found = STL10(self.root, split="train" if is_train else "test")
        assert found.labels is not None  # only the unlabeled images have none
        return found.data.transpose(0, 2, 3, 1), found.labels


class ImagenetteDataModule(TorchvisionDataModule):
    """13,394 photographs in ten classes of ImageNet (Howard 2019), at 160 pixels; 3,925 form the test set.

    The official ``val/`` is the test set. The shorter side is scaled to ``resize_size`` and the central square cropped.
    Validation and test take the classes in turn, because torchvision lists the images by class, and a limit on the
    batches would measure a single one.
    """

    name, title, megabytes = "imagenette", "Imagenette", 99
    class_names = (
        "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
        "gas pump", "golf ball", "parachute",
    )  # fmt: skip
    keep_ratio = True
    products = ("imagenette2-160",)
    is_cached = True

    def download(self, scratch: Path) -> None:
        url, md5 = imagenette_archive("160px")
        unpack(self.root, scratch, self.title, self.megabytes, url, os.path.basename(url), md5)

    def setup(self, stage: str | None = None) -> None:
        if self._loaders:
            return
        super().setup(stage)
        val = self._loaders["val"]
        val.indices = val.indices[torch.from_numpy(take_turns(val.labels[val.indices].numpy()))]

    def load(self) -> ImageSource:
        source = super().load()
        order = take_turns(source.test.labels)
        return replace(source, test=LabeledImages(source.test.images[order], source.test.labels[order]))

    def read(self, is_train: bool) -> tuple[np.ndarray, np.ndarray]:
        found = Imagenette(self.root, split="train" if is_train else "val", size="160px", loader=self._decode)
        if tuple(names[0] for names in found.classes) != self.class_names:
            raise ValueError("its classes are not Imagenette's")
        images = np.empty((len(found), self.resize_size, self.resize_size, 3), np.uint8)
        labels = np.empty(len(found), np.int64)
        for index in range(len(found)):
            images[index], labels[index] = found[index]
        return images, labels

    def _decode(self, path: str) -> np.ndarray:
        return np.asarray(central_square(read_image(path), self.resize_size))
