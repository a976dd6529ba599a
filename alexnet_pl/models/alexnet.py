"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in its original and modern variants: a plain ``nn.Module``."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from alexnet_pl.models.checks import check_choice, check_image_size, check_whole, check_widths
from alexnet_pl.models.layers import (
    NORM_PLACEMENTS,
    ActivationFactory,
    LocalResponseNorm,
    NormFactory,
    OverlappingMaxPool2d,
    PoolFactory,
    UnscaledDropout,
    conv_block,
    pooled_size,
)
from alexnet_pl.runtime.errors import invalid_value

DROPOUT_PLACEMENTS = ("before_fc", "after_fc")

DROPOUTS: dict[str, type[nn.Dropout]] = {"training": nn.Dropout, "evaluation": UnscaledDropout}
"""``dropout_scaling`` → layer: kept units are doubled in training (torch), or all halved in evaluation (paper)."""

GROUPED = ("conv2", "conv4", "conv5")
"""Layers that ``groups`` splits; conv3 reads both towers."""

MIDDLE_LAYERS = ("conv3", "conv4", "conv5")
"""Layers that ``without`` may leave out (paper, section 7)."""

PLACEMENTS = {
    **{name: (name, name) for name in NORM_PLACEMENTS},
    "released_code": ("before_activation", "after_activation"),
}
"""``norm_placement`` → placement in block 1 and in block 2."""

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
    checkpoint reads like the paper. The defaults are the geometry of the CIFAR-10 tutorial; the paper's is
    ``image_size=227, conv1_padding=0, pool2_padding=0, groups=2`` (``conf/model/alexnet_paper.yaml``), and the network
    that the authors ran is ``conf/model/alexnet_2012.yaml``.

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels, which sizes fc6; at least 47, or 67 in the paper's geometry.
        channels: feature maps of conv1 … conv5.
        fc_width: units in fc6 and fc7.
        groups: groups of conv2, conv4 and conv5, which see only their own feature maps; the paper has 2, one per GPU.
        half: halve the feature maps of conv1 … conv4: the "one half net" that section 3.2 compares with two groups.
            conv5, fc6 and fc7 keep their width, as its footnote and the authors' ``layers-145-half.cfg`` say.
        without: ``conv3``, ``conv4`` or ``conv5`` to leave out with its activation (paper, section 7). The next layer
            reads the feature maps of the one before; pool5 stays.
        conv1_padding: zero padding of the input in pixels, 0 to 10. The paper's 55×55 feature maps need 227 pixels
            without padding or 224 with 2, because the authors' code rounded up and torch rounds down.
        conv1_round_up: round up as the authors' code: conv1 counts a last window that is partly outside the image. 224
            pixels without padding then give 55×55 feature maps, for which the poolings fit exactly.
        pool2_padding: 1 (the tutorial) or 0 (the paper); with 0, nothing is left of a 50×50 input at pool5.
        norm: factory of the norm layers, called with the number of channels.
        norm_blocks: numbers of the convolutions with a norm layer; 1 and 2 in the paper.
        norm_placement: ``after_activation`` (the paper's text), ``before_activation`` (the tutorial), or
            ``released_code``, what the authors ran: convolution → norm → pool → activation in block 1, as in the text
            in block 2.
        cnorm2: factory of a second norm layer in block 2, after the first; None has none. The authors ran one that the
            text omits.
        bias_before_norm: give convolutions with a norm layer a bias. The tutorial omits it because BatchNorm subtracts
            it again.
        pool: factory of the pooling layers, called with the padding.
        activation: factory of the nonlinearity after every hidden layer.
        dropout: probability of dropping a unit, in [0, 1).
        dropout_placement: ``before_fc`` drops **inputs** of fc6 and fc7, as the tutorial and torchvision do;
            ``after_fc`` drops their activated **outputs**, as the paper does.
        dropout_scaling: ``training`` divides kept units by 1 − ``dropout``, torch's way; ``evaluation`` multiplies all
            units by it in evaluation instead, as the paper does.
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
        half: bool = False,
        without: Literal["conv3", "conv4", "conv5"] | None = None,
        conv1_padding: int = 2,
        conv1_round_up: bool = False,
        pool2_padding: int = 1,
        norm: NormFactory = LocalResponseNorm,
        norm_blocks: Sequence[int] = (1, 2),
        norm_placement: str = "after_activation",
        cnorm2: NormFactory | None = None,
        bias_before_norm: bool = True,
        pool: PoolFactory = OverlappingMaxPool2d,
        activation: ActivationFactory = nn.ReLU,
        dropout: float = 0.5,
        dropout_placement: str = "before_fc",
        dropout_scaling: Literal["training", "evaluation"] = "training",
        initialization: str = "torch",
    ):
        super().__init__()
        channels = check_widths("channels", channels, 5)
        check_whole("num_classes", num_classes)
        check_whole("fc_width", fc_width)
        check_whole("conv1_padding", conv1_padding, lowest=0, highest=10)
        check_whole("pool2_padding", pool2_padding, lowest=0, highest=1)
        geometry = (conv1_padding, pool2_padding, conv1_round_up)
        smallest = next(size for size in count(1) if min(feature_map_sizes(size, *geometry)) >= 1)
        check_image_size("AlexNet", image_size, smallest)
        if not 0 <= dropout < 1:
            raise invalid_value("model.dropout", dropout, "a probability in [0, 1)")
        if not set(norm_blocks) <= {1, 2, 3, 4, 5}:
            raise invalid_value("model.norm_blocks", list(norm_blocks), "numbers from 1 to 5")
        check_choice("dropout_placement", dropout_placement, DROPOUT_PLACEMENTS)
        check_choice("dropout_scaling", dropout_scaling, DROPOUTS)
        check_choice("norm_placement", norm_placement, PLACEMENTS)
        check_choice("initialization", initialization, INITIALIZATIONS)
        if without is not None:
            check_choice("without", without, MIDDLE_LAYERS)
        widths = convolution_widths(channels, half, without)
        check_groups(groups, widths)

        blocks = []
        last = [*widths][-1]
        for name, (before, after) in widths.items():
            kernel_size, stride, padding = {"conv1": (11, 4, conv1_padding), "conv2": (5, 1, 2)}.get(name, (3, 1, 1))
            normalized = int(name[-1]) in norm_blocks
            convolution = nn.Conv2d(before, after, kernel_size, stride, padding,
                                    groups=groups if name in GROUPED else 1,
                                    bias=bias_before_norm or not normalized)  # fmt: skip
            blocks += conv_block(
                int(name[-1]),
                convolution,
                activation,
                norm=norm if normalized else None,
                second_norm=cnorm2 if name == "conv2" else None,
                norm_placement=PLACEMENTS[norm_placement][name == "conv2"],
                pool=pool if name in ("conv1", "conv2", last) else None,
                pool_padding=pool2_padding if name == "conv2" else 0,
            )
        if conv1_round_up and (missing := -(image_size + 2 * conv1_padding - 11) % 4):
            blocks.insert(0, ("pad1", nn.ZeroPad2d((0, missing, 0, missing))))
        self.features = nn.Sequential(OrderedDict(blocks))

        inputs = widths[last][1] * feature_map_sizes(image_size, *geometry)[-1] ** 2
        drop = partial(DROPOUTS[dropout_scaling], dropout)
        classifier = [
            ("flatten", nn.Flatten()),
            *_fc_block(6, inputs, fc_width, activation, drop),
            *_fc_block(7, fc_width, fc_width, activation, drop),
            ("fc8", nn.Linear(fc_width, num_classes)),
        ]
        if dropout_placement == "before_fc":
            order = ("flatten", "drop6", "fc6", "act6", "drop7", "fc7", "act7", "fc8")
        else:
            order = ("flatten", "fc6", "act6", "drop6", "fc7", "act7", "drop7", "fc8")
        self.classifier = nn.Sequential(OrderedDict(sorted(classifier, key=lambda layer: order.index(layer[0]))))
        initialize(self, INITIALIZATIONS[initialization])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for normalized images ``(N, 3, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _fc_block(
    index: int, inputs: int, units: int, activation: ActivationFactory, dropout: Callable[[], nn.Module]
) -> list[tuple[str, nn.Module]]:
    return [
        (f"fc{index}", nn.Linear(inputs, units)),
        (f"act{index}", activation()),
        (f"drop{index}", dropout()),
    ]


def initialize(net: AlexNet, constants: Mapping[str, tuple[float, float]]) -> None:
    """Draw weights from N(0, std²) and set biases, in those of the layers in ``constants`` that the network has.

    Args:
        net: changed in place.
        constants: layer → standard deviation of the weights, value of the biases, as in ``INITIALIZATIONS["paper"]``.
    """
    layers = dict([*net.features.named_children(), *net.classifier.named_children()])
    with torch.no_grad():
        for name, (std, value) in constants.items():
            if name not in layers:  # left out by ``without``
                continue
            weight, bias = layers[name].get_parameter("weight"), layers[name].bias
            weight.normal_(0, std)
            if isinstance(bias, Tensor):
                bias.fill_(value)


def convolution_widths(channels: Sequence[int], half: bool, without: str | None) -> dict[str, tuple[int, int]]:
    """Return the input and output feature maps of each convolution that the network has, ``conv1`` first.

    Raises:
        ConfigError: ``half`` of an odd number.
    """
    if half and (odd := [number for number in channels[:4] if number % 2]):
        raise invalid_value("model.half", True, f"even numbers in model.channels[:4], which has {odd[0]}")
    outputs = [number // 2 if half and index < 4 else number for index, number in enumerate(channels)]
    kept = {name: number for index, number in enumerate(outputs, 1) if (name := f"conv{index}") != without}
    return dict(zip(kept, pairwise([3, *kept.values()]), strict=True))


def feature_map_sizes(
    image_size: int, conv1_padding: int = 2, pool2_padding: int = 1, conv1_round_up: bool = False
) -> list[int]:
    """Return the side in pixels after conv1, pool1, pool2 and pool5; below 1 from the first impossible layer on.

    Convolutions 2 to 5 keep the size. ``feature_map_sizes(50) == [11, 5, 3, 1]``, and the paper's are
    ``feature_map_sizes(227, 0, 0) == feature_map_sizes(224, 2, 0) == [55, 27, 13, 6]``.
    """
    conv1 = (image_size + 2 * conv1_padding - 11 + 3 * conv1_round_up) // 4 + 1
    pool1 = pooled_size(conv1)
    pool2 = pooled_size(pool1, padding=pool2_padding)
    return [conv1, pool1, pool2, pooled_size(pool2)]


def check_groups(groups: int, widths: Mapping[str, tuple[int, int]]) -> None:
    """Check that ``groups`` divides the input and output feature maps of the layers in ``GROUPED``.

    Args:
        widths: as :func:`convolution_widths` returns them.

    Raises:
        ConfigError: names the first convolution that it does not divide.
    """
    check_whole("groups", groups)
    for name in (name for name in GROUPED if name in widths):
        if odd := [number for number in widths[name] if number % groups]:
            channels = [number for _, number in widths.values()]
            expected = f"a divisor of the {odd[0]} feature maps at {name} (of {channels} in all convolutions)"
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
