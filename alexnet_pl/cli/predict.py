"""cli.predict."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alexnet_pl.data.image_io import picture_files, read_picture
from alexnet_pl.figures.image_grids import picture_bars
from alexnet_pl.inference.prediction import Prediction, predict
from alexnet_pl.inference.trained_run import RUN_HELP, load_run
from alexnet_pl.runtime.errors import UserError

DRAWN = 40
"""Most pictures in one drawing: beyond that nobody can read it."""

DESCRIPTION = """\
Names with probabilities for pictures, or for every file in a folder and below it.

Pictures are turned as EXIF says, transparency is laid over white, 16-bit grey is scaled, CMYK is converted, and an
animation stands for its first frame. A file that is no picture or is damaged gets a line of its own on stderr; the
others are still answered, and the exit status is 2."""

EPILOG = """\
  --json prints one object a line (JSON Lines), --csv one row a file; both as the batches are done.

examples:
  python -m alexnet_pl predict runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000 cat.jpg --top 3
  python -m alexnet_pl predict best.ckpt my-pictures --csv > names.csv
  python -m alexnet_pl predict best.ckpt my-pictures --bars bars.png"""


def as_plain(prediction: Prediction) -> dict[str, Any]:
    """For JSON."""
    if prediction.error is not None:
        return {"file": str(prediction.path), "error": prediction.error}
    top = [{"name": name, "probability": probability} for name, probability in prediction.top]
    return {"file": str(prediction.path), "top": top}


def as_row(prediction: Prediction, top: int) -> list[str | float]:
    """For CSV: file, ``top`` pairs of name and probability, error."""
    pairs = [value for pair in prediction.top for value in pair]
    return [str(prediction.path), *pairs, *[""] * (2 * top - len(pairs)), prediction.error or ""]


def as_line(prediction: Prediction) -> str:
    """For people: the file, then each name with its probability."""
    return f"{prediction.path}  " + "  ".join(f"{name} {probability:.3f}" for name, probability in prediction.top)


def show(predictions: Iterator[Prediction], form: str, top: int) -> Iterator[Prediction]:
    """Print each prediction as ``text``, ``json`` or ``csv``, errors to stderr too, and pass it on."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        table.writerow(["file", *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("name", "p")), "error"])
    for prediction in predictions:
        if form == "json":
            print(json.dumps(as_plain(prediction), ensure_ascii=False))
        elif form == "csv":
            table.writerow(as_row(prediction, top))
        elif prediction.error is None:
            print(as_line(prediction))
        if prediction.error is not None:
            print(f"error: {prediction.error}", file=sys.stderr)
        yield prediction


def draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Write the first :data:`DRAWN` pictures that were answered with their bars.

    Raises:
        UserError: none was answered, or the kind of file is not one that matplotlib writes.
    """
    answered = [prediction for prediction in predictions if prediction.error is None][:DRAWN]
    if not answered:
        raise UserError(f"{path} was not written: no picture was answered.")
    pictures = [read_picture(each.path) for each in answered]
    for picture in pictures:
        picture.thumbnail((300, 300))
    figure = picture_bars([(p, each.path.name, each.top) for p, each in zip(pictures, answered, strict=True)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} was not written: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl predict", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--top", type=_positive, default=5, help="names for each picture (default: 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="one JSON object a line")
    form.add_argument("--csv", action="store_const", const="csv", dest="form", help="one CSV row a file")
    parser.add_argument(
        "--bars",
        type=Path,
        metavar="FILE",
        help=f"also draw the pictures with bars, the first {DRAWN}: png, svg or pdf",
    )
    given = parser.parse_args(arguments)
    files = picture_files(given.pictures)
    run = load_run(given.run)
    top = min(given.top, len(run.class_names))
    predictions = list(show(predict(run, files, top), given.form or "text", top))
    if given.bars:
        draw(predictions, given.bars)
    if any(prediction.error is not None for prediction in predictions):
        sys.exit(UserError.exit_code)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
