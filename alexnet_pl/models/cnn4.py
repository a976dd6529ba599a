"""CNN4, a four-layer convolutional network for figure 1 of the paper: a plain ``nn.Module``."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from alexnet_pl.models.checks import check_image_size, check_whole, check_widths
from alexnet_pl.models.layers import (
    ActivationFactory,
    BlockOptions,
    NormFactory,
    OverlappingMaxPool2d,
    PoolFactory,
    conv_block,
    pooled_size,
)


class CNN4(nn.Module):
    """Three 5×5 convolutions, each followed by pooling, and one fully connected layer.

    The paper describes its network only as "a four-layer convolutional neural network". This one has the geometry of
    cuda-convnet's ``layers-18pct`` for CIFAR-10 (32, 32 and 64 feature maps), without its response normalization and
    with max pooling throughout; the original averages after the second and third convolution. It has 89,578 parameters
    at 32×32 pixels and 10 classes. The factories are those of :class:`alexnet_pl.models.AlexNet`.

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels, at least 2.
        channels: feature maps of conv1, conv2 and conv3.

    Raises:
        ConfigError: a value is out of range or the input too small.
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
        channels = check_widths("channels", channels, 3)
        check_whole("num_classes", num_classes)
        check_image_size("CNN4", image_size, smallest=2)

        size, blocks = image_size, []
        for index, (before, after) in enumerate(zip([3, *channels], channels, strict=False), start=1):
            conv = nn.Conv2d(before, after, kernel_size=5, padding=2)
            # With padding 1 both poolings halve an even side.
            block: BlockOptions = {"norm": norm, "norm_placement": norm_placement, "pool": pool, "pool_padding": 1}
            blocks += conv_block(index, conv, activation, **block)
            size = pooled_size(size, padding=1)
        self.features = nn.Sequential(OrderedDict(blocks))
        self.classifier = nn.Sequential(
            OrderedDict(flatten=nn.Flatten(), fc4=nn.Linear(channels[-1] * size**2, num_classes))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for normalized images ``(N, 3, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
