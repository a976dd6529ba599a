"""Evaluation command: ``alexnet evaluate RUN``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_pl.cli.parser import add_data_root, add_run, make_parser, output_file, write_output
from alexnet_pl.runtime.errors import csv_safe, printable

if TYPE_CHECKING:
    from alexnet_pl.inference.evaluation import Evaluation
    from alexnet_pl.inference.robustness import Part
    from alexnet_pl.inference.trained_run import TrainedRun

CROPS = (1, 2, 6, 10)
"""Views per image to choose from: one, or a key of :data:`alexnet_pl.data.transforms.VIEW_NAMES`."""

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The corruptions over which papers average: CIFAR-10-C has four more (Hendrycks and Dietterich 2019, section 4.1)."""

MAX_CONFUSION_CLASSES = 40
"""Largest number of classes whose confusion matrix fits on a terminal; --json has it for any number."""

DESCRIPTION = """\
Compute loss, top-1 and top-5 error, per-class accuracy, calibration error and confusion matrix of a trained run.

On the run's own data, with its precision, device type and number of threads, the metrics equal those of result.json
exactly, unless the run was compiled. --json uses the same names. --data-root points to a copy of the run's data, or to
any ImageFolder layout with the run's class names, DIR/test/<class>/* or DIR/<class>/*, with images of any size."""

EPILOG = """\
  --crops 10 is the paper's test: the softmax is averaged over the four corner crops, the center crop and their mirror
  images, cut from images of data.resize_size pixels, or of 256/224 of the network's input size if the run has none.
  --crops 2 averages over the center crop and its mirror image, --crops 6 also over both shifted by a pixel either way.
  The calibration error is the expected one over 15 bins of equal width: the mean of |accuracy − confidence|, weighted
  by the number of images per bin. Accuracies and errors are fractions; the loss is in nats.

examples:
  alexnet evaluate runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000
  alexnet evaluate best.ckpt --data-root my-images --json > metrics.json
  alexnet evaluate RUN --data cifar10_c CIFAR-10-C     error per corruption and severity; cifar10_1 for CIFAR-10.1
  alexnet evaluate RUN --corruptions                   needs no files; RUN/corruptions.json is for alexnet study"""


def report(run: TrainedRun, result: Evaluation, crops: int) -> str:
    """Return the metrics as text: a table, per-class accuracy and the confusion matrix."""
    split, names = result.split, [printable(name) for name in run.logit_names]
    loss, top1, top5, ece = (result.figures[f"{split}/{key}"] for key in ("loss", "error", "error_top5", "ece"))
    width = max(map(len, names))
    accuracies = result.confusion.diag() / result.confusion.sum(1)
    columns, has_matrix = [name[:5] for name in names], len(names) <= MAX_CONFUSION_CLASSES
    lines = [
        f"{printable(run.name)}, epoch {run.epoch}, {split} split: {len(result.labels):,} images, {crops} crop(s) each",
        f"data       {printable(result.description)}",
        f"precision  {result.precision}",
        "",
        f"{'loss':>10}{'top-1 err':>12}{'top-5 err':>12}{'ECE':>10}",
        f"{loss:10.4f}{top1:12.4f}{top5:12.4f}{ece:10.4f}",
        "",
        f"{'':{width}}  accuracy" + ("   predicted " + " ".join(f"{column:>5}" for column in columns)) * has_matrix,
    ]
    for name, accuracy, row in zip(names, accuracies.tolist(), result.confusion.tolist(), strict=True):
        counts = "             " + " ".join(f"{count:5}" for count in row)
        lines.append(f"{name:{width}}  {accuracy:8.4f}" + counts * has_matrix)
    if agreement := compare(run, result, crops):
        lines += ["", agreement]
    return "\n".join(lines)


def compare(run: TrainedRun, result: Evaluation, crops: int) -> str:
    """Return how the metrics relate to those in the run's result.json, or "" if there is nothing to compare."""
    from alexnet_pl.data.transforms import VIEW_NAMES  # here for start-up time: --help needs no torch

    here = {f"{result.split}/{key}": result.figures[f"{result.split}/{key}"] for key in ("loss", "acc", "acc_top5")}
    if crops > 1:
        here = {f"{name}_{VIEW_NAMES[crops]}": value for name, value in here.items()}
    if run.result is None or not here.keys() <= run.result.keys():
        return ""
    if all(run.result[name] == value for name, value in here.items()):
        return "identical to the metrics in result.json"
    recorded = ", ".join(f"{name} {run.result[name]:.6g} (here {value:.6g})" for name, value in here.items())
    origin = f"on the run's own images, from {run.result['device']} in {run.result['precision']}"
    return printable(f"result.json has {recorded}, {origin}")


def as_json(run: TrainedRun, result: Evaluation, crops: int) -> dict[str, Any]:
    """Return the metrics as plain values, under the names that they have in result.json."""
    split, confusion = result.split, result.confusion
    counts, correct = confusion.sum(1).tolist(), confusion.diag().tolist()
    per_class = [right / count if count else None for right, count in zip(correct, counts, strict=True)]
    return {
        **result.figures,
        f"{split}/class_acc": dict(zip(run.logit_names, per_class, strict=True)),  # null without images
        f"{split}/confusion": confusion.tolist(),
        "images": len(result.labels),
        "crops": crops,
        "data": result.description,
        "precision": result.precision,
        "epoch": run.epoch,
    }


def predictions_csv(run: TrainedRun, result: Evaluation) -> str:
    """Return a CSV row per image, in the split's order: the label's name, then the probability of each class."""
    names = [csv_safe(name) for name in run.logit_names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", *names])
    for label, row in zip(result.labels.tolist(), result.probabilities.tolist(), strict=True):
        writer.writerow([names[label], *row])
    return text.getvalue()


def robustness_report(run: TrainedRun, parts: Sequence[Part]) -> str:
    """Return top-1 errors as text: one row per corruption, one column per severity and their mean."""
    clean = [part for part in parts if not part.corruption]
    lines = [f"{printable(run.name)}, epoch {run.epoch}, top-1 error on {parts[0].images:,} images per severity", ""]
    if clean:
        lines.append(f"without corruption  {clean[0].figures['test/error']:.4f}")
    table: dict[str, list[float]] = {}
    for part in parts:
        if part.corruption:
            table.setdefault(part.corruption, []).append(part.figures["test/error"])
    if not table:
        return "\n".join(lines)
    has_benchmark = table.keys() >= set(CORRUPTIONS)
    counted = {name: errors for name, errors in table.items() if name in CORRUPTIONS or not has_benchmark}
    table["mean"] = [sum(column) / len(column) for column in zip(*counted.values(), strict=True)]
    width = max(len("severity"), *map(len, table))
    lines += ["", f"{'severity':{width}}" + "".join(f"{place:>9}" for place in (1, 2, 3, 4, 5, "mean"))]
    for name, errors in table.items():
        lines.append(f"{printable(name):{width}}" + "".join(f"{e:9.4f}" for e in (*errors, sum(errors) / len(errors))))
    if left := [printable(name) for name in table if name not in (*counted, "mean")]:
        lines += ["", f"mean: of the benchmark's {len(counted)} corruptions, without {', '.join(left)}"]
    return "\n".join(lines)


def evaluate_robustness(run: TrainedRun, args: argparse.Namespace) -> None:
    """Evaluate a published robustness set or the corruptions, print the errors and keep those of the corruptions."""
    from alexnet_pl.inference.robustness import (  # here for start-up time: --help needs no torch
        evaluate_corruptions,
        evaluate_published,
        is_own_data,
        record,
    )

    path, is_own = None, args.data is None and is_own_data(run, args.data_root)
    if args.data is None:
        parts = list(evaluate_corruptions(run, args.data_root))
        path = record(run, parts) if is_own else None
    else:
        parts = list(evaluate_published(run, args.data[0], Path(args.data[1])))
    rows = [{"corruption": p.corruption, "severity": p.severity, "images": p.images, **p.figures} for p in parts]
    print(json.dumps(rows, indent=2) if args.json else robustness_report(run, parts))
    if path is not None and not args.json:
        print(f"\n{path}")
    if path is None and is_own:
        print(
            "corruptions.json was not written: it belongs to the best checkpoint of a finished run, and to test images "
            "on which the run has the accuracy that its result.json records.",
            file=sys.stderr,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("evaluate", DESCRIPTION, EPILOG)
    add_run(parser)
    add_data_root(parser, "current location of the run's data, or other data with the same classes")
    parser.add_argument("--crops", type=int, choices=CROPS, default=1, help="views averaged (default: 1)")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: test")
    parser.add_argument(
        "--data", nargs=2, metavar=("cifar10_1|cifar10_c", "DIR"), help="robustness set and directory of its .npy files"
    )
    parser.add_argument(
        "--corruptions", action="store_true", help="test set under noise, blur, low contrast, JPEG, in five severities"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--predictions", type=output_file, metavar="FILE", help="also write labels and probabilities as CSV"
    )
    args = parser.parse_args(arguments)
    from alexnet_pl.data.robustness import KINDS  # here for start-up time: --help needs no torch
    from alexnet_pl.inference.evaluation import evaluate
    from alexnet_pl.inference.trained_run import load_run

    if args.data is not None and args.data[0] not in KINDS:
        parser.error(f"--data {args.data[0]} is invalid: expected {' or '.join(KINDS)}, and a directory")
    is_robustness = args.data is not None or args.corruptions
    excluded = args.crops != 1 or args.split != "test" or args.predictions or (args.data and args.corruptions)
    if is_robustness and excluded:
        parser.error("--data and --corruptions exclude each other, --crops, --split and --predictions")
    if args.data and args.data_root:
        parser.error("--data names its own directory and excludes --data-root")
    if args.predictions and not args.predictions.parent.is_dir():
        parser.error(f"--predictions {args.predictions} is invalid: its directory does not exist")
    run = load_run(args.run, args.trust)
    if is_robustness:
        evaluate_robustness(run, args)
        return
    result = evaluate(run, args.split, args.crops, args.data_root)
    if args.predictions:
        write_output(args.predictions, predictions_csv(run, result))
    print(json.dumps(as_json(run, result, args.crops), indent=2) if args.json else report(run, result, args.crops))
