"""Schema of a config section: the arguments of the constructor that its ``_target_`` names, and their types."""

import collections.abc
import inspect
import os
import pkgutil
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from torch import Tensor

from alexnet_pl.config.optimizers import GROUPING
from alexnet_pl.config.schedules import LENGTHS
from alexnet_pl.runtime.errors import ConfigError, did_you_mean, invalid_value

HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")

Settings = dict[str, Any]

ADDED: dict[str, Any] = {
    "scheduler.interval": Literal["epoch", "step"],
    "scheduler.warmup_epochs": float,
    "optimizer.decay_biases_and_norms": bool,
    "optimizer.bias_lr_multiplier": float,
    "optimizer.layers": dict[str, Any],
    **{f"scheduler.{name}": Literal["auto"] for name in LENGTHS},
    "trainer.precision": Literal["auto"],
}
"""Keys and values beyond those of the constructor; they are resolved before the constructor is called."""

NEW_KEYS = ("scheduler.interval", "scheduler.warmup_epochs", *(f"optimizer.{name}" for name in GROUPING))
"""Those of ``ADDED`` that no constructor has; the others are values beyond the constructor's."""


def check_arguments(path: str, node: Any) -> None:
    """Check ``node`` and everything in it against the constructors that its ``_target_`` keys name.

    Args:
        path: dotted key of ``node``, for messages.
        node: plain mapping, list or value.

    Raises:
        ConfigError: an argument that the constructor does not have, a value of another type than it declares, or a
            ``_target_`` that cannot be imported.
    """
    if isinstance(node, list):
        for index, value in enumerate(node):
            check_arguments(f"{path}[{index}]", value)
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        make = locate(path, node["_target_"])
        accepted, takes_any = accepted_arguments(make)
        if not takes_any:
            _check_names(path, node, make, accepted)
        for key, value in node.items():
            if key not in HYDRA_KEYS:
                _check_argument(f"{path}.{key}", value, accepted)
    for key, value in node.items():
        check_arguments(f"{path}.{key}", value)


def _check_names(path: str, node: Settings, make: Callable[..., Any], accepted: dict[str, Any]) -> None:
    """Check that every key of ``node`` is an argument of the constructor or one of ``NEW_KEYS``.

    Raises:
        ConfigError: names the first unknown argument.
    """
    known = {*HYDRA_KEYS, *accepted, *(new.rpartition(".")[2] for new in NEW_KEYS if new.startswith(f"{path}."))}
    if unknown := [key for key in node if key not in known]:
        key, name = unknown[0], getattr(make, "__name__", str(make))
        hint = remains_of_experiment(f"{path}.{key}" for key in unknown) or did_you_mean(key, accepted)
        raise ConfigError(f"{path}.{key}={format_value(node[key])} is invalid: {name} has no argument {key}.{hint}")


def remains_of_experiment(paths: Iterable[str]) -> str:
    """Return a hint to append to an error about keys that nobody typed; "" if that is not known to be so.

    An experiment or a rung sets keys of the option that it chooses. The keys stay when an override chooses another
    option, as in ``experiment=record augment=flip``.

    Args:
        paths: dotted keys; those that an override names are left out.
    """
    if not HydraConfig.initialized():
        return ""
    job = HydraConfig.get()
    choices = ((group, job.runtime.choices.get(group)) for group in ("rung", "experiment"))
    sources = [f"{group}={choice}" for group, choice in choices if choice not in (None, "null")]
    overrides = [override.lstrip("+~").partition("=") for override in job.overrides.task]
    given = [f"{key}." for key, _, value in overrides if "." in key or value.startswith("{")]
    replaced = [f"{key.replace('/', '.')}." for key, _, _ in overrides if "." not in key]
    remains = [
        path
        for path in paths
        if any(path.startswith(group) for group in replaced)
        and not any(f"{path}.".startswith(key) or key.startswith(f"{path}.") for key in given)
    ]
    if not sources or not remains:
        return ""
    them, removed = "them" if len(remains) > 1 else "it", " ".join(f"~{path}" for path in remains)
    return f" If {' or '.join(sources)} sets {them}, remove {them}: {removed}"


def _check_argument(path: str, value: Any, accepted: dict[str, Any]) -> None:
    """Check the value of one argument against its annotation.

    Raises:
        ConfigError: a value of another type.
    """
    key = path.rpartition(".")[2]
    if path in NEW_KEYS and key not in accepted:
        accepted = {**accepted, key: ADDED[path]}
    annotation = accepted.get(key, Any)
    if path in ADDED:
        annotation = annotation | ADDED[path]
    if isinstance(value, dict) and "_target_" in value:
        return
    if isinstance(value, str) and _is_factory(annotation):
        option = "augment" if path == "data.augment" else path.replace(".", "/")
        raise invalid_value(path, value, "a mapping with _target_", f"Choose an option: {option}={value}")
    if not matches_type(value, annotation):
        raise invalid_value(path, value, " or ".join(dict.fromkeys(describe_type(annotation))))


def _is_factory(annotation: Any) -> bool:
    """Return True if an argument expects an object that only a ``_target_`` can describe: a callable or a module."""
    if get_origin(annotation) in (Union, types.UnionType):
        return all(_is_factory(argument) or argument is types.NoneType for argument in get_args(annotation))
    return get_origin(annotation) is collections.abc.Callable or annotation is Callable


def locate(path: str, target: str) -> Callable[..., Any]:
    """Import the class or function that a ``_target_`` names.

    Args:
        path: dotted key of the section, for the message.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}._target_={target} cannot be imported: {error}.") from error
    return found


def accepted_arguments(make: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the named arguments of ``make`` with their annotations, and True if it takes any others as well.

    This project's classes pass their ``**settings`` on to their base class, so its arguments count too.
    """
    if not inspect.isclass(make):
        return _named_arguments(make)
    accepted: dict[str, Any] = {}
    for owner in make.__mro__:
        if "__init__" in vars(owner):
            named, takes_any = _named_arguments(vars(owner)["__init__"])
            accepted = {**named, **accepted}
            if not takes_any:
                return accepted, False
            if not owner.__module__.startswith("alexnet_pl."):
                break
    return accepted, True


def _named_arguments(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the arguments of one function with their annotations, and True if it has a ``**`` argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # implemented in C
        return {}, True
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # annotations for type checkers only
        hints = {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: hints.get(p.name, Any) for p in parameters if p.kind in by_name and p.name != "self"}
    # ``patience: int = None`` is common and means that null is valid.
    named |= {p.name: named[p.name] | None for p in parameters if p.name in named and p.default is None}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


# --- types ----------------------------------------------------------------------------------------------------------


def matches_type(value: Any, annotation: Any) -> bool:
    """Return True if a plain YAML value can be what ``annotation`` declares, or if that cannot be decided."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(matches_type(value, argument) for argument in arguments)
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
        return isinstance(value, list) and all(any(matches_type(entry, item) for item in items) for entry in value)
    return annotation is not Tensor


def describe_type(annotation: Any) -> list[str]:
    """Return in words what a user may write for ``annotation``: ``["a whole number", "null"]``."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in words:
        return [words[annotation]]
    if origin in (Union, types.UnionType):
        return [word for argument in arguments for word in describe_type(argument)]
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Mapping):
        return ["a mapping"]
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable):
        items = dict.fromkeys(word for argument in arguments if argument is not ... for word in describe_type(argument))
        return [f"a list, each entry {' or '.join(items)}"]
    if inspect.isclass(annotation) and issubclass(annotation, os.PathLike):
        return ["a path"]
    return []


def format_value(value: Any) -> str:
    """Return ``value`` as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
