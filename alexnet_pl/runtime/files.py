"""runtime.files."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process holds ``lock``, and leave no file behind."""
    with FileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: who waits for it notices, and makes a new one


def cache_folder() -> Path:
    """Where decoded images are kept, outside the repository and the data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_pl"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A scratch file that takes the place of ``path`` at the end, and is gone after an error."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-"))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
