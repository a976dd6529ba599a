"""What happens around steps and epochs: reseeding, stopping at NaN, timing, and the line a person reads."""

import logging
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor
from torch.optim import Optimizer

from alexnet_pl.data.loaders import epoch_seed
from alexnet_pl.runtime.errors import ConfigError

log = logging.getLogger(__name__)


class ReseedEachEpoch(Callback):
    """Make dropout and augmentation of an epoch a function of ``(seed, epoch, rank)``, whatever was drawn before it."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(epoch_seed(self.seed, trainer.current_epoch, trainer.global_rank))


class StopAtTrainingError(EarlyStopping):
    """Ends training after the epoch whose ``train/error`` is below ``error``: what figure 1 of the paper waits for.

    Args:
        error: fraction of the training images, in (0, 1).

    Raises:
        ConfigError: ``error`` out of range.
    """

    def __init__(self, error: float = 0.25):
        if not 0 < error < 1:
            raise ConfigError(f"StopAtTrainingError error={error} is not possible: it is above 0 and below 1.")
        never = 2**31
        super().__init__("train/error", patience=never, stopping_threshold=error, check_on_train_epoch_end=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was stopped between its last epoch and its test has nothing left to learn.
        trainer.should_stop = trainer.should_stop or self.stopping_reason is EarlyStoppingReason.STOPPING_THRESHOLD


class EpochReport(Callback):
    """Logs ``epoch_seconds`` (training and validation) and ``images_per_second`` (training alone), and one line."""

    def __init__(self) -> None:
        self._start = 0.0
        self._trained = 0.0
        self._images = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self._start, "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on inside an epoch; at the start of one, what is loaded here is set anew."""
        self._start = time.perf_counter() - state_dict["seconds"]
        self._images = state_dict["images"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._trained = time.perf_counter()
        self._images = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = time.perf_counter() - self._start
        rate = self._images / (self._trained - self._start)
        self.log_dict({"epoch_seconds": seconds, "images_per_second": rate})
        values = trainer.callback_metrics
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        log.info(
            f"epoch {epoch:>{len(str(epochs))}}/{epochs}  {seconds:6.1f} s  {rate:6,.0f} images/s  "
            f"val loss {values['val/loss']:.4f}  val acc {values['val/acc']:.4f}"
        )


class Norms(Callback):
    """Logs ``grad_norm`` (of the epoch's last step, before clipping) and ``weight_norm`` (after it), both Euclidean
    over all parameters. Once an epoch: a look at every step would make a GPU wait."""

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx + 1 < trainer.num_training_batches:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self._gradient = torch.nn.utils.get_total_norm(gradients)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            self._gradient = self._gradient / scaler.get_scale()  # a fused optimiser unscales in its own step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._gradient is not None:
            weights = torch.nn.utils.get_total_norm([p.detach() for p in pl_module.parameters()])
            self.log_dict({"grad_norm": self._gradient, "weight_norm": weights})
            self._gradient = None


class ProgressBar(RichProgressBar):
    """Lightning's bar on a terminal, with epochs counted from 1 as everywhere else in this project."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))
