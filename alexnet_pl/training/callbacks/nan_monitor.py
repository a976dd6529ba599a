"""training.callbacks.nan_monitor."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from alexnet_pl.distributed.collectives import all_reduce_max
from alexnet_pl.runtime.errors import ConfigError, UserError


class NonFiniteError(UserError):
    """The loss, a gradient or the loss scale says that training has broken down."""

    exit_code = 1


class NaNMonitor(Callback):
    """Stops a run whose loss or gradient is NaN or infinite, before that reaches a checkpoint.

    The loss is looked at in every step. A gradient is not: that would mean reading the whole network once more. It is
    found in the weights, where it has made NaN of them, before anything is saved and when the next loss is NaN.

    Reading a value back from a GPU would make the CPU wait for it in every step; there, and where several processes
    have to look together, the first such loss is remembered on the device and read back every
    ``check_every_n_steps`` steps,
    before validation and before anything is saved.

    With a float16 loss scaler an infinite gradient is part of the method (the step is skipped and the scale halved),
    so there it is ``max_skipped`` such steps in a row that stop the run.

    Args:
        max_skipped: steps in a row that the loss scaler may skip, at least 1.
        check_every_n_steps: steps between two looks on a GPU, at least 1.

    Raises:
        ConfigError: a number below 1.
    """

    HOW = ("nan", "infinite")
    NEVER = 2**62

    def __init__(self, max_skipped: int = 25, check_every_n_steps: int = 50):
        for name, value in (("max_skipped", max_skipped), ("check_every_n_steps", check_every_n_steps)):
            if value < 1:
                raise ConfigError(
                    f"callbacks.nan_monitor.{name}={value} is not possible: it is a number of steps from 1."
                )
        self.max_skipped, self.check_every_n_steps = max_skipped, check_every_n_steps
        self._first: Tensor | None = None
        self._step = self._batch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        self._at_once = device.type == "cpu" and trainer.world_size == 1
        self._first = torch.tensor(self.NEVER, device=device)  # 2 · step + 1 for an infinity: the smallest is the first
        self._skipped = self._longest = torch.zeros((), dtype=torch.int64, device=device)
        self._scale = torch.zeros((), device=device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._step, self._batch = trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx
        if self._at_once:
            if not torch.isfinite(loss):
                if self._batch > 0 and not finite(pl_module):
                    self._stop(trainer, self._step - 1, "gradient", "nan")
                self._stop(trainer, self._step, "loss", self.HOW[int(loss.isinf())])
            return
        loss = loss.detach()
        code = 2 * self._step + loss.isinf()
        self._first = torch.where(loss.isfinite(), self._first, torch.minimum(self._first, code))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scale = scaler._scale.clone()  # scaler.get_scale() would read it back
            self._skipped = torch.where(scale < self._scale, self._skipped + 1, 0)
            self._longest, self._scale = torch.maximum(self._longest, self._skipped), scale
        if not self._at_once and (batch_idx + 1) % self.check_every_n_steps == 0:
            self.look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_closely(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look_closely(trainer, pl_module)

    def _look_closely(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first is None:  # before training
            return
        self.look(trainer)
        if not finite(pl_module):
            self._stop(trainer, self._step, "gradient", "nan")

    def look(self, trainer: Trainer) -> None:
        """Read back what has been remembered.

        Raises:
            NonFiniteError: names the step, its images and the learning rate.
        """
        (latest,) = all_reduce_max(-int(self._first))
        if (first := -latest) != self.NEVER:
            step, infinite = divmod(first, 2)
            self._stop(trainer, step, "loss", self.HOW[infinite])
        if (longest := int(self._longest)) >= self.max_skipped:
            self._stop(trainer, self._step, f"gradient, in {longest} steps in a row,", "infinite")

    def _stop(self, trainer: Trainer, step: int, what: str, how: str) -> None:
        batch = self._batch - (self._step - step)
        images = trainer.train_dataloader.batches()[batch].tolist()
        listed = ", ".join(map(str, images[:8])) + (", …" if len(images) > 8 else "")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        raise NonFiniteError(
            f"the {what} is {how} at step {step} (epoch {trainer.current_epoch + 1}, batch {batch}, "
            f"{len(images)} images: {listed}; learning rate {rate:g}).\n"
            f"The checkpoints before it are kept. Try a smaller optimizer.lr, or trainer.precision=32-true."
        )


def finite(module: nn.Module) -> bool:
    """Whether no parameter is NaN or infinite: neither gets lost in a sum, which reads every value just once."""
    return bool(torch.stack([parameter.detach().float().sum() for parameter in module.parameters()]).sum().isfinite())
