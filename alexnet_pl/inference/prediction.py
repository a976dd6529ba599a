"""Name what pictures show: ``python -m alexnet_pl predict RUN IMAGE_OR_FOLDER…``; see ``--help``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alexnet_pl.data.image_io import read_picture
from alexnet_pl.data.transforms import normalize
from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.errors import DataError

BATCH_SIZE = 256


@dataclass(frozen=True)
class Prediction:
    """``top`` is ``(name, probability)`` pairs, the likeliest first; with an ``error`` it is empty."""

    path: Path
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(run: TrainedRun, files: Sequence[Path], top: int = 5) -> Iterator[Prediction]:
    """One prediction for each file, in order and in float32; a file that cannot be read gives one with an ``error``.

    Args:
        top: names for each picture; all of them where there are fewer.
    """
    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        pixels, errors = {}, {}
        for index, path in enumerate(batch):
            try:
                pixels[index] = run.preprocess.pixels(read_picture(path))
            except DataError as error:
                errors[index] = str(error)
        answers = iter(_names(run, list(pixels.values()), top) if pixels else [])
        for index, path in enumerate(batch):
            yield Prediction(path, error=errors[index]) if index in errors else Prediction(path, next(answers))


def _names(run: TrainedRun, pixels: list[torch.Tensor], top: int) -> list[tuple[tuple[str, float], ...]]:
    images = normalize(torch.stack(pixels), run.preprocess.mean, run.preprocess.std)
    values, indices = run.probabilities(images).topk(min(top, len(run.class_names)))
    return [
        tuple((run.class_names[label], value) for label, value in zip(labels, row, strict=True))
        for labels, row in zip(indices.tolist(), values.tolist(), strict=True)
    ]
