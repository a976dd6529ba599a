"""data.color_pca."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from alexnet_pl.runtime.errors import DataError


@dataclass(frozen=True)
class ColorStatistics:
    """What the RGB pixels of a data set are like, on the [0, 1] pixel scale.

    Attributes:
        mean: ``(3,)`` float64, of each channel.
        components: ``(3, 3)`` float64, a unit row for each principal component, the strongest first; the largest entry
            of a row is positive, since the sign of an eigenvector says nothing.
        std: ``(3,)`` float64, standard deviation along each: the roots of the covariance's eigenvalues.
        images: how many there were.
        pixels: how many there were.
    """

    mean: np.ndarray
    components: np.ndarray
    std: np.ndarray
    images: int
    pixels: int


def color_statistics(batches: Iterable[Tensor]) -> ColorStatistics:
    """Principal components of all pixels of uint8 ``(B, 3, H, W)`` batches, read once.

    The sums are of whole numbers, so in float64 they are exact up to 2**53: over 130 thousand million pixels.

    Raises:
        DataError: no pixel at all.
    """
    total, products, images, pixels = np.zeros(3), np.zeros((3, 3)), 0, 0
    for batch in batches:
        values = batch.cpu().numpy().transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        total += values.sum(1)
        products += values @ values.T
        images, pixels = images + len(batch), pixels + values.shape[1]
    if not pixels:
        raise DataError("There are no training images to take colours from.")
    mean = total / pixels
    variances, vectors = np.linalg.eigh(products / pixels - np.outer(mean, mean))
    components = vectors.T[::-1]
    largest = np.take_along_axis(components, np.abs(components).argmax(1, keepdims=True), axis=1)
    # Grey images have one component; rounding can leave the variance of the others a little below 0.
    std = np.sqrt(np.clip(variances[::-1], 0, None))
    return ColorStatistics(mean / 255, components * np.sign(largest), std / 255, images, pixels)
