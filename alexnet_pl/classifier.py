"""The LightningModule: loss, metrics and optimiser around any image classifier."""

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


class ImageClassifier(LightningModule):
    """Cross-entropy training of a network that maps ``(N, 3, S, S)`` images to ``(N, num_classes)`` logits.

    Logged once an epoch for each of train, val and test: ``<split>/loss`` (mean cross-entropy in nats), ``acc`` and
    ``acc_top5`` (fractions), ``error`` and ``error_top5`` (1 − those); with train also ``lr``.

    Args:
        net: the network; ``net.*`` are the only keys in the state dict.
        num_classes: for the metrics. With fewer than five classes top-5 is top-``num_classes``.
        optimizer: makes the optimiser from the parameters.
        scheduler: makes the learning-rate scheduler from the optimiser, stepped once an epoch; a
            ``ReduceLROnPlateau`` sees ``val/loss``. None keeps the rate.
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

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)``."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, self.train_metrics)[0]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits ``(N, num_classes)``, for whoever draws figures of the test."""
        return self._step(batch, self.test_metrics)[1]

    def _step(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images).float()  # autocast hands out 16-bit logits
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            metrics.update(logits, labels)
        return loss, logits

    def on_train_epoch_end(self) -> None:
        self._log(self.train_metrics)
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def on_validation_epoch_end(self) -> None:
        self._log(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log(self.test_metrics)

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
        scheduler = {"scheduler": self.make_scheduler(optimizer), "monitor": "val/loss", "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class MeanCrossEntropy(MeanMetric):
    """Mean cross-entropy over images (not over batches, whose last one may be smaller), in nats."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        losses = F.cross_entropy(logits, labels, reduction="none")
        super().update(losses)


def _metrics(split: str, num_classes: int) -> MetricCollection:
    settings = {"num_classes": num_classes, "average": "micro", "validate_args": False}
    return MetricCollection(
        {
            "loss": MeanCrossEntropy(nan_strategy="disable"),
            "acc": MulticlassAccuracy(**settings),
            "acc_top5": MulticlassAccuracy(**settings, top_k=min(5, num_classes)),
        },
        prefix=f"{split}/",
        compute_groups=False,
    )
