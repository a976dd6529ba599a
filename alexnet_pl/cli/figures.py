"""Learning-curve command: ``alexnet figures RUN… --out learning-curves.png``."""

from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.cli.parser import make_parser, output_file
from alexnet_pl.figures.charts import plot_learning_curves, read_curves
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.files import replacing


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("figures", "Draw the learning curves of finished or running runs.")
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run directory and its name in the legend")
    parser.add_argument(
        "--out",
        type=output_file,
        default=Path("learning-curves.png"),
        metavar="FILE",
        help="image to write: png, svg or pdf",
    )
    parser.add_argument(
        "--published", nargs="*", default=[], metavar="NAME=ACCURACY", help="published accuracies to compare with"
    )
    args = parser.parse_args(arguments)
    runs = by_name([named_run(text) for text in args.runs])
    published = dict(named_accuracy(text) for text in args.published)
    figure = plot_learning_curves({name: read_curves(run) for name, run in runs.items()}, published)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out) as scratch:
            figure.savefig(scratch, dpi=130)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not write
        raise UserError(f"{args.out} cannot be written: {error}") from error
    print(args.out)


def named_run(text: str) -> tuple[str, Path]:
    """Return legend name, "" without one, and directory of ``NAME=RUN``; both parts may contain ``=``.

    A path that exists is taken whole, and of several places to split, the first before a path that exists.
    """
    parts = text.split("=")
    for index in range(len(parts)):
        if Path(folder := "=".join(parts[index:])).exists():
            return "=".join(parts[:index]), Path(folder)
    name, _, folder = text.rpartition("=")
    return name, Path(folder)


def by_name(runs: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Return the directories by their names in the legend: as given, else the last part of the path if it is unique.

    Raises:
        UserError: a name is given twice.
    """
    found: dict[str, Path] = {}
    last = [folder.name for _, folder in runs]
    for name, folder in runs:
        label = name or (folder.name if last.count(folder.name) == 1 else str(folder))
        if label in found:
            raise UserError(f"{label} is invalid: expected a name of its own for each run, as in NAME={folder}.")
        found[label] = folder
    return found


def named_accuracy(text: str) -> tuple[str, float]:
    """Return name and accuracy of ``NAME=ACCURACY``.

    Raises:
        UserError: the accuracy is not a number.
    """
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise UserError(f"--published={text} is invalid: expected NAME=ACCURACY, such as Caffe=0.82.") from error
