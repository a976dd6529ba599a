"""cli.evaluate."""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_pl.inference.evaluation import Evaluation, evaluate
from alexnet_pl.inference.trained_run import RUN_HELP, TrainedRun, load_run

CONFUSION_SHOWN = 40
"""Most classes whose confusion matrix is printed: a wider one fits no screen. --json has any."""

DESCRIPTION = """\
Loss, top-1 and top-5 error, accuracy by class, calibration error and confusion matrix of a trained run.

On the run's own data, batch size, precision and kind of device the figures are exactly those of result.json, and have
the same names in --json. Another --data-root is either a copy of the run's data or any tree of class folders,
FOLDER/test/<class>/* or FOLDER/<class>/*, with pictures of any size and the run's class names."""

EPILOG = """\
  --views 10 is the paper's test: the softmax is averaged over the four corners, the centre and their mirror images of
  pictures of data.resize_size pixels a side; 256/224 of the network's input, where the run has no such size.
  Calibration error is the expected one over 15 bins of equal width: the mean of |accuracy − confidence|, weighted by
  the images in a bin. Accuracies and errors are fractions, the loss is in nats.

examples:
  python -m alexnet_pl evaluate runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000
  python -m alexnet_pl evaluate best.ckpt --data-root my-pictures --json > figures.json"""


# --- what is shown --------------------------------------------------------------------------------------------------


def report(run: TrainedRun, result: Evaluation, views: int) -> str:
    """The figures for people: a table, accuracy by class and the confusion matrix."""
    split, names = result.split, run.logit_names
    loss, top1, top5, ece = (result.figures[f"{split}/{key}"] for key in ("loss", "error", "error_top5", "ece"))
    width = max(map(len, names))
    correct = result.confusion.diag() / result.confusion.sum(1)
    columns, shown = [name[:5] for name in names], len(names) <= CONFUSION_SHOWN
    lines = [
        f"{run.name}, epoch {run.epoch}, {split} split: {len(result.labels):,} images, {views} view(s) each",
        f"data       {result.description}",
        f"precision  {result.precision}",
        "",
        f"{'loss':>10}{'top-1 err':>12}{'top-5 err':>12}{'ECE':>10}",
        f"{loss:10.4f}{top1:12.4f}{top5:12.4f}{ece:10.4f}",
        "",
        f"{'':{width}}  accuracy" + ("   predicted " + " ".join(f"{column:>5}" for column in columns)) * shown,
    ]
    for name, accuracy, row in zip(names, correct.tolist(), result.confusion.tolist(), strict=True):
        lines.append(
            f"{name:{width}}  {accuracy:8.4f}" + ("             " + " ".join(f"{count:5}" for count in row)) * shown
        )
    if agreement := compared(run, result, views):
        lines += ["", agreement]
    return "\n".join(lines)


def compared(run: TrainedRun, result: Evaluation, views: int) -> str:
    """How the figures relate to the run's own in result.json; empty where there is nothing to compare."""
    here = {f"{result.split}/{key}": result.figures[f"{result.split}/{key}"] for key in ("loss", "acc", "acc_top5")}
    if views == 10:
        here = {f"{name}_ten_crop": value for name, value in here.items()}
    if run.result is None or not here.keys() <= run.result.keys():
        return ""
    if all(run.result[name] == value for name, value in here.items()):
        return "exactly the figures of result.json"
    own = ", ".join(f"{name} {run.result[name]:.6g} (here {value:.6g})" for name, value in here.items())
    return f"result.json has {own}, from {run.result['device']} in {run.result['precision']}"


def as_json(run: TrainedRun, result: Evaluation, views: int) -> dict[str, Any]:
    """The same as plain values; figures have the names that they have in result.json."""
    split, confusion = result.split, result.confusion
    by_class = (confusion.diag() / confusion.sum(1)).nan_to_num(0).tolist()
    return {
        **result.figures,
        f"{split}/class_acc": dict(zip(run.logit_names, by_class, strict=True)),
        f"{split}/confusion": confusion.tolist(),
        "images": len(result.labels),
        "views": views,
        "data": result.description,
        "precision": result.precision,
        "epoch": run.epoch,
    }


def write_predictions(path: Path, run: TrainedRun, result: Evaluation) -> None:
    """A CSV row for each image, in the split's order: its label's name, then the probability of each class."""
    names = run.logit_names
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *names])
        for label, row in zip(result.labels.tolist(), result.probabilities.tolist(), strict=True):
            writer.writerow([names[label], *row])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl evaluate", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--data-root", type=Path, metavar="FOLDER", help="where the data is now, or other data")
    parser.add_argument("--views", type=int, choices=(1, 10), default=1, help="views of each picture (default: 1)")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: test")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="also write labels and probabilities as CSV")
    given = parser.parse_args(arguments)
    run = load_run(given.run)
    result = evaluate(run, given.split, given.views, given.data_root)
    if given.predictions:
        write_predictions(given.predictions, run, result)
    print(json.dumps(as_json(run, result, given.views), indent=2) if given.json else report(run, result, given.views))
