"""training.callbacks.tensorboard."""

import contextlib
import io
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch.distributed
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from alexnet_pl.figures.features import Histogram, feature_layer, layers, pca
from alexnet_pl.figures.run_figures import FigureInputs
from alexnet_pl.training.resume import named_on_the_command_line

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
    "Optimisation": {
        "learning rate": ["Multiline", ["lr$"]],
        "gradient norm, last step of an epoch": ["Multiline", ["grad_norm"]],
        "weight norm": ["Multiline", ["weight_norm"]],
        "dead ReLUs (share of units)": ["Multiline", ["dead_relu/.*"]],
    },
    "Speed": {
        "seconds an epoch": ["Multiline", ["epoch_seconds"]],
        "images/s in training": ["Multiline", ["images_per_second"]],
    },
}
"""The charts of TensorBoard's Custom Scalars: category → chart → the tags that share it, as regular expressions."""

HP_METRICS = ("hp/val_acc_best", "hp/test_acc", "hp/seconds")

PR_CLASSES = 20
"""Most classes with a precision-recall curve; of more, those named rightly the least often."""

THUMBNAIL = 32
"""Pixels, in the projector."""


# --- what is written for TensorBoard --------------------------------------------------------------------------------


def tensorboard(trainer: Trainer) -> SummaryWriter | None:
    """The run's TensorBoard writer in the first process; None in others, and where there is no such logger."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def describe(writer: SummaryWriter, pl_module: LightningModule, step: int) -> None:
    """Hyperparameters, the layout of the charts, and the texts."""
    config = dict(pl_module.hparams)
    for summary in open_row(hyperparameters(config), [name.replace("/", ".") for name in named_on_the_command_line()]):
        writer._get_file_writer().add_summary(summary)
    writer.add_custom_scalars(LAYOUT)
    for title, text in (
        ("configuration", OmegaConf.to_yaml(OmegaConf.create(config))),
        ("command", shlex.join(["python", *sys.argv])),
    ):
        writer.add_text(title, "\n".join(f"    {line}" for line in text.splitlines()), step)
    rows = [f"| {name} | {layer} | {count:,} |" for name, layer, count in layers(pl_module.net)]
    writer.add_text("model", "\n".join(["| layer | | parameters |", "|---|---|---:|", *rows]), step)


SHOWN_FIRST = ("model", "data", "optimizer.lr", "seed")
"""Columns that TensorBoard shows first (it shows five) where nothing was set on the command line."""

COLUMNS = {
    "augment.padding": 0,
    "model.channels": "",
    "model.dropout": 0,
    "model.fc_width": 0,
    "model.norm_placement": "",
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "scheduler.patience": 0,
}
"""What every run declares besides its own settings: TensorBoard takes the columns of a study from any one run of it."""

KEPT = {"trainer": ("max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches", "deterministic")}
"""Of a section only these; of the others all but paths and what another section says as well."""

ELSEWHERE = ("data.root", "data.seed", "data.split_seed", "data.augment", "data.image_size", "data.mean", "data.std",
             "model.num_classes")  # fmt: skip


def open_row(row: dict[str, Any], named: Sequence[str]) -> tuple[Summary, Summary]:
    """TensorBoard's declaration of the columns, with those ``named`` first, and the run's values in them."""
    metrics = dict.fromkeys(HP_METRICS, 0.0)  # the names alone: a value is read from the scalar of that name
    declared, started = hparams({**COLUMNS, **row}, metrics)[0], hparams(row, metrics)[1]
    plugin = declared.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    first = set(named) & set(row) or set(SHOWN_FIRST)
    for column in content.experiment.hparam_infos:
        column.differs = column.name in first
    plugin.content = content.SerializeToString()
    return declared, started


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as a flat row, by the names they have on the command line.

    A section is its class's name (``model: AlexNet``, ``model.norm: BatchNorm2d``) with its values beside it
    (``optimizer.lr: 0.001``); lists are text. Paths and what only concerns the machine are left out.
    """
    row: dict[str, Any] = {name: config[name] for name in ("seed", "split_seed") if name in config}

    def visit(path: str, node: Any) -> None:
        if path in ELSEWHERE or node is None:
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

    for section in ("model", "data", "augment", "optimizer", "scheduler", "trainer"):
        node = config.get(section)
        if section in KEPT and isinstance(node, dict):
            node = {key: node[key] for key in KEPT[section] if key in node}
        visit(section, node)
    return row


def add_histogram(writer: SummaryWriter, tag: str, values: Histogram | None, step: int) -> None:
    if values is not None:
        writer.add_histogram_raw(
            tag, min=values.edges[0], max=values.edges[-1], num=int(values.counts.sum()), sum=values.total,
            sum_squares=values.squares, bucket_limits=values.edges[1:].tolist(), bucket_counts=values.counts.tolist(),
            global_step=step,
        )  # fmt: skip


def add_images(writer: SummaryWriter, drawn: dict[str, bytes], step: int) -> None:
    """PNG files as they are; ``add_image`` would decode and encode them again."""
    for name, png in drawn.items():
        width, height = Image.open(io.BytesIO(png)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=f"figures/{name}", image=image)])
        writer._get_file_writer().add_summary(summary, step)


def add_pr_curves(writer: SummaryWriter, material: FigureInputs, step: int) -> None:
    labels, probabilities = material.test.labels, material.test.probabilities.nan_to_num(0)
    right = probabilities.argmax(1) == labels
    shares = {label: float(right[labels == label].float().mean()) for label in labels.unique().tolist()}
    for label in sorted(sorted(shares, key=shares.__getitem__)[:PR_CLASSES]):
        writer.add_pr_curve(f"precision_recall/{material.names[label]}", labels == label, probabilities[:, label], step)


def add_projector(writer: SummaryWriter, material: FigureInputs, step: int) -> None:
    """The sample's features with thumbnails; what is written has every distance that the features have."""
    sample = material.test.sample
    if material.features is None or not material.features.isfinite().all():
        return
    names = [" ".join(name.split()) for name in material.names]
    images = torch.nn.functional.interpolate(sample.images.float(), [THUMBNAIL, THUMBNAIL], mode="area") / 255
    predictions = sample.probabilities.argmax(1).tolist()
    rows = [[names[label], names[said]] for label, said in zip(sample.labels.tolist(), predictions, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):  # it says that a folder exists, where a run was resumed
        writer.add_embedding(
            pca(material.features), rows, images, step, feature_layer(material.net),
            ["class", "predicted"],
        )  # fmt: skip


def add_graph(writer: SummaryWriter, pl_module: LightningModule, material: FigureInputs) -> None:
    sample = material.test.sample
    side = sample.images.shape[-2:]
    net = getattr(pl_module.net, "_orig_mod", pl_module.net)
    parameter = next(net.parameters())
    example = torch.zeros(1, sample.images.shape[1], *side, device=parameter.device, dtype=parameter.dtype)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints what it raises
        warnings.simplefilter("ignore")  # tracing is deprecated, and nothing else makes TensorBoard's graph
        writer.add_graph(net, example)
