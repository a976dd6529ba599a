"""File operations that every package shares: atomic writes, checksums, the cache directory, locks between processes."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; text as UTF-8.

    Readers see the old file or the new one, never a part. The directory must exist.

    Raises:
        OSError: no space or no permission. ``path`` is unchanged and no scratch file is left behind.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path that replaces ``path`` on success and is removed after an error.

    For writers that take a path (``np.savez``, ``torch.onnx``); :func:`write_atomic` is for content at hand.
    """
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-"))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/alexnet_pl``, by default ``~/.cache/alexnet_pl``. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_pl"


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file ``path``, hold it, and leave no file behind.

    The lock is the operating system's, so it ends with its owner, however that ends.
    """
    with FileLock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: a waiting process notices and creates a new file
