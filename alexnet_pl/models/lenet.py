"""LeNet-5, the baseline of the CIFAR-10 tutorial: a plain ``nn.Module``."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from torch import Tensor, nn

from alexnet_pl.models.checks import check_image_size, check_whole, check_widths
from alexnet_pl.models.layers import (
    ActivationFactory,
    BlockOptions,
    NonOverlappingMaxPool2d,
    NormFactory,
    PoolFactory,
    conv_block,
    pooled_size,
)


class LeNet5(nn.Module):
    """Two convolutional and three fully connected layers (LeCun et al. 1998), three input channels.

    This is the modern version: conv2 sees all feature maps, pooling takes maxima, the output is linear. It has 62,006
    parameters at 32×32 pixels and 10 classes. The factories and ``norm_placement`` are those of
    :class:`alexnet_pl.models.AlexNet`.

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels, at least 13.
        channels: feature maps of conv1 and conv2.
        fc_widths: units in fc3 and fc4.

    Raises:
        ConfigError: a value is out of range or the input too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        *,
        channels: Sequence[int] = (6, 16),
        fc_widths: Sequence[int] = (120, 84),
        norm: NormFactory = nn.Identity,
        norm_placement: str = "before_activation",
        pool: PoolFactory = NonOverlappingMaxPool2d,
        activation: ActivationFactory = nn.ReLU,
    ):
        super().__init__()
        c1, c2 = check_widths("channels", channels, 2)
        f3, f4 = check_widths("fc_widths", fc_widths, 2)
        check_whole("num_classes", num_classes)
        smallest = next(size for size in count(1) if min(feature_map_sizes(size)) >= 1)
        check_image_size("LeNet5", image_size, smallest)

        # With padding 1 both poolings halve an even side, as LeNet-5's 2×2 subsampling does.
        block: BlockOptions = {"norm": norm, "norm_placement": norm_placement, "pool": pool, "pool_padding": 1}
        self.features = nn.Sequential(
            OrderedDict(
                [
                    *conv_block(1, nn.Conv2d(3, c1, kernel_size=5), activation, **block),
                    *conv_block(2, nn.Conv2d(c1, c2, kernel_size=5), activation, **block),
                ]
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                fc3=nn.Linear(c2 * feature_map_sizes(image_size)[-1] ** 2, f3),
                act3=activation(),
                fc4=nn.Linear(f3, f4),
                act4=activation(),
                fc5=nn.Linear(f4, num_classes),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for normalized images ``(N, 3, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def feature_map_sizes(image_size: int) -> list[int]:
    """Return the side in pixels after conv1, pool1, conv2 and pool2: ``[28, 14, 10, 5]`` for 32."""
    conv1 = image_size - 4
    pool1 = pooled_size(conv1, padding=1)
    conv2 = pool1 - 4
    return [conv1, pool1, conv2, pooled_size(conv2, padding=1)]
