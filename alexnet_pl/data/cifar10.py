"""CIFAR-10 from the official archive or from class folders, whichever is on disk, or else downloaded."""

from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from alexnet_pl.data.array_cache import Arrays, cache_name, cached_arrays, fingerprint
from alexnet_pl.data.class_folders import check_classes, interleave, list_images, nearby_root
from alexnet_pl.data.downloads import WAYS_OUT, install, unpack
from alexnet_pl.data.image_io import open_image, to_rgb
from alexnet_pl.data.in_memory import ImageSource, LabeledImages, TensorDataModule
from alexnet_pl.runtime.errors import DataError

TITLE, MEGABYTES = "CIFAR-10", 170

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGE_SIZE = 32

FULL_COUNTS = (50_000, 10_000)

CACHE_VERSION = 2


class CIFAR10DataModule(TensorDataModule):
    """60,000 color images of 32×32 pixels in ten classes (Krizhevsky 2009); 10,000 form the test set.

    Args:
        root: directory that holds ``cifar-10-batches-py/`` (official, MD5-verified) or class folders
            ``train/<class>/*`` and ``test/<class>/*``. Without either, the official archive is downloaded into it.
        **settings: see :class:`alexnet_pl.data.datamodule.ImageDataModule`.
    """

    name = "cifar10"
    class_names = CLASS_NAMES

    def __init__(self, root: str | Path, **settings: Any):
        super().__init__(**settings)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        """Download the official archive if there is no data.

        Raises:
            DataError: the data is one directory level away, there is no network, or the archive is corrupt.
        """
        if self.is_in(self.root):
            return
        if hint := nearby_root(self.root, _has_cifar10):
            raise DataError(f"{self.root} does not hold CIFAR-10. {hint}")
        fetch_official(self.root)

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        root = Path(root).expanduser()
        return official_dir(root).is_dir() or (root / "train").is_dir() or (root / "test").is_dir()

    def load(self) -> ImageSource:
        if official_dir(self.root).is_dir():
            return load_official(self.root)
        return load_class_folders(self.root)


def official_dir(root: Path) -> Path:
    """Return the directory of the unpacked official archive in ``root``."""
    return root / str(CIFAR10.base_folder)


def _has_cifar10(root: Path) -> bool:
    return official_dir(root).is_dir() or (root / "train" / CLASS_NAMES[0]).is_dir()


# --- the official archive -------------------------------------------------------------------------------------------


def load_official(root: Path) -> ImageSource:
    """Read ``cifar-10-batches-py`` with torchvision, after verifying the MD5 of every file.

    Raises:
        DataError: a file is not found or its MD5 is wrong.
    """
    directory = official_dir(root)
    listed = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    for name, md5 in listed:  # torchvision checks too, but does not say which file is wrong
        if not (directory / name).is_file():
            raise DataError(f"{directory / name} not found. Delete {directory} to download it again. {WAYS_OUT}")
        if not check_integrity(str(directory / name), md5):
            raise DataError(
                f"{directory / name} is corrupt (wrong MD5). Delete {directory} to download it again. {WAYS_OUT}"
            )
    parts = [CIFAR10(str(root), train=train) for train in (True, False)]
    train, test = (LabeledImages(part.data, np.array(part.targets, dtype=np.int64)) for part in parts)
    return ImageSource(train, test, f"official cifar-10-batches-py in {root.resolve()}")


def fetch_official(root: Path) -> None:
    """Unpack the official archive into ``root``, whole or not at all: the one that is there already, or a download.

    Raises:
        DataError: as for :func:`alexnet_pl.data.downloads.install`.
    """

    def fill(scratch: Path) -> None:
        unpack(root, scratch, TITLE, MEGABYTES, CIFAR10.url, CIFAR10.filename, CIFAR10.tgz_md5)

    install(root, "cifar10", TITLE, [str(CIFAR10.base_folder)], fill)


# --- class folders --------------------------------------------------------------------------------------------------


def load_class_folders(root: Path) -> ImageSource:
    """Read ``train/<class>/*`` and ``test/<class>/*``, decoding once: later calls read a cache of the pixels.

    The cache is rebuilt after a file was added, removed or changed: :func:`alexnet_pl.data.array_cache.cached_arrays`.

    Raises:
        DataError: class folders are missing or unexpected, or an image is corrupt or not 32×32.
    """
    files = {split: _list_split(root / split) for split in ("train", "test")}

    def decode(cache: Path | None) -> Arrays:
        print(f"decoding {sum(map(len, files.values())):,} images once{f', to {cache}' if cache else ''}")
        return {
            split: np.stack([_decode(root / split / path) for path, _ in listed]) for split, listed in files.items()
        }

    listed = [(f"{split}/{path}", label) for split, each in files.items() for path, label in each]
    arrays = cached_arrays(cache_name("cifar10", root), fingerprint(root, listed, str(CACHE_VERSION)), decode)
    train, test = (
        LabeledImages(arrays[split], np.array([label for _, label in listed], dtype=np.int64))
        for split, listed in files.items()
    )
    counts = tuple(len(listed) for listed in files.values())
    partial = "" if counts == FULL_COUNTS else f", {counts[0]:,} + {counts[1]:,} images, not the full 50,000 + 10,000"
    suffixes = "/".join(sorted({Path(path).suffix.lower().lstrip(".") for path, _ in files["train"]}))
    return ImageSource(train, test, f"class folders ({suffixes}) in {root.resolve()}{partial}")


def _list_split(directory: Path) -> list[tuple[str, int]]:
    try:
        if not directory.is_dir():
            raise DataError(f"{directory} not found.")
        check_classes(directory, CLASS_NAMES, "CIFAR-10")
        return interleave(list_images(directory, CLASS_NAMES)[0])
    except DataError as error:
        raise DataError(f"{error} {WAYS_OUT}") from error


def _decode(path: Path) -> np.ndarray:
    try:
        with open_image(path) as image:
            if image.size != (IMAGE_SIZE, IMAGE_SIZE):  # before decoding, which bounds the memory
                raise DataError(f"{path} is {image.width}×{image.height} pixels; CIFAR-10 images are 32×32.")
            return np.asarray(to_rgb(image))
    except DataError as error:
        raise DataError(f"{error} {WAYS_OUT}") from error
