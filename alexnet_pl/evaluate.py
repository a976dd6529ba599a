"""Evaluate a trained run: ``python -m alexnet_pl.evaluate RUN``; see ``--help``."""

import argparse
import csv
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from alexnet_pl.augment import normalize, ten_views
from alexnet_pl.classifier import ImageClassifier, average_views
from alexnet_pl.data.cifar10 import official_folder
from alexnet_pl.data.loader import TensorLoader
from alexnet_pl.errors import DataError, one_line_errors
from alexnet_pl.gallery import confusion_counts
from alexnet_pl.pictures import Preprocess, has_picture_suffix, read_picture
from alexnet_pl.runs import RUN_HELP, TrainedRun, data_class, load_run
from alexnet_pl.training import default_precision, quiet_lightning

ECE_BINS = 15
"""Bins of equal width for the calibration error (Guo et al. 2017)."""

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
  python -m alexnet_pl.evaluate runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000
  python -m alexnet_pl.evaluate best.ckpt --data-root my-pictures --json > figures.json"""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split gave.

    Attributes:
        figures: ``<split>/loss``, ``acc``, ``acc_top5``, ``error``, ``error_top5``, ``ece``.
        labels: ``(N,)`` int64.
        probabilities: ``(N, num_classes)`` float32.
        description: the data, for people.
        precision: what the network computed in.
        split: ``val`` or ``test``.
    """

    figures: dict[str, float]
    labels: Tensor
    probabilities: Tensor
    description: str
    precision: str
    split: str

    @property
    def confusion(self) -> Tensor:
        """``(classes, classes)`` int64 counts, row: the label, column: the prediction."""
        return confusion_counts(self.labels, self.probabilities)


class TenViews(nn.Module):
    """Averages a network's softmax over :func:`alexnet_pl.augment.ten_views`, view by view, as a run's own test does.

    Args:
        net: takes ``(N, 3, size, size)``.
        size: side of a view in pixels.
    """

    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities ``(N, num_classes)`` in float32 of ``(N, 3, B, B)``, B at least ``size``."""
        return average_views(torch.stack([self.net(view).float() for view in ten_views(images, self.size)]))


def evaluate(run: TrainedRun, split: str = "test", views: int = 1, data_root: Path | None = None) -> Evaluation:
    """Run the network over a split as the run's own test did: its batches, its precision where the device has it.

    Args:
        split: ``val`` or ``test``; ``val`` is the run's own part of the training images, by its ``split_seed``.
        views: 1, or the paper's 10.
        data_root: where the data is now, or another tree of class folders.

    Raises:
        DataError: no data, damaged data, or other classes than the run's.
    """
    data = find_data(run, split, data_root, run.preprocess if views == 1 else uncropped(run.preprocess))
    net = run.net if views == 1 else TenViews(run.net, run.preprocess.image_size)
    trainer, precision = make_trainer(run)
    model = ImageClassifier(net, run.config["model"]["num_classes"], torch.optim.SGD)
    logits: list[Tensor] = []
    hook = net.register_forward_hook(lambda module, inputs, output: logits.append(output.float().cpu()))
    data.setup()
    if tuple(data.class_names) != run.class_names:
        raise DataError(f"The classes are not the run's: {', '.join(data.class_names)}.")
    go = trainer.test if split == "test" else trainer.validate
    figures = go(model, datamodule=data, verbose=False)[0]
    hook.remove()
    run.net.cpu()
    probabilities = torch.cat(logits).softmax(1)
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    labels = loader.labels[loader.indices][: len(probabilities)].cpu()
    probabilities = probabilities[: len(labels)]  # without what filled up the last batch
    ece = multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=ECE_BINS, norm="l1")
    figures = {**figures, f"{split}/ece": float(ece)}
    return Evaluation(figures, labels, probabilities, data.description, precision, split)


def uncropped(preprocess: Preprocess) -> Preprocess:
    """The same with all of the larger picture that views are cut from: the run's own size of it, else 256 for 224."""
    size = preprocess.image_size
    has_room = preprocess.resize_size is not None and preprocess.resize_size > size
    return replace(
        preprocess, image_size=preprocess.resize_size if has_room else round(size * 256 / 224), resize_size=None
    )


def make_trainer(run: TrainedRun, callbacks: Sequence[Callback] = ()) -> tuple[Trainer, str]:
    """A trainer like the run's on the device that is here, and its precision.

    The run's precision is kept unless this device lacks it: float16 needs a GPU, and a CPU without bf16 instructions
    would emulate bfloat16, many times slower.
    """
    quiet_lightning()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    settings = run.config["trainer"]
    accelerator = "gpu" if torch.cuda.is_available() and settings["accelerator"] != "cpu" else "cpu"
    precision = str(settings["precision"])
    needs_gpu, needs_bf16 = precision.startswith("16"), precision.startswith("bf16")
    if accelerator == "cpu" and (needs_gpu or (needs_bf16 and default_precision("cpu") != "bf16-mixed")):
        precision = default_precision("cpu")
    limits = {name: settings[name] for name in ("limit_val_batches", "limit_test_batches") if name in settings}
    return Trainer(
        accelerator=accelerator, devices=1, precision=precision, deterministic=settings.get("deterministic", False),
        callbacks=[*callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **limits,
    ), precision  # fmt: skip


# --- data -----------------------------------------------------------------------------------------------------------


class ClassFolders(LightningDataModule):
    """Pictures of any size in ``<folder>/<class>/*`` as test data, in the order of the CIFAR-10 class folders.

    Args:
        folder: holds a folder for each class.
        class_names: in the order of the labels.
        preprocess: resizes each picture on its own.
        batch_size: at least 1.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], preprocess: Preprocess, batch_size: int):
        super().__init__()
        self.folder, self.class_names, self.preprocess = folder, class_names, preprocess
        self.batch_size = batch_size
        self.description = f"class folders in {folder}"

    def setup(self, stage: str | None = None) -> None:
        """Read everything; the second call does nothing.

        Raises:
            DataError: missing or other class folders, an empty one, a picture that cannot be read.
        """
        if hasattr(self, "loader"):
            return
        files = list_class_folders(self.folder, self.class_names)
        images = torch.stack([self.preprocess.pixels(read_picture(path)) for path, _ in files])
        labels = torch.tensor([label for _, label in files])
        self.loader = TensorLoader(images, labels, torch.arange(len(labels)), self.batch_size)

    def test_dataloader(self) -> TensorLoader:
        return self.loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return normalize(images, self.preprocess.mean, self.preprocess.std), labels


def list_class_folders(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """Picture files with their labels, taken from the classes in turn.

    Raises:
        DataError: the folders in ``folder`` are not exactly the classes, or one of them holds no picture.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Give a folder that holds test/<class>/* or <class>/*.")
    present = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    missing, unknown = [name for name in class_names if name not in present], sorted(present.difference(class_names))
    differences = [("lacks", missing), ("has besides", unknown)]
    if said := "; it ".join(f"{verb} {', '.join(names)}" for verb, names in differences if names):
        raise DataError(f"The class folders in {folder} are not the run's {len(class_names)} classes: it {said}.")
    found = []
    for label, name in enumerate(class_names):
        files = sorted(path for path in (folder / name).iterdir() if has_picture_suffix(path))
        if not files:
            raise DataError(f"{folder / name} holds no picture.")
        found += [(rank, label, path) for rank, path in enumerate(files)]
    return [(path, label) for _, label, path in sorted(found)]


def find_data(run: TrainedRun, split: str, data_root: Path | None, preprocess: Preprocess) -> LightningDataModule:
    """The data module to evaluate on, its pictures of the sizes in ``preprocess``; nothing is read or downloaded yet.

    Raises:
        DataError: the data is not where the run had it, or ``data_root`` cannot give the split.
    """
    left_out = ("_target_", "augment", "test_views")
    made_of = {name: value for name, value in run.config["data"].items() if name not in left_out}
    settings = {**made_of, "image_size": preprocess.image_size, "resize_size": preprocess.resize_size}
    has_root = "root" in settings
    kind = data_class(run.config)
    if data_root is None:
        if has_root and not kind.is_in(settings["root"]):
            raise DataError(f"The run's data is not in {settings['root']}. Say where it is now: --data-root FOLDER.")
        return kind(**settings)
    if kind.classes_from_files and kind.is_in(data_root):
        return kind(**{**settings, "root": str(data_root)})
    if has_root and (official_folder(data_root).is_dir() or split == "val"):
        if not official_folder(data_root).is_dir() and not (data_root / "train").is_dir():
            raise DataError(f"{data_root} holds no copy of the run's training images, which --split val is a part of.")
        return kind(**{**settings, "root": data_root})
    if split == "val":
        raise DataError("--split val is a part of the run's own data. Leave --data-root out, or use --split test.")
    folder = data_root / "test" if (data_root / "test").is_dir() else data_root
    return ClassFolders(folder, run.class_names, preprocess, settings["batch_size"])


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
        here = {f"{name}_10views": value for name, value in here.items()}
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
        prog="python -m alexnet_pl.evaluate", description=DESCRIPTION, epilog=EPILOG,
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


if __name__ == "__main__":
    with one_line_errors():
        main()
