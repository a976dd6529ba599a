"""Metrics of a run's final weights on all three splits, without dropout and augmentation: ``final_evaluation=true``."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from lightning import Trainer
from torch import Tensor

from alexnet_pl.data.datamodule import ImageDataModule, plain_batches
from alexnet_pl.data.loaders import BatchLoader
from alexnet_pl.distributed.environment import get_world
from alexnet_pl.training.build import num_batches
from alexnet_pl.training.classifier import ClassificationMetrics, ImageClassifier


def final_metrics(model: ImageClassifier, data: ImageDataModule, trainer: Trainer) -> dict[str, float]:
    """Return loss and accuracies of the model's weights at the end of training, on images as a test sees them.

    The best checkpoint is chosen by validation; the final weights are not chosen at all. A generalization gap is about
    their training error: that of an epoch's batches is measured while the network learns, with dropout and
    augmentation. All ranks take part.

    Returns:
        ``train/loss_final`` (nats), ``train/acc_final``, ``train/acc_top5_final`` in [0, 1], and likewise for ``val``
        and ``test``. Limits of the trainer apply.
    """
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    found: dict[str, float] = {}
    was_training = model.training
    model.to(trainer.strategy.root_device).eval()  # Lightning moves a trained network back to the CPU
    for split, loader in loaders.items():
        count = num_batches(loader, getattr(trainer, f"limit_{split}_batches"))
        batches: Iterable[tuple[Tensor, ...]] = _in_order(loader) if split == "train" else loader
        values = _evaluate(model, data, islice(batches, count if count < len(loader) else None), trainer)
        found |= {f"{split}/{name}_final": values[name] for name in ("loss", "acc", "acc_top5")}
    model.train(was_training)
    return found


def _in_order(loader: BatchLoader) -> Iterator[tuple[Tensor, ...]]:
    """Yield this rank's part of every training batch in the order of the images, the last incomplete one included."""
    world = get_world()
    for batch in loader.indices.split(loader.batch_size):
        if len(part := batch[world.rank :: world.size]):
            yield loader.gather(part)


def _evaluate(
    model: ImageClassifier, data: ImageDataModule, batches: Iterable[tuple[Tensor, ...]], trainer: Trainer
) -> dict[str, float]:
    device = trainer.strategy.root_device
    metrics = ClassificationMetrics(model.test_metrics.top_k).to(device)
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        for images, labels in plain_batches(data, batches, device):
            logits = model(images).float()
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            metrics.update(logits, labels, losses)
    return {name: float(value) for name, value in metrics.compute().items()}
