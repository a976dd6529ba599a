"""Cache of decoded images: one ``.npz`` per dataset in the cache directory, rebuilt when the files change."""

import hashlib
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from alexnet_pl.runtime.errors import UserError, one_line
from alexnet_pl.runtime.files import cache_dir, exclusive_lock, file_state, make_cache_dir, replacing

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def cached_arrays(name: str, fingerprint: str, make: Callable[[Path | None], Arrays]) -> Arrays:
    """Return the arrays of the cache file ``name``, or make them and write it.

    The cache is in :func:`alexnet_pl.runtime.files.cache_dir`. Of several concurrent processes, one makes the arrays
    and the others wait for the cache. Without a writable cache directory, every run makes them, and a warning says so.

    Args:
        fingerprint: digest of everything that the arrays depend on; a cache with another one is outdated.
        make: receives the cache's path, or None if it cannot be written, to tell the user.
    """
    arrays = _read(name, fingerprint)
    if arrays is not None:
        return arrays
    with _writable(name) as cache:
        arrays = _read(name, fingerprint) if cache else None  # written while this process waited
        if arrays is None:
            arrays = make(cache)
            if cache:
                _write(cache, fingerprint, arrays)
    return arrays


def cache_name(name: str, root: Path) -> str:
    """Return the name of the cache file of a dataset in ``root``."""
    return f"{name}-{hashlib.sha256(str(root.resolve()).encode(errors='surrogateescape')).hexdigest()[:16]}.npz"


def fingerprint(root: Path, files: Iterable[tuple[str, int]], version: str) -> str:
    """Return a digest that changes with any file's name, label, size or modification time, and with ``version``.

    A broken link counts as a file, so that decoding names it.

    Args:
        files: ``(path relative to root, label)``.
    """
    digest = hashlib.sha256(f"version {version}".encode())
    for path, label in files:
        size, changed = file_state(root / path)
        line = f"{path}|{label}|{size}|{changed}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read(name: str, expected: str) -> Arrays | None:
    """Return the arrays, or None if the cache is absent, outdated or corrupt."""
    try:
        with np.load(cache_dir() / name, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != expected:
                return None
            return {key: stored[key] for key in stored.files if key != "fingerprint"}
    except (UserError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


@contextmanager
def _writable(name: str) -> Iterator[Path | None]:
    """Yield the cache's path while no other process writes it, or None, after a warning, if it cannot be written."""
    cache: Path | None = None
    with ExitStack() as stack:
        try:
            path = make_cache_dir() / name
            stack.enter_context(exclusive_lock(path.with_suffix(".lock")))
            cache = path
        except (UserError, OSError) as error:  # a full disk, an exceeded quota
            log.warning(f"warning: decoded images are not cached, and every run decodes them: {one_line(error)}")
        if cache is not None:
            for abandoned in cache.parent.glob(f".{cache.stem}-*/"):  # left by a process that was killed while writing
                shutil.rmtree(abandoned, ignore_errors=True)
        yield cache


def _write(path: Path, current: str, arrays: Arrays) -> None:
    """Write the cache atomically. After an error the run continues, because a missing cache costs only seconds."""
    try:
        with replacing(path) as scratch:
            np.savez(scratch, **{"fingerprint": np.array(current), **arrays})  # type: ignore[arg-type]  # as in the writer
    except OSError as error:
        log.warning(f"warning: decoded images were not cached: {one_line(error)}")
