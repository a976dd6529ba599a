"""Augmentations beyond crops and colors: alternating flips, cutout, and RandAugment per image."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import atan, degrees
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from alexnet_pl.data.draws import Draws, draws_for
from alexnet_pl.data.transforms import BatchTransform
from alexnet_pl.runtime.errors import invalid_value


class AlternatingFlip(BatchTransform):
    """Mirror half of the images, chosen at random, in even epochs and the other half in odd ones.

    Any two consecutive epochs show every image both ways, where independent draws repeat one of them half of the time
    (Jordan 2024, section 3.6, cifar10-airbench). Whether an image is mirrored is a function of the seed, the epoch and
    its position in the dataset.
    """

    mirrors = takes_draws = True

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return ``(N, C, H, W)``, mirrored in part."""
        draws = draws or draws_for(images)
        mirrored = (hash_bits(draws.index, draws.seed) + draws.epoch) % 2 == 1
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def hash_bits(index: Tensor, seed: int) -> Tensor:
    """Return 32 pseudorandom bits for each non-negative index, as int64, by integer arithmetic on its device.

    The multipliers are those of the finalizer "lowbias32" (Wellons 2018).
    """
    mask = 2**32 - 1
    bits = (index + seed * 0x9E3779B9) & mask
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits = ((bits ^ (bits >> shift)) * factor) & mask
    return bits ^ (bits >> 15)


class Cutout(BatchTransform):
    """Cover one square of each image (DeVries and Taylor 2017).

    The center is uniform over the pixels, so a square at the border is cut off, as in the authors' code.

    Args:
        size: side of the square in pixels, at least 1.
        fill: color of the square per channel, on the [0, 1] pixel scale.

    Raises:
        ConfigError: a size below 1, or a fill that is not three numbers from 0 to 1.
    """

    takes_draws = True

    def __init__(self, size: int = 8, fill: Sequence[float] = (0.5, 0.5, 0.5)):
        super().__init__()
        if size < 1:
            raise invalid_value("augment.cutout.size", size, "1 or more pixels")
        if len(fill) != 3 or not all(0 <= value <= 1 for value in fill):
            raise invalid_value("augment.cutout.fill", list(fill), "three numbers from 0 to 1")
        self.size, self.fill = size, tuple(fill)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return a new tensor of the same dtype and shape for ``(N, 3, H, W)`` on the 0–255 scale."""
        sides = images.shape[2:]
        centers = (draws or draws_for(images)).below(*sides)
        rows, columns = (_window(side, self.size, center) for side, center in zip(sides, centers, strict=True))
        color = _gray_levels(self.fill, images.dtype, images.device)
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], color, images)

    def extra_repr(self) -> str:
        return f"size={self.size}, fill={self.fill}"


def _window(side: int, size: int, center: Tensor) -> Tensor:
    """Return ``(N, side)`` bool: positions inside a window of ``size`` around each center ``(N, 1)``."""
    first = center - size // 2
    positions = torch.arange(side, device=center.device)
    return (positions >= first) & (positions < first + size)


@lru_cache
def _gray_levels(color: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a color as ``(3, 1, 1)`` on the 0–255 scale; cached, because a copy per step would stall a GPU."""
    levels = torch.tensor(color, dtype=torch.float64).mul(255)
    return (levels if dtype.is_floating_point else levels.round()).to(dtype).to(device).view(3, 1, 1)


# --- RandAugment ----------------------------------------------------------------------------------------------------

Operation = Callable[[Tensor, float], Tensor]


def _affine(images: Tensor, **settings: Any) -> Tensor:
    defaults = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    moved: Tensor = TF.affine(images, **{**defaults, **settings})
    return moved


OPERATIONS: dict[str, tuple[Operation, bool]] = {
    "identity": (lambda images, level: images, False),
    "shear_x": (lambda x, level: _affine(x, shear=[degrees(atan(0.3 * level)), 0.0], center=[0, 0]), True),
    "shear_y": (lambda x, level: _affine(x, shear=[0.0, degrees(atan(0.3 * level))], center=[0, 0]), True),
    "translate_x": (lambda x, level: _affine(x, translate=[int(150 / 331 * x.shape[3] * level), 0]), True),
    "translate_y": (lambda x, level: _affine(x, translate=[0, int(150 / 331 * x.shape[2] * level)]), True),
    "rotate": (lambda x, level: TF.rotate(x, angle=30 * level), True),
    "brightness": (lambda x, level: TF.adjust_brightness(x, 1 + 0.9 * level), True),
    "color": (lambda x, level: TF.adjust_saturation(x, 1 + 0.9 * level), True),
    "contrast": (lambda x, level: TF.adjust_contrast(x, 1 + 0.9 * level), True),
    "sharpness": (lambda x, level: TF.adjust_sharpness(x, 1 + 0.9 * level), True),
    "posterize": (lambda x, level: TF.posterize(x, bits=8 - round(4 * level)), False),
    "solarize": (lambda x, level: TF.solarize(x, threshold=255 * (1 - level)), False),
    "auto_contrast": (lambda x, level: TF.autocontrast(x), False),
    "equalize": (lambda x, level: TF.equalize(x), False),
}
"""Name → operation on a batch at a level from −1 to 1, and True if the level has a random sign: torchvision's fourteen
operations with its ranges (Cubuk et al. 2020)."""


class RandAugment(BatchTransform):
    """Apply random operations at one strength (Cubuk et al. 2020), drawn for each image of a batch.

    torchvision's class of that name draws once per call, and calling it for every image takes four times as long.
    Images with the same draw form a group here, which torchvision's functions transform at once. That is less code than
    kornia, the other library that draws per image, would need around it.

    Args:
        num_ops: operations per image, at least 1.
        magnitude: strength, from 0 to 30.

    Raises:
        ConfigError: a value out of range.
    """

    takes_draws = True
    LARGEST = 30

    def __init__(self, num_ops: int = 2, magnitude: int = 9):
        super().__init__()
        if num_ops < 1:
            raise invalid_value("augment.policy.num_ops", num_ops, "1 or more operations")
        if not 0 <= magnitude <= self.LARGEST:
            raise invalid_value("augment.policy.magnitude", magnitude, f"a whole number from 0 to {self.LARGEST}")
        self.num_ops, self.magnitude = num_ops, magnitude

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return a new uint8 tensor of the same shape for ``(N, 3, H, W)``; floating point is rounded first."""
        result = images.round().clamp(0, 255).to(torch.uint8) if images.is_floating_point() else images.clone()
        operations = list(OPERATIONS.values())
        numbers = (draws or draws_for(images)).below(*[len(operations), 2] * self.num_ops)
        # The CPU has to know the groups: the one place where an augmentation waits for a GPU.
        choices = torch.stack(numbers).squeeze(2).cpu().split(2)
        for drawn, signs in choices:
            for number, (operation, is_signed) in enumerate(operations):
                for sign in (0, 1) if is_signed else (None,):
                    chosen = (drawn == number) if sign is None else (drawn == number) & (signs == sign)
                    positions = chosen.nonzero().squeeze(1)
                    if len(positions):
                        positions = positions.to(images.device, non_blocking=True)
                        level = self.magnitude / self.LARGEST * (-1 if sign else 1)
                        result[positions] = operation(result[positions], level)
        return result

    def extra_repr(self) -> str:
        return f"num_ops={self.num_ops}, magnitude={self.magnitude}"
