"""CudaConvnet, the authors' networks for CIFAR-10 as cuda-convnet publishes them: a plain ``nn.Module``."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from alexnet_pl.models.checks import check_choice, check_image_size, check_whole
from alexnet_pl.models.layers import ActivationFactory, LocallyConnected2d, NormFactory, pooled_size
from alexnet_pl.models.pooling import max_pool2d
from alexnet_pl.runtime.errors import invalid_value


class MaxPool(nn.MaxPool2d):
    """Maxima of 3×3 windows with stride 2; sizes round up."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)


class AveragePool(nn.AvgPool2d):
    """Means of 3×3 windows with stride 2 over the pixels inside the image; sizes round up."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, ceil_mode=True)


POOLS: dict[str, type[nn.Module]] = {"max": MaxPool, "average": AveragePool}

ORDERS = ("act pool norm", "act norm pool", "pool act norm")
"""Orders of what follows a convolution."""


class CudaConvnet(nn.Module):
    """Convolutional blocks, locally connected layers and fully connected layers, in the authors' geometry.

    Section 3.3 of the paper measures LRN on CIFAR-10 with "a four-layer CNN" that is "specified precisely by the code
    and parameter files" of cuda-convnet. This class builds its published networks (``example-layers/layers-*.cfg``):
    ``conf/model/cuda_convnet_13pct.yaml``, ``…_11pct``, ``…_18pct`` and ``…_80sec``, named after their test errors and
    training time. Convolutions are 5×5 with padding 2, locally connected layers 3×3 with padding 1. Layers are numbered
    through: ``features.conv1``, ``features.local3``, ``classifier.fc5``. The authors' ``fc10`` is the last one.

    Args:
        num_classes: number of logits, at least 1.
        image_size: side of the square input in pixels, at least 2 for each halving by a pooling layer.
        channels: feature maps of the convolutions.
        orders: of each block after its convolution, one of ``ORDERS``.
        pools: pooling of each block, ``max`` or ``average``.
        local_channels: feature maps of the locally connected layers.
        fc_widths: units of the fully connected layers before the last one.
        norm: factory of the norm layers, called with the number of channels.
        normalized: number of blocks that have one, from the first on.
        activation: factory of the nonlinearity after every hidden layer.
        weight_std: standard deviations of the initial weights around 0, one per layer that has weights, in order.
            Biases start at 0 then. None keeps torch's initialization.

    Raises:
        ConfigError: a value is out of range, the lists differ in length, or the input is too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 24,
        *,
        channels: Sequence[int] = (64, 64),
        orders: Sequence[str] = ("act pool norm", "act norm pool"),
        pools: Sequence[Literal["max", "average"]] = ("max", "max"),
        local_channels: Sequence[int] = (64, 32),
        fc_widths: Sequence[int] = (),
        norm: NormFactory = nn.Identity,
        normalized: int = 2,
        activation: ActivationFactory = nn.ReLU,
        weight_std: Sequence[float] | None = None,
    ):
        super().__init__()
        check_whole("num_classes", num_classes)
        check_whole("normalized", normalized, lowest=0, highest=len(channels))
        for name, widths in (("channels", channels), ("local_channels", local_channels), ("fc_widths", fc_widths)):
            if any(type(width) is not int or width < 1 for width in widths):
                raise invalid_value(f"model.{name}", list(widths), "whole numbers ≥ 1")
        for key, chosen, choices in (("orders", orders, ORDERS), ("pools", pools, POOLS)):
            if len(chosen) != len(channels):
                raise invalid_value(f"model.{key}", list(chosen), f"{len(channels)} entries, one per convolution")
            for value in chosen:
                check_choice(key, value, choices)
        check_image_size("CudaConvnet", image_size, smallest=2 ** len(channels))

        blocks: list[tuple[str, nn.Module]] = []
        width, size = 3, image_size
        for number, (after, order, pool) in enumerate(zip(channels, orders, pools, strict=True), start=1):
            layers: dict[str, nn.Module] = {
                "act": activation(),
                "pool": POOLS[pool](),
                "norm": norm(after) if number <= normalized else nn.Identity(),
            }
            blocks.append((f"conv{number}", nn.Conv2d(width, after, kernel_size=5, padding=2)))
            blocks += [(f"{name}{number}", layers[name]) for name in order.split()]
            width, size = after, pooled_size(size, ceil=True)
        for number, after in enumerate(local_channels, start=len(channels) + 1):
            blocks += [(f"local{number}", LocallyConnected2d(width, after, size)), (f"act{number}", activation())]
            width = after
        self.features = nn.Sequential(OrderedDict(blocks))

        classifier: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
        inputs = width * size**2
        for number, units in enumerate(fc_widths, start=len(channels) + len(local_channels) + 1):
            classifier += [(f"fc{number}", nn.Linear(inputs, units)), (f"act{number}", activation())]
            inputs = units
        depth = len(channels) + len(local_channels) + len(fc_widths) + 1
        classifier.append((f"fc{depth}", nn.Linear(inputs, num_classes)))
        self.classifier = nn.Sequential(OrderedDict(classifier))
        if weight_std is not None:
            self._initialize(weight_std)

    def _initialize(self, weight_std: Sequence[float]) -> None:
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d | LocallyConnected2d | nn.Linear)]
        if len(weight_std) != len(layers) or not all(0 < std < math.inf for std in weight_std):
            raise invalid_value("model.weight_std", list(weight_std), f"{len(layers)} numbers above 0, one per layer")
        with torch.no_grad():
            for layer, std in zip(layers, weight_std, strict=True):
                layer.weight.normal_(0, std)
                layer.get_parameter("bias").zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for normalized images ``(N, 3, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
