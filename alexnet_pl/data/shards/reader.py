"""Shard reader: tar files of JPEG images of one size, read by random access from a directory or an object store.

A shard directory holds ``train-00000.tar``, ``train-00001.tar``, …, the same for ``val`` and ``test``, ``shards.npz``
(offset, size, label and CRC-32 of each image) and ``shards.json`` (classes, counts, SHA-256 of every file).
``shards.json`` is written last, so a directory without it is unfinished. The tar files follow WebDataset's format,
``<key>.jpg`` then ``<key>.cls``, which other programs read as well. Images are stored in shuffled order.
"""

import errno
import hashlib
import io
import json
import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_pl.data.class_folders import SPLITS
from alexnet_pl.runtime.commands import shell_join
from alexnet_pl.runtime.errors import DataError, UserError, one_line, printable
from alexnet_pl.runtime.files import cache_dir, exclusive_lock, file_state, sha256_of

FORMAT = 1

INDEX, ARRAYS, UNFINISHED = "shards.json", "shards.npz", ".unfinished"

COLUMNS = ("offset", "size", "label", "crc32")

MAX_SIDE = 4096
"""Largest side of stored images in pixels."""

MAX_ENCODED = 2**26
"""Largest JPEG file in a shard, in bytes."""

_MAX_BYTES = {INDEX: 2**28, ARRAYS: 2**32}
"""Largest index files that are read. ImageNet's take 0.1 MB and 26 MB."""

_MIN_BYTES_PER_IMAGE = 4 * tarfile.BLOCKSIZE  # two tar headers, at least one block of JPEG, one block of label

_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Split:
    """Location and label of each image of a split, ``(N,)`` each; ``shard`` indexes ``names``."""

    names: tuple[str, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray


class Shards:
    """A finished set of shards, local or in an object store.

    Shards of an object store (``s3://…``, ``gs://…``, ``https://…``: any URL that fsspec reads) are downloaded whole,
    verified and kept in a cache. Every node downloads each shard once. The index is untrusted input: names, counts
    and sizes are checked before anything is allocated or written.

    Args:
        root: directory or URL.
        cache: directory for downloaded shards, by default in :func:`alexnet_pl.runtime.files.cache_dir`.
        is_written_by_runs: the next run writes missing shards again (``data=image_folder``); for error messages.

    Raises:
        DataError: the shards are not found, unfinished, corrupt, or from a newer version.
    """

    def __init__(self, root: str | Path, cache: Path | None = None, is_written_by_runs: bool = False):
        self.root = str(root)
        self.remote = is_url(self.root)
        self.is_written_by_runs = is_written_by_runs
        self._locks: dict[str, threading.Lock] = {}
        self._kept: dict[str, Path] = {}
        self._guard = threading.Lock()
        if self.remote:
            key = hashlib.sha256(self.root.encode()).hexdigest()[:16]
            with cache_errors("data.cache=DIR"):
                self.folder = cache / key if cache else cache_dir() / f"shards-{key}"
        else:
            self.folder = Path(self.root).expanduser()
        self.index = self._read_index()
        if self.remote:  # shards that were created again have the names of the old ones
            self.folder /= self.index["arrays_sha256"][:16]
        arrays = self._read_arrays()
        self.class_names = tuple(self.index["class_names"])
        self.side: int = self.index["side"]
        self.splits = {}
        for split, described in self.index["splits"].items():
            listed = described["shards"]
            counts = [each["images"] for each in listed]
            columns = {name: arrays[f"{split}_{name}"] for name in COLUMNS if f"{split}_{name}" in arrays}
            if len(columns) < len(COLUMNS) or any(column.shape != (sum(counts),) for column in columns.values()):
                raise self._corrupt(ARRAYS, f"its arrays do not have the {sum(counts):,} images of {INDEX}")
            names, sizes, sums = (tuple(each[name] for each in listed) for name in ("name", "bytes", "sha256"))
            found = Split(names, sizes, sums, np.repeat(np.arange(len(listed)), counts), **columns)
            self._check_split(found)
            self.splits[split] = found

    def _read_index(self) -> dict[str, Any]:
        unfinished = f"{self.root} does not hold finished shards"
        try:
            index = json.loads(self._read(INDEX))
        except FileNotFoundError as error:
            half = (self.folder / UNFINISHED).is_dir() and not self.remote
            raise DataError(
                f"{unfinished}: {'the conversion was interrupted' if half else f'{INDEX} not found'}. "
                f"alexnet shards IMAGES {self.root} {'resumes it' if half else 'creates them'}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise self._corrupt(INDEX, one_line(error)) from error
        if not isinstance(index, dict) or not isinstance(index.get("format"), int):
            raise DataError(f"{unfinished}: {INDEX} belongs to another program.")
        if index["format"] > FORMAT:
            raise DataError(f"{self.root} was written by a newer alexnet_pl. Update alexnet_pl.")
        if wrong := index_error(index):
            raise self._corrupt(INDEX, wrong)
        return index

    def _read_arrays(self) -> dict[str, np.ndarray]:
        try:
            content = self._read(ARRAYS)
        except FileNotFoundError as error:
            raise DataError(f"{self.root}/{ARRAYS} not found. Create the shards again.") from error
        if hashlib.sha256(content).hexdigest() != self.index["arrays_sha256"]:
            raise self._corrupt(ARRAYS, f"its SHA-256 differs from {INDEX}")
        return load_arrays(content)

    def _corrupt(self, name: str, reason: str) -> DataError:
        return DataError(f"{self.root}/{name} is corrupt: {reason}. Create the shards again.")

    def _check_split(self, split: Split) -> None:
        """Check that images lie inside their shards and labels inside the classes, so that reads stay bounded."""
        ends = split.offset.astype(np.float64) + split.size
        within = np.repeat(split.bytes, np.bincount(split.shard, minlength=len(split.bytes)))
        sizes_fit = (split.size > 0) & (split.size <= MAX_ENCODED) & (ends <= within) & (split.offset >= 0)
        labels_fit = (split.label >= 0) & (split.label < len(self.class_names))
        if not (sizes_fit & labels_fit).all():
            raise self._corrupt(ARRAYS, "it has images outside of their shards or labels outside of the classes")

    def _read(self, name: str) -> bytes:
        """Return the content of an index file.

        Raises:
            FileNotFoundError: the file does not exist.
            DataError: the file is too large or not a regular file, or the store does not respond.
        """
        limit = _MAX_BYTES[name]
        if self.remote:
            content = self._read_remote(name, limit)
        else:
            path = self.folder / name
            try:
                if path.exists() and not path.is_file():  # opening a FIFO or a device would block
                    raise DataError(f"{path} is not a regular file.")
                with path.open("rb") as file:
                    content = file.read(limit + 1)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise FileNotFoundError(name) from error
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if len(content) > limit:
            raise DataError(f"{self.root}/{name} is larger than {limit / 2**20:,.0f} MB, too large for an index.")
        return content

    def _read_remote(self, name: str, limit: int) -> bytes:
        filesystem, path = _filesystem(self.root)
        try:
            with filesystem.open(f"{path}/{name}", "rb") as file:
                chunks, size = [], 0
                while size <= limit and (chunk := file.read(min(2**20, limit + 1 - size))):
                    chunks.append(chunk)
                    size += len(chunk)
                return b"".join(chunks)
        except Exception as error:  # every store raises its own exceptions
            if _is_missing(error):
                raise FileNotFoundError(name) from error
            raise DataError(f"{self.root}/{name} cannot be read: {one_line(error.__cause__ or error)}") from error

    def fetch(self, split: str, shard: int) -> Path:
        """Return the local path of a shard. One thread of one process downloads it first if it is remote.

        Raises:
            DataError: the shard is not found or corrupt, or the cache cannot be written.
        """
        described = self.splits[split]
        name = described.names[shard]
        path = self.folder / name
        if not self.remote or path.exists():
            return path
        if name in self._kept or self._is_kept(name, described.bytes[shard], described.sha256[shard]):
            return path if path.exists() else self._kept[name]
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        try:
            with lock:
                if path.exists():
                    return path
                self.folder.mkdir(parents=True, exist_ok=True)
                with exclusive_lock(self.folder / f".{name}.lock"):
                    if not path.exists():
                        self._download(name, described.bytes[shard], described.sha256[shard], path)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {error.strerror}. Choose another directory with data.cache=DIR."
            ) from error
        return path

    def _is_kept(self, name: str, size: int, sha256: str) -> bool:
        """Return True if the cache has this shard where earlier versions kept it, and move it if that is allowed."""
        former = self.folder.parent / name
        if not has_size(former, size) or sha256_of(former) != sha256:
            return False
        self._kept[name] = former
        with suppress(OSError):  # a read-only cache is used as it is
            self.folder.mkdir(parents=True, exist_ok=True)
            os.replace(former, self.folder / name)
        return True

    def _download(self, name: str, size: int, sha256: str, path: Path) -> None:
        filesystem, root = _filesystem(self.root)
        scratch = path.with_name(f".{name}.part")
        scratch.unlink(missing_ok=True)
        try:
            try:
                with filesystem.open(f"{root}/{name}", "rb") as source, scratch.open("xb") as target:
                    _copy_at_most(source, target, size)
            except Exception as error:  # every store raises its own exceptions
                if isinstance(error, OSError) and (error.errno in _DISK_ERRORS or error.filename == str(scratch)):
                    raise
                if _is_missing(error):
                    raise DataError(f"{self.root}/{name} not found: the shards are incomplete.") from error
                reason = one_line(error.__cause__ or error)
                raise DataError(f"{self.root}/{name} cannot be downloaded: {reason}") from error
            if sha256_of(scratch) != sha256:
                raise DataError(f"{self.root}/{name} is corrupt: its SHA-256 differs from {INDEX}.")
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def read(self, split: str, images: Sequence[int]) -> list[bytearray]:
        """Return the JPEG files of the images at positions ``images``, with their CRC-32 verified.

        Raises:
            DataError: a shard is not found, truncated or corrupt.
        """
        described = self.splits[split]
        found: list[bytearray] = [bytearray()] * len(images)
        positions: dict[int, list[int]] = {}
        for position, image in enumerate(images):
            positions.setdefault(int(described.shard[image]), []).append(position)
        for shard, own in positions.items():
            path = self.fetch(split, shard)
            try:
                # Opened per batch, because a pool of open files would have to be bounded and shared between threads.
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait if the path is a FIFO
                try:
                    for position in own:
                        image = images[position]
                        buffer = bytearray(int(described.size[image]))
                        got = os.preadv(file, [buffer], int(described.offset[image]))
                        if got != len(buffer) or zlib.crc32(buffer) != described.crc32[image]:
                            raise self._failed(path, "is corrupt")
                        found[position] = buffer
                finally:
                    os.close(file)
            except FileNotFoundError as error:
                raise self._failed(path, "not found") from error
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        return found

    def _failed(self, path: Path, problem: str) -> DataError:
        """Return the error for a shard that is not found or corrupt, with its repair."""
        if self._is_rewritten():
            fix = (
                "Each run that writes shards needs its own data.shards=DIR."
                if self.is_written_by_runs
                else ("Start again when it has finished.")
            )
            return DataError(
                f"{path} {problem}: another process has rewritten the shards in {self.root}, or is doing so. {fix}"
            )
        if self.remote:
            repair = "Delete it to download it again."
        elif self.is_written_by_runs:  # which compare sizes, not checksums
            repair = "Delete it: the next run writes it again." if path.exists() else "The next run writes it again."
        else:
            repair = f"{self._command()} creates {path.name} again."
        return DataError(f"{path} {problem}. {repair}")

    def _is_rewritten(self) -> bool:
        """Return True if the writer has replaced the index since it was read, or has removed it until it is done."""
        if self.remote:
            return False
        try:
            index = json.loads(self._read(INDEX))
        except FileNotFoundError:
            return (self.folder / UNFINISHED).is_dir()
        except (DataError, ValueError, RecursionError):
            return False
        return isinstance(index, dict) and bool(index.get("arrays_sha256") != self.index["arrays_sha256"])

    def _command(self) -> str:
        """Return the command that writes these shards again, with the options that their content depends on."""
        words = ["alexnet", "shards", "IMAGES", self.root, "--size", str(self.side)]
        quality = self.index.get("quality")
        if _is_int(quality, 1, 100):  # the index may be untrusted, and the command is to be pasted
            words += ["--quality", str(quality)]
        # The largest shard is full, or each split has only one: either way its count gives the same shards.
        per_shard = 0
        for split in self.index["splits"].values():
            for shard in split["shards"]:
                skipped = shard.get("skipped")
                per_shard = max(per_shard, shard["images"] + (len(skipped) if isinstance(skipped, list) else 0))
        words += ["--per-shard", str(per_shard)]
        return shell_join(words + ["--skip-unreadable"] * bool(self.index["skipped"]))

    def verify(self, advance: Callable[[], None] = lambda: None) -> list[str]:
        """Read every shard and return one line for each whose size, SHA-256 or number of images is wrong."""
        wrong = []
        for split, described in self.splits.items():
            counts = np.bincount(described.shard, minlength=len(described.names))
            for number in range(len(described.names)):
                try:
                    path = self.fetch(split, number)
                    if not path.is_file():
                        wrong.append(f"{path} not found")
                    elif not has_size(path, described.bytes[number]):
                        wrong.append(f"{path} has {path.stat().st_size:,} bytes instead of {described.bytes[number]:,}")
                    elif sha256_of(path) != described.sha256[number]:
                        wrong.append(f"{path} is corrupt: its SHA-256 differs from {INDEX}")
                    else:
                        with tarfile.open(path) as tar:
                            images = sum(member.name.endswith(".jpg") for member in tar)
                        if images != counts[number]:
                            wrong.append(f"{path} holds {images:,} images instead of {counts[number]:,}")
                except DataError as error:
                    wrong.append(str(error))
                advance()
        return wrong


# --- the index ------------------------------------------------------------------------------------------------------


def index_error(index: dict[str, Any]) -> str:
    """Return what is wrong with the content of ``shards.json``, or "".

    The index may be untrusted. Its names become file names, and its counts and sizes become allocations.
    """
    classes, side, splits = index.get("class_names"), index.get("side"), index.get("splits")
    if not _is_int(side, 1, MAX_SIDE):
        return f"side is {_shown(side)}, not 1 to {MAX_SIDE:,}"
    if not (isinstance(classes, list) and 0 < len(classes) <= _MAX_CLASSES and all(map(_is_class_name, classes))):
        return "class_names is not a list of names"
    if len(set(classes)) < len(classes):
        return "class_names has duplicates"
    if not (isinstance(splits, dict) and splits and set(splits) <= set(SPLITS)):
        return "splits are not train, val and test"
    if not (_is_digest(index.get("arrays_sha256")) and isinstance(index.get("skipped"), list)):
        return "arrays_sha256 or skipped is invalid"
    for split, described in splits.items():
        shards = described.get("shards") if isinstance(described, dict) else None
        if not (isinstance(shards, list) and shards and all(isinstance(shard, dict) for shard in shards)):
            return f"{split} has no list of shards"
        for shard in shards:
            if wrong := _shard_error(split, shard):
                return wrong
        if len({shard["name"] for shard in shards}) < len(shards):
            return f"{split} names a shard twice"
    return ""


def _shard_error(split: str, shard: dict[str, Any]) -> str:
    name, size = shard.get("name"), shard.get("bytes", -1)
    if not (isinstance(name, str) and re.fullmatch(rf"{split}-[0-9]{{5,9}}\.tar", name)):
        return f"{_shown(name)} is not a shard name such as {split}-00000.tar"
    if not _is_int(size, 0, 2**50):
        return f"{name} has {_shown(size)} bytes"
    if not _is_int(shard.get("images"), 0, size // _MIN_BYTES_PER_IMAGE):
        return f"{name} has {_shown(shard.get('images'))} images in {size:,} bytes"
    return "" if _is_digest(shard.get("sha256")) else f"{name} has no SHA-256"


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_class_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255


def _shown(value: Any) -> str:
    return printable(repr(value))[:80]


def load_arrays(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of ``shards.npz``, which are one-dimensional integers, stored uncompressed.

    Raises:
        DataError: the content is corrupt, or would take more memory than its size.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(content):
                raise ValueError("its arrays are compressed")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = dict(stored)
        if not all(array.ndim == 1 and array.dtype.kind in "iu" for array in arrays.values()):
            raise ValueError("its arrays are not one-dimensional integers")
        return arrays
    except Exception as error:  # zipfile, zlib and NumPy raise their own exceptions
        raise DataError(f"{ARRAYS} is corrupt: {one_line(error)}. Create the shards again.") from error


# --- files and stores -----------------------------------------------------------------------------------------------


def is_url(root: str) -> bool:
    """Return True for a URL such as ``s3://bucket/imagenet``."""
    return "://" in root


@contextmanager
def cache_errors(option: str) -> Iterator[None]:
    """Add to an error about the cache directory the config option that avoids it, such as ``data.cache=DIR``."""
    try:
        yield
    except UserError as error:
        raise DataError(f"{error} Or choose another directory with {option}.") from error


def _filesystem(root: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it.

    Raises:
        DataError: no installed package reads this kind of store, or the URL names a layered one (``reference://``,
            ``a::b``), whose content could redirect reads to other places.
    """
    if "::" in root or root.startswith("reference:"):
        raise DataError(f"{root} is refused: expected the URL of a plain store, such as s3://bucket/imagenet.")
    import fsspec  # here for start-up time: most runs read local files

    try:
        filesystem, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise DataError(f"{root} cannot be opened: {one_line(error)}") from error
    return filesystem, path.rstrip("/")


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Errors of the local disk during a download; others come from the store."""


def _is_missing(error: Exception) -> bool:
    """Return True if a store says that a file does not exist, False if the store could not be asked.

    fsspec raises FileNotFoundError in both cases over HTTP.
    """
    cause = error.__cause__
    is_unreachable = isinstance(cause, OSError) or getattr(cause, "status", 404) not in (404, 410)
    return isinstance(error, FileNotFoundError) and not is_unreachable


def _copy_at_most(source: Any, target: Any, size: int) -> None:
    """Copy a file of ``size`` bytes; stop after one byte more, so that a store cannot fill the disk."""
    left = size + 1
    while left and (chunk := source.read(min(2**22, left))):
        target.write(chunk)
        left -= len(chunk)


def has_size(path: Path, size: int) -> bool:
    """Return True if the file exists and has ``size`` bytes."""
    return file_state(path)[0] == size
