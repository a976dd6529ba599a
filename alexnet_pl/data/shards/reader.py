"""Pictures as shards: tar files of JPEGs of one size, read from a folder or an object store, batch by batch.

A folder of shards holds ``train-00000.tar``, ``train-00001.tar``, …, the same for ``val`` and ``test``, ``shards.npz``
(where each picture lies, its label and its CRC-32) and ``shards.json`` (classes, counts, SHA-256 of every file), which
is written last: a folder without it is unfinished. The tar files are in WebDataset's format, ``<key>.jpg`` followed by
``<key>.cls``, which other programs read as well; pictures lie in them in a shuffled order.
"""

import hashlib
import io
import json
import os
import tarfile
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.files import sha256_of

FORMAT = 1

INDEX, ARRAYS, UNFINISHED = "shards.json", "shards.npz", ".unfinished"

COLUMNS = ("offset", "size", "label", "crc32")


@dataclass(frozen=True)
class Split:
    """One split's pictures: where each lies, ``(N,)`` each; ``shard`` counts in ``names``."""

    names: tuple[str, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray


class Shards:
    """A finished folder of shards, local or in an object store.

    Shards of an object store (``s3://…``, ``gs://…``, ``https://…``: whatever fsspec reads) are fetched whole, checked,
    and kept in ``cache``; every machine fetches each shard once.

    Args:
        root: folder or URL.
        cache: folder for fetched shards; by default one under ``~/.cache/alexnet_pl``.

    Raises:
        DataError: none there, an unfinished or damaged one, or one from a newer version.
    """

    def __init__(self, root: str | Path, cache: Path | None = None):
        self.root = str(root)
        self.remote = is_url(self.root)
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        if self.remote:
            key = hashlib.sha256(self.root.encode()).hexdigest()[:16]
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_pl"
            self.folder = Path(cache) / key if cache else home / f"shards-{key}"
        else:
            self.folder = Path(self.root).expanduser()
        self.index = self._read_index()
        arrays = self._read_arrays()
        self.class_names = tuple(self.index["class_names"])
        self.side: int = self.index["side"]
        self.splits = {}
        for split, described in self.index["splits"].items():
            listed = described["shards"]
            shard = np.repeat(np.arange(len(listed)), [each["images"] for each in listed])
            known = (tuple(each[name] for each in listed) for name in ("name", "bytes", "sha256"))
            self.splits[split] = Split(*known, shard, *(arrays[f"{split}_{name}"] for name in COLUMNS))

    def _read_index(self) -> dict[str, Any]:
        unfinished = f"{self.root} is no finished folder of shards"
        try:
            index = json.loads(self._read(INDEX))
        except FileNotFoundError as error:
            half = (self.folder / UNFINISHED).is_dir() and not self.remote
            raise DataError(
                f"{unfinished}: {'its making was interrupted' if half else f'it has no {INDEX}'}. "
                f"python -m alexnet_pl shards TREE {self.root} {'goes on with it' if half else 'makes one'}."
            ) from error
        except ValueError as error:
            raise DataError(f"{self.root}: {INDEX} is damaged ({error}). Make the shards again.") from error
        if not isinstance(index, dict) or not isinstance(index.get("format"), int):
            raise DataError(f"{unfinished}: its {INDEX} is of something else.")
        if index["format"] > FORMAT:
            raise DataError(f"{self.root} was made by a newer alexnet_pl. Update alexnet_pl.")
        return index

    def _read_arrays(self) -> dict[str, np.ndarray]:
        try:
            content = self._read(ARRAYS)
        except FileNotFoundError as error:
            raise DataError(f"{self.root} lacks {ARRAYS}. Make the shards again.") from error
        if hashlib.sha256(content).hexdigest() != self.index["arrays_sha256"]:
            raise DataError(f"{self.root}: {ARRAYS} is damaged. Make the shards again.")
        return load_arrays(content)

    def _read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: it is not there.
            DataError: the store does not answer.
        """
        if not self.remote:
            try:
                return (self.folder / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError) as error:
                raise FileNotFoundError(name) from error
            except OSError as error:
                raise DataError(f"{self.folder / name} cannot be read: {error.strerror}.") from error
        filesystem, path = _filesystem(self.root)
        try:
            return filesystem.cat_file(f"{path}/{name}")
        except FileNotFoundError:
            raise
        except Exception as error:  # every store has errors of its own
            raise DataError(f"{self.root}/{name} cannot be read: {_reason(error)}") from error

    def fetch(self, split: str, shard: int) -> Path:
        """The local file of a shard; of an object store it is fetched first, by one thread and process.

        Raises:
            DataError: missing, damaged, or no space for it.
        """
        described = self.splits[split]
        name = described.names[shard]
        path = self.folder / name
        if not self.remote or path.exists():
            return path
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        try:
            with lock:
                if path.exists():
                    return path
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / f".{name}.lock"):
                    if not path.exists():
                        self._download(name, described.sha256[shard], path)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}. data.cache names another folder.") from error
        return path

    def _download(self, name: str, sha256: str, path: Path) -> None:
        filesystem, root = _filesystem(self.root)
        scratch = path.with_name(f".{name}.part")
        try:
            try:
                filesystem.get_file(f"{root}/{name}", str(scratch))
            except FileNotFoundError as error:
                raise DataError(f"{self.root}/{name} does not exist: the shards are incomplete.") from error
            except OSError as error:
                if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
                    raise
                raise DataError(f"{self.root}/{name} cannot be fetched: {_reason(error)}") from error
            except Exception as error:
                raise DataError(f"{self.root}/{name} cannot be fetched: {_reason(error)}") from error
            if sha256_of(scratch) != sha256:
                raise DataError(f"{self.root}/{name} is damaged: its SHA-256 is not the one in {INDEX}.")
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def read(self, split: str, images: Sequence[int]) -> list[bytearray]:
        """JPEG files of the pictures at ``images``, their CRC-32 checked.

        Raises:
            DataError: a missing, shortened or damaged shard, by name.
        """
        described = self.splits[split]
        found: list[bytearray] = [bytearray()] * len(images)
        places: dict[int, list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault(int(described.shard[image]), []).append(place)
        for shard, own in places.items():
            path = self.fetch(split, shard)
            try:
                # Opened for each batch: a set of open files would have to be bounded, and shared between threads.
                file = os.open(path, os.O_RDONLY)
                try:
                    for place in own:
                        image = images[place]
                        buffer = bytearray(int(described.size[image]))
                        got = os.preadv(file, [buffer], int(described.offset[image]))
                        if got != len(buffer) or zlib.crc32(buffer) != described.crc32[image]:
                            raise DataError(f"{path} is damaged. {self._again(described.names[shard])}")
                        found[place] = buffer
                finally:
                    os.close(file)
            except FileNotFoundError as error:
                raise DataError(f"{path} is missing. {self._again(described.names[shard])}") from error
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        return found

    def _again(self, name: str) -> str:
        if self.remote:
            return "Delete it: it is fetched again."
        return f"python -m alexnet_pl shards TREE {self.root} makes {name} again."

    def verify(self, advance: Callable[[], None] = lambda: None) -> list[str]:
        """Read every shard whole: size, SHA-256 and number of pictures. What is wrong, a line for each shard."""
        wrong = []
        for split, described in self.splits.items():
            counts = np.bincount(described.shard, minlength=len(described.names))
            for number in range(len(described.names)):
                try:
                    path = self.fetch(split, number)
                    if not path.is_file():
                        wrong.append(f"{path} is missing")
                    elif not has_size(path, described.bytes[number]):
                        wrong.append(f"{path} has {path.stat().st_size:,} bytes instead of {described.bytes[number]:,}")
                    elif sha256_of(path) != described.sha256[number]:
                        wrong.append(f"{path} is damaged: its SHA-256 is not the one in {INDEX}")
                    else:
                        with tarfile.open(path) as tar:
                            pictures = sum(member.name.endswith(".jpg") for member in tar)
                        if pictures != counts[number]:
                            wrong.append(f"{path} holds {pictures:,} pictures instead of {counts[number]:,}")
                except DataError as error:
                    wrong.append(str(error))
                advance()
        return wrong


def is_url(root: str) -> bool:
    return "://" in root


def _filesystem(root: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
        DataError: a kind of store that nothing installed reads.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise DataError(f"{root} cannot be opened: {_reason(error)}") from error
    return filesystem, path.rstrip("/")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_arrays(content: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            return dict(stored)
    except Exception as error:  # zipfile's, zlib's and NumPy's own
        raise DataError(f"{ARRAYS} is damaged: {_reason(error)}") from error


def file_state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    except OSError:  # a link that leads nowhere: reading it says so
        return -1, -1


def has_size(path: Path, size: int) -> bool:
    return file_state(path)[0] == size
