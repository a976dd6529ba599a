"""Prediction: top-k classes of image files, streamed in bounded batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alexnet_pl.data.image_io import read_image
from alexnet_pl.data.transforms import normalize
from alexnet_pl.figures.image_grids import plot_top5
from alexnet_pl.inference.options import MAX_DRAWN
from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.errors import DataError, UserError
from alexnet_pl.runtime.files import replacing

MAX_BATCH_SIZE, MAX_BATCH_PIXELS = 256, 2_000_000
"""Limits of a batch, which bound the memory of a forward pass: 256 images of 32×32 pixels, 39 of 224×224."""

DRAWN_SIDE = 300
"""Longer side of an image in a drawing, in pixels."""


@dataclass(frozen=True)
class Prediction:
    """Prediction for one file.

    Attributes:
        path: the image file.
        top: ``(class name, probability)`` pairs, the most probable first; empty if there is an ``error``.
        error: why the file could not be read.
    """

    path: Path
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(run: TrainedRun, files: Sequence[Path], top: int = 5) -> Iterator[Prediction]:
    """Yield one prediction per file, in order and in float32; an unreadable file yields one with an ``error``.

    Args:
        top: classes per image, at most all of them.
    """
    batch_size = max(1, min(MAX_BATCH_SIZE, MAX_BATCH_PIXELS // run.preprocess.image_size**2))
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        pixels, errors = {}, {}
        for index, path in enumerate(batch):
            try:
                pixels[index] = run.preprocess.pixels(read_image(path))
            except DataError as error:
                errors[index] = str(error)
        tops = iter(_top_classes(run, list(pixels.values()), top) if pixels else [])
        for index, path in enumerate(batch):
            yield Prediction(path, error=errors[index]) if index in errors else Prediction(path, next(tops))


def _top_classes(run: TrainedRun, pixels: list[torch.Tensor], top: int) -> list[tuple[tuple[str, float], ...]]:
    """Return ``(name, probability)`` pairs per image, from N uint8 tensors ``(3, S, S)``."""
    images = normalize(torch.stack(pixels), run.preprocess.mean, run.preprocess.std)
    values, indices = run.probabilities(images).topk(min(top, len(run.class_names)))
    return [
        tuple((run.class_names[label], value) for label, value in zip(labels, row, strict=True))
        for labels, row in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Draw the first :data:`MAX_DRAWN` classified images with bars for their top classes.

    Raises:
        UserError: there is none, or the file cannot be written or has a suffix that matplotlib does not know.
    """
    drawn = []
    for prediction in [prediction for prediction in predictions if prediction.error is None][:MAX_DRAWN]:
        image = read_image(prediction.path)
        image.thumbnail((DRAWN_SIDE, DRAWN_SIDE))
        drawn.append((image, prediction.path.name, prediction.top))
    if not drawn:
        raise UserError(f"{path} was not written: no image could be classified.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            plot_top5(drawn).savefig(scratch, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
