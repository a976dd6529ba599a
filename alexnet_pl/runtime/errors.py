"""Errors the user can act on, and their translation into one line on the terminal."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alexnet_pl.runtime.commands import hydra_override, shell_join

if TYPE_CHECKING:
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError


class UserError(Exception):
    """An error the user can fix. The message says what is wrong, what is expected and what to do next.

    Attributes:
        exit_code: exit status of the process: 2 for an error before training, 1 for one during training.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """An invalid config: a value out of range, an input too small for the network."""


class DataError(UserError, RuntimeError):
    """Missing, incomplete or corrupt images. The message names the file and the ways out."""


# --- text -----------------------------------------------------------------------------------------------------------


def invalid_value(key: str, value: object, expected: str, fix: str = "") -> ConfigError:
    """Return the error for a config value out of range: ``data.val_fraction=1 is invalid: expected above 0 and …``.

    Args:
        key: dotted config key, or the argument's name if the caller does not know its place in the config.
        value: printed as it would be written on the command line: ``null``, ``true``.
        expected: type or range, without "expected" and without a period.
        fix: a full sentence that says how to fix it, if there is more to say than ``expected``.
    """
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return ConfigError(f"{key}={shown} is invalid: expected {expected}.{' ' * bool(fix)}{fix}")


def one_line(error: BaseException) -> str:
    """Return an error's message on a single line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def os_reason(error: BaseException) -> str:
    """Return why a file could not be written or read, in the operating system's words where they are known.

    torch's C++ writer drops errno: a full disk surfaces as ``enforce fail at inline_container.cc: unexpected pos``.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    if "unexpected pos" in text or "file write failed" in text or "failed writing" in text:
        return os.strerror(errno.ENOSPC)
    return one_line(error)


def printable(text: str) -> str:
    """Return ``text`` without control, escape and bidirectional-override characters, safe for a terminal."""
    return "".join(character for character in text if character.isprintable())


def csv_safe(text: str) -> str:
    """Return ``text`` as a CSV cell that no spreadsheet takes for a formula: a leading ``= + - @`` gets an apostrophe.

    Control characters are dropped as in :func:`printable`.
    """
    text = printable(text)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20") else text


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint to append to an error: the known name closest to ``name``, or all known names if none is close.

    Args:
        prefix: what all names share, such as ``trainer.``; printed, but not compared.
    """
    names = [str(other) for other in known]
    if near := difflib.get_close_matches(name, names, n=1):
        return f" Did you mean {prefix}{near[0]}?"
    return f" Available: {', '.join(prefix + other for other in names)}." if names else ""


# --- one line instead of a traceback --------------------------------------------------------------------------------

_FULL_ERROR = "HYDRA_FULL_ERROR"

_SHOW_TRACEBACK = os.environ.get(_FULL_ERROR, "0") not in ("", "0")  # read before one_line_errors sets it

_Message = tuple[str, int]


def user_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without :func:`one_line_errors`' variable, for subprocesses that report by themselves."""
    shown = {_FULL_ERROR: "1"} if _SHOW_TRACEBACK else {}
    return {**{name: value for name, value in environment.items() if name != _FULL_ERROR}, **shown}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors the user can fix as one line on stderr and exit with their exit code.

    Bugs keep their traceback, and so does every error if the environment has ``HYDRA_FULL_ERROR=1``.
    """
    # Without this variable Hydra prints a page and exits; with it the exception reaches us.
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    except Exception as error:
        found = None if _SHOW_TRACEBACK else user_message(error)
        if found is None:
            raise
        message, exit_code = found
        print(f"error: {message}", file=sys.stderr)
        sys.exit(exit_code)
    finally:
        del os.environ[_FULL_ERROR]
        if before is not None:
            os.environ[_FULL_ERROR] = before


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise errors the user can fix as :class:`UserError`, for callers from Python.

    It is the error that Hydra has wrapped, or has the line that :func:`one_line_errors` would print.

    Raises:
        UserError: with the original error as its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (found := user_message(error)) is None:
            raise
        known = _user_cause(error)
        raise known or (ConfigError if found[1] == 2 else UserError)(found[0]) from error


def user_message(error: BaseException) -> tuple[str, int] | None:
    """Return the message to print and the exit status; None if the error is a bug, which needs its traceback."""
    for translate in (_from_user_error, _from_yaml, _from_hydra, _from_worker, _from_file_system):
        if (found := translate(error)) is not None:
            return found
    return None


def _from_user_error(error: BaseException) -> _Message | None:
    """Find a UserError among the causes: ``hydra.utils.instantiate`` wraps what a constructor raises."""
    cause = _user_cause(error)
    return None if cause is None else (str(cause), cause.exit_code)


def _user_cause(error: BaseException) -> UserError | None:
    """Return the first UserError among an error and its causes."""
    from omegaconf.errors import OmegaConfBaseException  # start-up time: needed after an error only

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        # OmegaConf drops the cause of an error in a resolver.
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, OmegaConfBaseException) else None)
    return None


def _from_yaml(error: BaseException) -> _Message | None:
    """Translate a file of options that is not YAML: the file, the line, the problem, and the fix of common ones."""
    from yaml import MarkedYAMLError, YAMLError  # start-up time: needed after an error only

    if not isinstance(error, YAMLError):
        return None
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        # A character that no YAML file may have; the text names the file.
        return f"{printable(one_line(error))}. Expected a YAML file in UTF-8.", 2
    problem = printable(one_line(ValueError(error.problem)))
    fix = ""
    if "got '{'" in problem:
        fix = ' Quote interpolations inside brackets, as in ["${width}", 84]'
    elif "'\\t'" in problem:
        fix = " Indent with spaces instead of tabs."
    mark = error.problem_mark
    return f"{printable(mark.name)} is invalid YAML in line {mark.line + 1}: {problem}.{fix}", 2


def _from_hydra(error: BaseException) -> _Message | None:
    """Translate errors of Hydra and OmegaConf: wrong overrides, options, keys and constructor arguments."""
    from hydra.errors import (  # start-up time: needed after an error only
        ConfigCompositionException,
        HydraException,
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, OverrideParseException):
        return _invalid_override(str(error.override)), 2
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={value} is invalid: expected one of: {', '.join(sorted(error.options))}.", 2
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:  # of a list: augment=[crop_flip,cutuot]
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        if not group:  # -cn NAME
            return f"--config-name={value} is invalid: expected train, or a .yaml file in the directory of -cd DIR.", 2
        return f"{group}={value} is invalid: no such option. alexnet train --help lists those of {group}.", 2
    if isinstance(error, InstantiationException):
        key = f"{found[1]}: " if (found := re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)) else ""
        return f"{key}{one_line(error.__cause__ or error)} (for a traceback: {_FULL_ERROR}=1)", 2
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(str(error).rpartition(" +")[2], cause), 2
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be a string"):
        wrong = "null" if str(error).endswith("NoneType") else "a number"
        return (
            f"A config group cannot be {wrong}. To leave one out, put a tilde before its name, as in ~scheduler. In a "
            "sweep that takes a second command."
        ), 2
    if isinstance(error, HydraException) and (several := _several_values(str(error))):
        return several, 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return one_line(error if str(error) or cause is None else cause), 2
    return None


def _from_worker(error: BaseException) -> _Message | None:
    """Translate the death of a parallel launcher's worker, which has no message of its own."""
    if not type(error).__module__.startswith(("joblib.", "submitit.")):
        return None
    return f"a worker died ({one_line(error)[:300]}). Re-running the command continues with what is left.", 1


def _from_file_system(error: BaseException) -> _Message | None:
    """Translate a full, read-only or forbidden file system, and a path that none can hold."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
    if not isinstance(error, OSError) or error.errno not in known:
        return None
    name = error.filename or "a file of the run"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{name} is invalid: {error.strerror}.", 2
    return f"{name} cannot be {'accessed' if error.errno == errno.EACCES else 'written'}: {error.strerror}.", 1


def _invalid_override(override: str) -> str:
    """Return the message for an override that Hydra cannot parse, with the quoting or the value that it can."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[A-Za-z_][\w./@:-]*", key):
        return f"{override} is invalid: expected key=value."
    if value.startswith("~/"):
        fixed = shell_join([hydra_override(key, os.path.expanduser(value))])
        return f"{override} is invalid: expected a path without ~, which the shell does not expand here. Use {fixed}"
    quoted = _quoted(key, value.strip("'\""))
    if value.startswith(("[", "{")):
        return f"{override} is invalid: expected a list or a mapping with closed brackets. Quote text: {quoted}"
    if value.startswith(("'", '"')):
        return f"{override} is invalid: expected text that ends with its quote. Quote it as {quoted}"
    return f"{override} is invalid: expected quotes around special characters. Use {quoted}"


def _quoted(key: str, text: str) -> str:
    """Return ``key="text"`` quoted for the shell and for Hydra; its interpolations stay interpolations."""
    if "${" not in text or text.count("{") != text.count("}"):
        return shell_join([hydra_override(key, text)])
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    trailing = len(text) - len(text.rstrip("\\"))
    return shell_join([f'{key}="{text}{trailing * chr(92)}"'])


def _several_values(text: str) -> str | None:
    """Return the message for several values where one run has one, from Hydra's text; None if that is about else."""
    if found := re.match(r"Ambiguous value for argument '(.*)'$", text, re.MULTILINE):
        key, _, value = found[1].partition("=")
        quoted = shell_join([hydra_override(key, value)])
        return (
            f"{found[1]} is invalid: expected one value. To train every one of them, put -m before the overrides. "
            f"A list needs brackets, {key}=[{value}], and text with commas needs quotes, {quoted}"
        )
    if found := re.match(r"Multiple values for (\S+)\. To override", text):
        group = found[1].partition("/")[0]
        return (
            f"{group} is invalid: expected one option, not several with a {found[1]} each. To train every one of them: "
            f"-m {group}=A,B, or alexnet_pl.study"
        )
    return None


def _unknown_key(override: str, error: "ConfigKeyError | ConfigAttributeError") -> str:
    """Return the message for an override of a key that the config does not have, such as ``model.widht=8``."""
    from omegaconf import OmegaConf  # start-up time: needed after an error only

    path = str(error.full_key)
    section, separator, _ = path.rpartition("/" if "/" in path else ".")
    parent = error.parent_node  # of model/norm=batch the root, of model.widht=8 the model
    known = OmegaConf.select(parent, section.replace("/", ".")) if separator == "/" else parent
    key, _, value = override.partition("=")
    if key == section and value.startswith("{"):
        words = shell_join([f"~{section}", f"+{override}"])
        return (
            f"{override}: key {path} not found, because the mapping is merged into the option of {section} that is in "
            f"use. To replace the option: {words}"
        )
    names = [name for name in known or () if name != "hydra"]
    prefix = f"{section}{separator}" if section else ""
    own = value.startswith("{_target_:")  # an object of the user's own
    hint = "" if own else did_you_mean(path.removeprefix(prefix), names, prefix)
    added = shell_join([f"+{override}"])
    return f"{override}: key {path} not found.{hint} To add a key that conf/ does not define, use {added}"
