"""Private API of Hydra and torch that studies rely on, all in one place. Each use has a test that names it."""

import copy
import sys
from collections.abc import Callable, Sequence

from hydra._internal import config_loader_impl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict

from alexnet_pl.config.hydra_versions import IS_1_4


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


class SweepComposer:
    """Compose the trials of a sweep faster than Hydra, which reads and merges all of ``conf/`` three times per trial.

    Hydra composes the first trial of each choice of options. Those that differ from it in plain values only are copies
    with these values.

    Args:
        compose: ``ConfigLoader.load_sweep_config``.
        parser: of the loader's overrides.
    """

    def __init__(self, compose: Callable[[DictConfig, list[str]], DictConfig], parser: OverridesParser):
        self._compose, self._parser = compose, parser
        self._first: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return the config of a trial, as ``load_sweep_config`` does."""
        parsed = self._parser.parse_overrides(sweep_overrides)
        plain = {id(override) for override in parsed if self._is_plain(override, master_config)}
        signature = tuple(
            str(override.key_or_group) if id(override) in plain else str(override.input_line) for override in parsed
        )
        if (first := self._first.get(signature)) is None:
            cfg = self._compose(master_config, sweep_overrides)
            self._first[signature] = copy.deepcopy(cfg)
            return cfg
        cfg = copy.deepcopy(first)
        for override in parsed:
            if id(override) in plain:
                OmegaConf.update(cfg, override.key_or_group, override.value())
        with open_dict(cfg.hydra):
            cfg.hydra.overrides.task = sweep_overrides
            name = config_loader_impl.get_overrides_dirname(parsed, **cfg.hydra.job.config.override_dirname)
            cfg.hydra.job.override_dirname = name
        OmegaConf.copy_cache(from_config=master_config, to_config=cfg)
        return cfg

    @staticmethod
    def _is_plain(override: Override, master_config: DictConfig) -> bool:
        """Return True if an override replaces a scalar by another: no group, package, addition, deletion or mapping."""
        key, is_change = override.key_or_group, override.type == OverrideType.CHANGE and override.package is None
        is_option = key in master_config.hydra.runtime.choices or "/" in key or key.startswith("hydra")
        if "." not in key and not is_option:  # Hydra lists no group in its choices whose options are a list
            node = master_config._get_node(key, validate_access=False)
            is_option = node is None or OmegaConf.is_config(node)
        return is_change and not is_option and not isinstance(override.value(), dict | list)


def compose_sweeps_fast() -> None:
    """Let Hydra compose the trials of its current sweep with a :class:`SweepComposer`, in this process.

    Hydra 1.4 has changed what it is made of, and composes them itself.
    """
    if IS_1_4:
        return
    loader = GlobalHydra.instance().config_loader()
    if not isinstance(loader.load_sweep_config, SweepComposer):
        parser = OverridesParser.create(config_loader=loader)
        setattr(loader, "load_sweep_config", SweepComposer(loader.load_sweep_config, parser))  # noqa: B010 (a method)


def clear_traced_modules() -> None:
    """Free what torch.jit.trace has kept of a trial's networks, unless traced or scripted modules are still in use.

    What survives the first trial, mostly imported modules, is exempted from garbage collection.
    """
    if "torch.jit" not in sys.modules:
        return
    from alexnet_pl.training.lightning_internals import free_traced_types  # start-up time: it imports torch

    free_traced_types(freeze=True)
