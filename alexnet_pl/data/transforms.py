"""Transforms of whole batches, on the device the batch is on.

Pixels are on the 0–255 scale up to :func:`normalize`: uint8 as they are stored, or floating-point from a transform
whose result falls between grey levels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_pl.runtime.errors import ConfigError


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images / 255 - mean) / std`` in float32.

    Args:
        images: ``(N, C, H, W)`` uint8, or floating-point on the same 0–255 scale; left as they are.
        mean, std: one number a channel, in units of the [0, 1] pixel scale.
    """
    scale, shift = scale_and_shift(tuple(mean), tuple(std), images.device)
    scaled = images.float() * scale if images.is_floating_point() else images.float().mul_(scale)
    return scaled.add_(shift)


@lru_cache
def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What :func:`normalize` multiplies by and what it adds then, each ``(1, C, 1, 1)`` float32.

    Cached, because a copy to the device in every step would stall it.
    """
    m, s = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return (1 / (255 * s)).float().to(device), (-m / s).float().to(device)


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle ``(..., size, size)`` of images that are at least as large; where a margin is odd, one up and left."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


CENTRE = 2
"""Which of :func:`ten_crop` is the centre: :func:`center_crop`'s."""


def ten_crop(images: Tensor, size: int) -> Tensor:
    """The paper's test views: the four corners, the centre, and the mirror image of each.

    Args:
        images: ``(N, C, B, B)`` with B at least ``size``. For 256 → 224 the corners are at (0, 0), (0, 32), (32, 0)
            and (32, 32) and the centre at (16, 16), as in the paper.
        size: side of a view in pixels.

    Returns:
        ``(10, N, C, size, size)``.
    """
    room = images.shape[-1] - size
    corners = [(0, 0), (0, room), (room // 2, room // 2), (room, 0), (room, room)]
    views = [images[..., top : top + size, left : left + size] for top, left in corners]
    return torch.stack([*views, *(view.flip(-1) for view in views)])


class RandomCropFlip(nn.Module):
    """Cut a square at a random place, mirror half of the images. Each image draws for itself.

    Two uses: zero-pad and cut back to the old size (``padding`` alone), as is usual for CIFAR-10; and the paper's
    (section 4.1), a part of a larger image (``size`` alone): 224 of 256 pixels.

    Args:
        padding: pixels added on every side before, at least 0.
        size: side of the square in pixels; null for images as large as they came.

    Raises:
        ConfigError: negative padding, a size below 1; when called, images smaller than ``size``.
    """

    def __init__(self, padding: int = 0, size: int | None = None):
        super().__init__()
        if padding < 0:
            raise ConfigError(f"augment.padding={padding} is negative; it is 0 or more pixels.")
        if size is not None and size < 1:
            raise ConfigError(f"augment.size={size} is not possible; it is 1 or more pixels.")
        self.padding, self.size = padding, size

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` in; a new tensor of the same dtype out, ``(N, C, size, size)`` or of the same shape."""
        count = len(images)
        height, width = (self.size or side for side in images.shape[2:])
        padded = F.pad(images, [self.padding] * 4)
        rooms = [padded.shape[2] - height + 1, padded.shape[3] - width + 1]
        if min(rooms) < 1:
            raise ConfigError(
                f"a crop of augment size={self.size} does not fit into images of {images.shape[3]}×{images.shape[2]}: "
                f"store them larger, with data.resize_size={self.size} or more."
            )
        device = images.device
        top = torch.randint(rooms[0], (count, 1), device=device)
        left = torch.randint(rooms[1], (count, 1), device=device)
        mirrored = torch.rand(count, 1, device=device) < 0.5
        cut = cut_one_by_one if device.type == "cpu" else cut_at_once
        return cut(padded, top, left, mirrored, (height, width))

    def extra_repr(self) -> str:
        return f"padding={self.padding}, size={self.size}"


def cut_at_once(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """A part of each image, in two gathers: for a GPU.

    Args:
        images: ``(N, C, H, W)``.
        top, left: ``(N, 1)`` int64, the part's first row and column.
        mirrored: ``(N, 1)`` bool.
        size: height and width of the part.
    """
    count, channels, _, width = images.shape
    rows = top + torch.arange(size[0], device=images.device)
    columns = left + torch.arange(size[1], device=images.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    down = images.gather(2, rows.view(count, 1, size[0], 1).expand(-1, channels, -1, width))
    return down.gather(3, columns.view(count, 1, 1, size[1]).expand(-1, channels, size[0], -1))


def cut_one_by_one(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`cut_at_once` for a CPU, where a slice copies whole rows and a gather single pixels."""
    result = torch.empty(*images.shape[:2], *size, dtype=images.dtype)
    draws = zip(images, result, *(draw[:, 0].tolist() for draw in (top, left, mirrored)), strict=True)
    for image, place, first_row, first_column, mirror in draws:
        part = image[:, first_row : first_row + size[0], first_column : first_column + size[1]]
        place.copy_(part.flip(2) if mirror else part)
    return result


class PCAColor(nn.Module):
    """The paper's second augmentation (section 4.1): noise along the principal components of the RGB pixels.

    One colour an image, the same for all its pixels: the sum of the three components, each times its standard
    deviation times a draw from N(0, ``alpha_std``). The paper's text says eigenvalues where the authors' code has
    standard deviations; on 0–255 pixels the eigenvalues, their squares, would be thousands of grey levels.

    The result is floating-point, neither rounded nor clamped: the third component moves a pixel by about one grey
    level, which rounding to uint8 would distort, and clamping would change the colours of bright and dark pixels in
    another way than those of the rest. :func:`normalize` takes it as it is.

    ``python -m alexnet_pl color_pca`` computes ``components`` and ``std`` from a training split.

    Args:
        components: three orthogonal rows of unit length, each a direction in (red, green, blue).
        std: standard deviation of the pixels along each component, on the [0, 1] pixel scale; 0 or more.
        alpha_std: standard deviation of the draws, 0 or more; the paper's is 0.1.

    Raises:
        ConfigError: no 3×3 components, or not orthogonal to within 0.01; a negative or infinite deviation.
    """

    def __init__(self, components: Sequence[Sequence[float]], std: Sequence[float], alpha_std: float = 0.1):
        super().__init__()
        self.components, self.std = tuple(map(tuple, components)), tuple(std)
        self.alpha_std = alpha_std
        if len(self.std) != 3 or [len(row) for row in self.components] != [3, 3, 3]:
            raise ConfigError("PCA colour needs components of three rows of three numbers, and three numbers in std.")
        for name, values in (("std", self.std), ("alpha_std", (alpha_std,))):
            if not all(0 <= value < math.inf for value in values):
                raise ConfigError(f"PCA colour {name}={', '.join(map(str, values))} is not possible: it is 0 or more.")
        rows = torch.tensor(self.components, dtype=torch.float64)
        if not torch.allclose(rows @ rows.T, torch.eye(3, dtype=torch.float64), atol=0.01):
            raise ConfigError("PCA colour components are not orthogonal rows of length 1: take what color_pca printed.")

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` on the 0–255 scale in, a new float32 tensor of the same shape and scale out."""
        steps = color_steps(self.components, self.std, images.device)
        alphas = self.alpha_std * torch.randn(len(images), 3, 1, device=images.device)
        colors = (alphas * steps).sum(1)  # not a matrix product: some devices would round its factors
        return images.float() + colors.view(-1, 3, 1, 1)

    def extra_repr(self) -> str:
        return f"std={self.std}, alpha_std={self.alpha_std}"


@lru_cache
def color_steps(components: tuple[tuple[float, ...], ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """``(3, 3)`` float32: a row for each component, times its standard deviation in grey levels. Cached, as above."""
    rows, deviations = (torch.tensor(values, dtype=torch.float64) for values in (components, std))
    return (rows * deviations[:, None] * 255).float().to(device)


class Compose(nn.Module):
    """Transforms one after the other, each under a name that the command line can reach: ``augment.color.alpha_std``.

    Args:
        **transforms: in the order they are applied; null leaves one out (``augment.color=null``).

    Raises:
        ConfigError: a step that is no transform.
    """

    def __init__(self, **transforms: nn.Module | None):
        super().__init__()
        for name, transform in transforms.items():
            if transform is not None and not isinstance(transform, nn.Module):
                raise ConfigError(f"augment.{name}={transform} is no transform: it needs a _target_, or null.")
        self.transforms = nn.ModuleDict({name: step for name, step in transforms.items() if step is not None})

    def forward(self, images: Tensor) -> Tensor:
        for transform in self.transforms.values():
            images = transform(images)
        return images


def central_view(images: Tensor) -> Tensor:
    """``(N, 3, S, S)`` as it is; of the ten views ``(10, N, 3, S, S)`` of a test the one of the centre."""
    return images[CENTRE] if images.ndim == 5 else images


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised ``(N, C, H, W)`` images back as uint8 on the CPU: exactly what they were, from float32."""
    m, s = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    return images.float().mul(s).add_(m).mul_(255).round_().clamp_(0, 255).to(torch.uint8).cpu()
