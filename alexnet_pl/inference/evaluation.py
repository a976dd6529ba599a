"""Evaluation of a trained run on a data split, by the center crop or by several views."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from alexnet_pl.config.resolve import default_precision
from alexnet_pl.data.class_folders import ClassFolders
from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.data.transforms import make_views
from alexnet_pl.figures.run_figures import confusion_counts
from alexnet_pl.inference.run_data import check_classes, find_data
from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.errors import DataError, one_line
from alexnet_pl.training.build import quiet_lightning
from alexnet_pl.training.classifier import ImageClassifier, average_views

ECE_BINS = 15
"""Bins of equal width for the calibration error (Guo et al. 2017)."""


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one pass over a split.

    Attributes:
        figures: ``<split>/loss``, ``acc``, ``acc_top5``, ``error``, ``error_top5``, ``ece``.
        labels: ``(N,)`` int64.
        probabilities: ``(N, num_classes)`` float32.
        description: the data, in words.
        precision: the network's arithmetic, in Lightning's terms.
        split: ``val`` or ``test``.
    """

    figures: dict[str, float]
    labels: Tensor
    probabilities: Tensor
    description: str
    precision: str
    split: str

    @property
    def confusion(self) -> Tensor:
        """Confusion matrix, ``(classes, classes)`` int64; rows are labels, columns predictions."""
        return confusion_counts(self.labels, self.probabilities)


class AveragedViews(nn.Module):
    """Average a network's softmax over :func:`~alexnet_pl.data.transforms.make_views`, as a run's own test does.

    Args:
        net: takes ``(N, 3, size, size)``.
        size: side of a view in pixels.
        count: number of views: 2, 6 or 10.
    """

    def __init__(self, net: nn.Module, size: int, count: int):
        super().__init__()
        self.net, self.size, self.count = net, size, count

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities ``(N, num_classes)`` in float32 of ``(N, 3, B, B)``, B at least ``size``."""
        return average_views(
            torch.stack([self.net(view).float() for view in make_views(images, self.size, self.count)])
        )


def evaluate(
    run: TrainedRun, split: str = "test", crops: int = 1, data_root: str | Path | None = None
) -> Evaluation:  # fmt: skip
    """Evaluate the network on a split as the run's own test did: same batches, and same precision if supported here.

    Limits of the run, such as ``trainer.limit_test_batches``, are not applied to other data than its own.

    Args:
        split: ``val`` or ``test``; ``val`` is the run's own part of the training images, given by its ``split_seed``.
        crops: 1 for the center crop; 2, 6 or 10 for the views of :func:`~alexnet_pl.data.transforms.make_views`.
        data_root: current location of the data, or another ImageFolder layout with the run's classes.

    Raises:
        DataError: the data is missing or corrupt, or has other classes than the run.
    """
    data = find_data(run, split, data_root, uncropped(run.preprocess) if crops == 10 else run.preprocess)
    return evaluate_on(run, data, split, crops, is_limited=not isinstance(data, ClassFolders))


def evaluate_on(
    run: TrainedRun, data: LightningDataModule, split: str = "test", crops: int = 1, is_limited: bool = True
) -> Evaluation:
    """Evaluate the network on a data module that prepares images as the run's own does.

    Args:
        split, crops: as for :func:`evaluate`.
        is_limited: apply the run's ``trainer.limit_…_batches``.

    Raises:
        DataError: the data is missing or corrupt, or has other classes than the run.
    """
    net = run.net if crops == 1 else AveragedViews(run.net, run.preprocess.image_size, crops)
    trainer, precision = make_trainer(run, is_limited=is_limited)
    model = ImageClassifier(net, run.config["model"]["num_classes"], torch.optim.SGD)
    logits: list[Tensor] = []
    hook = net.register_forward_hook(lambda module, inputs, output: logits.append(output.float().cpu()))
    source: Any = data
    source.setup()
    check_classes(run, source)
    test = trainer.test if split == "test" else trainer.validate
    run.net.to(memory_format=torch.channels_last if run.config.get("channels_last") else torch.contiguous_format)
    try:
        figures = test(model, datamodule=data, verbose=False)[0]
    except MisconfigurationException as error:  # a limit in fractions of very few batches
        raise DataError(f"{one_line(error)}\nThis limit is the run's.") from error
    finally:
        hook.remove()
        run.net.cpu().to(memory_format=torch.contiguous_format)
    probabilities = torch.cat(logits).softmax(1)
    loader = source.test_dataloader() if split == "test" else source.val_dataloader()
    labels = loader.labels[loader.indices][: len(probabilities)].cpu()
    probabilities = probabilities[: len(labels)]  # without the padding of the last batch
    ece = multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=ECE_BINS, norm="l1")
    figures = {**figures, f"{split}/ece": float(ece)}
    return Evaluation(figures, labels, probabilities, source.description, precision, split)


def uncropped(preprocess: Preprocess) -> Preprocess:
    """Return the preprocessing that keeps the larger image for ten-crop: the run's own size, or 256 for every 224."""
    size = preprocess.image_size
    larger = preprocess.resize_size
    if larger is None or larger <= size:
        larger = round(size * 256 / 224)
    return replace(preprocess, image_size=larger, resize_size=None)


def make_trainer(
    run: TrainedRun, callbacks: Sequence[Callback] = (), is_limited: bool = True
) -> tuple[Trainer, str]:  # fmt: skip
    """Return a trainer like the run's for the device at hand, and its precision.

    The run's precision is kept unless this device lacks it: float16 needs a GPU, and a CPU without bf16 instructions
    would emulate bfloat16, many times slower.
    """
    quiet_lightning()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    settings = run.config.get("trainer") or {}
    accelerator = "gpu" if torch.cuda.is_available() and settings.get("accelerator") != "cpu" else "cpu"
    precision: Any = str(settings.get("precision", "32-true"))  # Lightning's type lists every value
    needs_gpu, needs_bf16 = precision.startswith("16"), precision.startswith("bf16")
    if accelerator == "cpu" and (needs_gpu or (needs_bf16 and default_precision("cpu") != "bf16-mixed")):
        precision = default_precision("cpu")
    limited = ("limit_val_batches", "limit_test_batches") if is_limited else ()
    limits = {name: settings[name] for name in limited if name in settings}
    return Trainer(
        accelerator=accelerator, devices=1, precision=precision, deterministic=settings.get("deterministic", False),
        callbacks=[*callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **limits,
    ), precision  # fmt: skip
