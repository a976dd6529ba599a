"""Robustness of a trained run: error per corruption and severity, on published sets or on its own corrupted test."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alexnet_pl.data.cifar10 import CLASS_NAMES, official_dir
from alexnet_pl.data.class_folders import ClassFolders
from alexnet_pl.data.in_memory import TensorDataModule
from alexnet_pl.data.robustness import KINDS, ArrayDataModule, TestSet, corrupted, read_published
from alexnet_pl.inference.evaluation import evaluate_on
from alexnet_pl.inference.run_data import find_data
from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.errors import DataError, os_reason
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.run_folder import CORRUPTIONS, RESULT

SAME = 0.005
"""Difference in accuracy that another device or precision may make on the same images."""


@dataclass(frozen=True)
class Part:
    """Outcome of one part of a robustness set.

    Attributes:
        corruption: its name; "" without one.
        severity: 1 to 5; 0 without corruption.
        images: number of images.
        figures: ``test/loss``, ``acc``, ``acc_top5``, ``error``, ``error_top5``, ``ece``.
    """

    corruption: str
    severity: int
    images: int
    figures: dict[str, float]


def evaluate_published(run: TrainedRun, kind: str, folder: Path) -> Iterator[Part]:
    """Evaluate a run on CIFAR-10.1 or CIFAR-10-C, part by part.

    Args:
        kind: ``cifar10_1`` or ``cifar10_c``.
        folder: directory of the published ``.npy`` files.

    Raises:
        DataError: a file is not found or corrupt, or the run has other classes than CIFAR-10.
    """
    assert kind in KINDS
    if run.class_names != CLASS_NAMES:
        raise DataError(f"{kind} is invalid for {run.name}: expected a run with CIFAR-10's ten classes.")
    for part in read_published(kind, folder, len(CLASS_NAMES)):
        yield _evaluate(run, part, is_limited=False)


def evaluate_corruptions(run: TrainedRun, data_root: str | Path | None = None) -> Iterator[Part]:
    """Evaluate a run on its test images, first as they are, then under every corruption and severity.

    Datasets that fit into memory are corrupted in their own resolution, before they are resized; those in class folders
    and shards in the resolution that they are stored in; other data with the same classes after it is resized.

    Args:
        data_root: current location of the run's data.

    Raises:
        DataError: the data is not found or corrupt.
    """
    data: Any = find_data(run, "test", data_root, run.preprocess)
    if isinstance(data, ClassFolders):
        # The crop to the network's input comes after the corruption.
        side = run.preprocess.resize_size or run.preprocess.image_size
        data.preprocess = replace(run.preprocess, image_size=side, resize_size=None)
        if is_own_data(run, data_root):  # whose data module reads images in their own resolution
            with suppress(DataError):  # images of other sizes than the dataset's
                own: Any = find_data(run, "val", data_root, run.preprocess)
                own.load()
                data = own
    if isinstance(data, TensorDataModule):
        test = data.load().test
        images, labels = torch.from_numpy(test.images).permute(0, 3, 1, 2), torch.from_numpy(test.labels)
    else:
        data.setup()
        loader = data.test_dataloader()
        parts = [loader.gather(part) for part in loader.indices.split(256)]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    yield _evaluate(run, TestSet("", 0, images, labels))
    for part in corrupted(images, labels):
        yield _evaluate(run, part)


def _evaluate(run: TrainedRun, part: TestSet, is_limited: bool = True) -> Part:
    batch_size = int(run.config["data"]["batch_size"])
    data = ArrayDataModule(part.images, part.labels, run.class_names, run.preprocess, batch_size)
    found = evaluate_on(run, data, is_limited=is_limited)
    return Part(part.corruption, part.severity, len(found.labels), found.figures)


def is_own_data(run: TrainedRun, data_root: str | Path | None) -> bool:
    """Return True if ``data_root`` is where the run's own dataset is now, not other images of the same classes.

    That takes the training images as well: ``DIR/test/<class>/*`` alone may be anyone's.
    """
    if data_root is None:
        return True
    kind, root = run.data_class, Path(data_root)
    is_whole = kind.classes_from_files or official_dir(root).is_dir() or (root / "train").is_dir()
    return "root" in run.config["data"] and is_whole and kind.is_in(data_root)


def record(run: TrainedRun, parts: list[Part]) -> Path | None:
    """Write ``corruptions.json`` into the run's directory, where the report of a study finds it.

    Args:
        parts: of the run's own test set.

    Returns:
        The file; None if there is no result that it belongs to, as of a run from a hub, of another checkpoint than the
        run's best, or of images on which it has another accuracy.

    Raises:
        DataError: the file cannot be written.
    """
    if run.result is None or not (run.folder / RESULT).is_file():
        return None
    if abs(parts[0].figures["test/acc"] - run.result["test/acc"]) > SAME:
        return None
    rows = [
        {"corruption": part.corruption, "severity": part.severity, "images": part.images, **part.figures}
        for part in parts
    ]
    path = run.folder / CORRUPTIONS
    try:
        write_atomic(path, json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {os_reason(error)}.") from error
    return path
