"""Learning-rate schedules beside torch's own."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from alexnet_pl.runtime.errors import ConfigError


class WarmupPlateau(ReduceLROnPlateau):
    """The paper's schedule (section 5), with a linear warm-up for large batches (Goyal et al. 2017, section 2.2).

    The rate is multiplied by ``factor`` whenever the monitored quantity has stopped improving, ``max_reductions`` times
    at most. The paper did this by hand, three times before it ended; how long it waited is not known.

    During the first ``warmup_epochs`` the rate rises step by step from ``warmup_lr`` to the optimiser's, and does not
    fall. An optimiser's rate that is no higher than ``warmup_lr``, as with the paper's batches of 128, stays as it is.

    Args:
        optimizer: its rates are those after the warm-up.
        warmup_epochs: 0 or more; need not be whole.
        warmup_lr: rate of the first step, above 0.
        max_reductions: 0 or more.
        factor, patience, mode: torch's: what the rate is multiplied by, how many epochs without improvement are let
            pass, and whether less (``min``) or more (``max``) is better.
        monitor: the logged quantity to watch.
        **settings: ``ReduceLROnPlateau``'s.

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
            raise ConfigError(f"scheduler.warmup_epochs={warmup_epochs} is not possible: it is 0 or more epochs.")
        if not 0 < warmup_lr < math.inf:
            raise ConfigError(f"scheduler.warmup_lr={warmup_lr} is not possible: it is a number above 0.")
        if max_reductions < 0:
            raise ConfigError(f"scheduler.max_reductions={max_reductions} is not possible: it is 0 or more.")
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        lowest = [rate * factor**max_reductions for rate in rates]
        super().__init__(
            optimizer, **{"mode": mode, "factor": factor, "patience": patience, "min_lr": lowest, **settings}
        )
        self.monitor = monitor
        self.warmup_epochs, self.warmup_lr, self.full_rates = warmup_epochs, warmup_lr, rates
        self.warming = False
        self.cooldown_counter = math.ceil(warmup_epochs)  # epochs in which torch's class does not lower the rate

    def warm_up(self, progress: float) -> None:
        """Set the rate of the coming step, where the warm-up has a say in it.

        A function of ``progress`` alone, so that a resumed run has the rates of one that never stopped.

        Args:
            progress: epochs done, with a fraction for the batches of this one.
        """
        if progress < self.warmup_epochs:
            share, self.warming = progress / self.warmup_epochs, True
        elif self.warming:
            share, self.warming = 1.0, False
        else:
            return
        for group, full in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            start = min(self.warmup_lr, full)
            group["lr"] = full if share == 1 else start + share * (full - start)
