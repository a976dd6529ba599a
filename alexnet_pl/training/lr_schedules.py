"""Learning-rate schedules that torch does not have: plateau with warm-up, milestones per parameter group."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alexnet_pl.runtime.errors import ConfigError, invalid_value


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
        factor, patience, mode: see ``ReduceLROnPlateau``: what the learning rate is multiplied by, how many epochs with
            validation may pass without improvement, and whether less (``min``) or more (``max``) is better.
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
        if warmup_lr >= rates[0]:
            self.warmup_epochs = 0

    def warm_up(self, progress: float) -> None:
        """Set the learning rate of the next step if the warm-up determines it.

        It is a function of ``progress`` alone, so that a resumed run has the learning rates of an uninterrupted one.

        Args:
            progress: epochs done, including the fraction of the current one.
        """
        if progress < self.warmup_epochs:
            fraction, self.warming = progress / self.warmup_epochs, True
            self.cooldown_counter = 1  # torch's class does not reduce it after the next validation
        elif self.warming:
            fraction, self.warming = 1.0, False
        else:
            return
        for group, full in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            start = min(self.warmup_lr * (full / self.full_rates[0]), full)
            group["lr"] = full if fraction == 1 else start + fraction * (full - start)


class Milestones(LRScheduler):
    """Learning rates that change after given epochs, with milestones of their own for single layers.

    The authors lowered the rates of 2012 by hand, at epochs that their parameter files record: those of the weights
    only, and conv1's earlier than the others'.

    Args:
        optimizer: its learning rates are those before the first milestone.
        epochs: increasing numbers of epochs (or steps, with ``interval: step``) after which the rate changes.
        factors: one per milestone: the rate after it as a multiple of the first one.
        hold_biases: keep the rate of the biases, which then need parameter groups of their own
            (``optimizer.bias_lr_multiplier``; in a network without normalization layers also
            ``optimizer.decay_biases_and_norms=false``).
        layers: pattern with an empty entry in ``optimizer.layers`` → ``epochs`` and ``factors`` of what it matches;
            ``conv1 weights`` and ``conv1 biases`` instead of ``conv1`` concern one of the two.

    Raises:
        ConfigError: epochs that do not increase, a negative factor, lists of different lengths, biases in a group with
            weights, layers without parameter groups of their own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        epochs: Sequence[int],
        factors: Sequence[float],
        hold_biases: bool = False,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        named = {str(group.get("name", "")): group for group in optimizer.param_groups}
        tables = {"": (list(epochs), list(factors))}
        for pattern, table in (layers or {}).items():
            if not any(_concerns(pattern, name) for name in named):
                fix = f"Add optimizer.layers.{pattern.partition(' ')[0]}={{}}"
                raise invalid_value("scheduler.layers", pattern, "layers with parameter groups of their own", fix)
            tables[pattern] = (list(table.get("epochs", [])), list(table.get("factors", [])))
        for pattern, (milestones, values) in tables.items():
            _check_milestones(f"scheduler.layers.{pattern}" if pattern else "scheduler", milestones, values)
        self.tables = []
        for name in named:
            pattern = next((pattern for pattern in tables if pattern and _concerns(pattern, name)), "")
            held = hold_biases and not pattern and "biases" in name
            if hold_biases and (not name or (held and ("weights" in name or "norms" in name))):
                fix = "Set optimizer.bias_lr_multiplier=2, or another number than 1"
                raise invalid_value("scheduler.hold_biases", True, "biases in a parameter group of their own", fix)
            self.tables.append(([], []) if held else tables[pattern])
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group, a function of ``last_epoch`` alone."""
        rates: list[float | Tensor] = []
        for base, (epochs, factors) in zip(self.base_lrs, self.tables, strict=True):
            passed = [factor for epoch, factor in zip(epochs, factors, strict=True) if epoch <= self.last_epoch]
            rates.append(base * (passed[-1] if passed else 1.0))
        return rates


def _concerns(pattern: str, group: str) -> bool:
    """Return True if an entry of ``layers`` is about the parameter group of that name."""
    return pattern == group or group.startswith(f"{pattern} ")


def _check_milestones(path: str, epochs: Sequence[Any], factors: Sequence[Any]) -> None:
    """Check milestones and their factors.

    Raises:
        ConfigError: names the key.
    """
    if any(type(epoch) is not int or epoch < 1 for epoch in epochs) or epochs != sorted(set(epochs)):
        raise invalid_value(f"{path}.epochs", epochs, "increasing whole numbers ≥ 1")
    if len(factors) != len(epochs) or not all(0 <= factor < math.inf for factor in factors):
        raise invalid_value(f"{path}.factors", factors, f"{len(epochs)} numbers ≥ 0, one per milestone")
