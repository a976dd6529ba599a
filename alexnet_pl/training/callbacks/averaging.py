"""Weight averaging: an exponential moving average that is validated, tested and exported instead of the raw weights."""

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor

from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.lightning_internals import move_average


class EMA(WeightAveraging):
    """Exponential moving average of the weights and BatchNorm statistics, updated after every optimizer step.

    Validation and test use the averaged weights, so ``best.ckpt`` holds them and an export contains them. Training goes
    on with the raw ones, which resume checkpoints hold as well. In the first steps the decay is only
    ``(1 + n) / (10 + n)`` after ``n`` updates, as in TensorFlow's ``ExponentialMovingAverage``: otherwise the random
    initial weights would dominate the average of a short run.

    Args:
        decay: weight of the previous average, in [0, 1).

    Raises:
        ConfigError: ``decay`` out of range.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ConfigError(f"callbacks.ema.decay={decay} is invalid: expected a number from 0 to below 1.")
        self.decay = decay
        super().__init__(use_buffers=True, multi_avg_fn=self._average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        move_average(self, trainer.strategy.root_device)  # the network itself is still on the CPU

    def _average(self, averages: list[Tensor], currents: list[Tensor], updates: Tensor) -> None:
        """Update tensors of one type in a few calls for all of them, since on a GPU every call takes CPU time."""
        if not averages[0].is_floating_point():  # BatchNorm's count of batches
            torch._foreach_copy_(averages, currents)
            return
        assert self._average_model is not None
        done = int(self._average_model.n_averaged)  # on the CPU: reading ``updates`` would wait for the GPU
        torch._foreach_lerp_(averages, currents, 1 - min(self.decay, (1 + done) / (10 + done)))


_UNSUPPORTED = {
    StochasticWeightAveraging: "its averaged weights are never validated. Use callbacks=ema",
    BatchSizeFinder: "it changes data.batch_size behind the config. Set data.batch_size",
    LearningRateFinder: "it changes optimizer.lr behind the config. Set optimizer.lr, or search it with -m",
    GradientAccumulationScheduler: "schedules need a fixed number of steps. Set trainer.accumulate_grad_batches",
}
"""Lightning's callbacks that change a run so that its result would not be what its config says."""


def check_supported(callbacks: dict[str, Callback]) -> None:
    """Refuse callbacks with which a run would report wrong numbers.

    Raises:
        ConfigError: names the key and an alternative.
    """
    averaging = [name for name, callback in callbacks.items() if isinstance(callback, WeightAveraging)]
    if len(averaging) > 1:
        raise ConfigError(f"callbacks.{averaging[1]} is invalid: expected one callback that averages weights.")
    for name, callback in callbacks.items():
        for refused, reason in _UNSUPPORTED.items():
            if isinstance(callback, refused):
                raise ConfigError(
                    f"callbacks.{name}={refused.__name__} is invalid: {reason}, or leave it out: ~callbacks.{name}"
                )
