"""Layers and networks of the authors' code against float64 references in NumPy, written from that code."""

import math

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from torch import nn

from alexnet_pl.models.alexnet import AlexNet, feature_map_sizes
from alexnet_pl.models.cuda_convnet import CudaConvnet
from alexnet_pl.models.layers import LocallyConnected2d, LocalResponseNorm, SpatialResponseNorm, UnscaledDropout
from alexnet_pl.runtime.errors import ConfigError

Array = np.ndarray


# --- references: images and feature maps are (channels, height, width) ----------------------------------------------


def positions(size: int, kernel: int, stride: int, padding: int = 0) -> list[int]:
    """Return the first pixel of every window; the number of windows rounds up, as in the authors' layer.py."""
    count = math.ceil((size + 2 * padding - kernel) / stride) + 1
    return [index * stride - padding for index in range(count)]


def inside(first: int, kernel: int, size: int) -> slice:
    return slice(max(first, 0), min(first + kernel, size))


def pool(x: Array, kind: str) -> Array:
    """Pool 3×3 windows with stride 2; an average is over the pixels inside the image (AvgPooler's regionSize)."""
    starts = positions(x.shape[1], 3, 2)
    reduce = {"max": np.max, "average": np.mean}[kind]
    return np.array(
        [[[reduce(m[inside(i, 3, len(m)), inside(j, 3, len(m))]) for j in starts] for i in starts] for m in x]
    )


def across_maps(x: Array, size: int, alpha: float, k: float) -> Array:
    """Normalize across feature maps (cmrnorm): layer.py divides the scale by the size, kFCNorm adds the squares."""
    windows = [x[inside(c - size // 2, size, len(x))] for c in range(len(x))]
    return np.array([x[c] / (k + alpha / size * np.square(w).sum(0)) ** 0.75 for c, w in enumerate(windows)])


def within_map(x: Array, size: int, alpha: float) -> Array:
    """Normalize within feature maps (rnorm): layer.py divides the scale by size², and the constant is 1."""
    side, result = x.shape[1], np.empty_like(x)
    for c, i, j in np.ndindex(x.shape):
        window = x[c, inside(i - size // 2, size, side), inside(j - size // 2, size, side)]
        result[c, i, j] = x[c, i, j] / (1 + alpha / size**2 * np.square(window).sum()) ** 0.75
    return result


def convolve(x: Array, weight: Array, bias: Array, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """Convolve; windows that are partly outside count, with zeros there."""
    out, per_group, kernel, _ = weight.shape
    starts = positions(x.shape[1], kernel, stride, padding)
    padded = np.pad(x, ((0, 0), (padding, padding + kernel), (padding, padding + kernel)))
    result = np.empty((out, len(starts), len(starts)))
    for o, i, j in np.ndindex(result.shape):
        group = o // (out // groups) * per_group
        window = padded[group : group + per_group, starts[i] + padding :, starts[j] + padding :][:, :kernel, :kernel]
        result[o, i, j] = (window * weight[o]).sum() + bias[o]
    return result


def convolve_locally(x: Array, weight: Array, bias: Array) -> Array:
    """Convolve 3×3 windows with padding 1, with filters and biases of its own at every pixel."""
    side = x.shape[1]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    result = np.empty((weight.shape[1], side, side))
    for o, i, j in np.ndindex(result.shape):
        filters = weight[i * side + j, o].reshape(3, 3, len(x)).transpose(2, 0, 1)
        result[o, i, j] = (padded[:, i : i + 3, j : j + 3] * filters).sum() + bias[i * side + j, o]
    return result


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def parameters(net: nn.Module) -> dict[str, tuple[Array, Array]]:
    """Return weights and biases by layer, with random biases, and weights large enough to saturate the norm layers."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    with torch.no_grad():
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | LocallyConnected2d):
                fan_in = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.weight.shape[-1]
                layer.weight.normal_(0, fan_in**-0.5, generator=generator)
                layer.bias.normal_(0, 0.5, generator=generator)
                found[name.rpartition(".")[2]] = (layer.weight.numpy(), layer.bias.numpy())
    return found


def raw_pixels(side: int, count: int = 2) -> torch.Tensor:
    """Return images on the 0–255 scale around 0, on which the constants of the norm layers have an effect."""
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 60


def network(*overrides: str) -> nn.Module:
    return instantiate(config(*overrides).model).double().eval()


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [(1, 4), (2, 5), (3, 6), (5, 7), (9, 4)])
def test_norm_within_a_map_matches_the_authors_formula(size, side):
    x = raw_pixels(side)
    ours = SpatialResponseNorm(3, size=size, alpha=0.01)(x)
    np.testing.assert_allclose(ours, [within_map(image, size, 0.01) for image in x.numpy()], rtol=1e-12)


def test_norm_within_a_map_does_not_overflow_in_16_bits():
    x = torch.full((1, 2, 3, 3), 3000.0, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = SpatialResponseNorm(2)(x)
    result.sum().backward()
    expected = within_map(x.detach().double().numpy()[0], 3, 5e-5)
    assert result.dtype == torch.float16
    np.testing.assert_allclose(result[0].detach().double(), expected, rtol=1e-3)
    assert x.grad.isfinite().all()


def test_norm_within_a_map_has_the_right_gradient():
    x = raw_pixels(4, count=1).requires_grad_()
    assert torch.autograd.gradcheck(SpatialResponseNorm(3, size=3, alpha=0.01), x)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_norm_across_maps_stays_within_its_group(groups):
    x = torch.randn(2, 12, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 100
    ours = LocalResponseNorm(12, size=5, alpha=1e-4, k=2.0, groups=groups)(x)
    parts = [np.concatenate([across_maps(part, 5, 1e-4, 2) for part in np.split(image, groups)]) for image in x.numpy()]
    np.testing.assert_allclose(ours, parts, rtol=1e-12)


def test_groups_of_a_norm_must_divide_the_maps():
    for groups in (0, 5):
        with pytest.raises(ConfigError, match=rf"^model.norm.groups={groups} is invalid: expected "):
            LocalResponseNorm(12, groups=groups)


@pytest.mark.parametrize("bad", [{"size": 0}, {"alpha": -1}, {"k": 0}, {"beta": math.inf}])
def test_norm_within_a_map_refuses_constants_out_of_range(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"^model.norm.{name}=.* is invalid: expected "):
        SpatialResponseNorm(3, **bad)


def test_locally_connected_layer_has_filters_and_biases_of_its_own_at_every_pixel():
    layer = LocallyConnected2d(3, 4, size=5).double()
    x = raw_pixels(5)
    weight, bias = parameters(nn.ModuleDict({"local": layer}))["local"]
    assert (weight.shape, bias.shape) == ((25, 4, 27), (25, 4))
    np.testing.assert_allclose(
        layer(x).detach(), [convolve_locally(image, weight, bias) for image in x.numpy()], rtol=1e-10
    )


def test_locally_connected_layer_with_equal_filters_is_a_convolution():
    torch.manual_seed(0)
    layer, convolution = LocallyConnected2d(3, 4, size=6).double(), nn.Conv2d(3, 4, 3, padding=1).double()
    with torch.no_grad():
        layer.weight.copy_(convolution.weight.permute(0, 2, 3, 1).flatten(1).expand_as(layer.weight))
        layer.bias.copy_(convolution.bias.expand_as(layer.bias))
    torch.testing.assert_close(layer(raw_pixels(6)), convolution(raw_pixels(6)))


def test_dropout_of_the_paper_scales_in_evaluation():
    x = torch.ones(10_000)
    layer = UnscaledDropout(0.25)
    torch.manual_seed(0)
    trained = layer(x)
    assert trained.unique().tolist() == [0, 1]
    assert trained.mean().item() == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / 10_000))
    assert layer.eval()(x).unique().tolist() == [0.75]


# --- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [12, 13])
@pytest.mark.parametrize(("model", "alpha"), [("cuda_convnet_11pct", 1e-3), ("cuda_convnet_13pct", 0.0)])
def test_network_with_locally_connected_layers_matches_the_reference(model, alpha, side):
    net = network(f"model={model}", f"model.image_size={side}", "model.channels=[12,11]", "model.local_channels=[5,4]")
    layers, images = parameters(net), raw_pixels(side)

    def reference(x: Array) -> Array:
        x = across_maps(pool(relu(convolve(x, *layers["conv1"], padding=2)), "max"), 9, alpha, 1)
        x = pool(across_maps(relu(convolve(x, *layers["conv2"], padding=2)), 9, alpha, 1), "max")
        for name in ("local3", "local4"):
            x = relu(convolve_locally(x, *layers[name]))
        weight, bias = layers["fc5"]
        return weight @ x.flatten() + bias

    np.testing.assert_allclose(net(images).detach(), [reference(image) for image in images.numpy()], rtol=1e-9)


@pytest.mark.parametrize("side", [16, 17])
@pytest.mark.parametrize("model", ["cuda_convnet_18pct", "cuda_convnet_80sec"])
def test_network_with_average_pooling_matches_the_reference(model, side):
    net = network(f"model={model}", f"model.image_size={side}", "model.channels=[4,3,5]")
    layers, images = parameters(net), raw_pixels(side)
    alpha = 5e-5 if model.endswith("18pct") else 0.0

    def reference(x: Array) -> Array:
        x = within_map(relu(pool(convolve(x, *layers["conv1"], padding=2), "max")), 3, alpha)
        x = within_map(pool(relu(convolve(x, *layers["conv2"], padding=2)), "average"), 3, alpha)
        x = pool(relu(convolve(x, *layers["conv3"], padding=2)), "average").flatten()
        weight, bias = layers["fc4"]
        if "fc5" in layers:
            x = relu(weight @ x + bias)
            weight, bias = layers["fc5"]
        return weight @ x + bias

    np.testing.assert_allclose(net(images).detach(), [reference(image) for image in images.numpy()], rtol=1e-9)


@pytest.mark.parametrize("side", [64, 67])
def test_alexnet_2012_matches_the_reference(side):
    """layers-145.cfg, with its two towers written out: 64 pixels have a last window of conv1 that is partly outside."""
    net = network(
        "model=alexnet_2012", f"model.image_size={side}", "model.channels=[6,8,8,12,4]", "model.fc_width=10",
        "model.num_classes=7",
    )  # fmt: skip
    layers, images = parameters(net), raw_pixels(side)

    def tower(name: str, index: int) -> tuple[Array, Array]:
        return tuple(np.split(values, 2)[index] for values in layers[name])

    def reference(image: Array) -> Array:
        towers = []
        for index in (0, 1):
            x = across_maps(convolve(image, *tower("conv1", index), stride=4), 5, 1e-4, 2)
            x = relu(convolve(relu(pool(x, "max")), *tower("conv2", index), padding=2))
            towers.append(pool(within_map(across_maps(x, 5, 1e-4, 2), 5, 1e-3), "max"))
        both = np.concatenate(towers)
        for index in (0, 1):
            x = relu(convolve(both, *tower("conv3", index), padding=1))
            x = relu(convolve(x, *tower("conv4", index), padding=1))
            towers[index] = relu(pool(convolve(x, *tower("conv5", index), padding=1), "max"))
        x = np.concatenate(towers).flatten()
        for name in ("fc6", "fc7"):
            weight, bias = layers[name]
            x = 0.5 * relu(weight @ x + bias)  # dropout of 0.5 at test time
        weight, bias = layers["fc8"]
        return weight @ x + bias

    np.testing.assert_allclose(net(images).detach(), [reference(image) for image in images.numpy()], rtol=1e-9)


def test_alexnet_2012_has_the_papers_feature_maps_at_224_pixels():
    assert feature_map_sizes(224, 0, 0, conv1_round_up=True) == [55, 27, 13, 6]
    for side in range(64, 72):
        sizes = [len(positions(side, 11, 4))]
        assert feature_map_sizes(side, 0, 0, conv1_round_up=True)[0] == sizes[0]


def test_alexnet_2012_is_initialized_as_it_ran():
    torch.manual_seed(0)
    net = network("model=alexnet_2012", "model.image_size=67", "model.fc_width=512", "model.num_classes=1000")
    stds = {"conv1": 0.01, "conv2": 0.01, "conv3": 0.03, "conv4": 0.03, "conv5": 0.03, "fc6": 0.01, "fc7": 0.01,
            "fc8": 0.01}  # fmt: skip
    layers = dict([*net.features.named_children(), *net.classifier.named_children()])
    for name, std in stds.items():
        weight = layers[name].weight
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), name
        assert layers[name].bias.eq(0 if name in ("conv1", "conv3", "fc8") else 1).all(), name


@pytest.mark.parametrize(
    ("model", "stds"),
    [
        ("cuda_convnet_13pct", [1e-4, 0.01, 0.04, 0.04, 0.01]),
        ("cuda_convnet_11pct", [1e-4, 0.01, 0.04, 0.04, 0.01]),
        ("cuda_convnet_18pct", [1e-4, 0.01, 0.01, 0.01]),
        ("cuda_convnet_80sec", [1e-4, 0.01, 0.01, 0.1, 0.1]),
    ],
)
def test_cuda_convnets_are_initialized_as_published(model, stds):
    torch.manual_seed(0)
    layers = [layer for layer in network(f"model={model}").modules() if hasattr(layer, "weight")]
    for layer, std in zip(layers, stds, strict=True):
        assert layer.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * layer.weight.numel()))
        assert layer.bias.eq(0).all()


def test_the_pair_of_the_lrn_study_differs_in_lrn_alone():
    nets = [network("model=cuda_convnet_11pct", f"model/norm={norm}") for norm in ("none", "lrn_cifar")]
    kinds = [[type(layer) for layer in net.modules()] for net in nets]
    assert [(a.__name__, b.__name__) for a, b in zip(*kinds, strict=True) if a is not b] == [
        ("Identity", "LocalResponseNorm")
    ] * 2
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    published = network("model=cuda_convnet_13pct")  # 32 feature maps in local3, not 64
    assert published.features.local3.weight.shape[1] * 2 == nets[0].features.local3.weight.shape[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 3}, "image_size=3 is invalid: expected 4 pixels or more for CudaConvnet"),
        ({"channels": [64, 0]}, r"channels=\[64, 0\] is invalid: expected whole numbers ≥ 1"),
        ({"channels": [64]}, "normalized=2 is invalid: expected a whole number from 0 to 1"),
        ({"pools": ["max"]}, r"pools=.*max.* is invalid: expected 2 entries, one per convolution"),
        ({"pools": ["max", "min"]}, "pools=min is invalid: expected one of: max, average"),
        ({"orders": ["act pool norm", "act"]}, "orders=act is invalid: expected one of: act pool norm"),
        ({"weight_std": [0.1, 0.1]}, r"weight_std=\[0.1, 0.1\] is invalid: expected 5 numbers above 0, one per layer"),
        ({"weight_std": [0.1] * 4 + [0]}, "weight_std=.* is invalid: expected 5 numbers above 0"),
    ],
)
def test_invalid_arguments_of_cuda_convnet_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^model.{message}"):
        CudaConvnet(**settings)


# --- half net, missing layers ---------------------------------------------------------------------------------------


def test_half_net_has_half_of_the_maps_in_conv1_to_conv4():
    """layers-145-half.cfg: conv5 and the fully connected layers keep their width."""
    with torch.device("meta"):
        net = instantiate(config("model=alexnet_half").model)
    shapes = [(layer.in_channels, layer.out_channels) for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert shapes == [(3, 48), (48, 128), (128, 192), (192, 192), (192, 256)]
    assert net.classifier.fc7.weight.shape == (4096, 4096)


@pytest.mark.parametrize("without", ["conv3", "conv4", "conv5"])
def test_a_middle_convolution_can_be_left_out(without):
    net = AlexNet(without=without, groups=2, channels=[4, 6, 8, 10, 12], fc_width=8, initialization="released_code")
    names = [name for name, _ in net.features.named_children()]
    assert without not in names
    assert f"act{without[-1]}" not in names
    assert len([name for name in names if name.startswith("pool")]) == 3
    assert net(torch.zeros(2, 3, 50, 50)).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"half": True, "channels": [96, 255, 384, 384, 256]}, "half=true is invalid: expected even numbers"),
        ({"without": "conv2"}, "without=conv2 is invalid: expected one of: conv3, conv4, conv5"),
        ({"dropout_scaling": "test"}, "dropout_scaling=test is invalid: expected one of: training, evaluation"),
        ({"norm_placement": "2012"}, "norm_placement=2012 is invalid: .* released_code"),
    ],
)
def test_invalid_arguments_of_alexnet_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^model.{message}"):
        AlexNet(**settings)
