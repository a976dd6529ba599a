"""Learning-rate schedules that torch does not have: plateau with warm-up."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet_pl.runtime.errors import ConfigError


class WarmupPlateau(ReduceLROnPlateau):
    """The paper's schedule (section 5) with a linear warm-up for large batches (Goyal et al. 2017, section 2.2).

    The learning rate is multiplied by ``factor`` whenever the monitored quantity stops improving, at most
    ``max_reductions`` times. The paper's authors did this by hand, three times before training ended; how long they
    waited is not known.

    During the first ``warmup_epochs`` the learning rate rises per step from ``warmup_lr`` to the optimizer's and is not
    reduced. An optimizer whose learning rate is not above ``warmup_lr``, as with the paper's batches of 128, has no
    warm-up.

    Args:
        optimizer: its learning rates are those after the warm-up.
        warmup_epochs: 0 or more; may be fractional.
        warmup_lr: learning rate of the first step, above 0; of the first parameter group, others in proportion.
        max_reductions: 0 or more.
        factor, patience, mode: see ``ReduceLROnPlateau``: what the learning rate is multiplied by, how many epochs may
            pass without improvement, and whether less (``min``) or more (``max``) is better.
        monitor: logged metric to watch.
        **settings: passed to ``ReduceLROnPlateau``.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: float = 0,
        warmup_lr: float = 0.01,
        max_reductions: int = 3,
        factor: float = 0.1,
        patience: int = 5,
        mode: str = "min",
        monitor: str = "val/error",
        **settings: Any,
    ):
        if not 0 <= warmup_epochs < math.inf:
            raise ConfigError(f"scheduler.warmup_epochs={warmup_epochs} is invalid: expected 0 or more epochs.")
        if not 0 < warmup_lr < math.inf:
            raise ConfigError(f"scheduler.warmup_lr={warmup_lr} is invalid: expected a number above 0.")
        if max_reductions < 0:
            raise ConfigError(f"scheduler.max_reductions={max_reductions} is invalid: expected 0 or more.")
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        lowest = [rate * factor**max_reductions for rate in rates]
        super().__init__(
            optimizer, **{"mode": mode, "factor": factor, "patience": patience, "min_lr": lowest, **settings}
        )
        self.monitor = monitor
        self.warmup_epochs, self.warmup_lr, self.full_rates = warmup_epochs, warmup_lr, rates
        self.warming = False
        self.cooldown_counter = math.ceil(warmup_epochs)  # epochs in which torch's class does not reduce it

    def warm_up(self, progress: float) -> None:
        """Set the learning rate of the next step if the warm-up determines it.

        It is a function of ``progress`` alone, so that a resumed run has the learning rates of an uninterrupted one.

        Args:
            progress: epochs done, including the fraction of the current one.
        """
        if progress < self.warmup_epochs:
            fraction, self.warming = progress / self.warmup_epochs, True
        elif self.warming:
            fraction, self.warming = 1.0, False
        else:
            return
        for group, full in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            start = min(self.warmup_lr * (full / self.full_rates[0]), full)
            group["lr"] = full if fraction == 1 else start + fraction * (full - start)
