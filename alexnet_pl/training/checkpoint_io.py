"""Checkpoints that survive: written whole or not at all, checked before they are read, never unpickled blindly.

A run keeps at most three files under ``checkpoints/``: ``best.ckpt`` (weights of the best epoch), ``latest.ckpt`` (all
that is needed to go on) and ``previous.ckpt`` (the ``latest`` before it, for the case that ``latest`` is damaged), with
their SHA-256 in ``SHA256SUMS`` beside them.
"""

import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from alexnet_pl.runtime.errors import UserError

log = logging.getLogger(__name__)


SUMS = "SHA256SUMS"

BEST, LATEST, PREVIOUS = "best.ckpt", "latest.ckpt", "previous.ckpt"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or one that is damaged, unsafe or of another network."""

    exit_code = 1


# --- files ----------------------------------------------------------------------------------------------------------


def write_checkpoint(checkpoint: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write ``checkpoint`` so that at every moment, also one of a power cut, a whole checkpoint bears a final name.

    A scratch file in the same folder is written, flushed to the disk and renamed. The checksum is noted before the
    rename: until it is over, ``SHA256SUMS`` has those of the old and of the new file.

    Args:
        previous: name that an existing ``path`` is kept under.

    Raises:
        CheckpointError: no space, no permission. What was there before is intact.
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        sums = read_sums(path.parent)
        digest = _sha256(scratch)
        after = {**sums, path.name: digest}
        if previous is not None and path.exists():
            after[previous.name] = sums.get(path.name, "")
        _write_sums(path.parent, [*after.items(), *sums.items()])
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(scratch, path)
        _sync_folder(path.parent)
        _write_sums(path.parent, [(name, known) for name, known in after.items() if (path.parent / name).exists()])
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        scratch.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} could not be written ({reason}). The checkpoints before it are intact."
        ) from error


def read_checkpoint(path: Path, map_location: Any = "cpu", bare: bool = False) -> dict[str, Any]:
    """Read a checkpoint after comparing its checksum, with ``weights_only=True``: nothing in it is executed.

    Args:
        bare: take a file that is nothing but a state dict for a checkpoint with that alone.

    Raises:
        CheckpointError: missing, damaged, or with content other than tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    # Between the two renames of write_checkpoint, previous.ckpt is still noted as latest.ckpt.
    names = (path.name, LATEST) if path.name == PREVIOUS else (path.name,)
    digests = {digest for name, digest in _sums_lines(path.parent) if name in names}
    try:
        if digests and _sha256(path) not in digests:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {path.parent / SUMS}.")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values; it was not loaded."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or a damaged one: {str(error).splitlines()[0]}") from error
    if bare and isinstance(checkpoint, dict) and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint of this project: it has no state_dict.")
    return checkpoint


def latest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest resume checkpoint that can be read, with a warning where it is not the newest one; None without any.

    Raises:
        CheckpointError: there are resume checkpoints, and none can be read.
    """
    errors = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            log.warning(f"warning: {error} Going on from {path.name}.")
        return path, checkpoint
    if errors:
        raise errors[0]
    return None


def read_sums(folder: Path) -> dict[str, str]:
    """``{file name: SHA-256}`` as noted beside the checkpoints."""
    return dict(reversed(_sums_lines(folder)))  # the first line of a name is the newest


def _sums_lines(folder: Path) -> list[tuple[str, str]]:
    path = folder / SUMS
    if not path.is_file():
        return []
    lines = (line.partition("  ") for line in path.read_text(errors="replace").splitlines())
    return [(name, digest) for digest, _, name in lines if name]


def _write_sums(folder: Path, sums: list[tuple[str, str]]) -> None:
    lines = dict.fromkeys(f"{digest}  {name}\n" for name, digest in sums if digest)
    scratch = folder / f".{SUMS}.part"
    with scratch.open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, folder / SUMS)
    _sync_folder(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SafeCheckpointIO(CheckpointIO):
    """Lightning's door to :func:`write_checkpoint` and :func:`read_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_checkpoint(checkpoint, Path(path), previous=(storage_options or {}).get("previous"))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
