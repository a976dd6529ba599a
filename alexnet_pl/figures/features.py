"""Views inside a network: first-layer kernels, penultimate features, activation statistics, dead ReLUs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_pl.data.transforms import denormalize

NUM_NEIGHBORS = 6
"""Neighbors per query, as in figure 4 of the paper."""


@dataclass(frozen=True)
class FeatureBank:
    """Images with their penultimate features, searchable by distance; all tensors are on the CPU.

    Attributes:
        images: ``(M, 3, S, S)`` uint8.
        labels: ``(M,)`` int64.
        features: ``(M, F)`` float32.
    """

    images: Tensor
    labels: Tensor
    features: Tensor

    def nearest(self, features: Tensor, count: int = NUM_NEIGHBORS) -> tuple[Tensor, Tensor]:
        """Return Euclidean distances and indices, ``(count,)`` each, of the nearest images to ``(F,)`` features."""
        distances = torch.linalg.vector_norm(self.features - features, dim=1)
        smallest = distances.topk(min(count, len(distances)), largest=False)
        return smallest.values, smallest.indices


def find_first_conv(net: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that reads the image (conv1), or None."""
    return next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)


def find_last_linear(net: nn.Module) -> nn.Linear | None:
    """Return the layer that produces the logits (fc8 in AlexNet), or None."""
    return next((module for module in reversed([*net.modules()]) if isinstance(module, nn.Linear)), None)


def kernel_groups(net: nn.Module) -> int:
    """Return how many groups the second convolution splits conv1's feature maps into: 2 in the 2012 network."""
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    first, second = (*convolutions, None, None)[:2]
    if first is None or second is None or second.in_channels != first.out_channels:
        return 1
    return second.groups if second.groups <= 4 else 1  # more is a depthwise convolution, not the paper's towers


def feature_layer(net: nn.Module) -> str:
    """Return the name of the layer that feeds the last linear one: ``fc7`` in AlexNet, ``fc4`` in LeNet-5."""
    names = [name.rpartition(".")[2] for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return names[-2] if len(names) > 1 else "last hidden layer"


def layer_name(path: str) -> str:
    """Return the last part of a module path, ``conv1`` for ``features.conv1``; the whole path if that is a number."""
    last = path.rpartition(".")[2]
    return path if last.isdigit() or not last else last


def list_layers(net: nn.Module) -> list[tuple[str, str, int]]:
    """Return name, description and parameter count of each layer, in the order they were created."""
    return [
        (name, f"{type(module).__name__}({module.extra_repr()})", sum(p.numel() for p in module.parameters()))
        for name, module in net.named_modules()
        if not any(True for _ in module.children())
    ]


@contextmanager
def capture_activations(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that every forward pass of ``net`` fills while the context is open.

    ``conv1`` is the output of the first convolution, ``(N, C, H, W)``, and ``features`` the input of the last linear
    layer, ``(N, F)``. The key of a layer that the network lacks is absent.
    """
    captured: dict[str, Tensor] = {}
    hooks = []
    if convolution := find_first_conv(net):
        hooks.append(convolution.register_forward_hook(lambda module, inputs, output: captured.update(conv1=output)))
    if linear := find_last_linear(net):
        hooks.append(linear.register_forward_hook(lambda module, inputs, output: captured.update(features=inputs[0])))
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore each module's mode and torch's random state after."""
    modes = {module: module.training for module in net.modules()}
    devices = {parameter.device for parameter in net.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            net.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def extract_features(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], mean: Sequence[float], std: Sequence[float], count: int
) -> FeatureBank | None:
    """Return the first ``count`` images with their features, or None if the network has no linear layer.

    Args:
        batches: normalized ``(N, 3, S, S)`` images on the network's device, and ``(N,)`` labels; a negative label
            marks padding.
        mean, std: normalization of the images, per channel on the [0, 1] pixel scale.
    """
    images, labels, features, found = [], [], [], 0
    with evaluation_mode(net), capture_activations(net) as captured:
        for batch, targets in batches:
            real = targets >= 0
            batch, targets = batch[real][: count - found], targets[real][: count - found]
            if len(targets) == 0:
                continue
            net.forward(batch)  # not net(batch): a compiled network would skip the hooks
            if "features" not in captured or captured["features"].ndim != 2:
                return None
            images.append(denormalize(batch, mean, std).cpu())
            labels.append(targets.cpu())
            features.append(captured["features"].float().cpu())
            found += len(targets)
            if found >= count:
                break
    return FeatureBank(torch.cat(images), torch.cat(labels), torch.cat(features)) if images else None


def pca(features: Tensor) -> Tensor:
    """Return ``(N, F)`` features in at most N - 1 principal axes, which preserve all N pairwise distances.

    N points span at most N - 1 dimensions. The axes are sorted by decreasing variance.
    """
    centered = features.double() - features.double().mean(0)
    left, scale, _ = torch.linalg.svd(centered, full_matrices=False)
    coordinates: Tensor = left * scale
    return coordinates[:, : max(1, len(features) - 1)].float()


# --- histograms -----------------------------------------------------------------------------------------------------

MAX_HISTOGRAM_VALUES = 2**18
"""A larger tensor is subsampled with a constant stride, because counting more values only costs time."""


@dataclass(frozen=True)
class Histogram:
    """A histogram and the moments that TensorBoard stores with it.

    Attributes:
        counts: values per bin.
        edges: bin edges, one more than ``counts``.
        total: sum of the values.
        squares: sum of their squares.
    """

    counts: np.ndarray
    edges: np.ndarray
    total: float
    squares: float


def compute_histogram(values: Tensor, bins: int = 64) -> Histogram | None:
    """Return bins of equal width over all finite values, or None if there are none. Computed on the tensor's device."""
    flat = values.detach().flatten()
    flat = flat[:: -(-flat.numel() // MAX_HISTOGRAM_VALUES) or 1].float()
    flat = flat[flat.isfinite()]
    if flat.numel() == 0:
        return None
    low, high = flat.aminmax()
    width = (high - low).clamp_min(1e-12)
    places = ((flat - low) / width * bins).long().clamp_max_(bins - 1)
    # bincount, because torch.histc has no deterministic implementation on a GPU.
    counts = torch.bincount(places, minlength=bins)
    bounds = torch.stack([low, low + width, flat.sum(), flat.square().sum()]).tolist()
    return Histogram(counts.cpu().numpy(), np.linspace(bounds[0], bounds[1], bins + 1), bounds[2], bounds[3])


@dataclass(frozen=True)
class ActivationStats:
    """Outputs of one activation layer for a batch.

    Attributes:
        histogram: of all outputs; None if none is finite.
        dead: fraction of units that output 0 for every image; None if the layer is not a ReLU.
    """

    histogram: Histogram | None
    dead: float | None


def activation_stats(net: nn.Module, images: Tensor) -> dict[str, ActivationStats]:
    """Return the statistics of each activation layer for normalized ``(N, 3, S, S)`` images, by layer name.

    A unit of a convolution is a feature map, dead if no image activates it at any position.
    """
    stats: dict[str, ActivationStats] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dead = None
        if isinstance(module, nn.ReLU | nn.ReLU6):
            units = output.flatten(2).amax(2) if output.ndim > 2 else output
            dead = float((units.amax(0) <= 0).float().mean())
        stats[name] = ActivationStats(compute_histogram(output), dead)

    hooks = [
        module.register_forward_hook(partial(record, layer_name(name)))
        for name, module in net.named_modules()
        if type(module).__module__ == "torch.nn.modules.activation"
    ]
    try:
        with evaluation_mode(net):
            net.forward(images)  # not net(images): a compiled network would skip the hooks
    finally:
        for hook in hooks:
            hook.remove()
    return stats
