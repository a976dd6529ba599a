"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) as it was and as it is built today: a plain ``nn.Module``."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import Tensor, nn

from alexnet_pl.models.layers import (
    ActivationFactory,
    LocalResponseNorm,
    NormFactory,
    OverlappingMaxPool2d,
    PoolFactory,
    check_sizes,
    conv_block,
    pooled_size,
)
from alexnet_pl.runtime.errors import ConfigError, did_you_mean

DROPOUT_PLACEMENTS = ("before_fc", "after_fc")

_BIASED = ("conv2", "conv4", "conv5", "fc6", "fc7")

_PAPER = {name: (0.01, 1.0 if name in _BIASED else 0.0) for name in
          ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")}  # fmt: skip

INITIALIZATIONS: dict[str, dict[str, tuple[float, float]]] = {
    "torch": {},
    "paper": _PAPER,
    "released_code": {**_PAPER, **{name: (0.03, _PAPER[name][1]) for name in ("conv3", "conv4", "conv5")}},
}
"""By name: the standard deviation of a layer's normal weights and the constant of its biases. What is not named keeps
torch's own. ``paper`` is section 5's; in ``released_code`` conv3 to conv5 have three times that deviation."""


class AlexNet(nn.Module):
    """Five convolutional and three fully connected layers.

    The layers carry the paper's names (``features.conv1`` … ``features.conv5``, ``classifier.fc6`` … ``fc8``), so a
    checkpoint reads like the paper. Normalisation follows conv1 and conv2 only. The defaults are the geometry of the
    CIFAR-10 tutorial; the paper's is ``image_size=227, conv1_padding=0, pool2_padding=0, groups=2``
    (``conf/model/alexnet_paper.yaml``).

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels; it sizes fc6. At least 47, or 67 in the paper's geometry.
        channels: feature maps of conv1 … conv5.
        fc_width: units in fc6 and fc7.
        groups: parts that conv2, conv4 and conv5 are cut into, each seeing its own maps alone: 2 in the paper, for its
            two GPUs.
        conv1_padding: pixels of zeros around the input. The paper's 55×55 maps need 227 pixels without padding or 224
            with 2: the authors' code rounded up where torch rounds down.
        pool2_padding: 1 is the tutorial's; without it a 50×50 input has nothing left for pool5.
        norm: makes the normalisation of blocks 1 and 2 from their number of channels.
        norm_placement: ``after_activation`` (the paper) or ``before_activation`` (the tutorial).
        bias_before_norm: whether conv1 and conv2 have a bias. The tutorial drops it before BatchNorm, which
            subtracts it again.
        pool: makes a pooling from its padding.
        activation: makes the non-linearity after every hidden layer.
        dropout: probability of dropping a unit.
        dropout_placement: ``before_fc`` drops **inputs** of fc6 and fc7, as the tutorial and torchvision do;
            ``after_fc`` their activated **outputs**, as the paper does.
        initialization: ``torch``, or one of ``INITIALIZATIONS``: ``paper``, ``released_code``.

    Raises:
        ConfigError: a value out of range, groups that do not divide the maps, an input too small for the five stages of
            downsampling.
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
        channels = list(channels)
        if len(channels) != 5:
            raise ConfigError(f"AlexNet channels={channels} names {len(channels)} convolutions; it has 5.")
        check_paddings(conv1_padding, pool2_padding)
        paddings = (conv1_padding, pool2_padding)
        smallest = next(size for size in count(1) if min(feature_map_sizes(size, *paddings)) >= 1)
        widths = {"num_classes": num_classes, "channels": channels, "fc_width": fc_width, "groups": groups}
        check_sizes("AlexNet", image_size, smallest, **widths)
        check_groups(groups, channels)
        if not 0 <= dropout < 1:
            raise ConfigError(f"AlexNet dropout={dropout} is not a probability in [0, 1).")
        if dropout_placement not in DROPOUT_PLACEMENTS:
            raise ConfigError(
                f"dropout_placement={dropout_placement} does not exist; it is {' or '.join(DROPOUT_PLACEMENTS)}."
            )
        if initialization not in INITIALIZATIONS:
            raise ConfigError(
                f"initialization={initialization} does not exist.{did_you_mean(initialization, INITIALIZATIONS)}"
            )

        c1, c2, c3, c4, c5 = channels
        normed = {"norm": norm, "norm_placement": norm_placement, "pool": pool}
        self.features = nn.Sequential(
            OrderedDict(
                [
                    *conv_block(
                        1,
                        nn.Conv2d(3, c1, kernel_size=11, stride=4, padding=conv1_padding, bias=bias_before_norm),
                        activation,
                        **normed,
                    ),
                    *conv_block(
                        2,
                        nn.Conv2d(c1, c2, kernel_size=5, padding=2, groups=groups, bias=bias_before_norm),
                        activation,
                        **normed,
                        pool_padding=pool2_padding,
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
        """Logits ``(N, num_classes)`` of normalised images ``(N, 3, image_size, image_size)``."""
        return self.classifier(self.features(images))


def _fc_block(
    index: int, inputs: int, units: int, activation: ActivationFactory, dropout: float
) -> list[tuple[str, nn.Module]]:
    return [
        (f"fc{index}", nn.Linear(inputs, units)),
        (f"act{index}", activation()),
        (f"drop{index}", nn.Dropout(dropout)),
    ]


def initialize(net: AlexNet, constants: Mapping[str, tuple[float, float]]) -> None:
    """Draw the weights of the layers that ``constants`` names from N(0, deviation) and set their biases.

    Args:
        constants: layer → deviation of the weights, value of the biases; such as ``INITIALIZATIONS["paper"]``.
    """
    layers = dict([*net.features.named_children(), *net.classifier.named_children()])
    with torch.no_grad():
        for name, (deviation, bias) in constants.items():
            layers[name].weight.normal_(0, deviation)
            if layers[name].bias is not None:
                layers[name].bias.fill_(bias)


def feature_map_sizes(image_size: int, conv1_padding: int = 2, pool2_padding: int = 1) -> list[int]:
    """Side in pixels after conv1, pool1, pool2 and pool5; below 1 from the first layer that cannot work.

    conv2 to conv5 keep the size. ``feature_map_sizes(50) == [11, 5, 3, 1]``, and the paper's are
    ``feature_map_sizes(227, 0, 0) == feature_map_sizes(224, 2, 0) == [55, 27, 13, 6]``.
    """
    conv1 = (image_size + 2 * conv1_padding - 11) // 4 + 1
    pool1 = pooled_size(conv1)
    pool2 = pooled_size(pool1, padding=pool2_padding)
    return [conv1, pool1, pool2, pooled_size(pool2)]


def check_paddings(conv1_padding: int, pool2_padding: int) -> None:
    """Refuse a padding that the layers cannot have.

    Raises:
        ConfigError: with the value and what is allowed.
    """
    if conv1_padding not in range(11):
        raise ConfigError(f"conv1_padding={conv1_padding} is not possible; it is 0 to 10 pixels, 0 or 2 in the paper.")
    if pool2_padding not in (0, 1):
        raise ConfigError(f"pool2_padding={pool2_padding} is not possible; it is 0 (the paper) or 1 (the tutorial).")


def check_groups(groups: int, channels: Sequence[int]) -> None:
    """Refuse groups that do not divide the maps on both sides of conv2, conv4 and conv5.

    Raises:
        ConfigError: with the first number that is not divided.
    """
    c1, c2, c3, c4, c5 = channels
    for name, maps in (("conv2", (c1, c2)), ("conv4", (c3, c4)), ("conv5", (c4, c5))):
        if odd := [number for number in maps if number % groups]:
            raise ConfigError(f"groups={groups} does not divide the {odd[0]} maps of channels={channels} at {name}.")


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
"""What ``torchvision.models.alexnet`` calls the layers of ``conf/model/alexnet_torchvision.yaml``."""


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ``torchvision.models.alexnet`` under this network's names; other names stay as they are."""
    renamed = {}
    for name, value in state_dict.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{TORCHVISION_LAYERS.get(layer, layer)}.{kind}"] = value
    return renamed
