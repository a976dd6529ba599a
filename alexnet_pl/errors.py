"""Errors that a person can act on, and the one place that turns them into a line on the terminal."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


_FULL_ERROR = "HYDRA_FULL_ERROR"
_SHOW_TRACEBACK = os.environ.get(_FULL_ERROR, "0") not in ("", "0")  # read before one_line_errors sets it


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that a person can mend into one line on stderr and exit code 2.

    With ``HYDRA_FULL_ERROR=1`` in the environment every error keeps its traceback. Errors that are not the
    user's (bugs) always keep it.
    """
    # Hydra prints a page and exits by itself unless this is set; then the exception reaches us.
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    except Exception as error:
        found = None if _SHOW_TRACEBACK else _for_people(error)
        if found is None:
            raise
        message, exit_code = found
        print(f"error: {message}", file=sys.stderr)
        sys.exit(exit_code)


def _for_people(error: BaseException) -> tuple[str, int] | None:
    """The message to print instead of a traceback and the exit status; None where only a traceback helps."""
    from hydra.errors import HydraException, InstantiationException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None:  # hydra.utils.instantiate wraps what a constructor raised
        if isinstance(cause, UserError):
            return str(cause), cause.exit_code
        cause = cause.__cause__

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={value} does not exist. Choose one of: {', '.join(sorted(error.options))}.", 2
    if isinstance(error, InstantiationException):
        # A constructor refused its arguments: a key too many, a value it cannot take.
        reason = " ".join(str(error.__cause__ or error).split())
        return f"{reason} (a traceback: {_FULL_ERROR}=1)", 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return " ".join(str(error).split()), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{error.filename or 'a file of the run'} cannot be written: {error.strerror}.", 1
    return None
