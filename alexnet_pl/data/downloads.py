"""Downloads of datasets: one process at a time, verified by MD5, unpacked within bounds, whole or not at all."""

import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torchvision.datasets.utils import calculate_md5, check_integrity, download_url

from alexnet_pl.runtime.errors import DataError, one_line
from alexnet_pl.runtime.files import exclusive_lock

WAYS_OUT = "Use another copy with data.root=DIR, or data=digits, which needs no download."

MAX_GROWTH = 4
"""Largest ratio of unpacked to packed size. The images of these archives barely compress."""

SMALL_ARCHIVE = 64 * 2**20
"""Unpacked bytes that an archive of any size may have."""


def install(root: Path, name: str, title: str, products: Sequence[str], fill: Callable[[Path], None]) -> None:
    """Download a dataset into ``root``, whole or not at all. Of several concurrent processes, one does, others wait.

    Args:
        name: of the lock file and the scratch directory.
        title: of the dataset, for messages.
        products: files and directories in ``root`` that exist once the dataset is complete.
        fill: downloads the dataset into the scratch directory that it is given, under the names of ``products``.

    Raises:
        DataError: there is no network, the archive is corrupt or would write elsewhere, or ``root`` is not writable.
    """
    existed = root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(root / f".{name}.lock"):
            if all((root / product).exists() for product in products):  # downloaded by another process in the meantime
                return
            for abandoned in root.glob(f".{name}-*/"):  # left by a killed process: the lock says no other is active
                shutil.rmtree(abandoned, ignore_errors=True)
            # Next to the target, so that the last step is a rename and the final name implies completeness.
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as scratch:
                fill(Path(scratch))
                for product in products:
                    (root / product).parent.mkdir(parents=True, exist_ok=True)
                    (Path(scratch) / product).replace(root / product)
    except (OSError, RuntimeError, tarfile.TarError, EOFError, zlib.error) as error:
        if not existed and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        if isinstance(error, DataError):
            raise
        reason = f"{title} not found in {root}, and the download failed: {one_line(error)}"
        raise DataError(f"{reason}\n{WAYS_OUT}") from error


def announce(title: str, megabytes: int, root: Path) -> None:
    """Say that a download begins, and how large it is."""
    print(f"downloading {title} ({megabytes:,} MB) to {root.resolve()}")


def is_copy(path: Path, md5: str, hint: str = "") -> bool:
    """Return True if a file of a dataset is there already, and False if it has to be downloaded.

    Args:
        hint: what else to do about a file with another MD5 than deleting it.

    Raises:
        DataError: the file is there, but has another MD5.
    """
    if not path.is_file():
        return False
    if not check_integrity(str(path), md5):
        raise DataError(
            f"{path} is truncated or corrupt (wrong MD5): {calculate_md5(str(path))}, expected {md5}. Delete it to "
            f"download it again.{hint and ' '}{hint} {WAYS_OUT}"
        )
    return True


def unpack(root: Path, scratch: Path, title: str, megabytes: int, url: str, filename: str, md5: str) -> None:
    """Unpack an archive into ``scratch``: the one that is already in ``root``, or else a download with torchvision.

    Raises:
        DataError: the archive in ``root`` has another MD5, or as :func:`extract`.
        RuntimeError, OSError: the download failed.
    """
    archive = root / filename
    if not is_copy(archive, md5):
        announce(title, megabytes, root)
        download_url(url, str(scratch), filename, md5)
        archive = scratch / filename
    extract(archive, scratch)


def extract(archive: Path, directory: Path) -> None:
    """Unpack a tar archive of regular files and directories, all inside ``directory``.

    All members are checked before any is written. Links and devices are refused wherever they lead, because no dataset
    here has any. The ``data`` filter, available from Python 3.11.4, would allow some links. Of an archive that
    unpacks to more than ``MAX_GROWTH`` times its size, nothing is written.

    Raises:
        DataError: names the refused member, or the archive that is too large.
        tarfile.TarError, EOFError, zlib.error: the archive is corrupt.
    """
    limit = max(SMALL_ARCHIVE, MAX_GROWTH * archive.stat().st_size)
    members, total = [], 0
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = (directory / member.name).resolve().is_relative_to(directory.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise DataError(
                    f"{archive} is refused and nothing was unpacked: {member.name!r} is not a regular file inside it. "
                    f"{WAYS_OUT}"
                )
            members.append(member)
            total += member.size
            if total > limit:
                raise DataError(
                    f"{archive} is refused and nothing was unpacked: it holds more than {limit:,} bytes. {WAYS_OUT}"
                )
        if hasattr(tarfile, "data_filter"):
            tar.extractall(directory, members, filter="data")
        else:
            tar.extractall(directory, members)
