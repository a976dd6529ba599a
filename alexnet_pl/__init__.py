"""AlexNet in PyTorch Lightning: train it, take it apart, check the claims of the 2012 paper."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from alexnet_pl.runtime.threads import wait_briefly

if TYPE_CHECKING:
    from alexnet_pl import models
    from alexnet_pl.api import Run, StudyRun, study, train
    from alexnet_pl.config.compose import compose
    from alexnet_pl.inference.trained_run import load_run

__all__ = ["Run", "StudyRun", "__version__", "compose", "load_run", "models", "study", "train"]
__version__ = "0.1.0"

_HOMES = {
    "Run": "alexnet_pl.api",
    "StudyRun": "alexnet_pl.api",
    "compose": "alexnet_pl.config.compose",
    "load_run": "alexnet_pl.inference.trained_run",
    "study": "alexnet_pl.api",
    "train": "alexnet_pl.api",
}
"""Name -> module, imported on first use, so that ``import alexnet_pl`` does not load torch."""

wait_briefly()  # here, because it has to come before torch


def __getattr__(name: str) -> Any:
    """Import a public name from its module, or the subpackage ``models``."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "models":
        return import_module("alexnet_pl.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
