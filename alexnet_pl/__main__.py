"""Command-line entry point: ``alexnet COMMAND``, or ``python -m alexnet_pl COMMAND``."""

import sys
from collections.abc import Sequence
from importlib import import_module

from alexnet_pl.runtime.deferred_imports import defer_imports
from alexnet_pl.runtime.errors import did_you_mean, one_line_errors, printable
from alexnet_pl.runtime.logging import make_output_safe, quiet_without_reader

COMMANDS = {
    "train": "train a network, or run a study with -m",
    "evaluate": "compute loss, errors, calibration and confusion matrix of a trained run",
    "predict": "classify image files",
    "export": "write a trained run as ONNX, torch.export or safetensors",
    "serve": "open a local web page for a trained run",
    "card": "write a model card",
    "push": "share a trained run on the Hugging Face Hub",
    "report": "redraw the figures and the HTML report of a run",
    "study": "write tables, statistics and plots of a study",
    "claims": "list, measure and report on the published claims",
    "figures": "draw the learning curves of several runs",
    "shards": "convert an ImageFolder layout to tar shards",
    "color_pca": "compute the RGB principal components of a dataset",
    "benchmark": "measure the speed of the training loop or of the input pipeline",
    "tensorboard": "start TensorBoard on all runs",
}
"""Command -> one line of help. Each is a module of ``alexnet_pl.cli``, imported only when it is called."""


def usage() -> str:
    """Return the help text: every command with its line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    footer = "Run alexnet COMMAND --help for the arguments of a command."
    return "\n".join(["usage: alexnet COMMAND [ARGUMENTS]", "", *lines, "", footer])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; exit with status 2 if there is no such command."""
    make_output_safe()
    with quiet_without_reader():
        _run([*(sys.argv[1:] if arguments is None else arguments)])


def _run(arguments: list[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        print(f"error: command {printable(name)} not found.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    defer_imports()
    with one_line_errors():
        import_module(f"alexnet_pl.cli.{name}").main(rest)


if __name__ == "__main__":
    main()
