"""AlexNet in PyTorch Lightning: train it, take it apart, check the claims of the 2012 paper."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_pl.inference.trained_run import load_run

__all__ = ["__version__", "load_run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import ``load_run`` on first use, so that ``import alexnet_pl`` does not load torch."""
    if name == "load_run":
        from alexnet_pl.inference.trained_run import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
