"""A convolutional network of four layers, for figure 1 of the paper: a plain ``nn.Module``."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from alexnet_pl.models.layers import (
    ActivationFactory,
    NormFactory,
    OverlappingMaxPool2d,
    PoolFactory,
    check_sizes,
    conv_block,
    pooled_size,
)
from alexnet_pl.runtime.errors import ConfigError


class CNN4(nn.Module):
    """Three convolutional layers of 5×5, each pooled, and one fully connected layer.

    The paper says of its network no more than "a four-layer convolutional neural network". This has the geometry of
    cuda-convnet's ``layers-18pct`` for CIFAR-10 (32, 32 and 64 maps), without its response normalisation and with max
    pooling after all three convolutions, where theirs averages after the second and third. 89,578 parameters at 32×32
    and 10 classes. The factories are :class:`alexnet_pl.models.AlexNet`'s.

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels, at least 2.
        channels: feature maps of conv1, conv2 and conv3.

    Raises:
        ConfigError: a value out of range, or an input too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        *,
        channels: Sequence[int] = (32, 32, 64),
        norm: NormFactory = nn.Identity,
        norm_placement: str = "after_activation",
        pool: PoolFactory = OverlappingMaxPool2d,
        activation: ActivationFactory = nn.ReLU,
    ):
        super().__init__()
        channels = list(channels)
        if len(channels) != 3:
            raise ConfigError(f"CNN4 channels={channels} names {len(channels)} convolutions; it has 3.")
        check_sizes("CNN4", image_size, 2, num_classes=num_classes, channels=channels)

        size, blocks = image_size, []
        for index, (before, after) in enumerate(zip([3, *channels], channels, strict=False), start=1):
            conv = nn.Conv2d(before, after, kernel_size=5, padding=2)
            # Padding 1 makes either pooling halve an even map.
            normed = {"norm": norm, "norm_placement": norm_placement, "pool": pool, "pool_padding": 1}
            blocks += conv_block(index, conv, activation, **normed)
            size = pooled_size(size, padding=1)
        self.features = nn.Sequential(OrderedDict(blocks))
        self.classifier = nn.Sequential(
            OrderedDict(flatten=nn.Flatten(), fc4=nn.Linear(channels[-1] * size**2, num_classes))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of normalised images ``(N, 3, image_size, image_size)``."""
        return self.classifier(self.features(images))
