"""Learning-rate schedules in a config: when they step, their linear warm-up, and lengths that follow the run."""

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alexnet_pl.runtime.errors import ConfigError, invalid_value

INTERVALS = ("epoch", "step")

LENGTHS = ("T_max", "total_steps", "total_iters")
"""Arguments of schedules that ``auto`` sets to the length of the run: its epochs, or its optimizer steps."""

PEAKS = ("max_lr", "base_lr")
"""Arguments of schedules that are learning rates: each parameter group gets them in proportion to its own rate."""

PER_STEP = ("OneCycleLR", "CyclicLR")
"""Schedules that torch defines per optimizer step."""

REHEARSED = 1000
"""Length of a schedule that is only created to have its arguments checked."""


@dataclass(frozen=True)
class RunLength:
    """How long a run, or what is left of it, will be.

    Attributes:
        epochs: epochs, the last one possibly incomplete.
        steps: optimizer steps.
    """

    epochs: int
    steps: int


@dataclass(frozen=True)
class ScheduleFactory:
    """A learning-rate schedule as configured, to be created for an optimizer.

    Attributes:
        make: creates the scheduler from the optimizer and keyword arguments.
        interval: ``epoch`` or ``step``, after which the scheduler steps.
        auto: names of arguments that follow from the length of the run.
        warmup_epochs: epochs in which the scheduled rates are multiplied by a factor that rises linearly to 1.
    """

    make: Any  # a class or functools.partial: typed calls are impossible because each schedule has its own arguments
    interval: Literal["epoch", "step"]
    auto: tuple[str, ...] = ()
    warmup_epochs: float = 0.0

    def warmup_factor(self, progress: float) -> float:
        """Return the factor of the learning rates for a step that ends at ``progress`` epochs; 1 after the warm-up."""
        return 1.0 if progress >= self.warmup_epochs else progress / self.warmup_epochs

    def _peaks(self, optimizer: Optimizer) -> dict[str, list[float]]:
        """Return the ``PEAKS`` of each parameter group if the config gives one number and groups have other rates."""
        groups, settings = optimizer.param_groups, getattr(self.make, "keywords", {})
        ratios = [group["lr"] / optimizer.defaults["lr"] for group in groups]
        found = {name: settings[name] for name in PEAKS if isinstance(settings.get(name), int | float)}
        if set(ratios) == {1}:
            return {}
        return {name: [value * ratio for ratio in ratios] for name, value in found.items()}

    def __call__(self, optimizer: Optimizer, length: RunLength | None = None) -> LRScheduler:
        """Create the scheduler for a run of ``length``; without one, for a rehearsal before data is read.

        Raises:
            ConfigError: a plateau schedule per step, a per-step schedule per epoch, a schedule shorter than the run, a
                cycle whose warm-up is a single step or leaves nothing to fall in, a cycle of the momentum that its own
                value has no part in, a final rate above the first, a warm-up longer than the run.
        """
        total = REHEARSED if length is None else length.steps if self.interval == "step" else length.epochs
        before = [dict(group) for group in optimizer.param_groups]
        try:
            scheduler: LRScheduler = self.make(optimizer, **dict.fromkeys(self.auto, total), **self._peaks(optimizer))
        except ZeroDivisionError as error:  # OneCycleLR, by the length of its warm-up less one
            part = getattr(self.make, "keywords", {}).get("pct_start")
            raise ConfigError(
                f"scheduler.pct_start={part} is invalid in a run of {total} {self.interval}s: expected a warm-up of "
                "more than one of them. Set a larger one, or train longer."
            ) from error
        check_momentum(optimizer, scheduler, before)
        check_final_rate(optimizer, scheduler)
        check_cycle(getattr(self.make, "keywords", {}))
        name = type(scheduler).__name__
        if self.interval == "step" and isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                f"scheduler.interval=step is invalid: {name} expects epoch, because it watches one value per epoch."
            )
        if self.interval == "epoch" and name in PER_STEP:
            raise ConfigError(
                f"scheduler.interval=epoch is invalid: {name} expects step. Set scheduler.interval=step, with a plus "
                "in front if the key is new."
            )
        # Torch raises an error in the step after the last, hours into a run.
        if length is not None and (last := getattr(scheduler, "total_steps", total)) < total:
            raise ConfigError(
                f"scheduler.total_steps={last} is invalid: expected at least {total}, the {self.interval}s of this "
                "run. Set scheduler.total_steps=auto"
            )
        warmup_epochs = max(self.warmup_epochs, getattr(scheduler, "warmup_epochs", 0))
        if length is not None and warmup_epochs > length.epochs:
            raise invalid_value("scheduler.warmup_epochs", warmup_epochs, f"at most {length.epochs}, those of this run")
        return scheduler


def check_momentum(optimizer: Optimizer, scheduler: LRScheduler, before: list[dict[str, Any]]) -> None:
    """Check that a schedule that cycles the momentum, or Adam's first beta, does not replace a value it never takes.

    Args:
        before: the parameter groups before the schedule was created, which sets its own momentum at once.

    Raises:
        ConfigError: names the key, its value and the cycle's range.
    """
    if not getattr(scheduler, "cycle_momentum", False):
        return
    cycles_beta = "betas" in optimizer.defaults  # as torch decides it
    for group, given in zip(optimizer.param_groups, before, strict=True):
        key, value = ("betas[0]", given["betas"][0]) if cycles_beta else ("momentum", given["momentum"])
        low, high = group["base_momentum"], group["max_momentum"]
        if not low <= value <= high:
            raise ConfigError(
                f"optimizer.{key}={value} is invalid with a schedule that moves it between {low} and {high}: to keep "
                "it, set scheduler.cycle_momentum=false"
            )


def check_cycle(settings: Mapping[str, Any]) -> None:
    """Check that a cycle leaves steps in which its learning rate falls, which torch does not.

    Raises:
        ConfigError: ``pct_start`` is 1, or above 0.5 in a cycle of three phases, the second as long as the first.
    """
    part = settings.get("pct_start")
    if isinstance(part, int | float) and settings.get("three_phase") and part > 0.5:
        raise invalid_value("scheduler.pct_start", part, "at most 0.5 with scheduler.three_phase=true")
    if isinstance(part, int | float) and part >= 1:
        raise invalid_value("scheduler.pct_start", part, "a number below 1, because the learning rate must fall again")


def check_final_rate(optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Check that ``eta_min``, the rate at which a cosine ends in every parameter group, is not above a group's first.

    Raises:
        ConfigError: names the key, its value and the group, whose rate would rise.
    """
    final = getattr(scheduler, "eta_min", None)
    if not isinstance(final, int | float):
        return
    for group in optimizer.param_groups:
        first = float(group.get("initial_lr", group["lr"]))
        if final > first and not math.isclose(final, first):
            named = f", the learning rate of {group['name']}" if group.get("name") else ", the learning rate"
            raise invalid_value("scheduler.eta_min", final, f"at most {first:g}{named}")


def schedule_factory(configured: Any) -> ScheduleFactory | None:
    """Separate ``interval``, ``warmup_epochs`` and ``auto`` lengths from an instantiated ``scheduler`` section.

    Args:
        configured: the ``functools.partial`` that Hydra makes of the section, any other callable, or None.

    Raises:
        ConfigError: an unknown interval or a negative warm-up.
    """
    if configured is None or isinstance(configured, ScheduleFactory):
        return configured
    if not isinstance(configured, functools.partial):
        return ScheduleFactory(configured, "epoch")
    keywords = dict(configured.keywords)
    own = inspect.signature(configured.func).parameters
    interval = "epoch" if "interval" in own else keywords.pop("interval", "epoch")
    warmup_epochs = 0.0 if "warmup_epochs" in own else keywords.pop("warmup_epochs", 0.0)
    if not 0 <= warmup_epochs < math.inf:
        raise invalid_value("scheduler.warmup_epochs", warmup_epochs, "0 or more epochs")
    if interval not in INTERVALS:
        raise ConfigError(f"scheduler.interval={interval} is invalid: expected epoch or step.")
    auto = tuple(name for name in LENGTHS if keywords.get(name) == "auto")
    if keywords.get("last_epoch", -1) != -1:
        fix = "A resumed run continues its schedule by itself."
        raise invalid_value("scheduler.last_epoch", keywords["last_epoch"], "no such key", fix)
    fixed = {name: value for name, value in keywords.items() if name not in auto}
    make = functools.partial(configured.func, *configured.args, **fixed)
    return ScheduleFactory(make, cast(Literal["epoch", "step"], interval), auto, warmup_epochs)
