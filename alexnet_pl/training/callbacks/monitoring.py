"""Monitoring callbacks: reseeding per epoch, stopping at a training error, progress lines, norms."""

import logging
import time
from collections import deque
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor
from torch.optim import Optimizer

from alexnet_pl.data.loaders import epoch_seed
from alexnet_pl.runtime.errors import invalid_value
from alexnet_pl.runtime.logging import Heartbeat
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.lightning_internals import loss_scale, unscales_in_step

log = logging.getLogger(__name__)


class ReseedEachEpoch(Callback):
    """Make dropout, mixup and cutmix of an epoch depend on ``(seed, epoch, rank)`` only, not on earlier draws."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(epoch_seed(self.seed, trainer.current_epoch, trainer.global_rank))


class StopAtTrainingError(EarlyStopping):
    """Stop training after the first epoch whose ``train/error`` is below ``error``, as in figure 1 of the paper.

    Args:
        error: fraction of the training images, in (0, 1).

    Raises:
        ConfigError: ``error`` is out of range.
    """

    def __init__(self, error: float = 0.25):
        if not 0 < error < 1:
            raise invalid_value("StopAtTrainingError.error", error, "a number above 0 and below 1")
        never = 2**31
        super().__init__("train/error", patience=never, stopping_threshold=error, check_on_train_epoch_end=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was interrupted between its last epoch and its test has nothing left to train.
        trainer.should_stop = trainer.should_stop or self.stopping_reason is EarlyStoppingReason.STOPPING_THRESHOLD


class StopWithoutImprovement(EarlyStopping):
    """Stop training after ``patience`` validations without an improvement of the monitored metric.

    Lightning's ``EarlyStopping`` with three differences: a run that was interrupted after its last epoch trains no
    further one, a resumed run may change ``patience``, and the metric of a validation is compared when it is new.

    Args:
        monitor: logged validation metric.
        mode: ``min`` or ``max``.
        patience: validations, at least 1.
        min_delta: smallest change that counts as an improvement, 0 or more.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min", patience: int = 5, min_delta: float = 0.0):
        if patience < 1:
            raise invalid_value("callbacks.early_stopping.patience", patience, "1 or more validations")
        if not 0 <= min_delta < float("inf"):
            raise invalid_value("callbacks.early_stopping.min_delta", min_delta, "a number ≥ 0")
        super().__init__(monitor, min_delta, patience, mode=mode, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class EpochReport(Callback):
    """Log ``epoch_seconds`` and ``images_per_second``, one line per epoch, and progress lines if there is no bar.

    ``epoch_seconds`` includes validation; ``images_per_second`` counts training time only. The epoch line has training
    and validation metrics and the estimated time left. Without a progress bar (stdout is not a terminal), a line every
    ``interval_seconds`` shows that a long epoch, validation or test is still running.

    Args:
        interval_seconds: time between progress lines.
    """

    def __init__(self, interval_seconds: float = 10.0) -> None:
        self._heartbeat = Heartbeat(interval_seconds)
        self._recent: deque[float] = deque(maxlen=5)
        self._start = self._mark = time.perf_counter()
        self._trained, self._images, self._batches = 0.0, 0, 0
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {"seconds": now - self._start, "trained": self._trained + now - self._mark, "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an epoch that was interrupted; at the start of an epoch, these values are reset."""
        self._mark = time.perf_counter()
        self._start = self._mark - state_dict["seconds"]
        self._trained, self._images = state_dict["trained"], state_dict["images"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Time between loading the state and the first step belongs to no epoch.
        now = time.perf_counter()
        self._start, self._mark = self._start + now - self._mark, now
        self._heartbeat.reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._mark = time.perf_counter()
        self._trained, self._images, self._batches = 0.0, 0, 0
        self._validated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size
        self._batches += 1
        self._log_progress(trainer, f"{_epoch(trainer)}  batch", batch_idx + 1, trainer.num_training_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        total = trainer.num_val_batches[0] if trainer.num_val_batches else 0
        self._log_progress(trainer, f"{_epoch(trainer)}  validation batch", batch_idx + 1, total)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True
        self._mark = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        total = trainer.num_test_batches[0] if trainer.num_test_batches else 0
        self._log_progress(trainer, "test batch", batch_idx + 1, total)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock(pl_module)
        seconds = time.perf_counter() - self._start
        rate = self._images / self._trained if self._trained > 0 else 0.0
        pl_module.log_dict({"epoch_seconds": seconds, "images_per_second": rate})
        self._recent.append(seconds)
        parts = [_epoch(trainer), f"{seconds:6.1f} s", f"{rate:6,.0f} images/s"]
        # Lightning logs the module's own training metrics after this hook. Computing them here caches the values.
        training_metrics = cast(ImageClassifier, pl_module).train_metrics.compute()
        parts.append(f"train loss {float(training_metrics['loss']):.4f}")
        if self._validated:  # otherwise the values are those of an earlier epoch
            metrics = trainer.callback_metrics
            parts += [f"val {n} {float(metrics[f'val/{n}']):.4f}" for n in ("loss", "acc") if f"val/{n}" in metrics]
        if left := self._seconds_left(trainer):
            parts.append(f"about {format_duration(left)} left")
        log.info("  ".join(parts))
        self._heartbeat.reset()

    def _stop_clock(self, pl_module: LightningModule) -> None:
        """Add the time since the last mark to the training time if batches were trained in it."""
        if self._batches and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self._trained += now - self._mark if self._batches else 0.0
        self._mark, self._batches = now, 0

    def _seconds_left(self, trainer: Trainer) -> float:
        """Estimate the rest of training from the last epochs; 0 if it is over or its end is unknown."""
        epochs_left = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            epochs_left.append(trainer.max_epochs - trainer.current_epoch - 1.0)
        if trainer.max_steps >= 0:
            steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
            epochs_left.append((trainer.max_steps - trainer.global_step) / max(steps_per_epoch, 1))
        if trainer.should_stop or not epochs_left:
            return 0.0
        return max(min(epochs_left), 0.0) * sum(self._recent) / len(self._recent)

    def _log_progress(self, trainer: Trainer, phase: str, batch: int, batches: float) -> None:
        if trainer.progress_bar_callback is None and batch < batches and self._heartbeat.is_due():
            log.info(f"{phase} {batch}/{batches}")


def _epoch(trainer: Trainer) -> str:
    """Return ``epoch  3/30``, or without a total if only the number of steps is limited."""
    epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
    if epochs is None or epochs < 0:
        return f"epoch {epoch}"
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"


def format_duration(seconds: float) -> str:
    """Return a rounded duration: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Norms(Callback):
    """Log ``grad_norm`` and ``weight_norm`` once per epoch, both Euclidean over all parameters.

    The gradient norm is that of the epoch's last step, before clipping; the weight norm is taken after that step.
    Reading them back in every step would make the CPU wait for a GPU.
    """

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        is_last_of_epoch = trainer.fit_loop.epoch_loop.batch_idx + 1 >= trainer.num_training_batches
        is_last_of_run = trainer.global_step + 1 == trainer.max_steps
        if not (is_last_of_epoch or is_last_of_run):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self._gradient = torch.nn.utils.get_total_norm(gradients)
        scale = loss_scale(trainer)
        if scale is not None and unscales_in_step(optimizer):
            self._gradient = self._gradient / scale

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._gradient is not None:
            weights = torch.nn.utils.get_total_norm([p.detach() for p in pl_module.parameters()])
            pl_module.log_dict({"grad_norm": self._gradient, "weight_norm": weights})
            self._gradient = None
