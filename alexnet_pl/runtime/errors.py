"""Errors that a person can act on, and the one place that turns them into a line on the terminal."""

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, what is allowed and what to do next.

    Attributes:
        exit_code: of the process; 2 for what was wrong before the run began, 1 for what went wrong in it.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting that cannot work: a value out of range, an input too small for the network."""


class DataError(UserError, RuntimeError):
    """Images that are missing, incomplete or damaged. The message names the file and the ways out."""


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


_FULL_ERROR = "HYDRA_FULL_ERROR"

_SHOW_TRACEBACK = os.environ.get(_FULL_ERROR, "0") not in ("", "0")  # read before one_line_errors sets it


def as_the_user_has_it(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what :func:`one_line_errors` puts into it: for processes that report by themselves."""
    shown = {_FULL_ERROR: "1"} if _SHOW_TRACEBACK else {}
    return {**{name: value for name, value in environment.items() if name != _FULL_ERROR}, **shown}


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence, with a space before it: the known name nearest to ``name``, or all of them where none is near."""
    known = [str(other) for other in known]
    if near := difflib.get_close_matches(name, known, n=1):
        return f" Did you mean {near[0]}?"
    return f" There is: {', '.join(known)}." if known else ""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that a person can mend into one line on stderr and exit code 2.

    With ``HYDRA_FULL_ERROR=1`` in the environment every error keeps its traceback. Errors that are not the
    user's (bugs) always keep it.
    """
    # Hydra prints a page and exits by itself unless this is set; then the exception reaches us.
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


def user_message(error: BaseException) -> tuple[str, int] | None:
    """The message to print instead of a traceback and the exit status; None where only a traceback helps."""
    from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None:  # hydra.utils.instantiate wraps what a constructor raised
        if isinstance(cause, UserError):
            return str(cause), cause.exit_code
        # OmegaConf drops the cause of an error in a resolver.
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, OmegaConfBaseException) else None)

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={value} does not exist. Choose one of: {', '.join(sorted(error.options))}.", 2
    if isinstance(error, InstantiationException):
        # A constructor refused its arguments: a key too many, a value it cannot take.
        reason = one_line(error.__cause__ or error)
        return f"{reason} (a traceback: {_FULL_ERROR}=1)", 2
    if isinstance(error, ConfigCompositionException) and isinstance(
        error.__cause__, ConfigKeyError | ConfigAttributeError
    ):
        return _unknown_key(str(error).rpartition(" +")[2], error.__cause__), 2
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be a string"):
        return "A group cannot be null. To leave one out, put a tilde before its name: ~scheduler", 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return one_line(error), 2
    if type(error).__module__.startswith(("joblib.", "submitit.")):
        reason = one_line(error)[:300]
        return f"a worker has ended without a word ({reason}). The same command goes on with what is left.", 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{error.filename or 'a file of the run'} cannot be written: {error.strerror}.", 1
    return None


def _unknown_key(override: str, error: "ConfigKeyError | ConfigAttributeError") -> str:
    """The message for an override such as ``model.widht=8`` of a key that the configuration does not have."""
    from omegaconf import OmegaConf

    path = str(error.full_key)
    section, separator, _ = path.rpartition("/" if "/" in path else ".")
    root = error.parent_node._get_root()
    known = OmegaConf.select(root, section.replace("/", ".")) if section else root
    hint = did_you_mean(path, (f"{section}{separator}{key}" for key in known if key != "hydra"))
    return f"{override}: there is no key {path}.{hint} What conf/ leaves out is added with a plus: +{override}"
