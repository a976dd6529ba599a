"""Figures of one run: data collected during its test, drawing functions by figure name, reasons for missing figures."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from alexnet_pl.data.transforms import denormalize
from alexnet_pl.figures.charts import MAX_MATRIX_CLASSES, plot_confused_pairs, plot_confusion_matrix
from alexnet_pl.figures.features import FeatureBank, feature_layer, find_first_conv, kernel_groups
from alexnet_pl.figures.image_grids import plot_captioned, plot_kernels, plot_nearest_images, plot_top5, png
from alexnet_pl.runtime.errors import one_line
from alexnet_pl.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLE_SIZE = 300
"""Test images kept for the projector, a fixed random sample of the split. The examples in figures come from it."""

NUM_MISTAKES, NUM_EXAMPLES, NUM_QUERIES, NUM_AUGMENTED = 24, 8, 5, 24
"""Images per figure; 8 and 5 as in figure 4 of the paper."""

TITLES = {
    "learning_curves": "Loss and accuracy",
    "training": "Learning rate, norms and speed",
    "conv1_kernels": "First-layer kernels (figure 3 of the paper)",
    "top5": "Test images with top-5 predictions (figure 4, left)",
    "nearest": "Nearest training images (figure 4, right)",
    "confusion_matrix": "Confusion matrix",
    "mistakes": "Most confident misclassifications",
    "augmented_batch": "A training batch as the network sees it",
}
"""Title of every figure in a report by file name, in order."""


@dataclass
class TopK:
    """The ``count`` images with the highest scores so far, in decreasing order.

    Attributes:
        scores: ``(K,)`` with K at most ``count``.
        images: ``(K, 3, S, S)`` uint8; None before the first image.
        labels: ``(K,)`` int64.
        probabilities: ``(K, classes)``.
    """

    count: int
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    images: Tensor | None = None
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0))

    def update(
        self, scores: Tensor, labels: Tensor, probabilities: Tensor, get_images: Callable[[Tensor], Tensor]
    ) -> None:
        """Insert candidates whose score is high enough; ``get_images`` maps ``(n,)`` indices to uint8 images."""
        threshold = self.scores[-1] if len(self.scores) == self.count else -torch.inf
        better = (scores > threshold).nonzero().flatten()
        if len(better) == 0:
            return
        better = better[scores[better].argsort(descending=True, stable=True)[: self.count]]
        new = scores[better], get_images(better), labels[better], probabilities[better]
        old = (self.scores, self.images, self.labels, self.probabilities) if self.images is not None else None
        merged = [torch.cat(pair) for pair in zip(old, new, strict=True)] if old else new
        order = merged[0].argsort(descending=True, stable=True)[: self.count]
        self.scores, self.images, self.labels, self.probabilities = (part[order] for part in merged)


class TestPredictions:
    """Labels and probabilities of a whole test, and a few of its images, for the figures.

    Args:
        mean, std: normalization of the images, per channel on the [0, 1] pixel scale.

    Attributes:
        sample: a fixed random sample of ``SAMPLE_SIZE`` images.
        mistakes: the ``NUM_MISTAKES`` most confident misclassifications.
    """

    __test__ = False  # not a pytest class

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean, std
        self.sample, self.mistakes = TopK(SAMPLE_SIZE), TopK(NUM_MISTAKES)
        self._generator = torch.Generator().manual_seed(0)
        self._labels: list[Tensor] = []
        self._probabilities: list[Tensor] = []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Add one batch.

        Args:
            images: ``(N, 3, S, S)``, normalized.
            labels: ``(N,)``; a negative label marks padding.
            logits: ``(N, classes)``.
        """
        probabilities, labels = logits.detach().float().softmax(1).cpu(), labels.cpu()
        real = (labels >= 0).nonzero().flatten()
        probabilities, labels = probabilities[real], labels[real]

        def get_images(indices: Tensor) -> Tensor:
            return denormalize(images[real[indices].to(images.device)], self.mean, self.std)

        confidence, predicted = probabilities.max(1)
        wrong = confidence.masked_fill((predicted == labels) | confidence.isnan(), -torch.inf)
        # Random scores make the images with the highest ones a uniform sample of the split.
        self.sample.update(torch.rand(len(labels), generator=self._generator), labels, probabilities, get_images)
        self.mistakes.update(wrong, labels, probabilities, get_images)
        self._labels.append(labels)
        self._probabilities.append(probabilities)

    @property
    def labels(self) -> Tensor:
        """``(N,)`` int64."""
        return torch.cat(self._labels) if self._labels else torch.empty(0, dtype=torch.int64)

    @property
    def probabilities(self) -> Tensor:
        """``(N, classes)`` float32."""
        return torch.cat(self._probabilities) if self._probabilities else torch.empty(0, 0)

    def merge(self, other: TestPredictions) -> None:
        """Add the predictions of another rank in the same test."""
        self._labels += other._labels
        self._probabilities += other._probabilities
        for ours, theirs in ((self.sample, other.sample), (self.mistakes, other.mistakes)):
            if theirs.images is not None:
                ours.update(theirs.scores, theirs.labels, theirs.probabilities, theirs.images.__getitem__)


@dataclass(frozen=True)
class FigureInputs:
    """Inputs of all figures of a run; None marks an unavailable one.

    Attributes:
        net: the network, on any device.
        names: one name per logit.
        test: predictions of a test.
        features: ``(SAMPLE_SIZE, F)`` features of the test's sample.
        training: training images with their features.
        augmented: ``(N, 3, S, S)`` uint8 training images after augmentation, and their ``(N,)`` labels.
        missing: why ``test``, ``features``, ``training`` or ``augmented`` is None, by its name.
    """

    net: nn.Module
    names: Sequence[str]
    test: TestPredictions | None = None
    features: Tensor | None = None
    training: FeatureBank | None = None
    augmented: tuple[Tensor, Tensor] | None = None
    missing: dict[str, str] = field(default_factory=dict)


class FigureUnavailable(Exception):
    """A figure cannot be drawn; the message is the reason."""


def draw_kernels(inputs: FigureInputs) -> Figure:
    convolution = find_first_conv(inputs.net)
    if convolution is None:
        raise FigureUnavailable("the network has no convolution")
    kernels = convolution.weight.detach().float().cpu().numpy()
    if kernels.shape[1] not in (1, 3):
        raise FigureUnavailable(f"the first convolution has {kernels.shape[1]} input channels, not 1 or 3")
    return plot_kernels(kernels, kernel_groups(inputs.net))


def draw_top5(inputs: FigureInputs) -> Figure:
    sample, images = _sample(inputs)
    predictions = []
    for index in spread_over_classes(sample.labels, NUM_EXAMPLES):
        values, order = sample.probabilities[index].topk(min(5, len(inputs.names)))
        top = [(inputs.names[label], value) for label, value in zip(order.tolist(), values.tolist(), strict=True)]
        predictions.append((Image.fromarray(images[index]), _name(inputs, sample.labels[index]), top))
    return plot_top5(predictions, [title for _, title, _ in predictions])


def draw_nearest(inputs: FigureInputs) -> Figure:
    sample, images = _sample(inputs)
    if inputs.features is None or inputs.training is None:
        reason = inputs.missing.get("training") or inputs.missing.get("features")
        raise FigureUnavailable(reason or "no features were extracted")
    queries = spread_over_classes(sample.labels, NUM_QUERIES)
    found = [inputs.training.nearest(inputs.features[index]) for index in queries]
    neighbors = torch.stack([indices for _, indices in found])
    layer, width = feature_layer(inputs.net), inputs.features.shape[1]
    return plot_nearest_images(
        images[queries],
        [_name(inputs, label) for label in sample.labels[queries]],
        _channels_last(inputs.training.images[neighbors]),
        [[_name(inputs, label) for label in row] for row in inputs.training.labels[neighbors]],
        torch.stack([distances for distances, _ in found]).numpy(),
        f"{layer} features ({width:,} values), among {len(inputs.training.labels):,} images",
    )


def draw_confusion_matrix(inputs: FigureInputs) -> Figure:
    test = _test(inputs)
    if len(inputs.names) <= MAX_MATRIX_CLASSES:
        return plot_confusion_matrix(confusion_counts(test.labels, test.probabilities).numpy(), inputs.names)
    pairs = test.labels * len(inputs.names) + test.probabilities.nan_to_num(-1).argmax(1)
    found, counts = np.unique(pairs.numpy(), return_counts=True)
    return plot_confused_pairs(*np.divmod(found, len(inputs.names)), counts, inputs.names)


def draw_mistakes(inputs: FigureInputs) -> Figure:
    mistakes = _test(inputs).mistakes
    if mistakes.images is None:
        raise FigureUnavailable("no test image was misclassified")
    captions = []
    for label, probabilities in zip(mistakes.labels, mistakes.probabilities, strict=True):
        predicted = int(probabilities.argmax())
        captions.append([f"{inputs.names[predicted]} {probabilities[predicted]:.3f}", f"true: {_name(inputs, label)}"])
    return plot_captioned(_channels_last(mistakes.images), captions)


def draw_augmented_batch(inputs: FigureInputs) -> Figure:
    if inputs.augmented is None:
        raise FigureUnavailable(inputs.missing.get("augmented", "this process trained no batch"))
    images, labels = inputs.augmented
    captions = [[_name(inputs, label)] for label in labels[:NUM_AUGMENTED]]
    return plot_captioned(_channels_last(images[:NUM_AUGMENTED]), captions)


DRAWN_BY: dict[str, Callable[[FigureInputs], Figure]] = {
    "conv1_kernels": draw_kernels,
    "top5": draw_top5,
    "nearest": draw_nearest,
    "confusion_matrix": draw_confusion_matrix,
    "mistakes": draw_mistakes,
    "augmented_batch": draw_augmented_batch,
}
"""Drawing function by figure name. Raises FigureUnavailable if the inputs do not allow the figure."""


def draw(inputs: FigureInputs) -> tuple[dict[str, bytes], dict[str, str]]:
    """Draw all figures that the inputs allow. Never raises, because plotting must never abort a run.

    Returns:
        PNG files by figure name, and for every other figure the reason why it is unavailable.
    """
    drawn, unavailable = {}, {}
    for name, draw_figure in DRAWN_BY.items():
        try:
            drawn[name] = png(draw_figure(inputs))
        except FigureUnavailable as reason:
            unavailable[name] = str(reason)
        except Exception as error:
            unavailable[name] = f"drawing failed: {one_line(error)[:300]}"
    return drawn, unavailable


def save(drawn: dict[str, bytes], folder: Path) -> None:
    """Write each figure to ``<name>.png``, atomically, replacing earlier ones.

    Raises:
        OSError: the directory cannot be written, or is a symbolic link, which an untrusted archive may point anywhere.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "Is a symbolic link", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in drawn.items():
        write_atomic(folder / f"{name}.png", content)


def confusion_counts(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the confusion matrix, ``(classes, classes)`` int64; rows are labels, columns predictions.

    Args:
        labels: ``(N,)`` int64.
        probabilities: ``(N, classes)``; NaN ranks last.
    """
    classes = probabilities.shape[1]
    predictions = probabilities.nan_to_num(-1).argmax(1)
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)


def spread_over_classes(labels: Tensor, count: int) -> list[int]:
    """Return up to ``count`` indices: one image per class before the second of any class."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(index)
    # Round n takes the n-th image of every class that has one.
    rounds = (indices[turn] for turn in range(count) for indices in by_class.values() if turn < len(indices))
    return [index for _, index in zip(range(count), rounds, strict=False)]


def _test(inputs: FigureInputs) -> TestPredictions:
    if inputs.test is None or len(inputs.test.labels) == 0:
        raise FigureUnavailable(inputs.missing.get("test", "the test had no images"))
    return inputs.test


def _sample(inputs: FigureInputs) -> tuple[TopK, np.ndarray]:
    """Return the test's sample and its images as ``(N, S, S, 3)`` uint8."""
    sample = _test(inputs).sample
    if sample.images is None:
        raise FigureUnavailable("the test had no images")
    return sample, _channels_last(sample.images)


def _name(inputs: FigureInputs, label: Tensor) -> str:
    return inputs.names[int(label)]


def _channels_last(images: Tensor) -> np.ndarray:
    """Return ``(…, C, H, W)`` as a ``(…, H, W, 3)`` array; a gray channel is repeated."""
    moved = images.movedim(-3, -1).numpy()
    return moved if moved.shape[-1] == 3 else moved[..., :1].repeat(3, axis=-1)
