"""Private API of Hydra and torch that studies rely on, all in one place. Each use has a test that names it."""

import sys
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig


def expand_sweep(config: DictConfig) -> Sequence[Sequence[str]]:
    """Return the overrides of every trial of a sweep, [] for a sweeper that chooses its trials as it goes.

    Hydra offers no public way to learn them before the first trial runs.
    """
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + list(config.hydra.overrides.task)
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    trials: Sequence[Sequence[str]] = BasicSweeper.split_arguments(parsed, None)[0]
    return trials


def clear_traced_modules() -> None:
    """Free what torch.jit.trace has kept of a trial's networks, unless traced or scripted modules are still in use.

    What survives the first trial, mostly imported modules, is exempted from garbage collection.
    """
    if "torch.jit" not in sys.modules:
        return
    from alexnet_pl.training.lightning_internals import free_traced_types  # start-up time: it imports torch

    free_traced_types(freeze=True)
