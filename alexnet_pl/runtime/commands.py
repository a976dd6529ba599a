"""Commands that are printed for a person to paste: quoted for the shell and for Hydra's override grammar."""

import re
import shlex
import sys

_BARE = re.compile(r"[A-Za-z0-9_./:@%+-]+")
"""Values that Hydra reads unquoted as they are."""


def program() -> list[str]:
    """Return the words that started this program: ``python train.py`` or ``alexnet train``."""
    return ["python", "train.py"] if sys.argv[0].endswith("train.py") else ["alexnet", "train"]


def hydra_override(key: str, value: object) -> str:
    """Return ``key=value`` in Hydra's grammar, quoted if the value holds spaces, brackets, ``=``, quotes or ``~``."""
    text = str(value)
    if _BARE.fullmatch(text):
        return f"{key}={text}"
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}{trailing * chr(92)}'"


def train_command(*words: str, **overrides: object) -> str:
    """Return a train command that can be pasted into a shell: ``python train.py resume='runs/lr=0.01'``.

    Args:
        words: arguments that are taken as they are, such as ``-m``.
        overrides: key -> value; for dotted keys pass ``**{"data.root": path}``.
    """
    return shlex.join([*program(), *words, *(hydra_override(key, value) for key, value in overrides.items())])
