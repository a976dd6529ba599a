"""CIFAR-10 from the official archive or from class folders, whichever is on disk, or else downloaded."""

import hashlib
import logging
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url

from alexnet_pl.data.class_folders import check_classes, interleave, list_images, nearby_root
from alexnet_pl.data.image_io import open_image, to_rgb
from alexnet_pl.data.in_memory import ImageSource, LabeledImages, TensorDataModule
from alexnet_pl.runtime.errors import DataError, UserError, one_line
from alexnet_pl.runtime.files import cache_dir, exclusive_lock, make_cache_dir, replacing

log = logging.getLogger(__name__)

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGE_SIZE = 32

FULL_COUNTS = (50_000, 10_000)

CACHE_VERSION = 2

WAYS_OUT = "Use another copy with data.root=DIR, or data=digits, which needs no download."


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
    """Download the official archive with torchvision and unpack it into ``root``, whole or not at all.

    An archive that is already in ``root`` is used instead. Of several concurrent processes, one downloads and the
    others wait.

    Raises:
        DataError: there is no network, the archive is corrupt or would write elsewhere, or ``root`` is not writable.
    """
    existed = root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(root / ".cifar10.lock"):
            if official_dir(root).is_dir():  # another process downloaded it in the meantime
                return
            for abandoned in root.glob(".cifar10-*/"):  # left by a killed process: the lock says no other is active
                shutil.rmtree(abandoned, ignore_errors=True)
            # Next to the target, so that the last step is a rename and the final name implies completeness.
            with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as scratch:
                archive = root / CIFAR10.filename
                if archive.is_file():
                    if not check_integrity(str(archive), CIFAR10.tgz_md5):
                        raise DataError(f"{archive} is truncated or corrupt (wrong MD5). Delete it. {WAYS_OUT}")
                else:
                    print(f"downloading CIFAR-10 (170 MB) to {root.resolve()}")
                    download_url(CIFAR10.url, scratch, CIFAR10.filename, CIFAR10.tgz_md5)
                    archive = Path(scratch) / CIFAR10.filename
                extract(archive, Path(scratch))
                (Path(scratch) / CIFAR10.base_folder).rename(official_dir(root))
    except (OSError, RuntimeError, tarfile.TarError, EOFError, zlib.error) as error:
        if not existed and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        if isinstance(error, DataError):
            raise
        reason = f"CIFAR-10 not found in {root}, and the download failed: {one_line(error)}"
        raise DataError(f"{reason}\n{WAYS_OUT}") from error


def extract(archive: Path, directory: Path) -> None:
    """Unpack a tar archive of regular files and directories, all inside ``directory``.

    All members are checked before any is written. Links and devices are refused wherever they lead, because CIFAR-10
    has none. The ``data`` filter, available from Python 3.11.4, would allow some links.

    Raises:
        DataError: names the refused member.
        tarfile.TarError, EOFError, zlib.error: the archive is corrupt.
    """
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        for member in members:
            inside = (directory / member.name).resolve().is_relative_to(directory.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise DataError(
                    f"{archive} is refused and nothing was unpacked: {member.name!r} is not a regular file inside it. "
                    f"{WAYS_OUT}"
                )
        if hasattr(tarfile, "data_filter"):
            tar.extractall(directory, members, filter="data")
        else:
            tar.extractall(directory, members)


# --- class folders --------------------------------------------------------------------------------------------------


def load_class_folders(root: Path) -> ImageSource:
    """Read ``train/<class>/*`` and ``test/<class>/*``, decoding once: later calls read a cache of the pixels.

    The cache is in :func:`alexnet_pl.runtime.files.cache_dir` and is rebuilt after a file was added, removed or
    changed. Of several concurrent processes, one decodes and the others wait for the cache. Without a writable cache
    directory, every run decodes, and a warning says so.

    Raises:
        DataError: class folders are missing or unexpected, or an image is corrupt or not 32×32.
    """
    files = {split: _list_split(root / split) for split in ("train", "test")}
    name = f"cifar10-{hashlib.sha256(str(root.resolve()).encode(errors='surrogateescape')).hexdigest()[:16]}.npz"
    fingerprint = _fingerprint(root, files)
    arrays = _read_cache(name, fingerprint)
    if arrays is None:
        with _writable_cache(name) as cache:
            arrays = _read_cache(name, fingerprint) if cache else None  # written while this process waited
            if arrays is None:
                print(f"decoding {sum(map(len, files.values())):,} images once{f', to {cache}' if cache else ''}")
                arrays = {
                    split: np.stack([_decode(root / split / path) for path, _ in listed])
                    for split, listed in files.items()
                }
                if cache:
                    _write_cache(cache, fingerprint, arrays)
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


def _fingerprint(root: Path, files: dict[str, list[tuple[str, int]]]) -> str:
    """Return a digest that changes with any file's name, size or modification time, and with the cache's format."""
    digest = hashlib.sha256(f"version {CACHE_VERSION}".encode())
    for split, listed in files.items():
        for path, label in listed:
            stat = (root / split / path).stat()
            line = f"{split}/{path}|{label}|{stat.st_size}|{stat.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decode(path: Path) -> np.ndarray:
    try:
        with open_image(path) as image:
            if image.size != (IMAGE_SIZE, IMAGE_SIZE):  # before decoding, which bounds the memory
                raise DataError(f"{path} is {image.width}×{image.height} pixels; CIFAR-10 images are 32×32.")
            return np.asarray(to_rgb(image))
    except DataError as error:
        raise DataError(f"{error} {WAYS_OUT}") from error


def _read_cache(name: str, fingerprint: str) -> dict[str, np.ndarray] | None:
    """Return the decoded images, or None if the cache is absent, outdated or corrupt."""
    try:
        with np.load(cache_dir() / name, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                return None
            return {split: stored[split] for split in ("train", "test")}
    except (UserError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


@contextmanager
def _writable_cache(name: str) -> Iterator[Path | None]:
    """Yield the cache's path while no other process writes it, or None, after a warning, if it cannot be written."""
    try:
        cache = make_cache_dir() / name
    except UserError as error:
        log.warning(f"warning: decoded images are not cached, and every run decodes them: {error}")
        yield None
        return
    with exclusive_lock(cache.with_suffix(".lock")):
        for abandoned in cache.parent.glob(f".{cache.stem}-*/"):  # left by a process that was killed while writing
            shutil.rmtree(abandoned, ignore_errors=True)
        yield cache


def _write_cache(path: Path, fingerprint: str, arrays: dict[str, np.ndarray]) -> None:
    """Write the cache atomically. After an error the run continues, because a missing cache costs only seconds."""
    try:
        with replacing(path) as scratch:
            np.savez(scratch, **{"fingerprint": np.array(fingerprint), **arrays})  # type: ignore[arg-type]  # as in the writer
    except OSError as error:
        log.warning(f"warning: decoded images were not cached: {one_line(error)}")
