"""NaN monitor: stops a run whose loss or gradient is NaN or infinite before a checkpoint is overwritten."""

from typing import Any, NoReturn

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from alexnet_pl.distributed.collectives import all_reduce_max
from alexnet_pl.runtime.errors import UserError, invalid_value
from alexnet_pl.training.lightning_internals import loss_scale


class NonFiniteError(UserError):
    """Training has diverged: the loss, a gradient or the loss scale is NaN or infinite."""

    exit_code = 1


class NaNMonitor(Callback):
    """Stop a run whose loss or gradient is NaN or infinite, before that reaches a checkpoint.

    The loss is checked in every batch. Checking every gradient would mean reading the whole network once more, so a
    bad one is found through the weights that it has turned into NaN: when the next loss is NaN, before validation and
    before anything is saved.

    On a GPU, reading a value back in every batch would make the CPU wait, and several ranks have to check together.
    There the first bad loss is remembered on the device and read back every ``check_every_n_steps`` batches, before
    validation and before anything is saved.

    With a float16 loss scaler an infinite gradient is part of the method: the step is skipped and the scale halved.
    There the run stops after ``max_skipped`` such steps in a row.

    Args:
        max_skipped: consecutive steps that the loss scaler may skip, at least 1.
        check_every_n_steps: batches between two checks on a GPU, at least 1.

    Raises:
        ConfigError: a number below 1.
    """

    KINDS = ("nan", "infinite")
    NEVER = 2**62

    def __init__(self, max_skipped: int = 25, check_every_n_steps: int = 50):
        for name, value in (("max_skipped", max_skipped), ("check_every_n_steps", check_every_n_steps)):
            if value < 1:
                raise invalid_value(f"callbacks.nan_monitor.{name}", value, "a positive integer")
        self.max_skipped, self.check_every_n_steps = max_skipped, check_every_n_steps
        self._first: Tensor | None = None
        self._step = self._batch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        self._is_immediate = device.type == "cpu" and trainer.world_size == 1
        # 2 · batch, plus 1 for an infinity: the minimum is the first bad batch of the epoch.
        self._first = torch.tensor(self.NEVER, device=device)
        self._skipped = self._longest = torch.zeros((), dtype=torch.int64, device=device)
        self._scale = torch.zeros((), device=device)
        self._scaled_step = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._step, self._batch = trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx
        if self._is_immediate:
            if not torch.isfinite(loss):
                last_update = self._batch // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches - 1
                if last_update >= 0 and not is_finite(pl_module):
                    self._stop(trainer, last_update, "gradient", "nan")
                self._stop(trainer, self._batch, "loss", self.KINDS[int(loss.isinf())])
            return
        assert self._first is not None
        loss = loss.detach()
        code = 2 * self._batch + loss.isinf()
        self._first = torch.where(loss.isfinite(), self._first, torch.minimum(self._first, code))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scale = loss_scale(trainer)
        if scale is not None and trainer.global_step != self._scaled_step:  # no batch whose gradients are accumulated
            self._scaled_step = trainer.global_step
            self._skipped = torch.where(scale < self._scale, self._skipped + 1, 0)
            self._longest, self._scale = torch.maximum(self._longest, self._skipped), scale
        if not self._is_immediate and (batch_idx + 1) % self.check_every_n_steps == 0:
            self.check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_with_weights(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_with_weights(trainer, pl_module)  # an epoch may end without validation

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_with_weights(trainer, pl_module)

    def _check_with_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first is None:  # before training
            return
        self.check(trainer)
        if not is_finite(pl_module):
            self._stop(trainer, self._batch, "gradient", "nan")

    def check(self, trainer: Trainer) -> None:
        """Read back what was remembered on the device.

        Raises:
            NonFiniteError: names the step, its images and the learning rate.
        """
        assert self._first is not None
        (latest,) = all_reduce_max(-int(self._first))
        if (first := -latest) != self.NEVER:
            batch, is_infinite = divmod(first, 2)
            self._stop(trainer, batch, "loss", self.KINDS[is_infinite])
        if (longest := int(self._longest)) >= self.max_skipped:
            self._stop(trainer, self._batch, f"gradient, in {longest} consecutive steps,", "infinite")

    def _stop(self, trainer: Trainer, batch: int, what: str, kind: str) -> NoReturn:
        """Raise the error for a batch of the current epoch, counted from 0."""
        per_step = trainer.accumulate_grad_batches
        step = self._step - (self._batch // per_step - batch // per_step)
        loader: Any = trainer.train_dataloader  # a BatchLoader; Lightning declares Any or None
        start = loader.images_before(batch)  # an epoch resumed with another batch size is shifted
        images = torch.cat(loader.batches())[start : start + loader.batch_size].tolist()
        listed = ", ".join(map(str, images[:8])) + (", …" if len(images) > 8 else "")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        raise NonFiniteError(
            f"the {what} is {kind} at step {step} (epoch {trainer.current_epoch + 1}, batch {batch}, "
            f"{len(images)} images: {listed}; learning rate {rate:g}).\n"
            f"Earlier checkpoints are kept. Try a smaller optimizer.lr, or trainer.precision=32-true."
        )


def is_finite(module: nn.Module) -> bool:
    """Return True if no parameter is NaN or infinite. Neither vanishes in a sum, which reads every value just once."""
    return bool(torch.stack([parameter.detach().float().sum() for parameter in module.parameters()]).sum().isfinite())
