"""config.trust."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_object
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from alexnet_pl.runtime.errors import ConfigError

# --- configurations of strangers ------------------------------------------------------------------------------------

TRUSTED_NAMES = ("alexnet_pl.", "lightning.", "torch.nn.", "torch.optim.", "torchmetrics.", "torchvision.")

TRUSTED_KINDS = (nn.Module, Optimizer, LRScheduler, Callback, Logger, Trainer)
"""What a run is made of beside this project's own classes. Whatever else those packages hold (``torch.load`` and the
like, what they import from ``os`` or ``subprocess``, readers of pickles) is not a class derived from one of these."""


def check_targets(config: Any) -> None:
    """Refuse a configuration from a run folder whose ``_target_`` keys could do more than build a run.

    Only classes may be named, functions never: this project's own, and those of ``TRUSTED_KINDS`` that are defined
    under ``TRUSTED_NAMES``. Interpolations are refused too: a run folder holds resolved values, and
    ``${oc.create:…}`` could bring in a ``_target_`` that is not there to be seen.

    Args:
        config: a ``DictConfig``, or plain dicts and lists. It is read, never instantiated.

    Raises:
        ConfigError: names the key and the name that is refused.
    """
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    for path, value in _leaves(plain, ""):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{path}={value} is refused: the configuration of a run folder has no interpolations.")
        if path.rpartition(".")[2] == "_target_" and not _is_trusted(value):
            raise ConfigError(
                f"{path}={value} is refused: the configuration of a run folder may only name layers, optimisers, "
                f"schedulers, callbacks and loggers (classes, not functions) under {', '.join(TRUSTED_NAMES)}"
            )


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every key with its value, mappings and lists included, by dotted path."""
    if path:
        yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _is_trusted(target: Any) -> bool:
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target, re.ASCII):
        return False  # no part begins with an underscore: nothing private, no __main__, no __globals__
    if not target.startswith(TRUSTED_NAMES):
        return False
    try:
        found = get_object(target)  # as Hydra will look it up
    except Exception:  # an optional dependency that is not there can raise anything
        return False
    if not inspect.isclass(found) or not found.__module__.startswith(TRUSTED_NAMES):
        return False
    return found.__module__.startswith("alexnet_pl.") or issubclass(found, TRUSTED_KINDS)
