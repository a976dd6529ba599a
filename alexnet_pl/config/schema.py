"""config.schema."""

import collections.abc
import inspect
import os
import pkgutil
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from alexnet_pl.config.schedules import LENGTHS
from alexnet_pl.runtime.errors import ConfigError, did_you_mean

HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")

Settings = dict[str, Any]


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
            if key in HYDRA_KEYS or f"{path}.{key}" == "scheduler.interval":
                continue
            if key not in accepted and not others_too:
                name = node["_target_"].rpartition(".")[2]
                hint = did_you_mean(key, accepted)
                raise ConfigError(
                    f"{path}.{key}={format_value(value)} is not possible: {name} has no argument {key}.{hint}"
                )
            annotation = accepted.get(key, Any)
            if f"{path}.{key}" == "trainer.precision":
                annotation = annotation | Literal["auto"]  # :func:`alexnet_pl.config.resolve.resolve_auto` replaces it
            if path == "scheduler" and key in LENGTHS:
                annotation = annotation | Literal["auto"]  # the length of the run
            described = isinstance(value, dict) and "_target_" in value
            if not described and not matches_type(value, annotation):
                words = " or ".join(dict.fromkeys(describe_type(annotation)))
                raise ConfigError(f"{path}.{key}={format_value(value)} is not possible: it is {words}.")
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


def matches_type(value: Any, annotation: Any) -> bool:
    """Whether a plain YAML value can be what ``annotation`` declares. True where that is not for us to judge."""
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
    """What a person may write for ``annotation``: ``["a whole number", "null"]``."""
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
    """As one would write it on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
