"""Dashboard callback: TensorBoard pages during training, figures after the test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from alexnet_pl.data.datamodule import ImageDataModule, logit_names, plain_batches
from alexnet_pl.data.transforms import denormalize, normalize, select_center_crop
from alexnet_pl.distributed.collectives import all_gather
from alexnet_pl.figures.features import (
    FeatureBank,
    activation_stats,
    compute_histogram,
    extract_features,
    layer_name,
)
from alexnet_pl.figures.html_report import REPORT
from alexnet_pl.figures.run_figures import NUM_AUGMENTED, FigureInputs, TestPredictions, draw, save
from alexnet_pl.runtime.errors import one_line
from alexnet_pl.runtime.logging import Heartbeat
from alexnet_pl.training.callbacks.tensorboard import (
    add_best_accuracy,
    add_graph,
    add_histogram,
    add_images,
    add_pr_curves,
    add_projector,
    add_results,
    close_hparams_row,
    describe_run,
    find_writer,
)
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.loggers import MetricsCSV
from alexnet_pl.training.trackers import trackers

if TYPE_CHECKING:  # a run without TensorBoard does not load it
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

PROBE_SIZE = 128
"""Validation images whose activations are recorded."""


class Dashboard(Callback):
    """Fill TensorBoard's pages and the run's ``figures/`` directory.

    Before training: hyperparameters, chart layout, config, model summary and command. After some epochs: histograms of
    weights and activations, and dead ReLUs. After the test: the figures of ``figures.run_figures``, precision-recall
    curves, the graph and the projector. The figures come from the run's own test; only features need extra forward
    passes, over a few images. Rank 0 draws. An exception is logged with the reason and never aborts the run.

    Args:
        folder: directory of the PNG files.
        histogram_every_n_epochs: epochs between histograms, of which the first epoch has one; 0 disables them.
        figures: draw figures after the test.
        num_neighbor_images: training images searched for nearest neighbors, at most; 0 disables the search. If
            ``trainer.limit_test_batches`` shortens the test, the search is limited to as many images as were tested.

    Attributes:
        unavailable: reason by the name of each thing that could not be drawn.
        augmented: the first training batch as the network saw it (normalized), and its labels.
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
        self.unavailable: dict[str, str] = {}
        self.augmented: tuple[Tensor, Tensor] | None = None
        self._step = 0
        self._probe: Tensor | None = None
        self._predictions: TestPredictions | None = None

    # --- during training --------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("text", trainer, lambda writer: describe_run(writer, pl_module, trainer.global_step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.figures and self.augmented is None and "training batch" not in self.unavailable:
            self._attempt("training batch", lambda: self._keep(batch))

    def _keep(self, batch: Any) -> None:
        images, labels = batch
        labels = labels if labels.ndim == 1 else labels.argmax(1)  # mixed images are named after their larger part
        self.augmented = images[:NUM_AUGMENTED].clone(), labels[:NUM_AUGMENTED].clone()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._is_histogram_due(trainer):
            self._probe = batch[0][batch[1] >= 0][:PROBE_SIZE]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("scalars", trainer, lambda writer: add_best_accuracy(writer, trainer, trainer.global_step))
        if self._probe is not None:
            self._write("histograms", trainer, lambda writer: self._add_histograms(writer, trainer, pl_module))
        self._probe = None

    def _is_histogram_due(self, trainer: Trainer) -> bool:
        epoch, every = trainer.current_epoch + 1, self.histogram_every_n_epochs
        return every > 0 and not trainer.sanity_checking and (epoch == 1 or epoch % every == 0)

    def _add_histograms(self, writer: SummaryWriter, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        net = _net(pl_module)
        for name, parameter in net.named_parameters():
            module, _, kind = name.rpartition(".")
            add_histogram(writer, f"{kind}s/{layer_name(module)}", compute_histogram(parameter), step)
        assert self._probe is not None
        with trainer.precision_plugin.forward_context():
            stats = activation_stats(net, self._probe)
        for name, layer in stats.items():
            add_histogram(writer, f"activations/{name}", layer.histogram, step)
            if layer.dead is not None:
                writer.add_scalar(f"dead_relu/{name}", layer.dead, step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    # --- the test and after it --------------------------------------------------------------------------------------

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._predictions = None
        if self.figures:
            self._attempt("figures", lambda: self._start_test(_data(trainer)))

    def _start_test(self, data: ImageDataModule) -> None:
        self._predictions = TestPredictions(data.mean, data.std)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if (predictions := self._predictions) is not None:
            images, labels = batch
            self._attempt("test", lambda: predictions.add(select_center_crop(images), labels, outputs))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (predictions := self._predictions) is not None:
            predictions, *others = all_gather(predictions)  # on every rank, so never inside _attempt
            for other in others:
                predictions.merge(other)
        self._write("hyperparameters", trainer, lambda writer: self._close_row(writer, trainer))
        if predictions is not None and trainer.is_global_zero:
            self._attempt("figures", lambda: self._draw(predictions, trainer, pl_module))
        self._predictions = self.augmented = None

    def _close_row(self, writer: SummaryWriter, trainer: Trainer) -> None:
        rows = [row for logger in trainer.loggers if isinstance(logger, MetricsCSV) for row in logger.rows.values()]
        seconds = sum(row.get("epoch_seconds", 0.0) for row in rows)
        add_best_accuracy(writer, trainer, self._step)
        tested = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        close_hparams_row(writer, tested["test/acc"], seconds, self._step)
        add_results(writer, tested, self.folder.parent / REPORT if self.figures else None, self._step)

    def _draw(self, predictions: TestPredictions, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw all figures, save them and add them to TensorBoard; log the reason for each one that fails."""
        log.info(f"figures {self.folder}")
        with trainer.precision_plugin.forward_context():
            inputs = self._collect_inputs(predictions, trainer, pl_module)
        drawn, unavailable = draw(inputs)
        self.unavailable |= unavailable
        for name, reason in unavailable.items():
            if "failed" in reason:
                log.warning(f"warning: figure {name} is unavailable: {reason}")
        self._attempt("figure files", lambda: save(drawn, self.folder))
        files = [file for name in drawn if (file := self.folder / f"{name}.png").is_file()]
        for tracker in trackers(trainer.loggers):
            self._attempt(f"figures at {type(tracker).__name__}", partial(tracker.log_figures, files, self._step))
        self._write("images", trainer, lambda writer: add_images(writer, drawn, self._step))
        self._write("precision-recall curves", trainer, lambda writer: add_pr_curves(writer, inputs, self._step))
        self._write("projector", trainer, lambda writer: add_projector(writer, inputs, self._step))
        self._write("graph", trainer, lambda writer: add_graph(writer, inputs))
        self._write("files", trainer, lambda writer: writer.flush())

    def _collect_inputs(
        self, predictions: TestPredictions, trainer: Trainer, pl_module: LightningModule
    ) -> FigureInputs:
        data, missing = _data(trainer), {}
        augmented = features = training = None
        if self.augmented is not None:
            images, labels = self.augmented
            augmented = denormalize(images, data.mean, data.std).cpu(), labels.cpu()
        if predictions.sample.images is None:
            missing["test"] = "the test had no images"
        else:
            try:
                features = self._sample_features(predictions, trainer, pl_module)
                if features is None:
                    missing["features"] = "the network has no linear layer after a hidden one"
                elif self.num_neighbor_images == 0:
                    missing["training"] = "callbacks.dashboard.num_neighbor_images=0"
                else:
                    training = self._training_features(predictions, trainer, pl_module)
            except Exception as error:  # the other figures do not need them
                missing["training"] = missing["features"] = f"feature extraction failed: {one_line(error)[:300]}"
        names = logit_names(pl_module.hparams["class_names"], predictions.probabilities.shape[1])
        return FigureInputs(_net(pl_module), names, predictions, features, training, augmented, missing)

    def _sample_features(
        self, predictions: TestPredictions, trainer: Trainer, pl_module: LightningModule
    ) -> Tensor | None:
        data, sample, device = _data(trainer), predictions.sample, pl_module.device
        assert sample.images is not None
        images = normalize(sample.images.to(device), data.mean, data.std)
        batches = zip(images.split(PROBE_SIZE), sample.labels.to(device).split(PROBE_SIZE), strict=True)
        bank = extract_features(_net(pl_module), batches, data.mean, data.std, len(images))
        return bank.features if bank else None

    def _training_features(
        self, predictions: TestPredictions, trainer: Trainer, pl_module: LightningModule
    ) -> FeatureBank | None:
        data, count = _data(trainer), self.num_neighbor_images
        if trainer.num_test_batches[0] < len(data.test_dataloader()):
            count = min(count, len(predictions.labels))
        batches = plain_batches(data, data.train_dataloader(), pl_module.device)
        return extract_features(_net(pl_module), _log_progress(batches, count), data.mean, data.std, count)

    # --- guards -----------------------------------------------------------------------------------------------------

    def _write(self, what: str, trainer: Trainer, act: Callable[[SummaryWriter], None]) -> None:
        """Call ``act`` with the TensorBoard writer if there is one, like :meth:`_attempt`."""

        def write() -> None:
            if writer := find_writer(trainer):
                act(writer)

        self._attempt(what, write)

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        """Log any exception, once per kind of output: plotting must never abort training."""
        try:
            act()
        except Exception as error:
            if what not in self.unavailable:
                log.warning(f"warning: {what} unavailable on the dashboard: {one_line(error)[:300]}")
            self.unavailable[what] = f"failed: {one_line(error)[:300]}"


def _net(pl_module: LightningModule) -> nn.Module:
    return cast(ImageClassifier, pl_module).net


def _data(trainer: Trainer) -> ImageDataModule:
    return cast(Any, trainer).datamodule  # type: ignore[no-any-return]  # Lightning does not declare the attribute


def _log_progress(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    heartbeat, done = Heartbeat(), 0
    for images, labels in batches:
        yield images, labels
        done += len(labels)
        if heartbeat.is_due():
            log.info(f"figures features of {min(done, count):,}/{count:,} training images")
