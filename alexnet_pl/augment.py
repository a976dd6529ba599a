"""Transforms of whole batches, on the device the batch is on."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_pl.errors import ConfigError


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images / 255 - mean) / std`` in float32.

    Args:
        images: ``(N, C, H, W)`` uint8.
        mean, std: one number a channel, in units of the [0, 1] pixel scale.
    """
    scale, shift = scale_and_shift(tuple(mean), tuple(std), images.device)
    return images.float().mul_(scale).add_(shift)


@lru_cache
def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What :func:`normalize` multiplies by and what it adds then, each ``(1, C, 1, 1)`` float32.

    Cached, because a copy to the device in every step would stall it.
    """
    m, s = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return (1 / (255 * s)).float().to(device), (-m / s).float().to(device)


def ten_views(images: Tensor, size: int) -> Tensor:
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
    """Zero-pad, cut back to the old size at a random place, mirror half of the images. Each image draws for itself.

    Args:
        padding: pixels added on every side, at least 0.

    Raises:
        ConfigError: negative padding.
    """

    def __init__(self, padding: int):
        super().__init__()
        if padding < 0:
            raise ConfigError(f"augment.padding={padding} is negative; it is 0 or more pixels.")
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` in, a new tensor of the same shape and dtype out."""
        count, channels, height, width = images.shape
        device, room = images.device, 2 * self.padding + 1
        rows = torch.randint(room, (count, 1), device=device) + torch.arange(height, device=device)
        columns = torch.randint(room, (count, 1), device=device) + torch.arange(width, device=device)
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, [self.padding] * 4)
        down = padded.gather(2, rows.view(count, 1, height, 1).expand(-1, channels, -1, padded.shape[3]))
        return down.gather(3, columns.view(count, 1, 1, width).expand(-1, channels, height, -1))

    def extra_repr(self) -> str:
        return f"padding={self.padding}"
