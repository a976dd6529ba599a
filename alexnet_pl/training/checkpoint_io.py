"""Checkpoint files: atomic writes, SHA-256 checksums, bounded and pickle-safe reads.

A run keeps at most three files under ``checkpoints/``: ``best.ckpt`` (weights of the best epoch), ``latest.ckpt`` (the
full training state) and ``previous.ckpt`` (the ``latest.ckpt`` before it, in case that ``latest.ckpt`` is corrupt), and
their SHA-256 in ``SHA256SUMS``.
"""

import logging
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from alexnet_pl.runtime.errors import ConfigError, UserError, one_line, os_reason
from alexnet_pl.runtime.files import flush_directory, flush_file, sha256_of, write_atomic

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"

BEST, LATEST, PREVIOUS = "best.ckpt", "latest.ckpt", "previous.ckpt"

MAX_ENTRIES, MAX_PICKLE_BYTES = 100_000, 2 * 2**20
"""Limits of a checkpoint's ZIP archive: files (one per tensor) and size of the pickle, which holds no tensor data.

A pickle of nested lists takes three seconds per MiB. The one of a run on ImageNet has a tenth of the limit.
"""

MAX_COUNT = 2**53
"""Largest epoch, step or number of images in the position of a resume checkpoint."""

_LEGACY_MAGIC, _LEGACY_PICKLES = 0x1950A86A20F9469CFC6C, 5
"""Start of a file in the format before torch 1.6, and its pickles: this number, version, system, objects, keys."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is missing, corrupt, unsafe or of another network."""

    exit_code = 1


def write_checkpoint(checkpoint: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write ``checkpoint`` so that a complete one exists under its final name at every moment, even in a power cut.

    A scratch file in the same directory is written, flushed to disk and renamed. Its checksum is recorded before the
    rename; until then ``SHA256SUMS`` lists those of the old and the new file. The parent of the directory must exist.

    Args:
        previous: name to keep an existing ``path`` under.

    Raises:
        CheckpointError: no space or no permission. The checkpoints before it are intact.
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        scratch.unlink(missing_ok=True)
        with scratch.open("xb") as file:  # never through a link planted under this name
            torch.save(checkpoint, file)
            flush_file(file)
        sums = read_sums(path.parent)
        after = {**sums, path.name: sha256_of(scratch)}
        if previous is not None and path.exists():
            after[previous.name] = sums.get(path.name) or sha256_of(path)
        _write_sums(path.parent, [*after.items(), *sums.items()])
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(scratch, path)
        flush_directory(path.parent)
        _write_sums(path.parent, [(name, known) for name, known in after.items() if (path.parent / name).exists()])
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} could not be written: {os_reason(error)}. The checkpoints before it are intact."
        ) from error


def read_checkpoint(path: Path, map_location: Any = "cpu", bare: bool = False) -> dict[str, Any]:
    """Load a checkpoint after comparing its checksum, with ``weights_only=True``, so that no code in it is executed.

    Args:
        map_location: device for the tensors, as in ``torch.load``.
        bare: accept a file that is only a state dict, and one in torch's format before 1.6.

    Raises:
        CheckpointError: not found, corrupt, too large for its file, or not only tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} not found.")
    try:
        check_sum(path)
        check_archive(path, legacy=bare)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is corrupt or holds more than tensors and plain values. It was not loaded."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os_reason(error)}.") from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupt or not a checkpoint: {one_line(error)[:200]}") from error
    if bare and isinstance(checkpoint, dict) and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of this project: it has no state_dict.")
    weights = checkpoint["state_dict"].items()
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights):
        raise CheckpointError(f"{path} is corrupt: its state_dict holds more than named tensors.")
    return checkpoint


@contextmanager
def refuse_misfits(path: Any) -> Iterator[None]:
    """Raise what ``load_state_dict`` raises for a part of a checkpoint as one line that names the file.

    Raises:
        ConfigError: the config and the checkpoint are not of the same run, or the checkpoint is corrupt.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ConfigError as error:
        raise ConfigError(f"{path} does not fit its config: {error}") from error
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise ConfigError(f"{path} does not fit its config: {reason} (for a traceback: HYDRA_FULL_ERROR=1)") from error


def check_sum(path: Path) -> None:
    """Compare a checkpoint with ``SHA256SUMS`` beside it. Without that file there is nothing to compare.

    Raises:
        CheckpointError: another checksum, or a ``SHA256SUMS`` that does not list the checkpoint.
    """
    if not _has_sums(path.parent):
        return
    # Between the two renames of write_checkpoint, previous.ckpt is still listed as latest.ckpt.
    names = (path.name, LATEST) if path.name == PREVIOUS else (path.name,)
    digests = {digest for name, digest in _sums_lines(path.parent) if name in names}
    if not digests:
        raise CheckpointError(
            f"{path} is not listed in {path.parent / SUMS}, so it cannot be verified. "
            "If you trust the file, remove SHA256SUMS."
        )
    if sha256_of(path) not in digests:
        raise CheckpointError(f"{path} is corrupt: its SHA-256 differs from the one in {path.parent / SUMS}.")


def check_archive(path: Path, legacy: bool = False) -> None:
    """Check the sizes inside a checkpoint before anything is allocated: ``torch.save`` stores without compression.

    Args:
        legacy: accept a file in the format before torch 1.6, whose pickles stand before the tensors' data.

    Raises:
        CheckpointError: compressed or overlapping entries, too many of them, or a pickle above ``MAX_PICKLE_BYTES``.
    """
    if not zipfile.is_zipfile(path):
        if legacy:
            return _check_pickles(path)
        raise CheckpointError(f"{path} is corrupt: expected a ZIP archive as torch.save writes it.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path} is corrupt: {one_line(error)}") from error
    reason = ""
    if len(entries) > MAX_ENTRIES:
        reason = f"more than {MAX_ENTRIES:,} entries"
    elif any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        reason = "compressed entries"
    elif sum(entry.file_size for entry in entries) > path.stat().st_size:
        reason = "entries larger than the file"
    elif any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES for entry in entries):
        reason = f"a pickle larger than {MAX_PICKLE_BYTES // 2**20} MiB"
    if reason:
        raise CheckpointError(f"{path} is refused: its archive has {reason}, unlike those that torch.save writes.")


def _check_pickles(path: Path) -> None:
    """Check the size of the pickles at the start of a file in the format before torch 1.6, without executing them.

    Raises:
        CheckpointError: not a file of that format, or pickles above ``MAX_PICKLE_BYTES``.
    """
    arguments: list[object] = []
    with path.open("rb") as file:
        try:
            for _ in range(_LEGACY_PICKLES):
                for _, argument, _ in pickletools.genops(file):
                    arguments.append(argument)
                    if file.tell() > MAX_PICKLE_BYTES:
                        raise CheckpointError(
                            f"{path} is refused: it has a pickle larger than {MAX_PICKLE_BYTES // 2**20} MiB, unlike "
                            "those that torch.save writes."
                        )
                if _LEGACY_MAGIC not in arguments:
                    raise ValueError("another kind of file")
        except ValueError as error:
            raise CheckpointError(f"{path} is corrupt or not a checkpoint: expected a file of torch.save.") from error


def latest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest readable resume checkpoint, with a warning if it is not the newest; None if there is none.

    Raises:
        CheckpointError: there are resume checkpoints, but none is readable.
    """
    errors: list[CheckpointError] = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
            check_position(checkpoint, path)
        except CheckpointError as error:
            errors.append(error)
            continue
        for earlier in errors:
            log.warning(f"warning: {earlier} Falling back to {path.name}.")
        return path, checkpoint
    if errors:
        raise errors[0]
    return None


def check_position(checkpoint: dict[str, Any], path: Path) -> None:
    """Check that a resume checkpoint says where training stopped.

    Raises:
        CheckpointError: it was written by an earlier version, or is not a resume checkpoint.
    """
    position = checkpoint.get("position")
    known = (
        isinstance(position, dict)
        and {"epoch", "images", "step"} <= set(position) <= {"epoch", "images", "batch", "step"}
        and all(type(count) is int and 0 <= count <= MAX_COUNT for count in position.values())
    )
    if not known or not isinstance(checkpoint.get("hyper_parameters"), dict):
        raise CheckpointError(f"{path} is not a resume checkpoint of this version. Start a new run with init_from=…")


def remove_resume_checkpoints(folder: Path) -> None:
    """Remove ``latest.ckpt`` and ``previous.ckpt`` of a finished run, and their lines in ``SHA256SUMS``."""
    kept = [(name, digest) for name, digest in read_sums(folder).items() if name not in (LATEST, PREVIOUS)]
    for name in (LATEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
    if _has_sums(folder):
        _write_sums(folder, kept)


def read_sums(folder: Path) -> dict[str, str]:
    """Return ``{file name: SHA-256}`` as recorded beside the checkpoints."""
    return dict(reversed(_sums_lines(folder)))  # the first line of a name is the newest


def _has_sums(folder: Path) -> bool:
    """Return True if there are checksums.

    Raises:
        CheckpointError: something else bears that name, so what it stands for cannot be checked.
    """
    path = folder / SUMS
    if os.path.lexists(path) and not path.is_file():
        raise CheckpointError(f"{path} is corrupt: expected a regular file.")
    return path.is_file()


def _sums_lines(folder: Path) -> list[tuple[str, str]]:
    path = folder / SUMS
    if not _has_sums(folder):
        return []
    lines = (line.partition("  ") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [(name, digest) for digest, _, name in lines if name]


def _write_sums(folder: Path, sums: list[tuple[str, str]]) -> None:
    lines = dict.fromkeys(f"{digest}  {name}\n" for name, digest in sums if digest)
    write_atomic(folder / SUMS, "".join(lines), durable=True)


class SafeCheckpointIO(CheckpointIO):
    """CheckpointIO plugin backed by :func:`write_checkpoint` and :func:`read_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_checkpoint(checkpoint, Path(path), previous=(storage_options or {}).get("previous"))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
