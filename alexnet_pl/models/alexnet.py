"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in its original and modern variants: a plain ``nn.Module``."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import Tensor, nn

from alexnet_pl.models.checks import check_choice, check_image_size, check_whole, check_widths
from alexnet_pl.models.layers import (
    ActivationFactory,
    BlockOptions,
    LocalResponseNorm,
    NormFactory,
    OverlappingMaxPool2d,
    PoolFactory,
    conv_block,
    pooled_size,
)
from alexnet_pl.runtime.errors import invalid_value

DROPOUT_PLACEMENTS = ("before_fc", "after_fc")

_BIASED = ("conv2", "conv4", "conv5", "fc6", "fc7")

_PAPER = {name: (0.01, 1.0 if name in _BIASED else 0.0) for name in
          ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")}  # fmt: skip

INITIALIZATIONS: dict[str, dict[str, tuple[float, float]]] = {
    "torch": {},
    "paper": _PAPER,
    "released_code": {**_PAPER, **{name: (0.03, _PAPER[name][1]) for name in ("conv3", "conv4", "conv5")}},
}
"""Initialization → layer → standard deviation of its weights and value of its biases; other layers keep torch's
initialization. ``paper`` is section 5; ``released_code`` has three times that standard deviation in conv3 to conv5."""


class AlexNet(nn.Module):
    """Five convolutional and three fully connected layers.

    Layers have the paper's names (``features.conv1`` … ``features.conv5``, ``classifier.fc6`` … ``fc8``), so a
    checkpoint reads like the paper. Only conv1 and conv2 are normalized. The defaults are the geometry of the CIFAR-10
    tutorial; the paper's is ``image_size=227, conv1_padding=0, pool2_padding=0, groups=2``
    (``conf/model/alexnet_paper.yaml``).

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels, which sizes fc6; at least 47, or 67 in the paper's geometry.
        channels: feature maps of conv1 … conv5.
        fc_width: units in fc6 and fc7.
        groups: groups of conv2, conv4 and conv5, which see only their own feature maps; the paper has 2, one per GPU.
        conv1_padding: zero padding of the input in pixels, 0 to 10. The paper's 55×55 feature maps need 227 pixels
            without padding or 224 with 2, because the authors' code rounded up and torch rounds down.
        pool2_padding: 1 (the tutorial) or 0 (the paper); with 0, nothing is left of a 50×50 input at pool5.
        norm: factory of the norm layers in blocks 1 and 2, called with the number of channels.
        norm_placement: ``after_activation`` (the paper) or ``before_activation`` (the tutorial).
        bias_before_norm: give conv1 and conv2 a bias. The tutorial omits it because BatchNorm subtracts it again.
        pool: factory of the pooling layers, called with the padding.
        activation: factory of the nonlinearity after every hidden layer.
        dropout: probability of dropping a unit, in [0, 1).
        dropout_placement: ``before_fc`` drops **inputs** of fc6 and fc7, as the tutorial and torchvision do;
            ``after_fc`` drops their activated **outputs**, as the paper does.
        initialization: a key of ``INITIALIZATIONS``: ``torch``, ``paper`` or ``released_code``.

    Raises:
        ConfigError: a value is out of range, groups do not divide the feature maps, or the input is too small for
            five stages of downsampling.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 50,
        *,
        channels: Sequence[int] = (96, 256, 384, 384, 256),
        fc_width: int = 4096,
        groups: int = 1,
        conv1_padding: int = 2,
        pool2_padding: int = 1,
        norm: NormFactory = LocalResponseNorm,
        norm_placement: str = "after_activation",
        bias_before_norm: bool = True,
        pool: PoolFactory = OverlappingMaxPool2d,
        activation: ActivationFactory = nn.ReLU,
        dropout: float = 0.5,
        dropout_placement: str = "before_fc",
        initialization: str = "torch",
    ):
        super().__init__()
        channels = check_widths("channels", channels, 5)
        check_whole("num_classes", num_classes)
        check_whole("fc_width", fc_width)
        check_whole("conv1_padding", conv1_padding, lowest=0, highest=10)
        check_whole("pool2_padding", pool2_padding, lowest=0, highest=1)
        paddings = (conv1_padding, pool2_padding)
        smallest = next(size for size in count(1) if min(feature_map_sizes(size, *paddings)) >= 1)
        check_image_size("AlexNet", image_size, smallest)
        check_groups(groups, channels)
        if not 0 <= dropout < 1:
            raise invalid_value("model.dropout", dropout, "a probability in [0, 1)")
        check_choice("dropout_placement", dropout_placement, DROPOUT_PLACEMENTS)
        check_choice("initialization", initialization, INITIALIZATIONS)

        c1, c2, c3, c4, c5 = channels
        block: BlockOptions = {"norm": norm, "norm_placement": norm_placement, "pool": pool}
        padded: BlockOptions = {**block, "pool_padding": pool2_padding}
        self.features = nn.Sequential(
            OrderedDict(
                [
                    *conv_block(
                        1,
                        nn.Conv2d(3, c1, kernel_size=11, stride=4, padding=conv1_padding, bias=bias_before_norm),
                        activation,
                        **block,
                    ),
                    *conv_block(
                        2,
                        nn.Conv2d(c1, c2, kernel_size=5, padding=2, groups=groups, bias=bias_before_norm),
                        activation,
                        **padded,
                    ),
                    *conv_block(3, nn.Conv2d(c2, c3, kernel_size=3, padding=1), activation),
                    *conv_block(4, nn.Conv2d(c3, c4, kernel_size=3, padding=1, groups=groups), activation),
                    *conv_block(
                        5,
                        nn.Conv2d(c4, c5, kernel_size=3, padding=1, groups=groups),
                        activation,
                        norm_placement=norm_placement,
                        pool=pool,
                    ),
                ]
            )
        )
        layers = [
            ("flatten", nn.Flatten()),
            *_fc_block(6, c5 * feature_map_sizes(image_size, *paddings)[-1] ** 2, fc_width, activation, dropout),
            *_fc_block(7, fc_width, fc_width, activation, dropout),
            ("fc8", nn.Linear(fc_width, num_classes)),
        ]
        if dropout_placement == "before_fc":
            order = ("flatten", "drop6", "fc6", "act6", "drop7", "fc7", "act7", "fc8")
        else:
            order = ("flatten", "fc6", "act6", "drop6", "fc7", "act7", "drop7", "fc8")
        self.classifier = nn.Sequential(OrderedDict(sorted(layers, key=lambda layer: order.index(layer[0]))))
        initialize(self, INITIALIZATIONS[initialization])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for normalized images ``(N, 3, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _fc_block(
    index: int, inputs: int, units: int, activation: ActivationFactory, dropout: float
) -> list[tuple[str, nn.Module]]:
    return [
        (f"fc{index}", nn.Linear(inputs, units)),
        (f"act{index}", activation()),
        (f"drop{index}", nn.Dropout(dropout)),
    ]


def initialize(net: AlexNet, constants: Mapping[str, tuple[float, float]]) -> None:
    """Draw weights from N(0, std²) and set biases, in the layers that ``constants`` names.

    Args:
        net: changed in place.
        constants: layer → standard deviation of the weights, value of the biases, as in ``INITIALIZATIONS["paper"]``.
    """
    layers = dict([*net.features.named_children(), *net.classifier.named_children()])
    with torch.no_grad():
        for name, (std, value) in constants.items():
            weight, bias = layers[name].get_parameter("weight"), layers[name].bias
            weight.normal_(0, std)
            if isinstance(bias, Tensor):
                bias.fill_(value)


def feature_map_sizes(image_size: int, conv1_padding: int = 2, pool2_padding: int = 1) -> list[int]:
    """Return the side in pixels after conv1, pool1, pool2 and pool5; below 1 from the first impossible layer on.

    Convolutions 2 to 5 keep the size. ``feature_map_sizes(50) == [11, 5, 3, 1]``, and the paper's are
    ``feature_map_sizes(227, 0, 0) == feature_map_sizes(224, 2, 0) == [55, 27, 13, 6]``.
    """
    conv1 = (image_size + 2 * conv1_padding - 11) // 4 + 1
    pool1 = pooled_size(conv1)
    pool2 = pooled_size(pool1, padding=pool2_padding)
    return [conv1, pool1, pool2, pooled_size(pool2)]


def check_groups(groups: int, channels: Sequence[int]) -> None:
    """Check that ``groups`` divides the input and output feature maps of conv2, conv4 and conv5.

    Raises:
        ConfigError: names the first convolution that it does not divide.
    """
    check_whole("groups", groups)
    c1, c2, c3, c4, c5 = channels
    for name, maps in (("conv2", (c1, c2)), ("conv4", (c3, c4)), ("conv5", (c4, c5))):
        if odd := [number for number in maps if number % groups]:
            expected = f"a divisor of the {odd[0]} feature maps at {name} (model.channels={list(channels)})"
            raise invalid_value("model.groups", groups, expected)


# --- torchvision ----------------------------------------------------------------------------------------------------

TORCHVISION_LAYERS = {
    "features.0": "features.conv1",
    "features.3": "features.conv2",
    "features.6": "features.conv3",
    "features.8": "features.conv4",
    "features.10": "features.conv5",
    "classifier.1": "classifier.fc6",
    "classifier.4": "classifier.fc7",
    "classifier.6": "classifier.fc8",
}
"""Layer of ``torchvision.models.alexnet`` → the same layer in ``conf/model/alexnet_torchvision.yaml``."""


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of ``torchvision.models.alexnet`` with this network's names; other names stay unchanged."""
    renamed = {}
    for name, value in state_dict.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{TORCHVISION_LAYERS.get(layer, layer)}.{kind}"] = value
    return renamed
