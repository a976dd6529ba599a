"""Growth of time and memory with images, classes and epochs: ``alexnet benchmark --growth``.

Each row has ten times as much of one quantity as the row before, on synthetic data that are small in all others. Cost
in a study's trials is measured by :mod:`alexnet_pl.studies.growth`.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from alexnet_pl.benchmark.loops import peak_memory
from alexnet_pl.benchmark.timing import note
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards.datamodule import ShardShuffle, StreamLoader
from alexnet_pl.data.shards.reader import Shards
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.figures.html_report import write_report
from alexnet_pl.figures.image_grids import png
from alexnet_pl.figures.run_figures import FigureInputs, TestPredictions, draw_confusion_matrix, draw_mistakes
from alexnet_pl.models.lenet import LeNet5
from alexnet_pl.runtime.run_folder import METRICS
from alexnet_pl.runtime.system import usable_cores
from alexnet_pl.training.classifier import ClassificationMetrics
from alexnet_pl.training.loggers import MetricsCSV

IMAGES = (1_000, 10_000, 100_000, 1_000_000)

CLASSES = (10, 100, 1_000, 10_000)

EPOCHS = (10, 100, 1_000, 10_000)

SIDE = 8
"""Pixels a side of the images in shards: only their number counts here."""

TESTED = 2_000
"""Test images behind the figures of many classes."""

LINKS = 30_000
"""Directory entries per image file; file systems allow 65,000."""


@dataclass
class Row:
    """Cost at one size.

    Attributes:
        quantity: what grows, ``images`` for one.
        count: how much there is of it.
        seconds: by step.
        megabytes: by file or kind of memory.
    """

    quantity: str
    count: int
    seconds: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)

    def time(self, step: str, work: Callable[[], object]) -> None:
        """Call ``work`` and record its seconds."""
        start = time.perf_counter()
        work()
        self.seconds[step] = time.perf_counter() - start

    def end(self) -> "Row":
        """Record the peak of the process's memory so far. Rows come in increasing order, so it is the row's own."""
        self.megabytes["peak memory"] = peak_memory("cpu") / 1e6
        note(f"growth: {self.count:,} {self.quantity}, {sum(self.seconds.values()):.1f} s")
        return self


def grow_images(count: int, scratch: Path) -> Row:
    """Make shards of ``count`` small images, open and shuffle them, and read an epoch in batches."""
    row, tree, out = Row("images", count), scratch / f"images-{count}", scratch / f"shards-{count}"
    _link_images(tree, count)
    row.time("list the files", lambda: list_splits(tree))
    listing = list_splits(tree)
    row.time("make the shards", lambda: make_shards(listing, out, SIDE, workers=usable_cores()))
    row.time("open the shards", lambda: Shards(out))
    shards = Shards(out)
    sampler = ShardShuffle(shards.splits["train"].shard, seed=0)
    row.time("shuffle an epoch", sampler.order)
    loader = StreamLoader(shards, "train", torch.arange(count), SIDE, usable_cores(), 128, sampler)
    row.time("read an epoch", lambda: [None for _ in loader])
    row.megabytes["shards"] = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    return row.end()


def _link_images(tree: Path, count: int) -> None:
    """Create an ImageFolder layout of ``count`` training images in ten classes: links to few files."""
    random = np.random.default_rng(0)
    tree.mkdir(parents=True)
    for number in range(-(-count // LINKS)):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tree / f"{number}.png")
    for split, images in (("train", count), ("val", 10)):
        for label in range(10):
            directory = tree / split / f"class{label}"
            directory.mkdir(parents=True)
            for index in range(label, images, 10):
                os.link(tree / f"{index // LINKS}.png", directory / f"{index:07}.png")


def grow_classes(count: int, scratch: Path) -> Row:
    """Train a step of LeNet-5 with ``count`` outputs, count its errors, and draw the figures of a test."""
    row = Row("classes", count)
    torch.manual_seed(0)
    net, metrics = LeNet5(count, image_size=32), ClassificationMetrics(top_k=5)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(count, (128,))

    def step() -> None:
        for _ in range(10):
            logits = net(images)
            losses = F.cross_entropy(logits, labels, reduction="none")
            metrics.update(logits.detach(), labels, losses.detach())
            losses.mean().backward()

    step()
    row.time("ten training steps", step)
    test = TestPredictions((0.5,) * 3, (0.5,) * 3)
    tested = torch.randn(TESTED, 3, 32, 32), torch.randint(count, (TESTED,)), torch.randn(TESTED, count)
    row.time("collect the test", lambda: test.add(*tested))
    inputs = FigureInputs(net, [f"class {index}" for index in range(count)], test)
    row.time("draw the confusion matrix", lambda: png(draw_confusion_matrix(inputs)))
    row.time("draw the mistakes", lambda: png(draw_mistakes(inputs)))
    return row.end()


def grow_epochs(count: int, scratch: Path) -> Row:
    """Log ``count`` epochs to metrics.csv and TensorBoard, and write the report of the run."""
    row, run_dir = Row("epochs", count), scratch / f"epochs-{count}"
    run_dir.mkdir()
    values = {f"{split}/{name}": 0.123456789 for split in ("train", "val") for name in ("loss", "acc", "acc_top5")}
    values |= {"lr": 1e-3, "grad_norm": 1.5, "weight_norm": 60.0, "images_per_second": 1e3, "epoch_seconds": 45.0}
    logger = MetricsCSV(run_dir / METRICS)

    def log_metrics() -> None:
        for epoch in range(count):
            logger.record(epoch + 1, {"step": epoch, **values})

    def log_scalars() -> None:
        writer = SummaryWriter(str(run_dir / "tensorboard"))
        for epoch in range(count):
            for name, value in values.items():
                writer.add_scalar(name, value, epoch)
        writer.close()

    row.time("write metrics.csv", log_metrics)
    row.time("write TensorBoard's events", log_scalars)
    row.time("write the report", lambda: write_report(run_dir))
    row.megabytes["metrics.csv"] = (run_dir / METRICS).stat().st_size / 1e6
    row.megabytes["TensorBoard's events"] = sum(f.stat().st_size for f in (run_dir / "tensorboard").iterdir()) / 1e6
    return row.end()


def grow(measure: Callable[[int, Path], Row], counts: Sequence[int], scratch: Path) -> list[Row]:
    """Return a row for each count, in increasing order."""
    return [measure(count, scratch) for count in sorted(counts)]
