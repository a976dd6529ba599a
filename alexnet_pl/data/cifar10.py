"""CIFAR-10 from whatever is on disk: the official archive, or a tree of class folders; else the official download."""

import hashlib
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url

from alexnet_pl.data.in_memory import ImageSource, LabeledImages, TensorDataModule
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.files import cache_dir, exclusive_lock, replacing

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGE_SIZE = 32

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

FULL_COUNTS = (50_000, 10_000)

CACHE_VERSION = 1

WAYS_OUT = "Give another copy with data.root=FOLDER, or use data=digits, which needs no download."


class CIFAR10DataModule(TensorDataModule):
    """60,000 colour images of 32×32 pixels in ten classes (Krizhevsky 2009); 10,000 are the test set.

    Args:
        root: folder that holds ``cifar-10-batches-py/`` (official, MD5-verified) or ``train/<class>/*.{png,jpg}``
            and ``test/<class>/*``. Where neither is there the official archive is downloaded into it.
        **settings: :class:`alexnet_pl.data.datamodule.ImageDataModule`'s.
    """

    name = "cifar10"
    class_names = CLASS_NAMES

    def __init__(self, root: str | Path, **settings):
        super().__init__(**settings)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        """Download the official archive where there is no data.

        Raises:
            DataError: no network, or a damaged archive.
        """
        if not official_folder(self.root).is_dir() and not class_folders_present(self.root):
            fetch_official(self.root)

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        root = Path(root).expanduser()
        return official_folder(root).is_dir() or class_folders_present(root)

    def load(self) -> ImageSource:
        if official_folder(self.root).is_dir():
            return load_official(self.root)
        return load_class_folders(self.root)


def official_folder(root: Path) -> Path:
    return root / CIFAR10.base_folder


def class_folders_present(root: Path) -> bool:
    return (root / "train").is_dir() or (root / "test").is_dir()


# --- the official archive -------------------------------------------------------------------------------------------


def load_official(root: Path) -> ImageSource:
    """Read ``cifar-10-batches-py`` through torchvision, after checking every file's MD5.

    Raises:
        DataError: a file is missing or its MD5 is wrong.
    """
    folder = official_folder(root)
    listed = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    for name, md5 in listed:  # torchvision checks too, but does not say which file
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing. Delete {folder} to download it again. {WAYS_OUT}")
        if not check_integrity(str(folder / name), md5):
            raise DataError(f"{folder / name} is damaged (wrong MD5). Delete {folder} to download it again. {WAYS_OUT}")
    parts = [CIFAR10(str(root), train=train) for train in (True, False)]
    train, test = (LabeledImages(part.data, np.array(part.targets, dtype=np.int64)) for part in parts)
    return ImageSource(train, test, f"official cifar-10-batches-py in {root.resolve()}")


def fetch_official(root: Path) -> None:
    """Download the official archive through torchvision and unpack it into ``root``, whole or not at all.

    An archive that already lies in ``root`` is used instead. Of several processes at once one does it and the others
    wait; the lock is the system's, so it ends with its owner, however that ends.

    Raises:
        DataError: no network, a truncated or damaged archive or one that would write elsewhere, a folder that cannot
            be written.
    """
    existed = root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(root / ".cifar10.lock"):
            if official_folder(root).is_dir():  # another process has done it while this one waited
                return
            for abandoned in root.glob(".cifar10-*/"):  # of a process that was killed: nobody else is at work
                shutil.rmtree(abandoned, ignore_errors=True)
            # Beside the target, so that the last step is a rename: what bears the final name is complete.
            with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as scratch:
                archive = root / CIFAR10.filename
                if archive.is_file():
                    if not check_integrity(str(archive), CIFAR10.tgz_md5):
                        raise DataError(f"{archive} is truncated or damaged (wrong MD5). Delete it. {WAYS_OUT}")
                else:
                    print(f"downloading CIFAR-10 (170 MB) to {root.resolve()}")
                    download_url(CIFAR10.url, scratch, CIFAR10.filename, CIFAR10.tgz_md5)
                    archive = Path(scratch) / CIFAR10.filename
                extract(archive, Path(scratch))
                (Path(scratch) / CIFAR10.base_folder).rename(official_folder(root))
    except (OSError, RuntimeError, tarfile.TarError, EOFError, zlib.error) as error:
        if not existed and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"No CIFAR-10 in {root}, and the download failed: {reason}\n{WAYS_OUT}") from error


def extract(archive: Path, folder: Path) -> None:
    """Unpack a tar archive of plain files and folders, all of which stay inside ``folder``.

    Everything is looked at before anything is written. Links and devices are refused as well, wherever they lead:
    CIFAR-10 has none. The ``data`` filter, which Python has from 3.11.4 on, would let some links pass.

    Raises:
        DataError: names the member that is refused.
        tarfile.TarError, EOFError, zlib.error: a damaged archive.
    """
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        for member in members:
            inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise DataError(
                    f"{archive} is refused, nothing was unpacked: {member.name!r} is no file inside it. {WAYS_OUT}"
                )
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, members, filter="data")
        else:
            tar.extractall(folder, members)


# --- class folders --------------------------------------------------------------------------------------------------


def load_class_folders(root: Path) -> ImageSource:
    """Read ``train/<class>/*`` and ``test/<class>/*``, decoding once: later calls read a cache of the pixels.

    The cache lies under ``$XDG_CACHE_HOME/alexnet_pl`` (``~/.cache/alexnet_pl``), and is rebuilt when a file was
    added, removed or changed. Of several processes at once one decodes and the others wait for its cache.

    Raises:
        DataError: a missing or unknown class folder, an image that cannot be read or is not 32×32.
    """
    files = {split: _list_images(root, split) for split in ("train", "test")}
    fingerprint = _fingerprint(root, files)
    cache = cache_dir() / f"cifar10-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.npz"
    arrays = _read_cache(cache, fingerprint)
    if arrays is None:
        with _cache_lock(cache):
            arrays = _read_cache(cache, fingerprint)  # another process may have made it while this one waited
            if arrays is None:
                print(f"decoding {sum(map(len, files.values())):,} images once, to {cache}")
                arrays = {split: np.stack([_decode(path) for path, _ in files[split]]) for split in files}
                _write_cache(cache, fingerprint, arrays)
    sets = (
        LabeledImages(arrays[split], np.array([label for _, label in files[split]], dtype=np.int64)) for split in files
    )
    counts = tuple(len(files[split]) for split in files)
    partial = "" if counts == FULL_COUNTS else f", {counts[0]:,} + {counts[1]:,} images, not the full 50,000 + 10,000"
    suffixes = "/".join(sorted({path.suffix.lower().lstrip(".") for path, _ in files["train"]}))
    return ImageSource(*sets, f"class folders ({suffixes}) in {root.resolve()}{partial}")


def _list_images(root: Path, split: str) -> list[tuple[Path, int]]:
    """Image files of one split with their labels, taken from the classes in turn.

    Any first part of the list is then balanced, as it nearly is in the official files: ``trainer.limit_val_batches``
    does not leave one class alone.
    """
    folder = root / split
    present = {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
    if missing := [name for name in CLASS_NAMES if name not in present]:
        raise DataError(f"{folder} lacks the class folder(s) {', '.join(missing)}. {WAYS_OUT}")
    if unknown := sorted(name for name in present.difference(CLASS_NAMES) if not name.startswith(".")):
        raise DataError(f"{folder} has folder(s) that are no CIFAR-10 class: {', '.join(unknown)}. {WAYS_OUT}")
    files = []
    for label, name in enumerate(CLASS_NAMES):
        images = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        images = [path for path in images if not path.name.startswith(".")]
        if not images:
            raise DataError(f"{folder / name} holds no png or jpg image. {WAYS_OUT}")
        files += [(rank, label, path) for rank, path in enumerate(images)]
    return [(path, label) for _, label, path in sorted(files)]


def _fingerprint(root: Path, files: dict[str, list[tuple[Path, int]]]) -> str:
    """Changes with any file's name, size or time of change, and with the format of the cache."""
    digest = hashlib.sha256(f"version {CACHE_VERSION}".encode())
    for listed in files.values():
        for path, label in listed:
            stat = path.stat()
            digest.update(f"{path.relative_to(root)}|{label}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}). Replace it. {WAYS_OUT}") from error
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        height, width = pixels.shape[:2]
        raise DataError(f"{path} is {width}×{height} pixels; CIFAR-10 images are 32×32. {WAYS_OUT}")
    return pixels


def _read_cache(path: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    """The decoded images, or None where the cache is absent, of another tree or version, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint:
                return None
            return {split: stored[split] for split in ("train", "test")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


@contextmanager
def _cache_lock(cache: Path) -> Iterator[None]:
    """Let one process at a time make ``cache``; all at once where the folder cannot be written, and nothing is kept."""
    lock = cache.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError:
        yield
        return
    with exclusive_lock(lock):
        for abandoned in cache.parent.glob(f".{cache.stem}-*/"):  # of a process that was killed while it wrote
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def _write_cache(path: Path, fingerprint: str, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all; a cache that cannot be written only costs the next run some seconds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            np.savez(scratch, fingerprint=np.array(fingerprint), **arrays)
    except OSError as error:
        print(f"warning: decoded images were not cached: {error}")
