"""Augmentation as the authors ran it: crops that many images share, and color noise that shrinks the pixels.

Both are in ``convdata.py`` of their code of 2012, where the text of the paper (section 4.1) leaves them open.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alexnet_pl.data.draws import Draws, draws_for
from alexnet_pl.data.transforms import BatchTransform, PCAColor, crop_images
from alexnet_pl.runtime.errors import ConfigError, invalid_value


class SharedCropFlip(BatchTransform):
    """Crop a random square and mirror it with probability 0.5, alike for consecutive images of a batch.

    :class:`RandomCropFlip` draws for each image, as the text of the paper suggests.

    Args:
        size: side of the crop in pixels, at least 1.
        shared_by: number of consecutive images with the same crop, at least 1; 32 in 2012.

    Raises:
        ConfigError: a value below 1. When called: images smaller than ``size``.
    """

    mirrors = takes_draws = True

    def __init__(self, size: int, shared_by: int = 32):
        super().__init__()
        for name, value in (("size", size), ("shared_by", shared_by)):
            if value < 1:
                raise invalid_value(f"augment.{name}", value, "1 or more")
        self.size, self.shared_by = size, shared_by

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return a new tensor of the same dtype, ``(N, C, size, size)``, for ``(N, C, H, W)``.

        The random numbers are those of the first image that shares them.
        """
        rooms = [side - self.size + 1 for side in images.shape[2:]]
        if min(rooms) < 1:
            raise ConfigError(
                f"augment size={self.size} is invalid: expected at most {images.shape[3]}×{images.shape[2]}, the size "
                f"of the images. Store them larger, with data.resize_size={self.size} or more."
            )
        first = torch.arange(len(images), device=images.device) // self.shared_by * self.shared_by
        top, left, mirrored = (each[first] for each in (draws or draws_for(images)).below(*rooms, 2))
        return crop_images(images, top, left, mirrored.bool(), (self.size, self.size))

    def extra_repr(self) -> str:
        return f"size={self.size}, shared_by={self.shared_by}"


class ShrinkingPCAColor(BatchTransform):
    """PCA color noise after which the distance to the mean color is divided by ``1 + alpha_std``.

    "This is so that the overall scale of the training data doesn't become too different from the test data", says
    ``convdata.py``. Test images are not divided, and training images no longer once the noise is off.

    Args:
        components, std, alpha_std: see :class:`PCAColor`.
        mean: color that stays as it is, on the [0, 1] pixel scale: the one that normalization subtracts.
        epochs: epochs with noise, from the first on; 67 or 68 in 2012, null for all.
    """

    takes_draws = True

    def __init__(
        self,
        components: Sequence[Sequence[float]],
        std: Sequence[float],
        mean: Sequence[float],
        alpha_std: float = 0.1,
        epochs: int | None = None,
    ):
        super().__init__()
        self.noise = PCAColor(components, std, alpha_std)
        self.mean, self.epochs = tuple(mean), epochs
        if len(self.mean) != 3:
            raise invalid_value("augment.color.mean", list(self.mean), "three numbers, one per channel")
        if epochs is not None and epochs < 0:
            raise invalid_value("augment.color.epochs", epochs, "0 or more epochs, or null")

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Return a new float32 tensor of the same shape and scale, or ``images`` after the last epoch with noise.

        Args:
            images: ``(N, 3, H, W)`` on the 0–255 scale.
            draws: the random numbers, which know the epoch.
        """
        draws = draws or draws_for(images)
        if self.epochs is not None and draws.epoch >= self.epochs:
            return images
        noisy: Tensor = self.noise(images, draws)
        scale = 1 + self.noise.alpha_std
        offset = torch.tensor(self.mean, dtype=torch.float32).mul(255 * (1 - 1 / scale)).view(3, 1, 1)
        return noisy.div_(scale).add_(offset.to(noisy.device, non_blocking=True))

    def extra_repr(self) -> str:
        return f"mean={self.mean}, epochs={self.epochs}"
