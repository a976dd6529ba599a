"""Checkpoints that survive: written whole or not at all, checked before they are read, never unpickled blindly.

A run keeps at most three files under ``checkpoints/``: ``best.ckpt`` (weights of the best epoch), ``latest.ckpt`` (all
that is needed to go on) and ``previous.ckpt`` (the ``latest`` before it, for the case that ``latest`` is damaged), with
their SHA-256 in ``SHA256SUMS`` beside them.
"""

import hashlib
import logging
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO

from alexnet_pl.distributed import highest, of_all
from alexnet_pl.errors import ConfigError, UserError
from alexnet_pl.stopping import RunStopped, StopRequest

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
AGREE_EVERY = 10
"""Batches after which several processes agree on saving and stopping: every time costs a message to all of them."""

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


# --- when to save ---------------------------------------------------------------------------------------------------


class BestCheckpoint(Callback):
    """Keeps the weights of the epoch with the best monitored value; of equal ones the first.

    They are copied in memory, and written before a resume checkpoint that knows of them is, and at the end: where an
    epoch takes less than a second, writing them would take longer than the epoch.

    Args:
        folder: where ``best.ckpt`` goes.
        monitor: name of a logged metric.
        mode: ``max`` or ``min``.
    """

    def __init__(self, folder: str | Path, monitor: str = "val/acc", mode: str = "max"):
        self.path, self.monitor, self.mode = Path(folder) / BEST, monitor, mode
        self.score: float | None = None
        self.epoch = 0  # from 1; 0 before the first
        self._unwritten: dict[str, Any] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics[self.monitor])
        if self.score is None or (score > self.score if self.mode == "max" else score < self.score):
            self.score, self.epoch = score, trainer.current_epoch + 1
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
            weights = checkpoint["state_dict"].items()
            self._unwritten = {**checkpoint, "state_dict": {name: value.clone() for name, value in weights}}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._unwritten is not None:
            checkpoint, self._unwritten = self._unwritten, None
            trainer.strategy.save_checkpoint(checkpoint, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epoch = state_dict["score"], state_dict["epoch"]


class ResumeCheckpoint(Callback):
    """Saves all that a run needs to go on as if it had never stopped, and stops it when it is asked to.

    Saved at the start of an epoch unless that was done within the last ``spare_seconds``, after ``every_minutes``
    inside an epoch, at the end of training, and at a stop. An epoch's order of images, dropout and augmentation start
    from ``(seed, epoch)``; inside an epoch the state of the random generators, the running metrics and the next batch
    are saved as well. Several processes save and stop at the same step, and the state of each is saved.

    Args:
        folder: where ``latest.ckpt`` and ``previous.ckpt`` go.
        every_minutes: at most this long between two checkpoints inside an epoch.
        spare_seconds: at least this long between two checkpoints at the starts of epochs. A checkpoint of AlexNet
            takes a second, and an epoch may take less.

    Raises:
        ConfigError: a negative time.
    """

    def __init__(self, folder: str | Path, every_minutes: float = 10, spare_seconds: float = 120):
        for name, value in (("every_minutes", every_minutes), ("spare_seconds", spare_seconds)):
            if not value >= 0:
                raise ConfigError(f"callbacks.resume.{name}={value} is not possible: it is 0 or more.")
        self.path, self.every_seconds = Path(folder) / LATEST, 60 * every_minutes
        self.spare_seconds = spare_seconds
        self.stop = StopRequest()
        self.changed_rate: float | None = None
        self.rebuild_schedule = False
        self._saved_at = 0.0
        self._saved_step = -1
        self._batch = 0
        self._inside: list[dict[str, Any]] | None = None

    # Lightning replaces the handler for SIGTERM when it starts; this runs after that.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.install()
        self.stop.wait = True
        self._saved_at = time.monotonic()
        if self._inside is not None:
            # Up to here it made the loops go on inside the epoch. Left on, Lightning would leave out the plateau
            # scheduler's step at the end of this epoch.
            trainer.fit_loop._restarting = False
            own = self._inside[trainer.global_rank]
            torch.set_rng_state(own["cpu_rng"].cpu())
            if own["cuda_rng"] is not None and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"].cpu(), pl_module.device)
            pl_module.load_running_metrics(own["metrics"])
            self._inside = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop, due = self._agree(self.spare_seconds)
        if stop or due:
            self._save(trainer, batch=0)
        self._stop_if(stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 >= trainer.num_training_batches:
            return  # the epoch's end is near, and the place to save at
        if trainer.world_size > 1 and (batch_idx + 1) % AGREE_EVERY:
            return
        stop, due = self._agree(self.every_seconds)
        if stop or due:
            self._save(trainer, batch=batch_idx + 1)
            self._stop_if(stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, batch=0)
        self.stop.wait = False
        self._stop_if(self._agree(self.every_seconds)[0])

    def _save(self, trainer: Trainer, batch: int) -> None:
        if trainer.global_step != self._saved_step:  # else it is what the run was resumed from, or just saved
            self._batch = batch
            trainer.save_checkpoint(self.path, storage_options={"previous": self.path.with_name(PREVIOUS)})
            self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def _agree(self, seconds: float) -> tuple[int, bool]:
        """The signal that any process has received, 0 for none; and whether one of them last saved ``seconds`` ago."""
        stop, due = highest(self.stop.received or 0, time.monotonic() - self._saved_at >= seconds)
        return stop, bool(due)

    def _stop_if(self, number: int) -> None:
        if number:
            raise RunStopped(number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning's own account of where the loops stand cannot be resumed exactly: at the end of an epoch it is
        # taken before the plateau scheduler's step, and that step is then left out.
        del checkpoint["loops"]
        checkpoint["position"] = {"epoch": trainer.current_epoch, "batch": self._batch, "step": trainer.global_step}
        if self._batch:
            device = pl_module.device
            checkpoint["inside"] = of_all(
                {
                    "cpu_rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                    "metrics": {name: value.cpu() for name, value in pl_module.running_metrics().items()},
                }
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        inside = checkpoint.get("inside")
        self._inside = [inside] if isinstance(inside, dict) else inside  # of one process, before there could be several
        if self._inside is not None and len(self._inside) != trainer.world_size:
            raise ConfigError(
                f"this run was stopped inside an epoch by {len(self._inside)} processes, and goes on with as many: "
                f"not {trainer.world_size}."
            )
        self._saved_step = checkpoint["position"]["step"]
        if self.rebuild_schedule:
            checkpoint["lr_schedulers"] = []
        if self.changed_rate is not None:
            for group in checkpoint["optimizer_states"][0]["param_groups"]:
                group["lr"] = group["initial_lr"] = self.changed_rate


def set_position(trainer: Trainer, position: dict[str, int]) -> None:
    """Let the next ``trainer.fit`` start at ``position``.

    ``position`` holds ``epoch`` and ``batch``, both counted from 0, and ``step``, the optimiser steps done.
    At batch 0 the loops start the epoch as any other. Inside an epoch they are told that ``batch`` batches are done;
    the loader has to leave those out.
    """
    fit, epochs = trainer.fit_loop, trainer.fit_loop.epoch_loop
    for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
        progress.processed = progress.completed = position["epoch"]
        progress.ready = progress.started = position["epoch"] + (position["batch"] > 0)
    optimizer = epochs.automatic_optimization.optim_progress.optimizer
    optimizer.step.total.ready = optimizer.step.total.completed = position["step"]
    epochs._batches_that_stepped = position["step"]
    for progress, done in ((epochs.batch_progress.total, "step"), (epochs.batch_progress.current, "batch")):
        progress.ready = progress.started = progress.processed = progress.completed = position[done]
    fit.restarting = position["batch"] > 0
