"""Augmentation and normalization of image batches, on the device that holds the batch.

Pixels stay on the 0–255 scale until :func:`normalize`: uint8 as stored, or floating point from a transform whose
result falls between gray levels.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_pl.data.draws import Draws, draws_for
from alexnet_pl.runtime.errors import ConfigError, invalid_value, one_line


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(images / 255 - mean) / std`` in float32.

    Args:
        images: ``(N, C, H, W)`` uint8, or floating point on the same 0–255 scale. Not modified.
        mean, std: one number per channel, on the [0, 1] pixel scale.
    """
    scale, shift = scale_and_shift(tuple(mean), tuple(std), images.device)
    scaled = images.float() * scale if images.is_floating_point() else images.float().mul_(scale)
    return scaled.add_(shift)


@lru_cache
def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factor and the offset that :func:`normalize` applies, each ``(1, C, 1, 1)`` float32.

    Cached, because a copy to the device in every step would stall it.
    """
    m, s = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return (1 / (255 * s)).float().to(device), (-m / s).float().to(device)


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Invert :func:`normalize`: return uint8 ``(N, C, H, W)`` on the CPU, exact for float32 input."""
    m, s = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    return images.float().mul(s).add_(m).mul_(255).round_().clamp_(0, 255).to(torch.uint8).cpu()


def center_crop(images: Tensor, size: int) -> Tensor:
    """Return the central ``(..., size, size)`` of images at least that large; odd margins round up and left."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


CENTER = 2
"""Index of :func:`center_crop`'s crop in :func:`ten_crop`."""


def ten_crop(images: Tensor, size: int) -> Tensor:
    """Return the paper's ten test crops: four corners, the center, and the mirror image of each.

    Args:
        images: ``(N, C, B, B)``, B at least ``size``. For 256 → 224, the corners start at (0, 0), (0, 32), (32, 0) and
            (32, 32) and the center at (16, 16), as in the paper.
        size: side of a crop in pixels.

    Returns:
        ``(10, N, C, size, size)``.
    """
    room = images.shape[-1] - size
    corners = [(0, 0), (0, room), (room // 2, room // 2), (room, 0), (room, room)]
    crops = [images[..., top : top + size, left : left + size] for top, left in corners]
    return torch.stack([*crops, *(crop.flip(-1) for crop in crops)])


VIEW_NAMES = {2: "mirror", 6: "shifted_mirror", 10: "ten_crop"}
"""Number of test views → their name, the suffix of the metrics that average over them."""

CENTERS = {2: 0, 6: 0, 10: CENTER}
"""Number of test views → index of the center crop among them."""

SHIFTED_MIRROR_WEIGHTS = (0.25, 0.25, 0.125, 0.125, 0.125, 0.125)
"""Weights of the six views: half of it for the center crop and its mirror image, half for the shifted ones."""


def make_views(images: Tensor, size: int, count: int) -> Tensor:
    """Return the views of each image whose predictions a test averages.

    Args:
        images: ``(N, C, B, B)``, B at least ``size``.
        size: side of a view in pixels, at least 2.
        count: 2 for the center crop and its mirror image, 6 for these two and both shifted by a pixel along the
            diagonal in either direction, with a reflected border (cifar10-airbench), 10 for :func:`ten_crop`.

    Returns:
        ``(count, N, C, size, size)``; ``CENTERS`` has the index of the center crop.
    """
    if count == 10:
        return ten_crop(images, size)
    center = center_crop(images, size)
    views = [center, center.flip(-1)]
    if count == 6:
        left = torch.arange(-1, size - 1, device=images.device).abs()  # 1, 0, 1, …: the border is reflected
        for order in (left, (size - 1 - left).flip(0)):
            shifted = center.index_select(-2, order).index_select(-1, order)
            views += [shifted, shifted.flip(-1)]
    return torch.stack(views)


def select_center_crop(images: Tensor) -> Tensor:
    """Return the center crop of a batch of views ``(V, N, 3, S, S)``, or an ``(N, 3, S, S)`` batch unchanged."""
    return images[CENTERS[len(images)]] if images.ndim == 5 else images


# --- augmentation ---------------------------------------------------------------------------------------------------


class BatchTransform(nn.Module):
    """Base class of transforms that take a whole batch ``(N, 3, H, W)`` and draw random numbers for each image.

    Deriving from it declares that property. The data modules apply every other transform image by image
    (:class:`PerImage`), because torchvision's draw once per call and would treat all images of a batch alike.

    Attributes:
        mirrors: it mirrors images, which two steps of a :class:`Compose` must not do.
        takes_draws: the transform is called with ``(images, draws)`` and takes its random numbers from the
            :class:`~alexnet_pl.data.draws.Draws`, which follow from the seed, the epoch and the images alone. Without
            ``draws`` they follow from torch's generator.
    """

    mirrors = False
    takes_draws = False


class PerImage(BatchTransform):
    """Apply a transform such as ``torchvision.transforms.v2.RandAugment`` to each image of a batch separately.

    The data modules and :class:`Compose` wrap transforms from elsewhere in this class. Torch's, NumPy's and Python's
    generators are seeded for each image and restored afterwards, so that a run repeats and resumes exactly.

    Args:
        transform: takes one image ``(3, H, W)``, uint8 or floating point on the 0–255 scale, and returns one on the
            same scale. All images of a batch must come out with the same shape.

    Raises:
        ConfigError: ``transform`` is not callable or mixes images, as mixup and cutmix do. When called: the transform
            fails, or its results are not color images of one size.
    """

    takes_draws = True

    def __init__(self, transform: Callable[[Tensor], Tensor]):
        super().__init__()
        if not callable(transform):
            raise ConfigError(f"augment={transform} is invalid: expected a transform with a _target_, or null.")
        self.transform = transform
        self.name = getattr(transform, "__name__", type(transform).__name__)
        if is_mixing(transform):
            raise ConfigError(
                f"augment={self.name} is invalid here: it mixes the images and labels of a batch, after all other "
                "steps. Set it as augment, or as the last step."
            )

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return ``(N, 3, h, w)``, a new tensor, for ``(N, 3, H, W)``."""
        if not len(images):
            return images
        seeds = (draws or draws_for(images)).seeds()
        results = []
        with _generators_restored(images.device):
            try:
                for image, seed in zip(images, seeds, strict=True):
                    _seed_generators(seed, images.device)
                    results.append(self.transform(image))
            except Exception as error:
                shape = "×".join(map(str, images.shape[1:]))
                raise ConfigError(f"augment={self.name} failed on a tensor of {shape}: {one_line(error)}") from error
        shapes = {tuple(result.shape) if isinstance(result, Tensor) else None for result in results}
        if len(shapes) > 1 or None in shapes or next(iter(shapes))[:-2] != (3,):
            raise ConfigError(f"augment={self.name} is invalid: expected one color image (3, h, w) of one size each.")
        return torch.stack(results)


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    """Restore Python's, NumPy's and torch's generators afterwards, the device's among them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _seed_generators(seed: int, device: torch.device) -> None:
    random.seed(seed)
    np.random.seed(seed)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # of the CPU alone, in a fifth of the time
    else:
        torch.manual_seed(seed)


def per_image(transform: Callable[[Tensor], Tensor] | None) -> nn.Module:
    """Return a module that draws random numbers for each image: ``transform`` itself, or wrapped in ``PerImage``."""
    if transform is None:
        return nn.Identity()
    return transform if isinstance(transform, BatchTransform | nn.Identity) else PerImage(transform)


def is_mixing(transform: object) -> bool:
    """Return True for torchvision's ``MixUp`` and ``CutMix``, which mix images of a batch and, alike, their labels."""
    return bool({"MixUp", "CutMix"} & {each.__name__ for each in type(transform).__mro__})


class Compose(BatchTransform):
    """Apply transforms one after another, each under a name for overrides, such as ``augment.color.alpha_std``.

    Because steps have names, the options of a list such as ``augment=[crop_flip,cutout]`` merge into one of these.

    Args:
        **transforms: in the order of application; null skips one (``augment.color=null``). Transforms from elsewhere
            are applied image by image (:class:`PerImage`). The last one may be torchvision's ``MixUp`` or ``CutMix``.

    Attributes:
        mixing: that one, or None. The data module applies it, because it changes the labels as well.

    Raises:
        ConfigError: a step is not a transform, or follows one that mixes; two steps mirror images.
    """

    takes_draws = True

    def __init__(self, **transforms: Callable[[Tensor], Tensor] | None):
        super().__init__()
        for name, transform in transforms.items():
            if transform is not None and not callable(transform):
                raise invalid_value(f"augment.{name}", transform, "a transform with a _target_, or null")
        steps = {name: step for name, step in transforms.items() if step is not None}
        mirroring = [name for name, step in steps.items() if getattr(step, "mirrors", False)]
        if len(mirroring) > 1:
            raise ConfigError(
                f"augment.{' and augment.'.join(mirroring)} both mirror images: expected one of them. Random crops "
                "without mirroring are augment=crop, as in augment=[crop,alternating_flip]."
            )
        self.mixing: Any = None
        if steps and is_mixing(next(reversed(steps.values()))):
            self.mixing = steps.popitem()[1]
        self.transforms = nn.ModuleDict({name: per_image(step) for name, step in steps.items()})

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        draws = draws or draws_for(images)
        for transform in self.transforms.values():
            images = apply_transform(transform, images, draws)
        return images


def apply_transform(transform: nn.Module, images: Tensor, draws: Draws | None) -> Tensor:
    """Return ``transform(images)``, with the random numbers if it takes them; without any it draws its own."""
    arguments = (images, draws) if getattr(transform, "takes_draws", False) else (images,)
    return cast(Tensor, transform(*arguments))


class RandomCropFlip(BatchTransform):
    """Crop a random square and mirror it with probability 0.5, independently for each image.

    ``padding`` alone pads with zeros and crops back to the original size, as is usual for CIFAR-10. ``size`` alone
    crops from a larger image, as in the paper (section 4.1): 224 of 256 pixels. Neither only mirrors.

    Args:
        padding: zeros added on every side before the crop, at least 0 pixels.
        size: side of the crop in pixels; null keeps the size of the input.
        flip: mirror half of the images.

    Raises:
        ConfigError: negative padding or a size below 1. When called: images smaller than ``size``.
    """

    takes_draws = True

    def __init__(self, padding: int = 0, size: int | None = None, flip: bool = True):
        super().__init__()
        if padding < 0:
            raise invalid_value("augment.padding", padding, "0 or more pixels")
        if size is not None and size < 1:
            raise invalid_value("augment.size", size, "1 or more pixels, or null")
        self.padding, self.size, self.flip = padding, size, flip
        self.mirrors = flip

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return a new tensor of the same dtype, ``(N, C, size, size)`` or ``(N, C, H, W)``, for ``(N, C, H, W)``."""
        height, width = (self.size or side for side in images.shape[2:])
        padded = F.pad(images, [self.padding] * 4)
        rooms = [padded.shape[2] - height + 1, padded.shape[3] - width + 1]
        if min(rooms) < 1:
            raise ConfigError(
                f"augment size={self.size} is invalid: expected at most {images.shape[3]}×{images.shape[2]}, the size "
                f"of the images. Store them larger, with data.resize_size={self.size} or more."
            )
        top, left, mirrored = (draws or draws_for(images)).below(*rooms, 2)
        return crop_images(padded, top, left, mirrored.bool() if self.flip else mirrored < 0, (height, width))

    def extra_repr(self) -> str:
        return f"padding={self.padding}, size={self.size}, flip={self.flip}"


def crop_images(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop each image, see :func:`crop_by_gather`, by what is fast on the device."""
    crop = crop_by_slicing if images.device.type == "cpu" else crop_by_gather
    return crop(images, top, left, mirrored, size)


def crop_by_gather(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop each image with two gathers, for a GPU.

    Args:
        images: ``(N, C, H, W)``.
        top, left: ``(N, 1)`` int64, first row and column of the crop.
        mirrored: ``(N, 1)`` bool.
        size: height and width of the crop.
    """
    count, channels, _, width = images.shape
    rows = top + torch.arange(size[0], device=images.device)
    columns = left + torch.arange(size[1], device=images.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    down = images.gather(2, rows.view(count, 1, size[0], 1).expand(-1, channels, -1, width))
    return down.gather(3, columns.view(count, 1, 1, size[1]).expand(-1, channels, size[0], -1))


def crop_by_slicing(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop as :func:`crop_by_gather` does, on a CPU, where a slice copies whole rows and a gather single pixels."""
    result = torch.empty(*images.shape[:2], *size, dtype=images.dtype)
    draws = zip(images, result, *(draw[:, 0].tolist() for draw in (top, left, mirrored)), strict=True)
    for image, target, first_row, first_column, mirror in draws:
        crop = image[:, first_row : first_row + size[0], first_column : first_column + size[1]]
        target.copy_(crop.flip(2) if mirror else crop)
    return result


class PCAColor(BatchTransform):
    """Add noise along the principal components of the RGB pixels: the paper's second augmentation (section 4.1).

    Each image gets one color offset for all its pixels: the sum of the three components, each times its standard
    deviation times a draw from N(0, ``alpha_std``). The paper's text says eigenvalues where the authors' code uses
    standard deviations. On 0–255 pixels the eigenvalues, their squares, would be thousands of gray levels.

    The result is floating point, neither rounded nor clamped. The third component moves a pixel by about one gray
    level, which rounding to uint8 would distort, and clamping would shift bright and dark pixels less than the others.
    :func:`normalize` accepts it unchanged.

    ``alexnet color_pca`` computes ``components`` and ``std`` from a training split.

    Args:
        components: three orthogonal unit rows, each a direction in (red, green, blue).
        std: standard deviation of the pixels along each component, on the [0, 1] pixel scale; 0 or more.
        alpha_std: standard deviation of the draws, 0 or more; 0.1 in the paper.

    Raises:
        ConfigError: the components are not 3×3, or not orthonormal to within 0.01; a deviation is negative or infinite.
    """

    takes_draws = True

    def __init__(self, components: Sequence[Sequence[float]], std: Sequence[float], alpha_std: float = 0.1):
        super().__init__()
        self.components, self.std = tuple(map(tuple, components)), tuple(std)
        self.alpha_std = alpha_std
        if len(self.std) != 3 or [len(row) for row in self.components] != [3, 3, 3]:
            raise ConfigError("PCA color needs components of three rows of three numbers, and three numbers in std.")
        for name, values in (("std", self.std), ("alpha_std", (alpha_std,))):
            if not all(0 <= value < math.inf for value in values):
                raise invalid_value(f"PCA color {name}", ", ".join(map(str, values)), "finite numbers, 0 or more")
        rows = torch.tensor(self.components, dtype=torch.float64)
        if not torch.allclose(rows @ rows.T, torch.eye(3, dtype=torch.float64), atol=0.01):
            raise ConfigError("PCA color components are not orthogonal unit rows. Use the output of color_pca.")

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return a new float32 tensor of the same shape and scale for ``(N, 3, H, W)`` on the 0–255 scale."""
        steps = color_steps(self.components, self.std, images.device)
        alphas = self.alpha_std * (draws or draws_for(images)).normal(3)
        colors = (alphas.unsqueeze(2) * steps).sum(1)  # not a matrix product, whose factors some devices would round
        return images.float() + colors.view(-1, 3, 1, 1)

    def extra_repr(self) -> str:
        return f"std={self.std}, alpha_std={self.alpha_std}"


@lru_cache
def color_steps(components: tuple[tuple[float, ...], ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``(3, 3)`` float32, each component times its standard deviation in gray levels.

    Cached, because a copy to the device in every step would stall it.
    """
    rows, deviations = (torch.tensor(values, dtype=torch.float64) for values in (components, std))
    return (rows * deviations[:, None] * 255).float().to(device)
