"""AlexNetModern: five convolutional and three fully connected layers with today's ingredients, for 32×32 pixels."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import count, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_pl.models.checks import check_image_size, check_whole, check_widths
from alexnet_pl.models.layers import (
    ActivationFactory,
    LocalResponseNorm,
    NonOverlappingMaxPool2d,
    NormFactory,
    PoolFactory,
    SpatialResponseNorm,
    conv_block,
    pooled_size,
)
from alexnet_pl.runtime.errors import invalid_value

KEEPS_MEAN = (nn.Identity, LocalResponseNorm, SpatialResponseNorm, nn.LocalResponseNorm, nn.RMSNorm)
"""Norm layers that do not subtract a mean, so that a bias before them is not in vain."""


class AlexNetModern(nn.Module):
    """AlexNet's five convolutions and three fully connected layers, with 3×3 kernels and a norm layer in every block.

    The layers have AlexNet's names, ``features.conv1`` … ``classifier.fc8``, and nothing skips a layer. Pooling halves
    the feature maps after conv1, conv2 and conv5, as in AlexNet. A whitening layer in front
    (:class:`Whitening`) is fitted to the training images and then fixed: preprocessing that is stored with the network.

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels, which sizes fc6; at least 16 with the defaults.
        channels: feature maps of conv1 … conv5.
        fc_width: units in fc6 and fc7.
        conv1_stride: 1, or more for larger images: 4 for 224 pixels leaves 6×6 feature maps at fc6.
        pool_after: numbers of the convolutions that are followed by pooling, in increasing order.
        pool_padding: 0, where 31 pixels become 15, 7 and 3, or 1, where they become 16, 8 and 4.
        whitening: side in pixels of the patches that are whitened, 2 or 3; 0 for no whitening.
        norm: factory of the norm layer in every block but the last, called with the number of channels or units.
        bias_before_norm: give the layers before a norm layer a bias. Without a norm layer, or before one that keeps the
            mean, such as LRN, they have one anyway.
        pool: factory of the pooling layers, called with the padding.
        activation: factory of the nonlinearity after every hidden layer.
        dropout: probability of dropping an output of fc6 and fc7, in [0, 1).

    Raises:
        ConfigError: a value is out of range, or the input too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        *,
        channels: Sequence[int] = (64, 256, 256, 256, 256),
        fc_width: int = 512,
        conv1_stride: int = 1,
        pool_after: Sequence[int] = (1, 2, 5),
        pool_padding: int = 0,
        whitening: int = 2,
        norm: NormFactory = nn.BatchNorm2d,
        bias_before_norm: bool = False,
        pool: PoolFactory = NonOverlappingMaxPool2d,
        activation: ActivationFactory = nn.GELU,
        dropout: float = 0.0,
    ):
        super().__init__()
        channels = check_widths("channels", channels, 5)
        for name, value in (("num_classes", num_classes), ("fc_width", fc_width), ("conv1_stride", conv1_stride)):
            check_whole(name, value)
        check_whole("pool_padding", pool_padding, lowest=0, highest=1)
        pool_after = list(pool_after)
        if not set(pool_after) <= {1, 2, 3, 4, 5} or pool_after != sorted(set(pool_after)):
            raise invalid_value("model.pool_after", pool_after, "numbers from 1 to 5 in increasing order")
        if whitening not in (0, 2, 3):
            raise invalid_value("model.whitening", whitening, "0, 2 or 3")
        if not 0 <= dropout < 1:
            raise invalid_value("model.dropout", dropout, "a probability in [0, 1)")

        sizing = (conv1_stride, pool_after, pool_padding, whitening)
        smallest = next(size for size in count(1) if feature_map_size(size, *sizing) >= 1)
        check_image_size("AlexNetModern", image_size, smallest)

        has_bias = bias_before_norm or isinstance(norm(channels[0]), KEEPS_MEAN)
        layers: list[tuple[str, nn.Module]] = []
        if whitening:
            layers += [("whitening", Whitening(whitening)), ("act0", activation())]
        widths = [2 * 3 * whitening**2 if whitening else 3, *channels]
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            stride = conv1_stride if index == 1 else 1
            conv = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=has_bias)
            layers += conv_block(
                index, conv, activation, norm=norm, norm_placement="before_activation",
                pool=pool if index in pool_after else None, pool_padding=pool_padding,
            )  # fmt: skip
        self.features = nn.Sequential(OrderedDict(layers))
        units = widths[-1] * feature_map_size(image_size, *sizing) ** 2
        self.classifier = nn.Sequential(
            OrderedDict(
                [
                    ("flatten", nn.Flatten()),
                    *_fc_block(6, units, fc_width, norm, has_bias, activation, dropout),
                    *_fc_block(7, fc_width, fc_width, norm, has_bias, activation, dropout),
                    ("fc8", nn.Linear(fc_width, num_classes)),
                ]
            )
        )

    @property
    def is_fitted(self) -> bool:
        """True if the whitening layer has been fitted, or its filters loaded; without one there is nothing to fit."""
        whitening = self.features[0]
        return not isinstance(whitening, Whitening) or whitening.is_fitted

    def fit_to_images(self, images: Iterable[Tensor]) -> None:
        """Fit the whitening layer, if there is one, to batches ``(N, 3, image_size, image_size)`` of training images.

        A run calls this once, before its first step, with normalized images that are not augmented.
        """
        if isinstance(whitening := self.features[0], Whitening):
            whitening.fit(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for normalized images ``(N, 3, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _fc_block(
    index: int, inputs: int, units: int, norm: NormFactory, bias: bool, activation: ActivationFactory, dropout: float
) -> list[tuple[str, nn.Module]]:
    return [
        (f"fc{index}", nn.Linear(inputs, units, bias=bias)),
        (f"norm{index}", PerUnit(norm(units))),
        (f"act{index}", activation()),
        (f"drop{index}", nn.Dropout(dropout)),
    ]


def feature_map_size(
    image_size: int, conv1_stride: int = 1, pool_after: Sequence[int] = (1, 2, 5), pool_padding: int = 0,
    whitening: int = 2,
) -> int:  # fmt: skip
    """Return the side in pixels of the feature maps that fc6 reads; below 1 if the image is too small."""
    size = (image_size - max(whitening - 1, 0) - 1) // conv1_stride + 1
    for _ in pool_after:
        size = pooled_size(size, padding=pool_padding) if size > 0 else 0
    return size


class PerUnit(nn.Module):
    """Apply a norm layer of feature maps to units, as maps of one pixel.

    Args:
        norm: takes ``(N, units, 1, 1)``.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, units: Tensor) -> Tensor:
        """Return the normalized ``(N, units)``."""
        normalized: Tensor = self.norm(units[:, :, None, None])
        return normalized.flatten(1)


class Whitening(nn.Module):
    """Project patches of an image onto their principal components, scaled to unit variance, with both signs.

    The filters are a buffer: stored with the network, and neither trained nor counted as parameters. Both signs are
    returned because an activation follows. Source: cifar10-airbench (Jordan 2024, section 3.3).

    Args:
        side: of the patches in pixels.
        epsilon: added to the variance of a component before the square root, which limits the gain of noise.
    """

    weight: Tensor

    def __init__(self, side: int, epsilon: float = 5e-4):
        super().__init__()
        self.side, self.epsilon = side, epsilon
        self.register_buffer("weight", self._identity())

    def _identity(self) -> Tensor:
        """Return the filters before the layer is fitted, which give the patches as they are."""
        return torch.eye(3 * self.side**2).view(-1, 3, self.side, self.side)

    @property
    def is_fitted(self) -> bool:
        """True if the filters are others than those of a new layer."""
        return not torch.equal(self.weight.cpu(), self._identity())

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> None:
        """Compute the filters from batches of images ``(N, 3, H, W)``, in float64.

        With second moments ``E[p p'] = V diag(variances) V'`` of the patches p, the filters are the columns of V
        divided by ``√(variance + epsilon)``, largest variance first. The sign of each makes its largest entry positive.
        """
        size, count = self.weight[0].numel(), 0
        moments = torch.zeros(size, size, dtype=torch.float64, device=self.weight.device)
        for batch in images:
            patches = batch.to(moments).unfold(2, self.side, 1).unfold(3, self.side, 1)
            patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, size)
            moments += patches.T @ patches
            count += len(patches)
        variances, columns = torch.linalg.eigh(moments / count)
        rows = (columns / (variances.clamp(min=0) + self.epsilon).sqrt()).T.flip(0)
        signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        self.weight.copy_((rows * signs).view_as(self.weight))

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(N, 6·side², H − side + 1, W − side + 1)``: each component, then their negatives."""
        # bfloat16 has too few digits: the components of the smallest variance would be off by 5 to 11%.
        kind = images.device.type
        is_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        is_bfloat16 = is_autocast and torch.get_autocast_dtype(kind) == torch.bfloat16
        with torch.autocast(kind, enabled=False) if is_bfloat16 else nullcontext():
            components = F.conv2d(images, self.weight.to(images.dtype))
        return torch.cat([components, -components], 1)

    def extra_repr(self) -> str:
        return f"side={self.side}, epsilon={self.epsilon}"
