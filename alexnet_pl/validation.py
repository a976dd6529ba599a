"""What cannot work in a configuration, found before any data is read; and what a stranger's configuration may name."""

import collections.abc
import inspect
import os
import pkgutil
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from alexnet_pl.errors import ConfigError, did_you_mean

SECTIONS = ("model", "augment", "data", "optimizer", "scheduler", "trainer")
"""Top-level keys that describe one object each; ``augment`` and ``scheduler`` may be null."""

COLLECTIONS = ("callbacks", "logger")
"""Top-level keys that describe any number of named objects."""

VALUES = ("seed", "split_seed", "study", "channels_last", "compile", "run_dir", "resume", "resume_with_changes",
          "init_from")  # fmt: skip
"""Top-level keys that are plain values."""

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What ``torch.compile`` takes as its mode."""

NEEDED = ("seed", "split_seed", "run_dir", "model.num_classes", "data.image_size", "callbacks.best", "callbacks.resume",
          "logger.csv")  # fmt: skip
"""What a run reads by name, some of it only after training."""

MONITORS = (
    *(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "acc", "acc_top5", "error", "error_top5")),
    "lr",
    "grad_norm",
    "weight_norm",
    "epoch_seconds",
    "images_per_second",
)
"""What :class:`alexnet_pl.classifier.ImageClassifier`, ``EpochReport`` and ``Norms`` log while training."""

LOGGED_BEFORE_SAVING = tuple(name for name in MONITORS if name.startswith("val/"))
"""What there is when ``BestCheckpoint`` looks, at the end of validation: the figures of training come after it."""

BEST_CHECKPOINT = "alexnet_pl.checkpoints.BestCheckpoint"

HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")

Settings = dict[str, Any]


def validate(cfg: DictConfig) -> None:
    """Check everything about a run's configuration that can be known without its data.

    What the constructors check themselves (``data.val_fraction``, ``model.dropout``, …) is left to them: they are
    called before data is read as well.

    Raises:
        ConfigError: names the first key that cannot work, its value and what is allowed.
    """
    check_sections(cfg)
    settings: Settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_ranges(settings)
    # The data borrow values of other sections: what is wrong there is to be named there.
    for section in sorted((*SECTIONS, *COLLECTIONS), key=lambda name: name == "data"):
        check_arguments(section, settings.get(section))
    check_monitors({f"callbacks.{name}": callback for name, callback in settings["callbacks"].items()})
    check_monitors({"scheduler": settings.get("scheduler") or {}})
    check_device(settings["trainer"])
    rehearse_optimizer(cfg)


# --- keys -----------------------------------------------------------------------------------------------------------


def check_sections(cfg: DictConfig) -> None:
    """Refuse a top-level key that nothing reads, and a section that is absent or describes nothing.

    A key of one's own is read where another key refers to it: ``width: 64`` and ``model.fc_width: ${width}``. In a
    configuration from a run folder the references are resolved already; it was checked before it was written.

    Raises:
        ConfigError: names the key.
    """
    known = (*VALUES, *SECTIONS, *COLLECTIONS)
    references = set(re.findall(r"\$\{\.*([^.:}[]+)", OmegaConf.to_yaml(cfg)))
    for key in cfg:
        if references and key not in known and key not in references:
            hint = f" Leave it out: ~{key}" if isinstance(cfg[key], DictConfig) else did_you_mean(str(key), known)
            raise ConfigError(f"{key}={shown(cfg[key])}: nothing reads a key {key}.{hint}")
    for key in (*SECTIONS, *(f"{name}.{entry}" for name in COLLECTIONS for entry in cfg.get(name) or ())):
        described = OmegaConf.select(cfg, key)
        if described is None and key in ("augment", "scheduler"):
            continue
        if described is None and key in SECTIONS:
            raise ConfigError(f"{key} is missing: every run needs it.")
        if not isinstance(described, DictConfig) or "_target_" not in described:
            section, _, entry = key.rpartition(".")
            named = [name for name, value in cfg[section].items() if value and "_target_" in value] if section else []
            hint = did_you_mean(entry, (f"{section}.{name}" for name in named)) if section else ""
            raise ConfigError(f"{key} has no _target_, so it describes nothing.{hint}")
    for key in NEEDED:
        if OmegaConf.select(cfg, key) is None:
            raise ConfigError(f"{key} is missing: every run needs it.")


def check_arguments(path: str, node: Any) -> None:
    """Hold ``node`` and all it contains against the constructors that its ``_target_`` keys name.

    Raises:
        ConfigError: an argument that the constructor does not take, a value of another type than it declares, a
            ``_target_`` that cannot be imported.
    """
    if isinstance(node, list):
        for index, value in enumerate(node):
            check_arguments(f"{path}[{index}]", value)
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        accepted, others_too = accepted_arguments(locate(path, node["_target_"]))
        for key, value in node.items():
            if key in HYDRA_KEYS:
                continue
            if key not in accepted and not others_too:
                name = node["_target_"].rpartition(".")[2]
                hint = did_you_mean(key, accepted)
                raise ConfigError(f"{path}.{key}={shown(value)} is not possible: {name} has no argument {key}.{hint}")
            annotation = accepted.get(key, Any)
            if f"{path}.{key}" == "trainer.precision":
                annotation = annotation | Literal["auto"]  # :func:`alexnet_pl.training.settle` replaces it
            described = isinstance(value, dict) and "_target_" in value
            if not described and not fits(value, annotation):
                words = " or ".join(dict.fromkeys(in_words(annotation)))
                raise ConfigError(f"{path}.{key}={shown(value)} is not possible: it is {words}.")
    for key, value in node.items():
        check_arguments(f"{path}.{key}", value)


def locate(path: str, target: str) -> Callable[..., Any]:
    """The class or function of a ``_target_``.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}._target_={target} cannot be imported: {error}.") from error


def accepted_arguments(make: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """The arguments that ``make`` names, with their annotations, and whether it takes others beside them.

    This project's classes hand their ``**settings`` on to the class they derive from, so its arguments count too.
    """
    if not inspect.isclass(make):
        return _named_arguments(make)
    accepted: dict[str, Any] = {}
    for owner in make.__mro__:
        if "__init__" in vars(owner):
            named, others_too = _named_arguments(owner.__init__)
            accepted = {**named, **accepted}
            if not others_too:
                return accepted, False
            if not owner.__module__.startswith("alexnet_pl."):
                break
    return accepted, True


def _named_arguments(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C
        return {}, True
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # annotations that exist for type checkers only
        hints = {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: hints.get(p.name, Any) for p in parameters if p.kind in by_name and p.name != "self"}
    # ``patience: int = None`` is common, and means that null is fine.
    named |= {p.name: named[p.name] | None for p in parameters if p.name in named and p.default is None}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


# --- types ----------------------------------------------------------------------------------------------------------


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain YAML value can be what ``annotation`` declares. True where that is not for us to judge."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if annotation in (None, types.NoneType):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is str or (inspect.isclass(annotation) and issubclass(annotation, os.PathLike)):
        return isinstance(value, str)
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Mapping):
        return isinstance(value, dict)
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable):
        items = [argument for argument in arguments if argument is not ...]
        return isinstance(value, list) and all(any(fits(entry, item) for item in items) for entry in value)
    return annotation is not Tensor


def in_words(annotation: Any) -> list[str]:
    """What a person may write for ``annotation``: ``["a whole number", "null"]``."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in words:
        return [words[annotation]]
    if origin in (Union, types.UnionType):
        return [word for argument in arguments for word in in_words(argument)]
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Mapping):
        return ["a mapping"]
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable):
        items = dict.fromkeys(word for argument in arguments if argument is not ... for word in in_words(argument))
        return [f"a list, each entry {' or '.join(items)}"]
    if inspect.isclass(annotation) and issubclass(annotation, os.PathLike):
        return ["a path"]
    return []


def shown(value: Any) -> str:
    """As one would write it on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- values ---------------------------------------------------------------------------------------------------------


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_share(value: Any) -> bool:
    return value >= 1 if type(value) is int else 0 < value <= 1


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "split_seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "channels_last": (lambda value: value in (True, False, "auto"), "true, false or auto"),
    "compile": (lambda mode: mode in COMPILE_MODES, f"null or one of {', '.join(COMPILE_MODES)}"),
    "data.seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "data.split_seed": (_is_seed, "a whole number from 0 to 4294967295"),
    "data.mean": (lambda values: len(values) == 3, "three numbers, one a channel"),
    "data.std": (lambda values: len(values) == 3 and min(values) > 0, "three numbers above 0, one a channel"),
    "optimizer.lr": (lambda rate: 0 < rate < float("inf"), "a number above 0"),
    "scheduler.factor": (lambda factor: 0 < factor < 1, "above 0 and below 1"),
    "scheduler.patience": (lambda epochs: epochs >= 0, "a number of epochs, 0 or more"),
    "callbacks.dashboard.histograms_every": (lambda epochs: epochs >= 0, "a number of epochs; 0 for none"),
    "callbacks.dashboard.training_images": (lambda count: count >= 0, "a number of images; 0 for none"),
    "trainer.max_epochs": (lambda epochs: epochs >= 1, "a whole number, 1 or more"),
    **{
        f"trainer.limit_{split}_batches": (_is_share, "a number of batches from 1, or a share above 0 up to 1.0")
        for split in ("train", "val", "test")
    },
}
"""Values that their types allow and nothing else would refuse before training. Each: the test, and what is allowed."""


def check_ranges(settings: Settings) -> None:
    """Hold the values of ``RANGES`` that are there against their ranges.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for path, (allowed, words) in RANGES.items():
        value: Any = settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        try:
            possible = value is None or allowed(value)
        except TypeError:  # text, where a constructor of the user's own declares no type
            possible = False
        if not possible:
            raise ConfigError(f"{path}={value} is not possible: it is {words}.")


def check_monitors(watching: Settings) -> None:
    """Refuse a monitored quantity that is never logged, and a ``mode`` that would keep its worst value.

    Args:
        watching: key → the settings of what may monitor something.

    Raises:
        ConfigError: names the key.
    """
    for path, settings in watching.items():
        monitor = settings.get("monitor")
        if monitor is None:
            continue
        logged = LOGGED_BEFORE_SAVING if settings["_target_"] == BEST_CHECKPOINT else MONITORS
        if monitor not in logged:
            raise ConfigError(
                f"{path}.monitor={monitor} is never logged{' in time' * (monitor in MONITORS)}."
                f"{did_you_mean(monitor, logged)}\nLogged: {', '.join(logged)}."
            )
        best = "max" if "/acc" in monitor else "min" if "/" in monitor else None
        parameters = inspect.signature(locate(path, settings["_target_"])).parameters
        mode = settings.get("mode", parameters["mode"].default if "mode" in parameters else best)
        if best and mode != best:
            key = f"{path}.mode"
            raise ConfigError(f"{key}={mode} takes the worst {monitor} for the best: set {key}={best}.")


def check_device(trainer: Settings) -> None:
    """Refuse an accelerator or a number of devices that this machine lacks, and float16 on a CPU.

    Raises:
        ConfigError: names the key, its value and what there is.
    """
    wanted, devices, precision = (trainer.get(key) for key in ("accelerator", "devices", "precision"))
    known = {"cuda": CUDAAccelerator, "mps": MPSAccelerator, "cpu": CPUAccelerator}
    present = [name for name, accelerator in known.items() if accelerator.is_available()]
    names = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if wanted is not None and wanted not in names:
        raise ConfigError(f"trainer.accelerator={wanted} does not exist.{did_you_mean(wanted, names)}")
    choices = {None: present, "auto": present, "gpu": [name for name in present if name != "cpu"]}
    found = choices.get(wanted, [name for name in present if name == wanted])
    if not found and wanted in ("gpu", *known):
        raise ConfigError(
            f"trainer.accelerator={wanted} is not possible: torch {torch.__version__} finds no such device here. "
            f"There is: {', '.join(['auto', *present])}."
        )
    if not found:  # a kind of accelerator that only Lightning knows
        return
    try:
        known[found[0]].parse_devices(1 if devices in (None, "auto") else devices)
    except (MisconfigurationException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"trainer.devices={devices} is not possible on {found[0]}: {reason}") from error
    if found[0] == "cpu" and trainer.get("sync_batchnorm"):
        raise ConfigError("trainer.sync_batchnorm=true is not possible on a CPU: torch has it for GPUs only.")
    if found[0] == "cpu" and str(precision) in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer.precision={precision} is not possible on a CPU: it is auto, bf16-mixed, 32-true or 64-true."
        )


def rehearse_optimizer(cfg: DictConfig) -> None:
    """Make the optimiser and the scheduler for a single weight, so that torch refuses now what it refuses later.

    Raises:
        ConfigError: with torch's reason, which names the value.
    """
    weight = nn.Parameter(torch.zeros(1, 1))
    section = "optimizer"
    try:
        optimizer = instantiate(cfg.optimizer)([weight])
        section = "scheduler"
        if cfg.get(section) is not None:
            instantiate(cfg.scheduler)(optimizer)
    except (InstantiationException, ConfigError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{section}={cfg[section]._target_} is not possible: {reason}") from error


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
