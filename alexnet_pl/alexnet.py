"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in the geometry of the CIFAR-10 tutorial: a plain ``nn.Module``."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from torch import Tensor, nn

from alexnet_pl.errors import ConfigError
from alexnet_pl.layers import (
    ActivationFactory,
    LocalResponseNorm,
    NormFactory,
    OverlappingMaxPool2d,
    PoolFactory,
    check_sizes,
    conv_block,
    pooled_size,
)


class AlexNet(nn.Module):
    """Five convolutional and three fully connected layers.

    The layers carry the paper's names (``features.conv1`` … ``features.conv5``, ``classifier.fc6`` … ``fc8``), so a
    checkpoint reads like the paper. Normalisation follows conv1 and conv2 only.

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels; it sizes fc6. At least 47.
        channels: feature maps of conv1 … conv5.
        fc_width: units in fc6 and fc7.
        norm: makes the normalisation of blocks 1 and 2 from their number of channels.
        norm_placement: ``after_activation`` (the paper) or ``before_activation`` (the tutorial).
        bias_before_norm: whether conv1 and conv2 have a bias. The tutorial drops it before BatchNorm, which
            subtracts it again.
        pool: makes a pooling from its padding.
        activation: makes the non-linearity after every hidden layer.
        dropout: probability of dropping an **input** of fc6 and fc7, as the tutorial and torchvision do.

    Raises:
        ConfigError: a value out of range, or an input too small for the five stages of downsampling.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 50,
        *,
        channels: Sequence[int] = (96, 256, 384, 384, 256),
        fc_width: int = 4096,
        norm: NormFactory = LocalResponseNorm,
        norm_placement: str = "after_activation",
        bias_before_norm: bool = True,
        pool: PoolFactory = OverlappingMaxPool2d,
        activation: ActivationFactory = nn.ReLU,
        dropout: float = 0.5,
    ):
        super().__init__()
        channels = list(channels)
        if len(channels) != 5:
            raise ConfigError(f"AlexNet channels={channels} names {len(channels)} convolutions; it has 5.")
        smallest = next(size for size in count(1) if min(feature_map_sizes(size)) >= 1)
        check_sizes("AlexNet", image_size, smallest, num_classes=num_classes, channels=channels, fc_width=fc_width)
        if not 0 <= dropout < 1:
            raise ConfigError(f"AlexNet dropout={dropout} is not a probability in [0, 1).")

        c1, c2, c3, c4, c5 = channels
        normed = {"norm": norm, "norm_placement": norm_placement, "pool": pool}
        self.features = nn.Sequential(
            OrderedDict(
                [
                    *conv_block(
                        1,
                        nn.Conv2d(3, c1, kernel_size=11, stride=4, padding=2, bias=bias_before_norm),
                        activation,
                        **normed,
                    ),
                    *conv_block(
                        2,
                        nn.Conv2d(c1, c2, kernel_size=5, padding=2, bias=bias_before_norm),
                        activation,
                        **normed,
                        pool_padding=1,  # the tutorial's: without it a 50×50 input has nothing left for pool5
                    ),
                    *conv_block(3, nn.Conv2d(c2, c3, kernel_size=3, padding=1), activation),
                    *conv_block(4, nn.Conv2d(c3, c4, kernel_size=3, padding=1), activation),
                    *conv_block(
                        5,
                        nn.Conv2d(c4, c5, kernel_size=3, padding=1),
                        activation,
                        norm_placement=norm_placement,
                        pool=pool,
                    ),
                ]
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                drop6=nn.Dropout(dropout),
                fc6=nn.Linear(c5 * feature_map_sizes(image_size)[-1] ** 2, fc_width),
                act6=activation(),
                drop7=nn.Dropout(dropout),
                fc7=nn.Linear(fc_width, fc_width),
                act7=activation(),
                fc8=nn.Linear(fc_width, num_classes),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of normalised images ``(N, 3, image_size, image_size)``."""
        return self.classifier(self.features(images))


def feature_map_sizes(image_size: int) -> list[int]:
    """Side in pixels after conv1, pool1, pool2 and pool5; below 1 from the first layer that cannot work.

    conv2 to conv5 keep the size. ``feature_map_sizes(50) == [11, 5, 3, 1]``.
    """
    conv1 = (image_size + 2 * 2 - 11) // 4 + 1
    pool1 = pooled_size(conv1)
    pool2 = pooled_size(pool1, padding=1)
    return [conv1, pool1, pool2, pooled_size(pool2)]
