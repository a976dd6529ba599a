"""cli.figures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.figures.charts import learning_curves, read_curves


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl figures", description="Draw the learning curves of runs."
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run folder, with the name to show for it")
    parser.add_argument(
        "--out", type=Path, default=Path("learning-curves.png"), help="picture to write: png, svg or pdf"
    )
    parser.add_argument(
        "--published", nargs="*", default=[], metavar="NAME=ACCURACY", help="accuracies to compare with"
    )
    arguments = parser.parse_args(arguments)
    runs = {}
    for run in arguments.runs:
        name, _, folder = run.rpartition("=")
        runs[name or Path(folder).name] = read_curves(Path(folder))
    published = {name: float(value) for name, _, value in (line.rpartition("=") for line in arguments.published)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    learning_curves(runs, published).savefig(arguments.out, dpi=130)
    print(arguments.out)
