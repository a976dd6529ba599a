"""Networks and their layers: plain ``nn.Module`` classes, usable without the rest of the package."""

from alexnet_pl.models.alexnet import AlexNet
from alexnet_pl.models.alexnet_modern import AlexNetModern
from alexnet_pl.models.cnn4 import CNN4
from alexnet_pl.models.cuda_convnet import CudaConvnet
from alexnet_pl.models.layers import (
    LocalResponseNorm,
    NonOverlappingMaxPool2d,
    OverlappingMaxPool2d,
    SpatialResponseNorm,
)
from alexnet_pl.models.lenet import LeNet5

__all__ = [
    "CNN4",
    "AlexNet",
    "AlexNetModern",
    "CudaConvnet",
    "LeNet5",
    "LocalResponseNorm",
    "NonOverlappingMaxPool2d",
    "OverlappingMaxPool2d",
    "SpatialResponseNorm",
]
