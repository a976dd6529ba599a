"""When a run is drawn: callbacks for TensorBoard and for the files under ``figures/``. What is drawn: gallery.py."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from alexnet_pl.data.datamodule import logit_names, plain_batches
from alexnet_pl.data.transforms import central_view, denormalize, normalize
from alexnet_pl.figures.features import activations, extract_features, histogram, layer_name
from alexnet_pl.figures.run_figures import AUGMENTED, FigureInputs, TestPredictions, draw, one_line, save
from alexnet_pl.training.callbacks.tensorboard import (
    add_graph,
    add_histogram,
    add_images,
    add_pr_curves,
    add_projector,
    describe,
    tensorboard,
)
from alexnet_pl.training.loggers import MetricsCSV

log = logging.getLogger(__name__)


PROBED = 128
"""Validation images whose activations are looked at."""


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
        histogram_every_n_epochs: epochs between two looks at weights and activations (the first epoch has one); 0:
            none.
        figures: whether to draw after the test.
        num_neighbor_images: to look for nearest neighbours among, at most; 0: none.
    """

    def __init__(
        self,
        folder: str | Path,
        histogram_every_n_epochs: int = 5,
        figures: bool = True,
        num_neighbor_images: int = 10_000,
    ):
        self.folder, self.histogram_every_n_epochs, self.figures = Path(folder), histogram_every_n_epochs, figures
        self.num_neighbor_images = num_neighbor_images
        self.left_out: dict[str, str] = {}
        self.augmented: tuple[Tensor, Tensor] | None = None
        self._best = 0.0
        self._step = 0
        self._probe: Tensor | None = None
        self._record: TestPredictions | None = None

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
        epoch, every = trainer.current_epoch + 1, self.histogram_every_n_epochs
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
        self._record = TestPredictions(trainer.datamodule.mean, trainer.datamodule.std) if self.figures else None

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

    def _material(self, trainer: Trainer, pl_module: LightningModule) -> FigureInputs:
        data, record, missing = trainer.datamodule, self._record, {}
        augmented = None
        if self.augmented is not None:
            images, labels = self.augmented
            augmented = denormalize(images, data.mean, data.std), labels.cpu()
        features = training = None
        sample = record.sample
        if sample.images is None:
            missing["test"] = "no test image was seen"
        elif self.num_neighbor_images == 0:
            missing["training"] = "callbacks.dashboard.num_neighbor_images=0"
        try:
            if sample.images is not None:
                images = normalize(sample.images.to(pl_module.device), data.mean, data.std)
                batches = zip(images.split(PROBED), sample.labels.to(pl_module.device).split(PROBED), strict=True)
                shown = extract_features(pl_module.net, batches, data.mean, data.std, len(images))
                features = shown.features if shown else None
                missing["features"] = "the network has no hidden layer before a linear one"
            if features is not None and self.num_neighbor_images > 0:
                batches = plain_batches(data, data.train_dataloader(), pl_module.device)
                training = extract_features(pl_module.net, batches, data.mean, data.std, self.num_neighbor_images)
        except Exception as error:
            missing["training"] = missing["features"] = f"looking for features failed: {one_line(error)}"
        names = logit_names(pl_module.hparams["class_names"], record.probabilities.shape[1])
        return FigureInputs(pl_module.net, names, record, features, training, augmented, missing)

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        """Let nothing that is only there to be looked at end a run."""
        try:
            act()
        except Exception as error:
            if what not in self.left_out:
                log.warning(f"warning: no {what} on the dashboard: {one_line(error)}")
            self.left_out[what] = f"it failed: {one_line(error)}"
