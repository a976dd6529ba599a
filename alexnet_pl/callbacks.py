"""What happens at the edges of an epoch: reseeding, timing, and the line a person reads in the log."""

import logging
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from alexnet_pl.data.loader import epoch_seed

log = logging.getLogger(__name__)


class ReseedEachEpoch(Callback):
    """Make dropout and augmentation of an epoch a function of ``(seed, epoch)``, whatever was drawn before it."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(epoch_seed(self.seed, trainer.current_epoch))


class EpochReport(Callback):
    """Logs ``epoch_seconds`` (training and validation) and ``images_per_second`` (training alone), and one line."""

    def __init__(self) -> None:
        self._start = 0.0
        self._trained = 0.0
        self._images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._trained = time.perf_counter()
        self._images = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1])

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


class ProgressBar(RichProgressBar):
    """Lightning's bar on a terminal, with epochs counted from 1 as everywhere else in this project."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))
