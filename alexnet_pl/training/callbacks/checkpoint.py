"""training.callbacks.checkpoint."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from alexnet_pl.distributed.collectives import all_gather, all_reduce_max
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.signals import GracefulShutdown, RunInterrupted
from alexnet_pl.training.checkpoint_io import BEST, LATEST, PREVIOUS

AGREE_EVERY = 10
"""Batches after which several processes agree on saving and stopping: every time costs a message to all of them."""


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

    Saved at the start of an epoch unless that was done within the last ``min_interval_seconds``, after
    ``interval_minutes``
    inside an epoch, at the end of training, and at a stop. An epoch's order of images, dropout and augmentation start
    from ``(seed, epoch)``; inside an epoch the state of the random generators, the running metrics and the next batch
    are saved as well. Several processes save and stop at the same step, and the state of each is saved.

    Args:
        folder: where ``latest.ckpt`` and ``previous.ckpt`` go.
        interval_minutes: at most this long between two checkpoints inside an
            epoch.
        min_interval_seconds: at least this long between two checkpoints at the starts of epochs. A checkpoint of
            AlexNet
            takes a second, and an epoch may take less.

    Raises:
        ConfigError: a negative time.
    """

    def __init__(self, folder: str | Path, interval_minutes: float = 10, min_interval_seconds: float = 120):
        for name, value in (("interval_minutes", interval_minutes), ("min_interval_seconds", min_interval_seconds)):
            if not value >= 0:
                raise ConfigError(f"callbacks.resume.{name}={value} is not possible: it is 0 or more.")
        self.path, self.every_seconds = Path(folder) / LATEST, 60 * interval_minutes
        self.min_interval_seconds = min_interval_seconds
        self.stop = GracefulShutdown()
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
        stop, due = self._agree(self.min_interval_seconds)
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
        stop, due = all_reduce_max(self.stop.received or 0, time.monotonic() - self._saved_at >= seconds)
        return stop, bool(due)

    def _stop_if(self, number: int) -> None:
        if number:
            raise RunInterrupted(number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning's own account of where the loops stand cannot be resumed exactly: at the end of an epoch it is
        # taken before the plateau scheduler's step, and that step is then left out.
        del checkpoint["loops"]
        checkpoint["position"] = {"epoch": trainer.current_epoch, "batch": self._batch, "step": trainer.global_step}
        if self._batch:
            device = pl_module.device
            checkpoint["inside"] = all_gather(
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
