"""TensorBoard pages: hyperparameter rows, chart layout, histograms, images, PR curves, projector, graph."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image

from alexnet_pl.figures.features import Histogram, feature_layer, list_layers, pca
from alexnet_pl.figures.run_figures import FigureInputs
from alexnet_pl.runtime.commands import current_command
from alexnet_pl.runtime.errors import printable
from alexnet_pl.training.callbacks.checkpoint import BestCheckpoint
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.lightning_internals import add_summary, free_traced_types
from alexnet_pl.training.resume import named_on_the_command_line

if TYPE_CHECKING:  # a run without TensorBoard does not load it, nor do the local imports below
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

CHARTS = {
    "loss (nats)": "loss",
    "top-1 accuracy": "acc",
    "top-5 accuracy": "acc_top5",
    "top-1 error": "error",
    "top-5 error": "error_top5",
}

LAYOUT = {
    "Training and validation": {
        title: ["Multiline", [f"{split}/{name}$" for split in ("train", "val", "test")]]
        for title, name in CHARTS.items()
    },
    "Optimization": {
        "learning rate": ["Multiline", ["lr$"]],
        "gradient norm, last step of each epoch": ["Multiline", ["grad_norm"]],
        "weight norm": ["Multiline", ["weight_norm"]],
        "dead ReLUs (fraction of units)": ["Multiline", ["dead_relu/.*"]],
    },
    "Speed": {
        "s/epoch": ["Multiline", ["epoch_seconds"]],
        "training images/s": ["Multiline", ["images_per_second"]],
    },
}
"""Charts of TensorBoard's Custom Scalars page: category → chart → regular expressions of the tags in it."""

HP_METRICS = ("hp/val_acc_best", "hp/test_acc", "hp/seconds")

PR_CLASSES = 20
"""Maximum number of precision-recall curves: those of the classes with the lowest recall."""

THUMBNAIL = 32
"""Side of the projector's thumbnails in pixels."""


def find_writer(trainer: Trainer) -> SummaryWriter | None:
    """Return the run's TensorBoard writer on rank 0; None on other ranks or without such a logger."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def describe_run(writer: SummaryWriter, pl_module: LightningModule, step: int) -> None:
    """Write the hyperparameter row, the chart layout, and config, command and layers as text."""
    config = dict(pl_module.hparams)
    for summary in open_row(hyperparameters(config), [name.replace("/", ".") for name in named_on_the_command_line()]):
        add_summary(writer, summary)
    writer.add_custom_scalars(LAYOUT)
    for title, text in (
        ("configuration", OmegaConf.to_yaml(OmegaConf.create(config))),
        ("command", current_command()),
    ):
        writer.add_text(title, "\n".join(f"    {line}" for line in text.splitlines()), step)
    rows = [
        f"| {name} | {layer} | {count:,} |" for name, layer, count in list_layers(cast(ImageClassifier, pl_module).net)
    ]
    writer.add_text("model", "\n".join(["| layer | | parameters |", "|---|---|---:|", *rows]), step)


def add_best_accuracy(writer: SummaryWriter, trainer: Trainer, step: int) -> None:
    """Write the validation accuracy of the weights in ``best.ckpt``, which result.json reports as ``val/acc``."""
    for callback in cast(Any, trainer).callbacks:  # Lightning does not declare the attribute
        if isinstance(callback, BestCheckpoint) and "val/acc" in callback.metrics:
            writer.add_scalar("hp/val_acc_best", callback.metrics["val/acc"], step)


def close_hparams_row(writer: SummaryWriter, accuracy: float, seconds: float, step: int) -> None:
    """Add test accuracy and training time to the run's hyperparameter row, and mark the run as finished."""
    from torch.utils.tensorboard.summary import hparams

    writer.add_scalar("hp/test_acc", accuracy, step)
    writer.add_scalar("hp/seconds", seconds, step)
    add_summary(writer, hparams({}, {})[2])


def add_results(writer: SummaryWriter, metrics: Mapping[str, float], page: Path | None, step: int) -> None:
    """Write the test's metrics as a table, and the place of the report, which TensorBoard cannot show itself."""
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    place = ["", f"Report with all figures: `{page.absolute()}`"] if page is not None else []
    writer.add_text("results", "\n".join(["| metric | value |", "|---|---:|", *rows, *place]), step)


SHOWN_FIRST = ("model", "data", "optimizer.lr", "seed")
"""Columns that TensorBoard shows first (of five) if the command line sets no hyperparameter."""

COLUMNS = {
    "augment.crop.padding": 0,
    "model.channels": "",
    "model.dropout": 0,
    "model.fc_width": 0,
    "model.norm_placement": "",
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "scheduler.patience": 0,
}
"""Columns that every run declares besides its own: TensorBoard takes a study's columns from any one of its runs."""

INCLUDED = {"trainer": ("max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches", "deterministic")}
"""The only keys of a section that become columns. Other sections have all of theirs except the excluded ones."""

EXCLUDED = ("data.root", "data.seed", "data.split_seed", "data.augment", "data.image_size", "data.mean", "data.std",
            "model.num_classes")  # fmt: skip
"""Keys that are paths or repeat another section."""


def open_row(row: dict[str, Any], named: Sequence[str]) -> tuple[Summary, Summary]:
    """Return the declaration of the hyperparameter columns, those ``named`` first, and the start of the run's row."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    metrics = dict.fromkeys(HP_METRICS, 0.0)  # only the names count: TensorBoard reads the scalars of these names
    declared, started = hparams({**COLUMNS, **row}, metrics)[0], hparams(row, metrics)[1]
    plugin = declared.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    first = set(named) & set(row) or set(SHOWN_FIRST)
    for column in content.experiment.hparam_infos:
        column.differs = column.name in first
    plugin.content = content.SerializeToString()
    return declared, started


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config as a flat row with the names of the command line.

    A section becomes its class name (``model: AlexNet``, ``model.norm: BatchNorm2d``) with its values in columns of
    their own (``optimizer.lr: 0.001``); lists become text. Paths and machine-specific keys are excluded.
    """
    row: dict[str, Any] = {name: config[name] for name in ("seed", "split_seed") if name in config}

    def visit(path: str, node: Any) -> None:
        if path in EXCLUDED or node is None:
            return
        if isinstance(node, dict):
            if "_target_" in node:
                row[path] = str(node["_target_"]).rpartition(".")[2].removesuffix("DataModule")
            for key, value in node.items():
                if not str(key).startswith("_"):
                    visit(f"{path}.{key}", value)
        elif isinstance(node, list):
            row[path] = ", ".join(map(str, node))
        else:
            row[path] = node

    for section in ("model", "data", "augment", "loss", "optimizer", "scheduler", "trainer"):
        node = config.get(section)
        if section in INCLUDED and isinstance(node, dict):
            node = {key: node[key] for key in INCLUDED[section] if key in node}
        visit(section, node)
    return row


def add_histogram(writer: SummaryWriter, tag: str, values: Histogram | None, step: int) -> None:
    """Write a histogram; None writes nothing."""
    if values is not None:
        writer.add_histogram_raw(
            tag, min=values.edges[0], max=values.edges[-1], num=int(values.counts.sum()), sum=values.total,
            sum_squares=values.squares, bucket_limits=values.edges[1:].tolist(), bucket_counts=values.counts.tolist(),
            global_step=step,
        )  # fmt: skip


def add_images(writer: SummaryWriter, drawn: dict[str, bytes], step: int) -> None:
    """Write PNG files as they are; ``add_image`` would decode and re-encode them."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, png in drawn.items():
        width, height = Image.open(io.BytesIO(png)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        add_summary(writer, Summary(value=[Summary.Value(tag=f"figures/{name}", image=image)]), step)


def add_pr_curves(writer: SummaryWriter, inputs: FigureInputs, step: int) -> None:
    """Write a precision-recall curve per class, for the ``PR_CLASSES`` classes with the lowest recall."""
    if inputs.test is None:
        return
    labels, probabilities = inputs.test.labels, inputs.test.probabilities.nan_to_num(0)
    is_right = probabilities.argmax(1) == labels
    images, right = labels.bincount(), labels[is_right].bincount(minlength=int(labels.max()) + 1)
    present = images.nonzero().flatten()
    lowest = present[(right[present] / images[present]).argsort(stable=True)[:PR_CLASSES]]
    for label in lowest.sort().values.tolist():
        tag = f"precision_recall/{printable(inputs.names[label])}"
        writer.add_pr_curve(tag, labels == label, probabilities[:, label], step)


def add_projector(writer: SummaryWriter, inputs: FigureInputs, step: int) -> None:
    """Write the sample's features with thumbnails; their principal axes preserve every pairwise distance."""
    if inputs.test is None or inputs.features is None or not inputs.features.isfinite().all():
        return
    sample = inputs.test.sample
    assert sample.images is not None  # the features are theirs
    names = [printable(" ".join(name.split())) for name in inputs.names]
    images = torch.nn.functional.interpolate(sample.images.float(), [THUMBNAIL, THUMBNAIL], mode="area") / 255
    predictions = sample.probabilities.argmax(1).tolist()
    rows = [
        [names[label], names[predicted]] for label, predicted in zip(sample.labels.tolist(), predictions, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # a resumed run has the directory, which is printed as a warning
        writer.add_embedding(
            pca(inputs.features), rows, images, step, feature_layer(inputs.net), ["class", "predicted"]
        )


def add_graph(writer: SummaryWriter, inputs: FigureInputs) -> None:
    """Write the network's graph, traced with an image of zeros."""
    if inputs.test is None or inputs.test.sample.images is None:
        return
    parameter = next(inputs.net.parameters())
    shape = inputs.test.sample.images.shape[1:]
    example = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # add_graph prints what it raises
            warnings.simplefilter("ignore")  # tracing is deprecated, but TensorBoard's graph has no other source
            writer.add_graph(inputs.net, example)
    finally:
        free_traced_types()
