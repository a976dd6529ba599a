"""Commands printed for the user to paste, quoted for the shell and for Hydra's override grammar."""

import os
import re
import shlex
import sys
from pathlib import Path

_BARE = re.compile(r"[A-Za-z0-9_./:@%+-]+")
"""Characters that Hydra reads unquoted."""

_NOT_TEXT = re.compile(r"(?i)null|true|false|[+-]?(nan|inf)|[+-]?[0-9._]+(e[+-]?[0-9_]+)?")
"""Words that Hydra reads unquoted as another type than text."""


def program() -> list[str]:
    """Return the words that start this program from the current directory: ``python train.py`` or ``alexnet train``.

    A ``train.py`` elsewhere is named by its path. Anything else in ``sys.argv[0]`` (the installed command,
    ``python -m alexnet_pl``, a notebook, a test runner) has the installed command's name.
    """
    script = Path(sys.argv[0])
    if script.name != "train.py":
        return ["alexnet", "train"]
    try:
        here = os.path.samefile(script, "train.py")
    except OSError:
        here = False
    return ["python", "train.py" if here else str(script)]


def hydra_override(key: str, value: object) -> str:
    """Return ``key=value`` in Hydra's grammar, which yields ``value`` again: a number, a bool, None, or else its text.

    Text is quoted if it holds spaces, brackets, ``=``, ``,``, ``~`` or quotes, or looks like a number or a boolean.
    """
    if value is None:
        return f"{key}=null"
    text = str(value)
    if _BARE.fullmatch(text) and (isinstance(value, bool | int | float) or not _NOT_TEXT.fullmatch(text)):
        return f"{key}={text}"
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(text) - len(text.rstrip("\\"))
    return f"{key}='{text}{trailing * chr(92)}'"


def shell_join(words: list[str]) -> str:
    """Return a command line for POSIX shells, with double quotes where they suffice: ``"resume='runs/lr=0.01'"``."""
    return " ".join(
        f'"{word}"' if shlex.quote(word) != word and not re.search(r'["$`\\!\n]', word) else shlex.quote(word)
        for word in words
    )


def train_command(*words: str, **overrides: object) -> str:
    """Return a train command to paste into a shell: ``python train.py "resume='runs/lr=0.01'"``.

    Args:
        words: arguments that are valid Hydra already, such as ``-m`` or those of ``sys.argv``.
        overrides: key -> value; pass dotted keys as ``**{"data.root": path}``.
    """
    return shell_join([*program(), *words, *(hydra_override(key, value) for key, value in overrides.items())])


def current_command() -> str:
    """Return the command that started this run, to be pasted into a shell; a sweep's trial has its own overrides."""
    from hydra.core.hydra_config import HydraConfig  # here for start-up time
    from hydra.types import RunMode

    words = sys.argv[1:]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        words = list(HydraConfig.get().overrides.task)
    return shlex.join([*program(), *words])
