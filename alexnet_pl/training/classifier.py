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
from torchmetrics import Metric

from alexnet_pl.data.transforms import CENTRE
from alexnet_pl.training.lr_schedules import WarmupPlateau


class ImageClassifier(LightningModule):
    """Cross-entropy training of a network that maps ``(N, 3, S, S)`` images to ``(N, num_classes)`` logits.

    Logged once an epoch for each of train, val and test: ``<split>/loss`` (mean cross-entropy in nats), ``acc`` and
    ``acc_top5`` (fractions), ``error`` and ``error_top5`` (1 − those); with train also ``lr``. Where test batches hold
    ten views of each image, these are the centre's, and ``test/acc_ten_crop`` and so on those of the mean softmax: both
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
            ClassificationMetrics(top_k=min(5, num_classes)) for _ in ("train", "val", "test")
        )
        self.ten_crop_metrics = ClassificationMetrics(top_k=min(5, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)``."""
        return self.net(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        schedule = self.lr_schedulers()
        if isinstance(schedule, WarmupPlateau):
            schedule.warm_up(self.current_epoch + batch_idx / self.trainer.num_training_batches)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, self.train_metrics)[0]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits ``(N, num_classes)``, of ten views those of the centre, for whoever draws figures of the test."""
        images, labels = batch
        if images.ndim == 4:
            return self._step(batch, self.test_metrics)[1]
        # One view at a time: the centre's figures are then exactly those of a test without the others.
        logits = torch.stack([self(view).float() for view in images])
        for metrics, averaged in ((self.test_metrics, logits[CENTRE]), (self.ten_crop_metrics, average_crops(logits))):
            metrics.update(averaged, labels, F.cross_entropy(averaged, labels, reduction="none"))
        return logits[CENTRE]

    def _step(self, batch: tuple[Tensor, Tensor], metrics: "ClassificationMetrics") -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images).float()  # autocast hands out 16-bit logits
        losses = F.cross_entropy(logits, labels, reduction="none")
        metrics.update(logits.detach(), labels, losses.detach())
        return losses.mean(), logits  # the mean is for training, where no image is left out

    def on_train_epoch_end(self) -> None:
        self._log("train", self.train_metrics)
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def on_validation_epoch_end(self) -> None:
        self._log("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log("test", self.test_metrics)
        if self.ten_crop_metrics.update_called:
            self._log("test", self.ten_crop_metrics, "_ten_crop")

    def _log(self, split: str, metrics: "ClassificationMetrics", suffix: str = "") -> None:
        self.log_dict({f"{split}/{name}{suffix}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def running_metrics(self) -> dict[str, Tensor]:
        """What the training metrics have counted in this epoch so far, by state."""
        return dict(self.train_metrics.metric_state)

    def load_running_metrics(self, states: dict[str, Tensor]) -> None:
        """Go on counting from what :meth:`running_metrics` gave."""
        for state, value in states.items():
            setattr(self.train_metrics, state, value.to(self.train_metrics.device))
        self.train_metrics._update_count = 1  # else compute() warns that nothing was counted

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


class ClassificationMetrics(Metric):
    """Mean cross-entropy in nats, accuracy and error over all images but those with a negative label.

    One metric instead of a collection of three: their bookkeeping took longer than their arithmetic. It only adds to
    tensors on the device; nothing is read back before :meth:`compute`.

    Args:
        top_k: 5, or the number of classes where there are fewer.
    """

    full_state_update = False

    def __init__(self, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.add_state("loss_sum", torch.zeros(()), dist_reduce_fx="sum")
        for count in ("correct", "correct_top5", "images"):
            self.add_state(count, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add a batch: ``(N, num_classes)`` logits, ``(N,)`` labels, ``(N,)`` cross-entropies, 0 where left out."""
        self.loss_sum += losses.sum()
        self.correct += (logits.argmax(1) == labels).sum()
        self.correct_top5 += (logits.topk(self.top_k).indices == labels.unsqueeze(1)).sum()
        self.images += (labels >= 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """``loss``, ``acc``, ``acc_top5``, ``error``, ``error_top5``."""
        acc, acc_top5 = self.correct / self.images, self.correct_top5 / self.images
        errors = {"error": 1 - acc, "error_top5": 1 - acc_top5}
        return {"loss": self.loss_sum / self.images, "acc": acc, "acc_top5": acc_top5, **errors}


def average_crops(logits: Tensor) -> Tensor:
    """Log-probabilities ``(N, classes)``, the logarithm of the mean softmax, of logits ``(views, N, classes)``."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
