"""When a run is drawn: callbacks for TensorBoard and for the files under ``figures/``. What is drawn: gallery.py."""

import contextlib
import io
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from alexnet_pl.augment import normalize
from alexnet_pl.features import (
    Histogram,
    activations,
    central_view,
    feature_layer,
    histogram,
    layer_name,
    layers,
    logit_names,
    pixels,
    plain_batches,
    projected,
    see,
)
from alexnet_pl.gallery import AUGMENTED, Material, TestRecord, draw, one_line, save
from alexnet_pl.metrics_csv import MetricsCSV
from alexnet_pl.resuming import named_on_the_command_line

log = logging.getLogger(__name__)

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
PROBED = 128
"""Validation images whose activations are looked at."""
PR_CLASSES = 20
"""Most classes with a precision-recall curve; of more, those named rightly the least often."""
THUMBNAIL = 32
"""Pixels, in the projector."""


class Dashboard(Callback):
    """Fills TensorBoard's pages and the run's ``figures/``.

    Before training: hyperparameters, the charts' layout, configuration, model summary and command. After some epochs:
    histograms of weights and activations, and dead ReLUs. After the test: the figures of :mod:`alexnet_pl.gallery`,
    precision-recall curves, the graph and the projector. The test is the run's own: nothing is passed over twice but
    some images for their features. Only the first of several processes draws, and what cannot be drawn is left out with
    the reason: it never ends a run.

    Attributes:
        left_out: what could not be drawn → why.
        augmented: the first training batch that was seen, as the network saw it (normalised), and its labels.

    Args:
        folder: where the PNG files go.
        histograms_every: epochs between two looks at weights and activations (the first epoch has one); 0: none.
        figures: whether to draw after the test.
        training_images: to look for nearest neighbours among, at most; 0: none.
    """

    def __init__(
        self, folder: str | Path, histograms_every: int = 5, figures: bool = True, training_images: int = 10_000
    ):
        self.folder, self.histograms_every, self.figures = Path(folder), histograms_every, figures
        self.training_images = training_images
        self.left_out: dict[str, str] = {}
        self.augmented: tuple[Tensor, Tensor] | None = None
        self._best = 0.0
        self._step = 0
        self._probe: Tensor | None = None
        self._record: TestRecord | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    # --- before and in training -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if writer := tensorboard(trainer):
            self._attempt("texts", lambda: describe(writer, pl_module, trainer.global_step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.figures and self.augmented is None:
            images, labels = batch
            self.augmented = images[:AUGMENTED].clone(), labels[:AUGMENTED].clone()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._is_due(trainer):
            self._probe = batch[0][batch[1] >= 0][:PROBED]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = tensorboard(trainer)
        self._best = max(self._best, float(trainer.callback_metrics.get("val/acc", 0.0)))
        if writer:
            writer.add_scalar("hp/val_acc_best", self._best, trainer.global_step)
        if writer and self._is_due(trainer) and self._probe is not None:
            self._attempt("histograms", lambda: self._look_inside(writer, trainer, pl_module))
        self._probe = None

    def _is_due(self, trainer: Trainer) -> bool:
        epoch, every = trainer.current_epoch + 1, self.histograms_every
        return every > 0 and not trainer.sanity_checking and (epoch == 1 or epoch % every == 0)

    def _look_inside(self, writer: SummaryWriter, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.net.named_parameters():
            module, _, kind = name.rpartition(".")
            add_histogram(writer, f"{kind}s/{layer_name(module)}", histogram(parameter), trainer.global_step)
        with trainer.precision_plugin.forward_context():
            seen = activations(pl_module.net, self._probe)
        for name, answers in seen.items():
            add_histogram(writer, f"activations/{name}", answers.histogram, trainer.global_step)
            if answers.dead is not None:
                writer.add_scalar(f"dead_relu/{name}", answers.dead, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    # --- the test and after it --------------------------------------------------------------------------------------

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record = TestRecord(trainer.datamodule.mean, trainer.datamodule.std) if self.figures else None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self._record is not None:
            images, labels = batch
            self._attempt("test", lambda: self._record.add(central_view(images), labels, outputs))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._record is not None and trainer.world_size > 1:
            records: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(records, self._record)
            self._record = records[0]
            for record in records[1:]:
                self._record.merge(record)
        writer = tensorboard(trainer)
        if writer:
            self._attempt("hyperparameters", lambda: self._close_row(writer, trainer, pl_module))
        if self._record is not None and trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                material = self._material(trainer, pl_module)
            drawn, left_out = draw(material)
            self.left_out |= left_out
            self._attempt("figures", lambda: save(drawn, self.folder))
            if writer:
                self._attempt("images", lambda: add_images(writer, drawn, self._step))
                self._attempt("precision-recall curves", lambda: add_pr_curves(writer, material, self._step))
                self._attempt("projector", lambda: add_projector(writer, material, self._step))
                self._attempt("graph", lambda: add_graph(writer, pl_module, material))
                writer.flush()
            for name, reason in left_out.items():
                if "failed" in reason:
                    log.warning(f"warning: no figure {name}: {reason}")
        self._record = self.augmented = None

    def _close_row(self, writer: SummaryWriter, trainer: Trainer, pl_module: LightningModule) -> None:
        writer.add_scalar("hp/test_acc", float(trainer.callback_metrics["test/acc"]), self._step)
        rows = [row for logger in trainer.loggers if isinstance(logger, MetricsCSV) for row in logger.rows.values()]
        writer.add_scalar("hp/seconds", sum(row.get("epoch_seconds", 0.0) for row in rows), self._step)
        writer._get_file_writer().add_summary(hparams({}, {})[2])

    def _material(self, trainer: Trainer, pl_module: LightningModule) -> Material:
        data, record, missing = trainer.datamodule, self._record, {}
        augmented = None
        if self.augmented is not None:
            images, labels = self.augmented
            augmented = pixels(images, data.mean, data.std), labels.cpu()
        features = training = None
        sample = record.sample
        if sample.images is None:
            missing["test"] = "no test image was seen"
        elif self.training_images == 0:
            missing["training"] = "callbacks.dashboard.training_images=0"
        try:
            if sample.images is not None:
                images = normalize(sample.images.to(pl_module.device), data.mean, data.std)
                batches = zip(images.split(PROBED), sample.labels.to(pl_module.device).split(PROBED), strict=True)
                shown = see(pl_module.net, batches, data.mean, data.std, len(images))
                features = shown.features if shown else None
                missing["features"] = "the network has no hidden layer before a linear one"
            if features is not None and self.training_images > 0:
                batches = plain_batches(data, data.train_dataloader(), pl_module.device)
                training = see(pl_module.net, batches, data.mean, data.std, self.training_images)
        except Exception as error:
            missing["training"] = missing["features"] = f"looking for features failed: {one_line(error)}"
        names = logit_names(pl_module.hparams["class_names"], record.probabilities.shape[1])
        return Material(pl_module.net, names, record, features, training, augmented, missing)

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        """Let nothing that is only there to be looked at end a run."""
        try:
            act()
        except Exception as error:
            if what not in self.left_out:
                log.warning(f"warning: no {what} on the dashboard: {one_line(error)}")
            self.left_out[what] = f"it failed: {one_line(error)}"


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


def add_pr_curves(writer: SummaryWriter, material: Material, step: int) -> None:
    labels, probabilities = material.test.labels, material.test.probabilities.nan_to_num(0)
    right = probabilities.argmax(1) == labels
    shares = {label: float(right[labels == label].float().mean()) for label in labels.unique().tolist()}
    for label in sorted(sorted(shares, key=shares.__getitem__)[:PR_CLASSES]):
        writer.add_pr_curve(f"precision_recall/{material.names[label]}", labels == label, probabilities[:, label], step)


def add_projector(writer: SummaryWriter, material: Material, step: int) -> None:
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
            projected(material.features), rows, images, step, feature_layer(material.net),
            ["class", "predicted"],
        )  # fmt: skip


def add_graph(writer: SummaryWriter, pl_module: LightningModule, material: Material) -> None:
    sample = material.test.sample
    side = sample.images.shape[-2:]
    net = getattr(pl_module.net, "_orig_mod", pl_module.net)
    parameter = next(net.parameters())
    example = torch.zeros(1, sample.images.shape[1], *side, device=parameter.device, dtype=parameter.dtype)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints what it raises
        warnings.simplefilter("ignore")  # tracing is deprecated, and nothing else makes TensorBoard's graph
        writer.add_graph(net, example)
