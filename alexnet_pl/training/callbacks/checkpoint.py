"""Checkpoint callbacks: the best weights, the full state to resume from, and the validation that ends a run."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from alexnet_pl.config.schedules import RunLength
from alexnet_pl.distributed.collectives import all_gather, all_reduce_max
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.signals import GracefulShutdown, RunInterrupted
from alexnet_pl.training.checkpoint_io import BEST, LATEST, PREVIOUS, remove_resume_checkpoints
from alexnet_pl.training.lightning_internals import dump_weights, end_restart
from alexnet_pl.training.saved_state import has_same_state

log = logging.getLogger(__name__)

AGREE_EVERY = 10
"""Optimizer steps between two times that the ranks agree on saving and stopping, which costs them an all-reduce."""


class BestCheckpoint(Callback):
    """Keeps the weights of the validation with the best monitored value, the first of equal ones.

    The weights are copied after the last validation batch, so that they are the validated ones even if a callback swaps
    in averaged weights for validation only. They are written to disk before a resume checkpoint that refers to them,
    and at the end of training: if an epoch takes less than a second, writing them takes longer than the epoch.

    Args:
        folder: directory of ``best.ckpt``.
        monitor: logged validation metric.
        mode: ``max`` or ``min``.

    Attributes:
        score: best monitored value; None before the first validation.
        epoch: epoch of that validation, counted from 1.
        metrics: all metrics of that validation, such as ``val/loss``.
    """

    def __init__(self, folder: str | Path, monitor: str = "val/acc", mode: str = "max"):
        self.path, self.monitor, self.mode = Path(folder) / BEST, monitor, mode
        self.score: float | None = None
        self.epoch = 0
        self.metrics: dict[str, float] = {}
        self._validated: dict[str, Tensor] = {}
        self._unwritten: dict[str, Any] | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if _is_fitting(trainer) and batch_idx + 1 == trainer.num_val_batches[dataloader_idx]:
            self._validated = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_fitting(trainer):
            return
        weights, self._validated = self._validated, {}
        logged = trainer.callback_metrics
        score = float(logged[self.monitor])
        if self.score is None or (score > self.score if self.mode == "max" else score < self.score):
            self.score, self.epoch = score, trainer.current_epoch + 1
            self.metrics = {name: float(value) for name, value in logged.items() if name.startswith("val/")}
            self._unwritten = {**dump_weights(trainer), "state_dict": weights}

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
        return {"score": self.score, "epoch": self.epoch, "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.metrics = state_dict["epoch"], state_dict["metrics"]
        self.score = self.metrics.get(self.monitor, state_dict["score"])  # which may be of another quantity


def _is_fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


class TrainingEnd(Callback):
    """Validates the final weights, even if ``max_steps`` ends inside an epoch, and has the final state saved.

    Args:
        resume: saves the state, before a callback that averages weights replaces the raw ones.
    """

    def __init__(self, resume: "ResumeCheckpoint"):
        self.resume = resume

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning then validates before it stops
            trainer.check_val_every_n_epoch = 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.resume.save_last(trainer)


class ResumeCheckpoint(Callback):
    """Saves the full training state, so that a resumed run equals an uninterrupted one, and stops on request.

    It saves at the start of an epoch unless the last save was within ``min_interval_seconds``, inside an epoch after
    ``interval_minutes``, at the end of training, and before it stops for a signal; always after an optimizer step, so
    that no accumulated gradients are lost. The order of images, dropout and augmentation of an epoch follow from
    ``(seed, epoch)``. Inside an epoch, the state of the random generators, the running metrics and the number of images
    seen are saved as well. All ranks save and stop at the same step, and the state of each is saved.

    Args:
        folder: directory of ``latest.ckpt`` and ``previous.ckpt``.
        interval_minutes: longest time between two saves inside an epoch.
        min_interval_seconds: shortest time between two saves at the start of epochs. Saving AlexNet takes a second, and
            an epoch may take less.
        keep: keep both files when the run has finished, so that it can be extended.

    Attributes:
        stop: signals received so far.
        planned: length of the whole run; ``run_length`` of the model is the part that its schedule covers.
        restart_schedule: recreate the schedule and give the optimizer the configured hyperparameters.
        restart_optimizer: drop the state of the optimizer, which is of another class or has other parameter groups.

    Raises:
        ConfigError: a negative time.
    """

    def __init__(
        self,
        folder: str | Path,
        interval_minutes: float = 10,
        min_interval_seconds: float = 120,
        keep: bool = False,
    ):
        for name, value in (("interval_minutes", interval_minutes), ("min_interval_seconds", min_interval_seconds)):
            if not value >= 0:
                raise ConfigError(f"callbacks.resume.{name}={value} is invalid: expected 0 or more.")
        self.path, self.every_seconds = Path(folder) / LATEST, 60 * interval_minutes
        self.min_interval_seconds, self.keep = min_interval_seconds, keep
        self.stop = GracefulShutdown()
        self.restart_schedule = self.restart_optimizer = False
        self.planned: RunLength | None = None
        self._saved_at = 0.0
        self._step_after_batch = self._saved_step = -1
        self._saving = False
        self._batch = 0
        self._inside: list[dict[str, Any]] | None = None
        self._unfinished: dict[str, Any] | None = None

    def remove(self) -> None:
        """Remove the files, unless they are to be kept."""
        if not self.keep:
            remove_resume_checkpoints(self.path.parent)

    # Lightning replaces the handler of SIGTERM when it starts; this hook runs after that.
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # an ImageClassifier
        self.stop.install()
        self.stop.wait = True
        self._saved_at = time.monotonic()
        self._step_after_batch = trainer.global_step
        if self.restart_schedule:
            for group, initial in zip(trainer.optimizers[0].param_groups, pl_module.initial_groups, strict=True):
                group.update(initial)
        if self._inside is not None:
            end_restart(trainer)
            own = self._inside[trainer.global_rank]
            torch.set_rng_state(own["cpu_rng"].cpu())
            if own["cuda_rng"] is not None and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"].cpu(), pl_module.device)
            pl_module.load_running_metrics(own["metrics"])
            self._inside = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unfinished = None
        stop, due = self._agree(self.min_interval_seconds)
        if stop or due:
            self._save(trainer)
        self._stop_if(stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step_after_batch:
            return  # gradients are being accumulated
        self._step_after_batch = trainer.global_step
        if batch_idx + 1 >= trainer.num_training_batches:
            return  # the epoch is about to end, which is the better place to save
        if 0 < trainer.max_steps <= trainer.global_step:
            return  # so is training, after a validation
        if trainer.world_size > 1 and (batch_idx + 1) // trainer.accumulate_grad_batches % AGREE_EVERY:
            return
        stop, due = self._agree(self.every_seconds)
        if stop or due:
            self._save(trainer, batch_idx + 1)
            self._stop_if(stop)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Training may end inside an epoch. Its position is recorded now, because the metrics are reset afterwards.
        batch = trainer.fit_loop.epoch_loop.batch_idx + 1
        if _is_fitting(trainer) and batch < trainer.num_training_batches:
            self._unfinished = {"batch": batch, "epoch": trainer.current_epoch, "inside": self._state(pl_module)}

    def save_last(self, trainer: Trainer) -> None:
        """Save the state at the end of training."""
        self._save(trainer, force=self._unfinished is not None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.wait = False
        self._stop_if(self._agree(self.every_seconds)[0])

    def _save(self, trainer: Trainer, batch: int = 0, force: bool = False) -> None:
        if force or trainer.global_step != self._saved_step:  # otherwise it was just saved or resumed from
            self._batch, self._saving = batch, True
            try:
                trainer.save_checkpoint(self.path, storage_options={"previous": self.path.with_name(PREVIOUS)})
            finally:
                self._batch, self._saving = 0, False
            self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def _agree(self, seconds: float) -> tuple[int, bool]:
        """Return the signal that any rank has received, or 0, and True if any rank last saved ``seconds`` ago."""
        stop, due = all_reduce_max(self.stop.received or 0, time.monotonic() - self._saved_at >= seconds)
        return stop, bool(due)

    def _stop_if(self, number: int) -> None:
        if number:
            raise RunInterrupted(number)

    def _state(self, pl_module: Any) -> list[dict[str, Any]]:
        """Return what each rank needs to resume inside an epoch: random generators and running metrics."""
        device = pl_module.device
        return all_gather(
            {
                "cpu_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "metrics": {name: value.cpu() for name, value in pl_module.running_metrics().items()},
            }
        )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # has a datamodule
        if not self._saving:
            return  # a callback of the user's saves a checkpoint of its own
        # Lightning's own record of the loops cannot be resumed exactly: at the end of an epoch it is taken before the
        # plateau schedule steps, and that step is then skipped.
        del checkpoint["loops"]
        unfinished = self._unfinished or {
            "batch": self._batch,
            "epoch": trainer.current_epoch,
            "inside": self._state(pl_module) if self._batch else None,
        }
        batch = unfinished["batch"]
        images = trainer.datamodule.train_dataloader().images_before(batch) if batch else 0
        checkpoint["position"] = {
            "epoch": unfinished["epoch"], "batch": batch, "images": images, "step": trainer.global_step,
        }  # fmt: skip
        length = pl_module.run_length
        checkpoint["run_length"] = asdict(length) if length else None
        checkpoint["planned_length"] = asdict(self.planned) if self.planned else None
        checkpoint["images"] = trainer.datamodule.digest
        checkpoint["schedule_start"] = float(pl_module.schedule_start)
        if batch:
            checkpoint["inside"] = unfinished["inside"]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._inside = checkpoint.get("inside")
        self._saved_step = checkpoint["position"]["step"]
        if "current_model_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in trainer.callbacks):
            # The run averaged weights until now. Those it trained are the ones to go on with.
            pl_module.load_state_dict(checkpoint["current_model_state"])
        if self.restart_schedule:
            checkpoint["lr_schedulers"] = []
            saved = checkpoint["optimizer_states"][0]
            if not self.restart_optimizer and not has_same_state(pl_module, saved):
                log.info("change  the optimizer's state starts anew: it consists of other parts now")
                self.restart_optimizer = True
        if self.restart_optimizer:
            checkpoint["optimizer_states"] = []
