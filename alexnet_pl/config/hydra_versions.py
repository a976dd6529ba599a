"""Differences between Hydra 1.3 with OmegaConf 2.3 and Hydra 1.4 with OmegaConf 2.4: both run without warnings."""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from packaging.version import Version

from alexnet_pl.runtime.errors import one_line

IS_1_4 = Version(hydra.__version__).release >= (1, 4)

VERSION_BASE: dict[str, Any] = {} if IS_1_4 else {"version_base": "1.3"}
"""Argument of ``initialize_config_dir`` that Hydra 1.3 demands and 1.4 deprecates."""

MAIN: dict[str, Any] = (
    {"execution_whitelist": ["alexnet_pl.*", "hydra.*", "hydra_plugins.*", "logging.*"]} if IS_1_4 else VERSION_BASE
)
"""Arguments of ``hydra.main``: to Hydra 1.4, what its callbacks, launchers and logging may call."""


def option_parser() -> ArgumentParser:
    """Return the parser of Hydra's own options, such as ``-m`` and ``--cfg``."""
    from hydra._internal.utils import get_args_parser  # start-up time: not needed in workers

    return get_args_parser()


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Register a resolver with OmegaConf, in place of an earlier one of that name."""
    if IS_1_4:  # whose check of annotations warns of an integer where a float is meant
        register: Any = OmegaConf.register_resolver  # another function in OmegaConf 2.3
        register(name, resolver, replace=True, annotation_validation="off")
    else:
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def instantiate(config: Any, **settings: Any) -> Any:
    """Return the object that a config describes, by Hydra's ``instantiate``.

    Hydra 1.4 asks for a list of what may be called. It gets the targets of the config, because it is not the check: the
    user's own configs may name anything, and foreign ones have passed ``config.trust.check_targets``.

    Raises:
        InstantiationException: whatever a constructor raised, as its cause.
    """
    from hydra.utils import instantiate as hydra_instantiate  # start-up time: not needed to print a config

    if not IS_1_4:
        return hydra_instantiate(config, **settings)
    named = {*named_targets(config)}
    # Hydra compares the names that imports resolve to, which have the package in common with the short ones.
    callables = [*named, *{f"{name.partition('.')[0]}.*" for name in named if "." in name}]
    try:
        return hydra_instantiate(config, _execution_whitelist_=callables, **settings)
    except HydraException:
        raise
    except Exception as error:  # of a constructor; Hydra 1.3 raises it like this
        raise InstantiationException(one_line(error)) from error


def named_targets(node: Any) -> Iterator[str]:
    """Yield every ``_target_`` of a config."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from named_targets(value)
