"""What goes on inside a network: its first kernels, the features before its last layer, how its units answer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_pl.data.transforms import denormalize

NEIGHBOURS = 6
"""As in figure 4 of the paper."""


@dataclass(frozen=True)
class FeatureBank:
    """``images`` ``(M, 3, S, S)`` uint8, their ``labels`` ``(M,)`` and ``features`` ``(M, F)`` float32, on the CPU."""

    images: Tensor
    labels: Tensor
    features: Tensor

    def nearest(self, features: Tensor, count: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
        """Euclidean distances and positions, ``(count,)`` each, of the nearest to one ``(F,)`` feature vector."""
        distances = torch.linalg.vector_norm(self.features - features, dim=1)
        return distances.topk(min(count, len(distances)), largest=False)


def first_convolution(net: nn.Module) -> nn.Conv2d | None:
    """The convolution that sees the image: conv1."""
    return next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)


def kernel_groups(net: nn.Module) -> int:
    """Into how many groups conv1's maps are parted by the convolution that reads them: 2 in the 2012 network."""
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    first, second = (*convolutions, None, None)[:2]
    if first is None or second is None or second.in_channels != first.out_channels:
        return 1
    return second.groups if second.groups <= 4 else 1  # beyond that it is no group in the paper's sense


def last_linear(net: nn.Module) -> nn.Linear | None:
    """The layer that gives the logits: fc8."""
    return next((module for module in reversed([*net.modules()]) if isinstance(module, nn.Linear)), None)


def feature_layer(net: nn.Module) -> str:
    """The name of the layer whose answer the last one reads: ``fc7`` in AlexNet, ``fc4`` in LeNet-5."""
    names = [name.rpartition(".")[2] for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return names[-2] if len(names) > 1 else "last hidden layer"


@contextmanager
def capture_activations(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While it is open, a pass through ``net`` leaves ``conv1`` (what the first convolution answers, ``(N, C, H, W)``)
    and ``features`` (what the last linear layer reads, ``(N, F)``) in the mapping, as far as there are such layers."""
    seen: dict[str, Tensor] = {}
    hooks = []
    if convolution := first_convolution(net):
        hooks.append(convolution.register_forward_hook(lambda module, inputs, output: seen.update(conv1=output)))
    if linear := last_linear(net):
        hooks.append(linear.register_forward_hook(lambda module, inputs, output: seen.update(features=inputs[0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and the state of torch's random generators are put back."""
    modes = {module: module.training for module in net.modules()}
    devices = {parameter.device for parameter in net.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield net.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def eager(net: nn.Module, images: Tensor) -> Tensor:
    """A pass through the network as it is written: hooks on its layers may be passed over by a compiled one."""
    return getattr(net, "_orig_mod", net).forward(images)


def extract_features(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], mean: Sequence[float], std: Sequence[float],
        count: int) -> FeatureBank | None:  # fmt: skip
    """The first ``count`` images with their features; None of a network without a linear layer.

    Args:
        batches: normalised images on the network's device, and labels; those with a negative label are padding.
        mean, std: what they were normalised by.
    """
    images, labels, features, found = [], [], [], 0
    with undisturbed(net), capture_activations(net) as seen:
        for batch, targets in batches:
            real = targets >= 0
            batch, targets = batch[real][: count - found], targets[real][: count - found]
            if len(targets) == 0:
                continue
            eager(net, batch)
            if "features" not in seen or seen["features"].ndim != 2:
                return None
            images.append(denormalize(batch, mean, std))
            labels.append(targets.cpu())
            features.append(seen["features"].float().cpu())
            found += len(targets)
            if found >= count:
                break
    return FeatureBank(torch.cat(images), torch.cat(labels), torch.cat(features)) if images else None


# --- histograms -----------------------------------------------------------------------------------------------------

MOST_VALUES = 2**18
"""Of a larger tensor every n-th value is counted: more would only cost time."""


@dataclass(frozen=True)
class Histogram:
    """``counts`` of the values between ``edges`` (one more than counts), and the sums over them."""

    counts: np.ndarray
    edges: np.ndarray
    total: float
    squares: float


def histogram(values: Tensor, bins: int = 64) -> Histogram | None:
    """Bins of equal width from the least to the largest finite value; None where there is none. On the device."""
    flat = values.detach().flatten()
    flat = flat[:: -(-flat.numel() // MOST_VALUES) or 1].float()
    flat = flat[flat.isfinite()]
    if flat.numel() == 0:
        return None
    low, high = flat.aminmax()
    width = (high - low).clamp_min(1e-12)
    places = ((flat - low) / width * bins).long().clamp_max_(bins - 1)
    # bincount: torch.histc has no deterministic form on a GPU.
    counts = torch.bincount(places, minlength=bins)
    bounds = torch.stack([low, low + width, flat.sum(), flat.square().sum()]).tolist()
    return Histogram(counts.cpu().numpy(), np.linspace(bounds[0], bounds[1], bins + 1), bounds[2], bounds[3])


@dataclass(frozen=True)
class ActivationStats:
    """What a non-linearity gave for a batch; ``dead`` is the share of units that were 0 for every image (ReLU)."""

    histogram: Histogram | None
    dead: float | None


def activations(net: nn.Module, images: Tensor) -> dict[str, ActivationStats]:
    """Each non-linearity's answers to normalised images ``(N, 3, S, S)``, by the layer's name (``act1`` …).

    A unit of a convolution is a map: dead where no image moves it at any place.
    """
    found: dict[str, ActivationStats] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dead = None
        if isinstance(module, nn.ReLU | nn.ReLU6):
            units = output.flatten(2).amax(2) if output.ndim > 2 else output
            dead = float((units.amax(0) <= 0).float().mean())
        found[name] = ActivationStats(histogram(output), dead)

    hooks = [
        module.register_forward_hook(partial(record, layer_name(name)))
        for name, module in net.named_modules()
        if type(module).__module__ == "torch.nn.modules.activation"
    ]
    try:
        with undisturbed(net):
            eager(net, images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layer_name(path: str) -> str:
    """``features.conv1`` → ``conv1``: the paper's names. A number alone says nothing: then the whole path."""
    last = path.rpartition(".")[2]
    return path if last.isdigit() or not last else last


def layers(net: nn.Module) -> list[tuple[str, str, int]]:
    """Name, description and number of parameters of each layer, in the order they were made."""
    return [
        (name, f"{type(module).__name__}({module.extra_repr()})", sum(p.numel() for p in module.parameters()))
        for name, module in net.named_modules()
        if not any(True for _ in module.children())
    ]


def pca(features: Tensor) -> Tensor:
    """``(N, F)`` features in at most N columns, with the same distances between all N: centred and turned.

    N points lie in a space of N - 1 dimensions; its axes by falling variance (principal components).
    """
    centred = features.double() - features.double().mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    return (left * scale)[:, : max(1, len(features) - 1)].float()
