"""Evaluate a trained run: ``python -m alexnet_pl evaluate RUN``; see ``--help``."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from alexnet_pl.config.resolve import default_precision
from alexnet_pl.data.cifar10 import official_folder
from alexnet_pl.data.class_folders import ClassFolders
from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.data.transforms import ten_crop
from alexnet_pl.figures.run_figures import confusion_counts
from alexnet_pl.inference.trained_run import TrainedRun, data_class
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.training.build import quiet_lightning
from alexnet_pl.training.classifier import ImageClassifier, average_crops

ECE_BINS = 15
"""Bins of equal width for the calibration error (Guo et al. 2017)."""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split gave.

    Attributes:
        figures: ``<split>/loss``, ``acc``, ``acc_top5``, ``error``, ``error_top5``, ``ece``.
        labels: ``(N,)`` int64.
        probabilities: ``(N, num_classes)`` float32.
        description: the data, for people.
        precision: what the network computed in.
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
        """``(classes, classes)`` int64 counts, row: the label, column: the prediction."""
        return confusion_counts(self.labels, self.probabilities)


class TenCrop(nn.Module):
    """Averages a network's softmax over :func:`~alexnet_pl.data.transforms.ten_crop`, one by one, as a run's test.

    Args:
        net: takes ``(N, 3, size, size)``.
        size: side of a view in pixels.
    """

    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities ``(N, num_classes)`` in float32 of ``(N, 3, B, B)``, B at least ``size``."""
        return average_crops(torch.stack([self.net(view).float() for view in ten_crop(images, self.size)]))


def evaluate(run: TrainedRun, split: str = "test", views: int = 1, data_root: Path | None = None) -> Evaluation:
    """Run the network over a split as the run's own test did: its batches, its precision where the device has it.

    Args:
        split: ``val`` or ``test``; ``val`` is the run's own part of the training images, by its ``split_seed``.
        views: 1, or the paper's 10.
        data_root: where the data is now, or another tree of class folders.

    Raises:
        DataError: no data, damaged data, or other classes than the run's.
    """
    data = find_data(run, split, data_root, run.preprocess if views == 1 else uncropped(run.preprocess))
    net = run.net if views == 1 else TenCrop(run.net, run.preprocess.image_size)
    trainer, precision = make_trainer(run)
    model = ImageClassifier(net, run.config["model"]["num_classes"], torch.optim.SGD)
    logits: list[Tensor] = []
    hook = net.register_forward_hook(lambda module, inputs, output: logits.append(output.float().cpu()))
    data.setup()
    if tuple(data.class_names) != run.class_names:
        raise DataError(f"The classes are not the run's: {', '.join(data.class_names)}.")
    go = trainer.test if split == "test" else trainer.validate
    figures = go(model, datamodule=data, verbose=False)[0]
    hook.remove()
    run.net.cpu()
    probabilities = torch.cat(logits).softmax(1)
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    labels = loader.labels[loader.indices][: len(probabilities)].cpu()
    probabilities = probabilities[: len(labels)]  # without what filled up the last batch
    ece = multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=ECE_BINS, norm="l1")
    figures = {**figures, f"{split}/ece": float(ece)}
    return Evaluation(figures, labels, probabilities, data.description, precision, split)


def uncropped(preprocess: Preprocess) -> Preprocess:
    """The same with all of the larger picture that views are cut from: the run's own size of it, else 256 for 224."""
    size = preprocess.image_size
    has_room = preprocess.resize_size is not None and preprocess.resize_size > size
    return replace(
        preprocess, image_size=preprocess.resize_size if has_room else round(size * 256 / 224), resize_size=None
    )


def make_trainer(run: TrainedRun, callbacks: Sequence[Callback] = ()) -> tuple[Trainer, str]:
    """A trainer like the run's on the device that is here, and its precision.

    The run's precision is kept unless this device lacks it: float16 needs a GPU, and a CPU without bf16 instructions
    would emulate bfloat16, many times slower.
    """
    quiet_lightning()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    settings = run.config["trainer"]
    accelerator = "gpu" if torch.cuda.is_available() and settings["accelerator"] != "cpu" else "cpu"
    precision = str(settings["precision"])
    needs_gpu, needs_bf16 = precision.startswith("16"), precision.startswith("bf16")
    if accelerator == "cpu" and (needs_gpu or (needs_bf16 and default_precision("cpu") != "bf16-mixed")):
        precision = default_precision("cpu")
    limits = {name: settings[name] for name in ("limit_val_batches", "limit_test_batches") if name in settings}
    return Trainer(
        accelerator=accelerator, devices=1, precision=precision, deterministic=settings.get("deterministic", False),
        callbacks=[*callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **limits,
    ), precision  # fmt: skip


def find_data(run: TrainedRun, split: str, data_root: Path | None, preprocess: Preprocess) -> LightningDataModule:
    """The data module to evaluate on, its pictures of the sizes in ``preprocess``; nothing is read or downloaded yet.

    Raises:
        DataError: the data is not where the run had it, or ``data_root`` cannot give the split.
    """
    left_out = ("_target_", "augment", "test_crops")
    made_of = {name: value for name, value in run.config["data"].items() if name not in left_out}
    settings = {**made_of, "image_size": preprocess.image_size, "resize_size": preprocess.resize_size}
    has_root = "root" in settings
    kind = data_class(run.config)
    if data_root is None:
        if has_root and not kind.is_in(settings["root"]):
            raise DataError(f"The run's data is not in {settings['root']}. Say where it is now: --data-root FOLDER.")
        return kind(**settings)
    if kind.classes_from_files and kind.is_in(data_root):
        return kind(**{**settings, "root": str(data_root)})
    if has_root and (official_folder(data_root).is_dir() or split == "val"):
        if not official_folder(data_root).is_dir() and not (data_root / "train").is_dir():
            raise DataError(f"{data_root} holds no copy of the run's training images, which --split val is a part of.")
        return kind(**{**settings, "root": data_root})
    if split == "val":
        raise DataError("--split val is a part of the run's own data. Leave --data-root out, or use --split test.")
    folder = data_root / "test" if (data_root / "test").is_dir() else data_root
    return ClassFolders(folder, run.class_names, preprocess, settings["batch_size"])
