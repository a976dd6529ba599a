"""The figures of one run: what of a test is kept for them, which there are, and why one is left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from alexnet_pl.data.transforms import denormalize
from alexnet_pl.figures.charts import confusion_matrix
from alexnet_pl.figures.features import FeatureBank, feature_layer, first_convolution, kernel_groups
from alexnet_pl.figures.image_grids import conv1_kernels, image_wall, nearest_images, picture_bars, png

SHOWN = 300
"""Test images kept for the projector, drawn by lot over the whole split; the figures' examples are among them."""

MISTAKES, EXAMPLES, QUERIES, AUGMENTED = 24, 8, 5, 24
"""Images in the figures; 8 and 5 as in figure 4 of the paper."""

TITLES = {
    "learning_curves": "Loss and accuracy",
    "training": "Learning rate, norms and speed",
    "conv1_kernels": "First-layer kernels (figure 3 of the paper)",
    "top5": "Test images and the five likeliest classes (figure 4, left)",
    "nearest": "Nearest training images (figure 4, right)",
    "confusion_matrix": "Confusion matrix",
    "mistakes": "The most confident mistakes",
    "augmented_batch": "A training batch as the network sees it",
}
"""Every figure of a report by its file's name, in order."""


@dataclass
class TopK:
    """The ``count`` images with the greatest score so far, in falling order.

    Attributes:
        scores: ``(K,)``; images ``(K, 3, S, S)`` uint8; labels ``(K,)``; probabilities ``(K, classes)``.
    """

    count: int
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    images: Tensor | None = None
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0))

    def offer(self, scores: Tensor, labels: Tensor, probabilities: Tensor, look: Callable[[Tensor], Tensor]) -> None:
        """Take what belongs among them; ``look`` gives the images at ``(n,)`` positions as uint8."""
        if len(self.scores) == self.count:
            better = (scores > self.scores[-1]).nonzero().flatten()
        else:
            better = torch.isfinite(scores).nonzero().flatten()
        if len(better) == 0:
            return
        better = better[scores[better].argsort(descending=True, stable=True)[: self.count]]
        new = scores[better], look(better), labels[better], probabilities[better]
        old = (self.scores, self.images, self.labels, self.probabilities) if self.images is not None else None
        merged = [torch.cat(pair) for pair in zip(old, new, strict=True)] if old else new
        order = merged[0].argsort(descending=True, stable=True)[: self.count]
        self.scores, self.images, self.labels, self.probabilities = (part[order] for part in merged)


class TestPredictions:
    """What one pass over the test set leaves for the figures: every label and probability, and a few of the images.

    Args:
        mean, std: what the images are normalised by.
    """

    __test__ = False  # not one of pytest's

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean, std
        self.lot = torch.Generator().manual_seed(0)
        self.sample, self.mistakes = TopK(SHOWN), TopK(MISTAKES)
        self._labels: list[Tensor] = []
        self._probabilities: list[Tensor] = []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """One batch: normalised ``(N, 3, S, S)``, ``(N,)`` and ``(N, classes)``; a negative label is padding."""
        probabilities, labels = logits.detach().float().softmax(1).cpu(), labels.cpu()
        real = (labels >= 0).nonzero().flatten()
        probabilities, labels = probabilities[real], labels[real]

        def look(places: Tensor) -> Tensor:
            return denormalize(images[real[places].to(images.device)], self.mean, self.std)

        confidence, predicted = probabilities.max(1)
        wrong = confidence.masked_fill((predicted == labels) | confidence.isnan(), -torch.inf)
        self.sample.offer(torch.rand(len(labels), generator=self.lot), labels, probabilities, look)
        self.mistakes.offer(wrong, labels, probabilities, look)
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

    def merge(self, other: "TestPredictions") -> None:
        """Add what another process saw of the same test."""
        self._labels += other._labels
        self._probabilities += other._probabilities
        for ours, theirs in ((self.sample, other.sample), (self.mistakes, other.mistakes)):
            if theirs.images is not None:
                ours.offer(theirs.scores, theirs.labels, theirs.probabilities, theirs.images.__getitem__)


@dataclass(frozen=True)
class FigureInputs:
    """What the figures of a run are drawn from; what is None is not to be had.

    Attributes:
        net: the network, on any device.
        names: a name for each logit.
        test: the record of a test.
        features: ``(SHOWN, F)`` of the record's sample.
        training: training images with their features.
        augmented: ``(N, 3, S, S)`` uint8 of a training batch after augmentation, and its labels.
        missing: why one of the four is None, by its name.
    """

    net: nn.Module
    names: Sequence[str]
    test: TestPredictions | None = None
    features: Tensor | None = None
    training: FeatureBank | None = None
    augmented: tuple[Tensor, Tensor] | None = None
    missing: dict[str, str] = field(default_factory=dict)


class FigureUnavailable(Exception):
    """A figure cannot be drawn; the message says why."""


def kernels_figure(material: FigureInputs) -> Figure:
    convolution = first_convolution(material.net)
    if convolution is None:
        raise FigureUnavailable("the network has no convolution")
    kernels = convolution.weight.detach().float().cpu().numpy()
    if kernels.shape[1] not in (1, 3):
        raise FigureUnavailable(f"its first convolution reads {kernels.shape[1]} channels, which make no image")
    return conv1_kernels(kernels, kernel_groups(material.net))


def top5_figure(material: FigureInputs) -> Figure:
    sample = _sample(material)
    chosen = one_of_each_class(sample.labels, EXAMPLES)
    answers = []
    for place in chosen:
        values, order = sample.probabilities[place].topk(min(5, len(material.names)))
        top = [(material.names[label], value) for label, value in zip(order.tolist(), values.tolist(), strict=True)]
        picture = Image.fromarray(sample.images[place].permute(1, 2, 0).numpy())
        answers.append((picture, _name(material, sample.labels[place]), top))
    return picture_bars(answers, [title for _, title, _ in answers])


def nearest_figure(material: FigureInputs) -> Figure:
    sample = _sample(material)
    if material.features is None or material.training is None:
        raise FigureUnavailable(
            material.missing.get("training") or material.missing.get("features") or "there are no features"
        )
    queries = one_of_each_class(sample.labels, QUERIES)
    found = [material.training.nearest(material.features[place]) for place in queries]
    places = torch.stack([places for _, places in found])
    layer, width = feature_layer(material.net), material.features.shape[1]
    return nearest_images(
        _channels_last(sample.images[queries]),
        [_name(material, label) for label in sample.labels[queries]],
        _channels_last(material.training.images[places]),
        [[_name(material, label) for label in row] for row in material.training.labels[places]],
        torch.stack([distances for distances, _ in found]).numpy(),
        f"{layer} space ({width:,} values), of {len(material.training.labels):,} images",
    )


def confusion_figure(material: FigureInputs) -> Figure:
    test = _test(material)
    return confusion_matrix(confusion_counts(test.labels, test.probabilities).numpy(), material.names)


def mistakes_figure(material: FigureInputs) -> Figure:
    mistakes = _test(material).mistakes
    if mistakes.images is None:
        raise FigureUnavailable("no test image was named wrongly")
    captions = []
    for label, probabilities in zip(mistakes.labels, mistakes.probabilities, strict=True):
        predicted = int(probabilities.argmax())
        captions.append(
            [f"{material.names[predicted]} {probabilities[predicted]:.3f}", f"true: {_name(material, label)}"]
        )
    return image_wall(_channels_last(mistakes.images), captions)


def augmented_figure(material: FigureInputs) -> Figure:
    if material.augmented is None:
        raise FigureUnavailable(material.missing.get("augmented", "no training batch was seen"))
    images, labels = material.augmented
    return image_wall(_channels_last(images[:AUGMENTED]), [[_name(material, label)] for label in labels[:AUGMENTED]])


DRAWN_BY: dict[str, Callable[[FigureInputs], Figure]] = {
    "conv1_kernels": kernels_figure,
    "top5": top5_figure,
    "nearest": nearest_figure,
    "confusion_matrix": confusion_figure,
    "mistakes": mistakes_figure,
    "augmented_batch": augmented_figure,
}


def draw(material: FigureInputs) -> tuple[dict[str, bytes], dict[str, str]]:
    """All figures that can be drawn.

    Returns:
        A PNG file by the figure's name, and for every other one why it was left out. Nothing is raised: a picture is
        no reason to lose a run.
    """
    drawn, left_out = {}, {}
    for name, make in DRAWN_BY.items():
        try:
            drawn[name] = png(make(material))
        except FigureUnavailable as reason:
            left_out[name] = str(reason)
        except Exception as error:
            left_out[name] = f"drawing it failed: {one_line(error)}"
    return drawn, left_out


def save(drawn: dict[str, bytes], folder: Path) -> None:
    """Write each as ``<name>.png``, over those of before."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in drawn.items():
        scratch = folder / f".{name}.png"
        scratch.write_bytes(content)
        scratch.replace(folder / f"{name}.png")


def confusion_counts(labels: Tensor, probabilities: Tensor) -> Tensor:
    """``(classes, classes)`` int64 counts of ``(N,)`` labels and ``(N, classes)``; row: label, column: prediction."""
    classes = probabilities.shape[1]
    predictions = probabilities.nan_to_num(-1).argmax(1)
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)


def one_of_each_class(labels: Tensor, count: int) -> list[int]:
    """Positions of ``count`` images (fewer where there are not as many), from as many classes as there are."""
    waiting: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        waiting.setdefault(label, []).append(place)
    rounds = (places[turn] for turn in range(count) for places in waiting.values() if turn < len(places))
    return [place for _, place in zip(range(count), rounds, strict=False)]


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks, its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _test(material: FigureInputs) -> TestPredictions:
    if material.test is None or len(material.test.labels) == 0:
        raise FigureUnavailable(material.missing.get("test", "no test image was seen"))
    return material.test


def _sample(material: FigureInputs) -> TopK:
    sample = _test(material).sample
    if sample.images is None:
        raise FigureUnavailable("no test image was seen")
    return sample


def _name(material: FigureInputs, label: Tensor) -> str:
    return material.names[int(label)]


def _channels_last(images: Tensor) -> np.ndarray:
    """``(…, C, H, W)`` → ``(…, H, W, 3)``; grey images become colour images."""
    moved = images.movedim(-3, -1).numpy()
    return moved if moved.shape[-1] == 3 else moved[..., :1].repeat(3, axis=-1)
