"""Principal components of a dataset's RGB pixels, for the paper's color augmentation."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from alexnet_pl.runtime.errors import DataError


@dataclass(frozen=True)
class ColorStatistics:
    """Mean and principal components of a dataset's RGB pixels, on the [0, 1] pixel scale.

    Attributes:
        mean: ``(3,)`` float64, of each channel.
        components: ``(3, 3)`` float64, one unit row per principal component in order of decreasing variance. The
            largest entry of each row is positive, because the sign of an eigenvector is arbitrary.
        std: ``(3,)`` float64, standard deviation along each component: the roots of the covariance's eigenvalues.
        images: number of images.
        pixels: number of pixels.
    """

    mean: np.ndarray
    components: np.ndarray
    std: np.ndarray
    images: int
    pixels: int


def color_statistics(batches: Iterable[Tensor]) -> ColorStatistics:
    """Compute the principal components of all pixels in one pass over uint8 ``(B, 3, H, W)`` batches.

    The sums are of integers, hence exact in float64 up to 2**53: over 130 billion pixels.

    Raises:
        DataError: there are no pixels.
    """
    total, products, images, pixels = np.zeros(3), np.zeros((3, 3)), 0, 0
    for batch in batches:
        values = batch.cpu().numpy().transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        total += values.sum(1)
        products += values @ values.T
        images, pixels = images + len(batch), pixels + values.shape[1]
    if not pixels:
        raise DataError("no training images to compute the color statistics from.")
    mean = total / pixels
    variances, vectors = np.linalg.eigh(products / pixels - np.outer(mean, mean))
    components = vectors.T[::-1]
    largest = np.take_along_axis(components, np.abs(components).argmax(1, keepdims=True), axis=1)
    # Gray images have a single component; rounding can leave the other variances slightly below 0.
    std = np.sqrt(np.clip(variances[::-1], 0, None))
    return ColorStatistics(mean / 255, components * np.sign(largest), std / 255, images, pixels)
