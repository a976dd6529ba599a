"""Every network that the configuration can name: builds, learns, and has the published shapes and counts."""

import itertools

import pytest
import torch
from conftest import REPOSITORY, config
from hydra.utils import instantiate
from torch import nn

from alexnet_pl.alexnet import AlexNet, feature_map_sizes
from alexnet_pl.errors import ConfigError
from alexnet_pl.lenet import LeNet5


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (REPOSITORY / "conf" / group).glob("*.yaml"))


MODELS, NORMS = options("model"), options("model/norm")
POOLS, ACTIVATIONS = options("model/pool"), options("model/activation")
NARROW = {"AlexNet": ["model.fc_width=32", "model.channels=[8,12,16,16,12]"], "LeNet5": [], "CNN4": []}


def build(*overrides: str) -> nn.Module:
    return instantiate(config(*overrides).model)


def count(*overrides: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(*overrides).parameters())


@pytest.mark.parametrize(
    ("model", "norm", "pool", "activation"), [*itertools.product(MODELS, NORMS, POOLS, ACTIVATIONS)]
)
def test_every_combination_trains_every_parameter(model, norm, pool, activation):
    variant = [f"model={model}", f"model/norm={norm}", f"model/pool={pool}", f"model/activation={activation}"]
    cfg = config(*variant)
    cfg = config(*variant, *NARROW[cfg.model._target_.rpartition(".")[2]])
    torch.manual_seed(0)
    net = instantiate(cfg.model)
    images = torch.randn(4, 3, cfg.data.image_size, cfg.data.image_size)
    logits = net(images)
    assert logits.shape == (4, 10)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.abs().max() > 0, name
    kind = {"lrn": "LocalResponseNorm", "batch": "BatchNorm2d", "none": "Identity"}[norm]
    assert type(net.features.norm1).__name__ == type(net.features.norm2).__name__ == kind


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=alexnet_bn"], 21_622_506),
        (["model=alexnet_bn", "model/pool=non_overlapping"], 21_622_506),
        (["model=alexnet_bn", "model/norm=none"], 21_622_506 - 704),
        (["model=alexnet_lrn"], 21_622_506 - 704 + 96 + 256),  # no scale and shift, but the two biases
        (["model=alexnet_plain"], 21_622_506 - 704 + 96 + 256),
        (["model=alexnet_lrn", "model/norm=batch"], 21_622_506 + 96 + 256),  # LRN → BatchNorm is +704
        (["model=alexnet_lrn", "model/pool=non_overlapping", "model/activation=tanh"], 21_622_506 - 704 + 96 + 256),
        (["model=alexnet_bn", "model.num_classes=100"], 21_622_506 + 90 * 4097),
        (["model=cnn4"], 89_578),  # 3·25·32+32, 32·25·32+32, 32·25·64+64, 64·4·4·10+10
        (["model=cnn4", "model/pool=non_overlapping"], 89_578),
        (["model=lenet5"], 62_006),
        (["model=lenet5", "model/pool=overlapping"], 62_006),
    ],
    ids=str,
)
def test_parameter_counts(overrides, expected):
    assert count(*overrides) == expected


def test_parameters_by_layer():
    """The tutorial's table at 50×50: conv1 and conv2 without bias, fc6 from 256 features."""
    counts = {
        name: sum(p.numel() for p in layer.parameters())
        for part in ("features", "classifier")
        for name, layer in getattr(build("model=alexnet_bn"), part).named_children()
    }
    assert {name: n for name, n in counts.items() if n} == {
        "conv1": 3 * 96 * 11 * 11,
        "norm1": 2 * 96,
        "conv2": 96 * 256 * 5 * 5,
        "norm2": 2 * 256,
        "conv3": 256 * 384 * 9 + 384,
        "conv4": 384 * 384 * 9 + 384,
        "conv5": 384 * 256 * 9 + 256,
        "fc6": 256 * 4096 + 4096,
        "fc7": 4096 * 4096 + 4096,
        "fc8": 4096 * 10 + 10,
    }


@pytest.mark.parametrize("pool", POOLS)
def test_feature_maps_of_the_tutorial(pool):
    net = build("model=alexnet_bn", f"model/pool={pool}", "model.fc_width=8")
    sizes, x = [], torch.zeros(1, 3, 50, 50)
    for name, layer in net.features.named_children():
        x = layer(x)
        if name.startswith(("conv", "pool")):
            sizes.append(x.shape[-1])
    assert sizes == [11, 5, 5, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("size", [47, 48, 50, 63, 64, 79, 96, 224])
@pytest.mark.parametrize("pool", POOLS)
def test_feature_map_sizes_are_what_the_layers_make(size, pool):
    net = build("model=alexnet_bn", f"model/pool={pool}", f"model.image_size={size}", "model.fc_width=8")
    assert net.features(torch.zeros(1, 3, size, size)).shape[-1] == feature_map_sizes(size)[-1]
    assert net(torch.zeros(1, 3, size, size)).shape == (1, 10)


def test_order_of_layers():
    def order(model, part, count):
        return " ".join([name for name, _ in getattr(build(f"model={model}"), part).named_children()][:count])

    assert order("alexnet_bn", "features", 8) == "conv1 norm1 pool1 act1 conv2 norm2 pool2 act2"
    assert order("alexnet_lrn", "features", 8) == "conv1 act1 norm1 pool1 conv2 act2 norm2 pool2"
    assert order("alexnet_bn", "classifier", 8) == "flatten drop6 fc6 act6 drop7 fc7 act7 fc8"


def test_alexnet_lrn_has_the_papers_constants():
    norm = build("model=alexnet_lrn", "model.fc_width=8").features.norm1
    assert (norm.k, norm.size, norm.alpha, norm.beta) == (2, 5, 1e-4, 0.75)


def test_pooling_before_or_after_the_activation_is_the_same_function():
    """Without a norm the two placements differ in nothing but the order of pooling and activation."""
    narrow = NARROW["AlexNet"]
    for activation in ACTIVATIONS:
        nets = [
            build("model=alexnet_plain", f"model/activation={activation}", f"model.norm_placement={placement}", *narrow)
            for placement in ("before_activation", "after_activation")
        ]
        nets[1].load_state_dict(nets[0].state_dict())
        x = torch.randn(2, 3, 50, 50)
        torch.testing.assert_close(nets[0].eval()(x), nets[1].eval()(x))


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (AlexNet, {"image_size": 46}, "image_size=46 is too small for AlexNet: the smallest that works is 47"),
        (AlexNet, {"image_size": -1}, "image_size=-1"),
        (AlexNet, {"channels": [96, 0, 384, 384, 256]}, "channels=.*: 0 is not possible"),
        (AlexNet, {"channels": [96, 256]}, "names 2 convolutions; it has 5"),
        (AlexNet, {"fc_width": -5}, "fc_width=-5"),
        (AlexNet, {"num_classes": 0}, "num_classes=0"),
        (AlexNet, {"dropout": 1.0}, "dropout=1.0"),
        (AlexNet, {"norm_placement": "later"}, "norm_placement=later.*before_activation or after_activation"),
        (LeNet5, {"image_size": 12}, "image_size=12 is too small for LeNet5: the smallest that works is 13"),
        (LeNet5, {"channels": [6]}, "two numbers"),
        (LeNet5, {"fc_widths": [120, 0]}, "fc_widths=.*: 0 is not possible"),
    ],
)
def test_refusals_name_the_value_in_one_line(network, settings, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        network(**settings)
    assert "\n" not in str(refusal.value)


def test_the_smallest_sizes_work():
    assert AlexNet(image_size=47, fc_width=8)(torch.zeros(1, 3, 47, 47)).shape == (1, 10)
    assert LeNet5(image_size=13)(torch.zeros(1, 3, 13, 13)).shape == (1, 10)


def test_torch_and_torchvision_fit_together():
    """A torchvision built for another torch imports half-way: its operators are missing."""
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
