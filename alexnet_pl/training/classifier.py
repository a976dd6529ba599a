"""LightningModule with the loss, metrics, optimizer and schedule of an image classifier."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric

from alexnet_pl.config.optimizers import OptimizerFactory, convolution_groups, optimizer_factory
from alexnet_pl.config.schedules import RunLength, ScheduleFactory, schedule_factory
from alexnet_pl.data.loaders import IGNORE_INDEX
from alexnet_pl.data.transforms import CENTERS, SHIFTED_MIRROR_WEIGHTS, VIEW_NAMES
from alexnet_pl.training.lightning_internals import mark_updated
from alexnet_pl.training.lr_schedules import WarmupPlateau


class ImageClassifier(LightningModule):
    """Cross-entropy training of a network that maps ``(N, 3, S, S)`` images to ``(N, num_classes)`` logits.

    Logs once per epoch, for each of train, val and test, ``<split>/loss`` (mean cross-entropy in nats), ``acc`` and
    ``acc_top5`` (fractions), ``error`` and ``error_top5`` (1 − those), and ``lr`` with train, for further parameter
    groups as ``lr/<group>``. If test batches hold several views of each image, these metrics are the center crop's,
    and ``test/acc_ten_crop`` and so on (``VIEW_NAMES``) come from their mean softmax. One pass gives both.

    These metrics are those of plain cross-entropy whatever ``loss`` is, so that all runs and splits compare. Labels of
    mixed training images are rows of class weights: their loss is the cross-entropy with these weights, and a
    prediction is correct if it is the class with the largest.

    Args:
        net: the network; ``net.*`` are the only keys in the state dict, beside ``loss.*`` of a loss that has buffers.
        num_classes: number of logits. With fewer than five classes, top-5 is top-``num_classes``.
        optimizer: creates the optimizer from the parameters; see :func:`optimizer_factory`.
        scheduler: creates the learning-rate scheduler from the optimizer; see :func:`schedule_factory`. A
            ``ReduceLROnPlateau`` monitors ``val/loss``, a ``WarmupPlateau`` what it is told to. None keeps the rate.
        loss: objective of training, from logits and labels to a scalar; None is the mean cross-entropy.
        hyperparameters: plain values that the checkpoint and the loggers record.

    Attributes:
        validation_period: epochs per validation (``trainer.check_val_every_n_epoch``); set before ``trainer.fit``.
        run_length: epochs and steps that a schedule with ``auto`` lengths covers; set before ``trainer.fit``.
        schedule_start: epochs done when the schedule began; 0, or where a resumed run restarted it.
        initial_groups: the optimizer's parameter groups as created, without the parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | OptimizerFactory,
        scheduler: Callable[[Optimizer], LRScheduler] | ScheduleFactory | None = None,
        hyperparameters: dict[str, Any] | None = None,
        loss: nn.Module | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(hyperparameters or {})
        self.net = net
        self.loss = None if loss is None or is_plain(loss) else loss
        self.make_optimizer, self.make_scheduler = optimizer_factory(optimizer), schedule_factory(scheduler)
        self.validation_period = 1
        self.run_length: RunLength | None = None
        self.schedule_start = 0.0
        self.initial_groups: list[dict[str, Any]] = []
        self._rates: list[float] = []  # of the last step, one per parameter group
        self._batch_weight = 1.0
        self.train_metrics, self.val_metrics, self.test_metrics = (
            ClassificationMetrics(top_k=min(5, num_classes)) for _ in ("train", "val", "test")
        )
        self.views_metrics = ClassificationMetrics(top_k=min(5, num_classes))
        self._views = 1

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` of normalized images ``(N, 3, S, S)``."""
        logits: Tensor = self.net(images)
        return logits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        schedule = self.lr_schedulers()
        if isinstance(schedule, WarmupPlateau):
            done = self.current_epoch + batch_idx / self.trainer.num_training_batches
            schedule.warm_up(done - self.schedule_start)
        trainer = self.trainer
        self._batch_weight = batch_weight(batch_idx, int(trainer.num_training_batches), trainer.accumulate_grad_batches)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Take a step at the scheduled learning rates, times the factor of the warm-up.

        The factor follows from the position alone and the scheduled rates are put back, because many schedules compute
        a rate from the one before.
        """
        schedule, done = self.make_scheduler, epoch + (batch_idx + 1) / self.trainer.num_training_batches
        factor = 1.0 if schedule is None else schedule.warmup_factor(done - self.schedule_start)
        scheduled = [group["lr"] for group in optimizer.param_groups]
        self._rates = [rate * factor for rate in scheduled]
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for group, rate in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        mean, logits = self._step(batch, self.train_metrics)
        objective: Tensor = mean if self.loss is None else self.loss(logits, pad_classes(batch[1], logits))
        return objective if self._batch_weight == 1 else objective * self._batch_weight

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the logits ``(N, num_classes)``, the center crop's if there are several: figures show them."""
        images, labels = batch
        if images.ndim == 4:
            return self._step(batch, self.test_metrics)[1]
        # One view at a time, so that the center crop's metrics equal those of a test without the others.
        logits = torch.stack([self(view).float() for view in images])
        self._views, center = len(images), logits[CENTERS[len(images)]]
        for metrics, averaged in ((self.test_metrics, center), (self.views_metrics, average_views(logits))):
            metrics.update(averaged, labels, F.cross_entropy(averaged, labels, reduction="none"))
        return center

    def _step(self, batch: tuple[Tensor, Tensor], metrics: "ClassificationMetrics") -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images).float()  # autocast returns 16-bit logits
        losses = F.cross_entropy(logits, pad_classes(labels, logits), reduction="none")
        metrics.update(logits.detach(), labels if labels.ndim == 1 else labels.argmax(1), losses.detach())
        return losses.mean(), logits  # the mean is used in training only, where batches have no padding

    def on_train_epoch_end(self) -> None:
        self._log("train", self.train_metrics)
        # The rates of the epoch's last step: most schedules have moved on to those of the next one by now.
        for index, (group, rate) in enumerate(zip(self.trainer.optimizers[0].param_groups, self._rates, strict=True)):
            name = "/" + re.sub(r"\W+", "_", str(group.get("name", index))).strip("_") if index else ""
            self.log(f"lr{name}", rate)

    def on_validation_epoch_end(self) -> None:
        self._log("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log("test", self.test_metrics)
        if self.views_metrics.update_called:
            self._log("test", self.views_metrics, f"_{VIEW_NAMES[self._views]}")

    def _log(self, split: str, metrics: "ClassificationMetrics", suffix: str = "") -> None:
        self.log_dict({f"{split}/{name}{suffix}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def running_metrics(self) -> dict[str, Tensor]:
        """Return the states of the training metrics, accumulated so far in this epoch."""
        metrics = self.train_metrics
        return {name: getattr(metrics, name) for name in ("loss_sum", "correct", "correct_top5", "images")}

    def load_running_metrics(self, states: dict[str, Tensor]) -> None:
        """Restore what :meth:`running_metrics` returned."""
        for state, value in states.items():
            setattr(self.train_metrics, state, value.to(self.train_metrics.device))
        mark_updated(self.train_metrics)

    def create_optimizer(self) -> Optimizer:
        """Create the optimizer of the network's parameters, without a schedule."""
        return self.make_optimizer(self.net.named_parameters(), convolution_groups(self.net))

    def configure_optimizers(self) -> Any:  # Lightning accepts many types
        """Create the optimizer and the schedule."""
        optimizer = self.create_optimizer()
        configured: dict[str, Any] = {"optimizer": optimizer}
        if self.make_scheduler is not None:
            scheduler = self.make_scheduler(optimizer, self.run_length)
            monitor = getattr(scheduler, "monitor", "val/loss")
            # Without this, a plateau schedule would count a stale value in every epoch that has no validation.
            per_validation = isinstance(scheduler, ReduceLROnPlateau) and monitor.startswith("val/")
            configured["lr_scheduler"] = {
                "scheduler": scheduler,
                "monitor": monitor,
                "interval": self.make_scheduler.interval,
                "frequency": self.validation_period if per_validation else 1,
            }
        self.initial_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return configured


class ClassificationMetrics(Metric):
    """Mean cross-entropy in nats, accuracy and error over all images except those with a negative label.

    One metric replaces a collection of three, whose bookkeeping took longer than their arithmetic. It accumulates on
    the device and reads nothing back before :meth:`compute`.

    Args:
        top_k: 5, or the number of classes if there are fewer.
    """

    full_state_update = False
    loss_sum: Tensor
    correct: Tensor
    correct_top5: Tensor
    images: Tensor

    def __init__(self, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.add_state("loss_sum", torch.zeros(()), dist_reduce_fx="sum")
        for count in ("correct", "correct_top5", "images"):
            self.add_state(count, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add a batch of logits ``(N, num_classes)``, labels ``(N,)`` and cross-entropies ``(N,)``, 0 for padding."""
        self.loss_sum += losses.sum()
        self.correct += (logits.argmax(1) == labels).sum()
        self.correct_top5 += (logits.topk(self.top_k).indices == labels.unsqueeze(1)).sum()
        self.images += (labels >= 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss``, ``acc``, ``acc_top5``, ``error`` and ``error_top5``."""
        acc, acc_top5 = self.correct / self.images, self.correct_top5 / self.images
        errors = {"error": 1 - acc, "error_top5": 1 - acc_top5}
        return {"loss": self.loss_sum / self.images, "acc": acc, "acc_top5": acc_top5, **errors}


def average_views(logits: Tensor) -> Tensor:
    """Return the logarithm of the mean softmax, ``(N, classes)``, of logits ``(views, N, classes)``, by their weights.

    Source: the paper, section 4.1, for ten crops; cifar10-airbench for the shifted mirror views.
    """
    if len(logits) == 6:
        weights = torch.tensor(SHIFTED_MIRROR_WEIGHTS, device=logits.device).log().view(-1, 1, 1)
        return (logits.log_softmax(-1) + weights).logsumexp(0)
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def pad_classes(labels: Tensor, logits: Tensor) -> Tensor:
    """Return rows of class weights ``(N, classes of the data)`` as wide as the logits; labels ``(N,)`` unchanged."""
    return labels if labels.ndim == 1 else F.pad(labels, (0, logits.shape[1] - labels.shape[1]))


def batch_weight(batch: int, batches: int, accumulated: int) -> float:
    """Return what makes the last optimizer step of an epoch, on fewer batches than the others, average as well.

    Lightning divides the loss of each of an epoch's ``batches`` by ``accumulated``, however many form the step.
    """
    rest = batches % accumulated
    return accumulated / rest if batch >= batches - rest else 1.0


def is_plain(loss: nn.Module) -> bool:
    """Return True if a loss is the mean cross-entropy, which the metrics compute anyway."""
    if type(loss) is not nn.CrossEntropyLoss or loss.weight is not None or loss.ignore_index != IGNORE_INDEX:
        return False
    return loss.label_smoothing == 0 and loss.reduction == "mean"
