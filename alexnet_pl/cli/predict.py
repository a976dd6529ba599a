"""Prediction command: ``alexnet predict RUN IMAGE…``."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_pl.cli.parser import add_run, make_parser, output_file, positive_int
from alexnet_pl.inference.options import MAX_DRAWN
from alexnet_pl.runtime.errors import UserError, csv_safe, printable

if TYPE_CHECKING:
    from alexnet_pl.inference.prediction import Prediction

DESCRIPTION = """\
Classify images, or every file in a directory and below it.

EXIF orientation is applied, transparency is composited on white, 16-bit gray is scaled, CMYK is converted, and an
animation is represented by its first frame. A file that is not an image or is corrupt gets its own line on stderr; the
others are still classified, and the exit status is 2."""

EPILOG = """\
  --json prints one object per line (JSON Lines), --csv one row per file; both appear batch by batch.

examples:
  alexnet predict runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000 cat.jpg --top 3
  alexnet predict best.ckpt my-images --csv > predictions.csv
  alexnet predict best.ckpt my-images --bars bars.png"""


def as_plain(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain values for JSON."""
    if prediction.error is not None:
        return {"file": str(prediction.path), "error": prediction.error}
    top = [{"name": name, "probability": probability} for name, probability in prediction.top]
    return {"file": str(prediction.path), "top": top}


def as_row(prediction: Prediction, top: int) -> list[str | float]:
    """Return a CSV row: file, ``top`` pairs of name and probability, error."""
    pairs = [value for name, probability in prediction.top for value in (csv_safe(name), probability)]
    return [csv_safe(str(prediction.path)), *pairs, *[""] * (2 * top - len(pairs)), csv_safe(prediction.error or "")]


def as_line(prediction: Prediction) -> str:
    """Return a line for the terminal: the file, then each class with its probability."""
    top = "  ".join(f"{name} {probability:.3f}" for name, probability in prediction.top)
    return printable(f"{prediction.path}  {top}")


def show(predictions: Iterable[Prediction], form: str, top: int) -> Iterator[Prediction]:
    """Print each prediction as ``text``, ``json`` or ``csv``, errors also to stderr, and pass it on."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        table.writerow(["file", *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("name", "p")), "error"])
    for prediction in predictions:
        if form == "json":
            print(json.dumps(as_plain(prediction)))  # ASCII, so that no control character reaches the terminal
        elif form == "csv":
            table.writerow(as_row(prediction, top))
        elif prediction.error is None:
            print(as_line(prediction))
        if prediction.error is not None:
            print(f"error: {printable(prediction.error)}", file=sys.stderr)
        yield prediction


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("predict", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_DIR")
    parser.add_argument("--top", type=positive_int, default=5, help="classes per image (default: 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="one JSON object per line")
    form.add_argument("--csv", action="store_const", const="csv", dest="form", help="one CSV row per file")
    parser.add_argument(
        "--bars",
        type=output_file,
        metavar="FILE",
        help=f"also draw the first {MAX_DRAWN} images with bars: png, svg or pdf",
    )
    args = parser.parse_args(arguments)
    from alexnet_pl.data.image_io import image_files  # here for start-up time: --help needs no torch
    from alexnet_pl.inference.prediction import draw, predict
    from alexnet_pl.inference.trained_run import load_run

    files = image_files(args.images)
    run = load_run(args.run, args.trust)
    top = min(args.top, len(run.class_names))
    drawn: list[Prediction] = []
    failed = False
    for prediction in show(predict(run, files, top), args.form or "text", top):
        failed |= prediction.error is not None
        if prediction.error is None and len(drawn) < MAX_DRAWN:
            drawn.append(prediction)
    if args.bars:
        draw(drawn, args.bars)
    if failed:
        sys.exit(UserError.exit_code)
