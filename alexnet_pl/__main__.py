"""Command-line entry point: ``alexnet COMMAND``, or ``python -m alexnet_pl COMMAND``."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "train a network, or run a study with -m",
    "evaluate": "compute loss, errors, calibration and confusion matrix of a trained run",
    "predict": "classify image files",
    "export": "write a trained run as ONNX, torch.export or safetensors",
    "serve": "open a local web page for a trained run",
    "card": "write a model card",
    "report": "redraw the figures and the HTML report of a run",
    "study": "write tables, statistics and plots of a study",
    "figures": "draw the learning curves of several runs",
    "shards": "convert an ImageFolder layout to tar shards",
    "color_pca": "compute the RGB principal components of a dataset",
    "benchmark": "measure the speed of the training loop",
    "benchmark_input": "measure the speed of the input pipeline",
    "tensorboard": "start TensorBoard on all runs",
}
"""Command -> one line of help. Each is a module of ``alexnet_pl.cli``, imported only when it is called."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: alexnet COMMAND [ARGUMENTS]", "", *lines, "", "alexnet COMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> None:
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        print(f"error: alexnet {name} is not a command.\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    from alexnet_pl.runtime.errors import one_line_errors

    with one_line_errors():
        import_module(f"alexnet_pl.cli.{name}").main(rest)


if __name__ == "__main__":
    main()
