"""File operations that every package shares: atomic writes, checksums, the cache directory, locks between processes."""

import errno
import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from alexnet_pl.runtime.errors import UserError, os_reason

log = logging.getLogger(__name__)


def write_atomic(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write ``content`` to ``path``, whole or not at all; text as UTF-8.

    Readers see the old file or the new one, never a part. The directory must exist.

    Args:
        durable: flush the file and its directory to the disk, so that the new file survives a power cut.

    Raises:
        OSError: no space or no permission. ``path`` is unchanged and no scratch file is left behind.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        scratch.unlink(missing_ok=True)
        with scratch.open("xb") as file:  # never through a link planted under this name
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                flush_file(file)
        os.replace(scratch, path)
        if durable:
            flush_directory(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def replace_end(path: Path, size: int, position: int, content: bytes) -> bool:
    """Replace what a file holds from ``position`` on by at least as many bytes, at a cost independent of its size.

    Args:
        size: bytes of the file, as it was written last.

    Returns:
        False, and nothing is written, if the file has another size, is a link, or would become shorter.

    Raises:
        OSError: no space or no permission. The file is unchanged.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != size or position + len(content) < size:
        return False
    with path.open("r+b", buffering=0) as file:  # one call writes all, so that a killed process leaves no half row
        file.seek(position)
        before = file.read()
        try:
            file.seek(position)
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.seek(position)
            file.write(before)
            file.truncate(size)
            raise
    return True


def fill_section(text: str, name: str, content: str) -> str | None:
    """Return a Markdown text with ``content`` between ``<!-- name -->`` and ``<!-- /name -->``; None without them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    return f"{before}{start}\n{content.strip()}\n{end}{after}" if found and closed else None


def flush_file(file: IO[bytes]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """Flush the renames in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path that replaces ``path`` on success and is removed after an error.

    For writers that take a path (``np.savez``, ``torch.onnx``); :func:`write_atomic` is for content at hand.
    """
    scratch_dir = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-"))
    try:
        yield scratch_dir / path.name
        os.replace(scratch_dir / path.name, path)
    finally:
        shutil.rmtree(scratch_dir, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> tuple[int, int]:
    """Return size and modification time in nanoseconds, or (-1, -1) for a broken link, which reading reports."""
    try:
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    except OSError:
        return -1, -1


def cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/alexnet_pl``, by default ``~/.cache/alexnet_pl``. It may not exist yet.

    Raises:
        UserError: XDG_CACHE_HOME is unset and there is no home directory (a container started with ``--user``).
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "alexnet_pl"
    try:
        return Path.home() / ".cache" / "alexnet_pl"
    except RuntimeError as error:
        raise UserError(f"cache directory not found: this user has no home directory. {_SET_CACHE}") from error


def make_cache_dir() -> Path:
    """Create :func:`cache_dir` if needed and return it.

    Raises:
        UserError: there is no home directory, or the cache directory cannot be created or written to.
    """
    path = cache_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"cache directory {path} is not writable: {os_reason(error)}. {_SET_CACHE}") from error


_SET_CACHE = "Set XDG_CACHE_HOME=DIR to a writable directory."


class InUseError(UserError):
    """A lock is held by another process.

    Attributes:
        pid: process ID of the holder; None if it is unknown.
    """

    def __init__(self, path: Path, pid: int | None):
        super().__init__(f"{path} is in use by another process{f' (pid {pid})' if pid else ''}.")
        self.pid = pid


@contextmanager
def exclusive_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file ``path`` for the duration of the block, and leave no file behind.

    The lock is the operating system's: it ends with its owner, however the owner ends. The file holds the owner's
    process ID, if the disk has room for it. It is never truncated before its content is known to be a process ID, and
    links are refused, so that a lock file planted in a downloaded directory cannot damage another file. Where the file
    system has no locks (some network mounts), a warning is logged and the block runs unlocked.

    Args:
        wait: wait for the current owner; otherwise raise.

    Raises:
        InUseError: another process holds the lock and ``wait`` is False.
        UserError: ``path`` is not a lock file.
        OSError: ``path`` cannot be created.
    """
    while True:
        descriptor = _open_lock_file(path)
        try:
            _lock(descriptor, wait)
            if _is_current(path, descriptor):
                break
        except BlockingIOError:
            try:
                owner = _owner(descriptor)
            finally:
                os.close(descriptor)
            raise InUseError(path, owner) from None
        except OSError as error:
            log.warning(f"warning: {path} cannot be locked: {os_reason(error)}. Continuing without a lock.")
            break
        except BaseException:  # a signal while waiting
            os.close(descriptor)
            raise
        os.close(descriptor)  # the previous owner removed the file in the meantime
    _held.add(descriptor)
    try:
        _write_owner(descriptor)
        yield
    finally:
        if descriptor in _held:  # not in a forked child, which has no part in the lock
            _held.discard(descriptor)
            if sys.platform != "win32":  # Windows refuses to remove an open file; there it stays
                path.unlink(missing_ok=True)  # while it is held: a waiting process notices and creates a new file
            os.close(descriptor)


def _open_lock_file(path: Path) -> int:
    """Open or create a lock file without changing it. Refuse links and files that are not lock files."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP or path.is_symlink() or path.is_dir():
            raise UserError(f"{path} is invalid: expected a lock file. Remove it.") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > 20:
        os.close(descriptor)
        raise UserError(f"{path} is invalid: expected a lock file. Remove it.")
    return descriptor


def _lock(descriptor: int, wait: bool) -> None:
    """Lock an open file.

    Raises:
        BlockingIOError: another process holds it and ``wait`` is False.
    """
    if sys.platform == "win32":
        import msvcrt  # exists on Windows only

        while True:
            os.lseek(descriptor, 1024, os.SEEK_SET)  # beyond the content, which stays readable
            try:
                return msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "locked") from error
                time.sleep(0.05)
    import fcntl  # does not exist on Windows

    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _is_current(path: Path, descriptor: int) -> bool:
    """Return True if ``path`` still names the open file: its previous owner may have removed it."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    """Write this process's ID into an open lock file. A full disk is ignored, because the ID is only for messages."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, str(os.getpid()).encode())


def _owner(descriptor: int) -> int | None:
    """Return the process ID in an open lock file; None if its owner has not written it yet."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = os.read(descriptor, 20)
    return int(content) if content.isdigit() else None


_held: set[int] = set()


def _close_in_child() -> None:
    """Close inherited locks: a forked data-loading worker must not hold its parent's lock beyond the parent's death."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
