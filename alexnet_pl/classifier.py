"""The LightningModule: loss, metrics and optimiser around any image classifier."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from alexnet_pl.augment import CENTRE
from alexnet_pl.schedules import WarmupPlateau


class ImageClassifier(LightningModule):
    """Cross-entropy training of a network that maps ``(N, 3, S, S)`` images to ``(N, num_classes)`` logits.

    Logged once an epoch for each of train, val and test: ``<split>/loss`` (mean cross-entropy in nats), ``acc`` and
    ``acc_top5`` (fractions), ``error`` and ``error_top5`` (1 − those); with train also ``lr``. Where test batches hold
    ten views of each image, these are the centre's, and ``test/acc_10views`` and so on those of the mean softmax: both
    from one pass over the test set.

    Args:
        net: the network; ``net.*`` are the only keys in the state dict.
        num_classes: for the metrics. With fewer than five classes top-5 is top-``num_classes``.
        optimizer: makes the optimiser from the parameters.
        scheduler: makes the learning-rate scheduler from the optimiser, stepped once an epoch; a
            ``ReduceLROnPlateau`` sees ``val/loss``, a ``WarmupPlateau`` what it monitors. None keeps the rate.
        hyperparameters: plain values that the checkpoint and the loggers carry along.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        hyperparameters: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(hyperparameters or {})
        self.net = net
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.train_metrics, self.val_metrics, self.test_metrics = (
            _metrics(split, num_classes) for split in ("train", "val", "test")
        )
        self.ten_view_metrics = _metrics("test", num_classes, postfix="_10views")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)``."""
        return self.net(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        schedule = self.lr_schedulers()
        if isinstance(schedule, WarmupPlateau):
            schedule.warm_up(self.current_epoch + batch_idx / self.trainer.num_training_batches)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, self.train_metrics)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if images.ndim == 4:
            self._step(batch, self.test_metrics)
            return
        # One view at a time: the centre's figures are then exactly those of a test without the others.
        logits = torch.stack([self(view).float() for view in images])
        self.test_metrics.update(logits[CENTRE], labels)
        self.ten_view_metrics.update(average_views(logits), labels)

    def _step(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> Tensor:
        images, labels = batch
        logits = self(images).float()  # autocast hands out 16-bit logits
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            metrics.update(logits, labels)
        return loss

    def on_train_epoch_end(self) -> None:
        self._log(self.train_metrics)
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def on_validation_epoch_end(self) -> None:
        self._log(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log(self.test_metrics)
        if self.ten_view_metrics["loss"].update_called:
            self._log(self.ten_view_metrics)

    def _log(self, metrics: MetricCollection) -> None:
        values = metrics.compute()
        errors = {name.replace("acc", "error"): 1 - value for name, value in values.items() if "/acc" in name}
        self.log_dict({**values, **errors})
        metrics.reset()

    def running_metrics(self) -> dict[str, dict[str, Tensor]]:
        """What the training metrics have counted in this epoch so far: metric → state → tensor."""
        return {name: dict(metric.metric_state) for name, metric in self.train_metrics.items(keep_base=True)}

    def load_running_metrics(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Go on counting from what :meth:`running_metrics` gave."""
        for name, metric in self.train_metrics.items(keep_base=True):
            for state, value in states[name].items():
                setattr(metric, state, value.to(metric.device))
            metric._update_count = 1  # else compute() warns that nothing was counted

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.make_scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", "val/loss")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": monitor, "interval": "epoch"},
        }


class MeanCrossEntropy(MeanMetric):
    """Mean cross-entropy over images (not over batches, whose last one may be smaller), in nats."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        losses = F.cross_entropy(logits, labels, reduction="none")
        super().update(losses)


def average_views(logits: Tensor) -> Tensor:
    """Log-probabilities ``(N, classes)``, the logarithm of the mean softmax, of logits ``(views, N, classes)``."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def _metrics(split: str, num_classes: int, postfix: str | None = None) -> MetricCollection:
    settings = {"num_classes": num_classes, "average": "micro", "validate_args": False}
    return MetricCollection(
        {
            "loss": MeanCrossEntropy(nan_strategy="disable"),
            "acc": MulticlassAccuracy(**settings),
            "acc_top5": MulticlassAccuracy(**settings, top_k=min(5, num_classes)),
        },
        prefix=f"{split}/",
        postfix=postfix,
        compute_groups=False,
    )
