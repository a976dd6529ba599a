"""Networks of conf/model: every variant builds and trains, with the published shapes and parameter counts."""

import functools
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, config
from hydra.utils import instantiate
from sklearn.datasets import load_sample_image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import alexnet as torchvision_alexnet

from alexnet_pl.models.alexnet import AlexNet, feature_map_sizes, from_torchvision
from alexnet_pl.models.cnn4 import CNN4
from alexnet_pl.models.layers import NonOverlappingMaxPool2d, OverlappingMaxPool2d
from alexnet_pl.models.lenet import LeNet5
from alexnet_pl.runtime.errors import ConfigError


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (REPOSITORY / "conf" / group).glob("*.yaml"))


MODELS, NORMS = options("model"), options("model/norm")
POOLS, ACTIVATIONS = options("model/pool"), options("model/activation")
PARTS = {"norm": NORMS, "pool": POOLS, "activation": ACTIVATIONS}
NARROW = {
    "AlexNet": ["model.fc_width=32", "model.channels=[8,12,16,16,12]"],
    "AlexNetModern": ["model.fc_width=32", "model.channels=[8,12,16,16,12]", "model.image_size=32"],
    "CudaConvnet": ["model.image_size=24"],
    "LeNet5": [],
    "CNN4": [],
}


PAPER = {"conv1_padding": 0, "pool2_padding": 0, "groups": 2}


def build(*overrides: str) -> nn.Module:
    return instantiate(config(*overrides).model)


def count(*overrides: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(*overrides).parameters())


KINDS = {"norm": ("batch", "lrn", "none", "within_map"), "pool": POOLS, "activation": ("relu", "tanh")}
"""Options that differ in more than constants."""


def variants() -> list[tuple[str, str]]:
    """Return single options for all networks, all of them for one, and combinations for the tutorial's and LeNet-5.

    CudaConvnet has its poolings as arguments.
    """
    crossed = ("alexnet_bn", "lenet5")
    single = [(model, f"model/{group}={option}") for model in MODELS if model not in crossed
              for group, options in (PARTS if model == "alexnet_lrn" else KINDS).items() for option in options
              if group != "pool" or not model.startswith("cuda_convnet")]  # fmt: skip
    combined = [" ".join(f"model/{group}={option}" for group, option in zip(KINDS, chosen, strict=True))
                for chosen in itertools.product(("batch", "lrn", "none"), POOLS, KINDS["activation"])]  # fmt: skip
    return single + [(model, variant) for model in crossed for variant in combined]


@functools.cache
def class_name(model: str) -> str:
    return config(f"model={model}").model._target_.rpartition(".")[2]


@pytest.mark.parametrize(("model", "variant"), variants())
def test_every_variant_trains_every_parameter(model, variant):
    network = class_name(model)
    small = [] if network == "LeNet5" else ["model.image_size=70"]
    chosen = [f"model={model}", *variant.split(), *small, "model.num_classes=10", *NARROW[network]]
    cfg = config(*chosen)
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
    if "model/norm=" in variant:
        norm = variant.partition("model/norm=")[2].split()[0]
        kinds = {"batch": "BatchNorm2d", "none": "Identity", "within_map": "SpatialResponseNorm"}
        kind = kinds.get(norm, "LocalResponseNorm")
        assert type(net.features.norm1).__name__ == type(net.features.norm2).__name__ == kind


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=alexnet_bn"], 21_622_506),
        (["model=alexnet_bn_everywhere"], 21_622_506 + 384 + 384 + 256),  # two numbers per map instead of a bias
        (["model=alexnet_modern"], 3_381_898),
        (["model=alexnet_bn", "model/pool=non_overlapping"], 21_622_506),
        (["model=alexnet_bn", "model/norm=none"], 21_622_506 - 704),
        (["model=alexnet_lrn"], 21_622_506 - 704 + 96 + 256),  # no scale and shift, but the two biases
        (["model=alexnet_plain"], 21_622_506 - 704 + 96 + 256),
        (["model=alexnet_lrn", "model/norm=batch"], 21_622_506 + 96 + 256),  # LRN → BatchNorm is +704
        (["model=alexnet_lrn", "model/pool=non_overlapping", "model/activation=tanh"], 21_622_506 - 704 + 96 + 256),
        (["model=alexnet_bn", "model.num_classes=100"], 21_622_506 + 90 * 4097),
        (["model=cnn4"], 89_578),  # 3·25·32+32, 32·25·32+32, 32·25·64+64, 64·4·4·10+10
        (["model=cnn4", "model/pool=non_overlapping"], 89_578),
        (["model=alexnet_paper"], 60_965_224),
        (["model=alexnet_paper", "model.num_classes=10"], 56_909_194),
        (["model=alexnet_paper", "model.image_size=224", "model.conv1_padding=2"], 60_965_224),
        (["model=alexnet_paper", "model/norm=batch"], 60_965_224 + 704),
        (["model=alexnet_paper", "model/pool=non_overlapping"], 60_965_224),
        (["model=alexnet_ungrouped"], 62_378_344),
        (["model=alexnet_ungrouped", "model.num_classes=10"], 58_322_314),
        (["model=alexnet_imagenet_bn"], 62_378_344 + 704 - 96 - 256),  # no biases before BatchNorm, as in the tutorial
        (["model=alexnet_imagenet_bn", "model.bias_before_norm=true"], 62_378_344 + 704),
        (["model=alexnet_torchvision"], 61_100_840),
        (["model=alexnet_torchvision", "model.num_classes=10"], 57_044_810),
        (["model=alexnet_2012"], 60_965_224),  # the paper's, with the same layers in another order
        (["model=alexnet_2012", "model.num_classes=10"], 56_909_194),
        (["model=alexnet_2012", "model.half=true", "model.groups=1", "model/norm=lrn"], 59_798_312),
        (["model=alexnet_half"], 19_042_122),  # conv1 to conv5 1,167,168; fc6 to fc8 1,052,672 + 16,781,312 + 40,970
        (["model=alexnet_paper", "model.groups=1", "model.half=true"], 59_798_312),  # fc6 to fc8 58,631,144
        (["model=alexnet_lrn", "model.groups=2"], 21_622_506 - 704 + 352 - 307_200 - 663_552 - 442_368),
        (["model=alexnet_lrn", "model.without=conv3"], 21_622_154 - 1_327_488),  # conv4 reads 256 maps, not 384
        (["model=alexnet_lrn", "model.without=conv4"], 21_622_154 - 1_327_488),
        (["model=alexnet_lrn", "model.without=conv5"], 21_622_154 - 884_992 + 128 * 4096),  # fc6 reads 384 maps
        (["model=cuda_convnet_13pct"], 1_116_490),  # 4,864 + 102,464 + 36·(577·32 + 289·32) + 11,530
        (["model=cuda_convnet_11pct"], 2_112_970),  # 4,864 + 102,464 + 36·(577·64 + 577·32) + 11,530
        (["model=cuda_convnet_11pct", "model/norm=none"], 2_112_970),
        (["model=cuda_convnet_18pct"], 89_578),
        (["model=cuda_convnet_80sec"], 145_578),  # 2,432 + 25,632 + 51,264 + 65,600 + 650
        (["model=lenet5"], 62_006),
        (["model=lenet5", "model/pool=overlapping"], 62_006),
    ],
    ids=str,
)
def test_parameter_counts(overrides, expected):
    assert count(*overrides) == expected


def test_parameters_by_layer():
    """The tutorial's table at 50×50 pixels: no bias in conv1 and conv2, 256 inputs of fc6."""
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


def test_parameters_of_the_paper_by_layer():
    with torch.device("meta"):
        net = build("model=alexnet_paper")
    layers = [*net.features.named_children(), *net.classifier.named_children()]
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers}
    assert [n for n in counts.values() if n] == [
        34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=alexnet_paper"], 724_406_816),
        (["model=alexnet_paper", "model.image_size=224", "model.conv1_padding=2"], 724_406_816),
        (["model=alexnet_ungrouped"], 1_135_256_096),
        (["model=alexnet_2012"], 724_406_816),
        (["model=alexnet_imagenet_bn"], 1_135_256_096),
        (["model=alexnet_torchvision"], 714_188_480),
    ],
    ids=str,
)
def test_multiply_adds(overrides, expected):
    """Torch's counter reports two operations per multiply-add."""
    cfg = config(*overrides).model
    with FakeTensorMode(), FlopCounterMode(display=False) as counted:
        instantiate(cfg)(torch.zeros(1, 3, cfg.image_size, cfg.image_size))
    assert counted.get_total_flops() == 2 * expected


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=alexnet_bn"], [11, 5, 5, 3, 3, 3, 3, 1]),
        (["model=alexnet_paper"], [55, 27, 27, 13, 13, 13, 13, 6]),
        (["model=alexnet_paper", "model.image_size=224", "model.conv1_padding=2"], [55, 27, 27, 13, 13, 13, 13, 6]),
        (["model=alexnet_ungrouped"], [55, 27, 27, 13, 13, 13, 13, 6]),
        (["model=alexnet_2012"], [55, 27, 27, 13, 13, 13, 13, 6]),
        (["model=alexnet_imagenet_bn"], [55, 27, 27, 13, 13, 13, 13, 6]),
        (["model=alexnet_torchvision"], [55, 27, 27, 13, 13, 13, 13, 6]),
    ],
    ids=str,
)
def test_feature_maps_of_the_paper_and_the_tutorial(overrides, expected, pool):
    cfg = config(*overrides, f"model/pool={pool}", "model.fc_width=8", "model.channels=[4,4,4,4,4]").model
    net, sizes, x = instantiate(cfg), [], torch.zeros(1, 3, cfg.image_size, cfg.image_size)
    for name, layer in net.features.named_children():
        x = layer(x)
        if name.startswith(("conv", "pool")):
            sizes.append(x.shape[-1])
    assert sizes == expected


@pytest.mark.parametrize("pool", [OverlappingMaxPool2d, NonOverlappingMaxPool2d])
@pytest.mark.parametrize("paddings", [(2, 1), (2, 0), (0, 1), (0, 0)], ids=str)
def test_feature_map_sizes_agree_with_the_layers(pool, paddings):
    """Both poolings give the same sizes for every valid input; inputs that are too small are refused."""
    geometry = {"pool": pool, **dict(zip(("conv1_padding", "pool2_padding"), paddings, strict=True))}
    for size in (*range(45, 80), 96, 224, 225, 227, 256):
        sizes = feature_map_sizes(size, *paddings)
        if min(sizes) < 1:
            with pytest.raises(
                ConfigError, match=f"image_size={size} is invalid: expected .* pixels or more for AlexNet"
            ):
                AlexNet(image_size=size, **geometry)
            continue
        net = AlexNet(image_size=size, channels=[2] * 5, fc_width=2, **geometry)
        assert net.features(torch.zeros(1, 3, size, size)).shape[-1] == sizes[-1]
        assert net(torch.zeros(1, 3, size, size)).shape == (1, 10)


def test_order_of_layers():
    def order(model, part, count):
        net = build(f"model={model}", *(["model.fc_width=8"] if model.startswith("alexnet") else []))
        return " ".join([name for name, _ in getattr(net, part).named_children()][:count])

    assert order("alexnet_bn", "features", 8) == "conv1 norm1 pool1 act1 conv2 norm2 pool2 act2"
    assert order("alexnet_lrn", "features", 8) == "conv1 act1 norm1 pool1 conv2 act2 norm2 pool2"
    assert order("alexnet_bn", "classifier", 8) == "flatten drop6 fc6 act6 drop7 fc7 act7 fc8"
    assert order("alexnet_paper", "features", 8) == "conv1 act1 norm1 pool1 conv2 act2 norm2 pool2"
    assert order("alexnet_paper", "classifier", 8) == "flatten fc6 act6 drop6 fc7 act7 drop7 fc8"
    assert order("alexnet_2012", "features", 11) == ("pad1 conv1 norm1 pool1 act1 conv2 act2 norm2 cnorm2 pool2 conv3")
    assert order("alexnet_2012", "classifier", 8) == "flatten fc6 act6 drop6 fc7 act7 drop7 fc8"
    assert order("cuda_convnet_11pct", "features", 12) == (
        "conv1 act1 pool1 norm1 conv2 act2 norm2 pool2 local3 act3 local4 act4"
    )
    assert order("cuda_convnet_18pct", "features", 12) == (
        "conv1 pool1 act1 norm1 conv2 act2 pool2 norm2 conv3 act3 pool3 norm3"
    )
    assert order("alexnet_imagenet_bn", "features", 8) == "conv1 norm1 pool1 act1 conv2 norm2 pool2 act2"


def test_alexnet_lrn_has_the_papers_constants():
    norm = build("model=alexnet_lrn", "model.fc_width=8").features.norm1
    assert (norm.k, norm.size, norm.alpha, norm.beta) == (2, 5, 1e-4, 0.75)


def test_lrn_presets_are_the_released_code_and_the_printed_formula():
    norms = [build("model=alexnet_paper", f"model/norm={name}", *NARROW["AlexNet"]).features.norm2
             for name in ("lrn", "lrn_printed")]  # fmt: skip
    assert [(norm.k, norm.size, norm.alpha, norm.beta) for norm in norms] == [(2, 5, 1e-4, 0.75), (2, 5, 5e-4, 0.75)]


def test_groups_separate_the_two_halves():
    """In conv2, conv4 and conv5 neither half sees the other; conv3 sees both."""
    net = build("model=alexnet_paper", "model.image_size=67", *NARROW["AlexNet"])
    assert [getattr(net.features, f"conv{i}").groups for i in range(1, 6)] == [1, 2, 1, 2, 2]
    x = torch.randn(1, 8, 7, 7)
    first_half_changed = torch.cat([torch.randn(1, 4, 7, 7), x[:, 4:]], 1)
    difference = (net.features.conv2(x) - net.features.conv2(first_half_changed)).abs().amax((0, 2, 3))
    assert difference[:6].min() > 0
    assert difference[6:].max() == 0


@pytest.mark.parametrize(
    ("name", "stds"),
    [("paper", [0.01] * 8), ("released_code", [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01])],
)
def test_initializations_match_the_published_ones(name, stds):
    torch.manual_seed(0)
    net = build("model=alexnet_paper", f"model.initialization={name}", "model.image_size=67", "model.fc_width=512")
    layers = [layer for layer in net.modules() if hasattr(layer, "weight")]
    for layer, std, bias in zip(layers, stds, [0, 1, 0, 1, 1, 1, 1, 0], strict=True):
        # The tolerance is five standard errors of a standard deviation.
        assert layer.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * layer.weight.numel()))
        assert abs(layer.weight.mean().item()) < 5 * std / math.sqrt(layer.weight.numel())
        assert layer.bias.eq(bias).all()


def test_initialization_skips_biases_that_bias_before_norm_leaves_out():
    net = build("model=alexnet_imagenet_bn", "model.initialization=paper", "model.image_size=70", *NARROW["AlexNet"])
    assert net.features.conv2.bias is None
    assert net.features.conv4.bias.eq(1).all()
    assert net.features.norm2.weight.eq(1).all()


def test_the_papers_biases_drown_unit_variance_input():
    """docs/paper-network.md: initial logits hardly depend on a unit-variance image; on the 0–255 scale they do."""
    torch.manual_seed(0)
    net = build("model=alexnet_paper", "model.num_classes=10").eval()
    images = torch.from_numpy(
        np.stack([load_sample_image(name)[100:327, 200:427] for name in ("china.jpg", "flower.jpg")])
    )
    images = images.permute(0, 3, 1, 2).float()
    centered = images - images.mean((0, 2, 3), keepdim=True)
    with torch.no_grad():
        unit, raw = net(centered / centered.std()), net(centered)
    assert (unit[0] - unit[1]).abs().mean() < 1e-3 < 1e-2 < (raw[0] - raw[1]).abs().mean()


@pytest.mark.parametrize(
    ("model", "digest"),
    [
        ("alexnet_bn", "08124b7631985bdc015ce3ad794ed690f4fcd7db648ed8778f5381f83bef711c"),
        ("alexnet_lrn", "3cab850e6274ff625290ce5e7df5c7f452c93cc1f20d6bcdaa2bc2c8da1eca26"),
    ],
)
def test_a_seed_gives_the_initial_weights_of_version_0_1(model, digest):
    """Names, values and their order are those of version 0.1.0, so that its runs can be reproduced and loaded."""
    torch.manual_seed(3)
    digested = hashlib.sha256()
    for name, value in build(f"model={model}", "model.fc_width=64").state_dict().items():
        digested.update(name.encode() + value.numpy().tobytes())
    assert digested.hexdigest() == digest


@pytest.mark.parametrize("classes", [1000, 10])
def test_torchvision_weights_load_by_name_and_give_equal_logits(classes):
    torch.manual_seed(0)
    theirs = torchvision_alexnet(num_classes=classes).eval()
    net = build("model=alexnet_torchvision", f"model.num_classes={classes}").eval()
    assert net.load_state_dict(from_torchvision(theirs.state_dict())).missing_keys == []
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(images), theirs(images), atol=1e-5, rtol=0)
    # Training gives equal logits as well, because dropout draws its masks in the same order.
    torch.manual_seed(1)
    ours = net.train()(images)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, theirs.train()(images), atol=1e-5, rtol=0)


def test_pooling_commutes_with_the_activation():
    """Without a norm layer the two placements differ only in the order of pooling and activation."""
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
        (AlexNet, {"image_size": 46}, "image_size=46 is invalid: expected 47 pixels or more.*Set data.image_size=47"),
        (AlexNet, {"image_size": -1}, "image_size=-1 is invalid: expected 47 pixels"),
        (AlexNet, {"image_size": 50.0}, "image_size=50.0 is invalid: expected 47 pixels"),
        (AlexNet, {"channels": [96, 0, 384, 384, 256]}, "channels=.96, 0, .* is invalid: expected 5 whole numbers ≥ 1"),
        (AlexNet, {"channels": [96, 256]}, "channels=.96, 256. is invalid: expected 5 whole numbers ≥ 1"),
        (AlexNet, {"fc_width": -5}, "fc_width=-5 is invalid: expected a whole number ≥ 1"),
        (AlexNet, {"num_classes": 0}, "num_classes=0 is invalid: expected a whole number ≥ 1"),
        (AlexNet, {"dropout": 1.0}, "dropout=1.0 is invalid: expected a probability in .0, 1[)]"),
        (AlexNet, {"dropout": math.nan}, "dropout=nan is invalid"),
        (AlexNet, {"norm_placement": "later"}, "norm_placement=later is invalid: .* before_activation, after"),
        (AlexNet, {"image_size": 66, **PAPER}, "image_size=66 is invalid: expected 67 pixels or more for AlexNet"),
        (AlexNet, {"groups": 3}, "groups=3 is invalid: expected a divisor of the 256 feature maps at conv2"),
        (AlexNet, {"groups": 2, "channels": [96, 256, 384, 383, 256]}, "groups=2 .* the 383 .* at conv4"),
        (AlexNet, {"groups": 0}, "groups=0 is invalid: expected a whole number ≥ 1"),
        (AlexNet, {"conv1_padding": -1}, "conv1_padding=-1 is invalid: expected a whole number from 0 to 10"),
        (AlexNet, {"pool2_padding": 2}, "pool2_padding=2 is invalid: expected a whole number from 0 to 1"),
        (AlexNet, {"initialization": "papper"}, "initialization=papper is invalid: .* Did you mean paper[?]"),
        (AlexNet, {"dropout_placement": "inputs"}, "dropout_placement=inputs is invalid: .* before_fc, after_fc"),
        (LeNet5, {"image_size": 12}, "image_size=12 is invalid: expected 13 pixels or more for LeNet5"),
        (LeNet5, {"channels": [6]}, "channels=.6. is invalid: expected 2 whole numbers ≥ 1"),
        (LeNet5, {"fc_widths": [120, 0]}, "fc_widths=.120, 0. is invalid: expected 2 whole numbers ≥ 1"),
        (CNN4, {"channels": [6, 6]}, "channels=.6, 6. is invalid: expected 3 whole numbers ≥ 1"),
        (CNN4, {"image_size": 1}, "image_size=1 is invalid: expected 2 pixels or more for CNN4"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused_in_one_line_that_names_the_key(network, settings, message):
    with pytest.raises(ConfigError, match=f"^model.{message}") as refusal:
        network(**settings)
    assert "\n" not in str(refusal.value)


def test_the_smallest_sizes_work():
    assert AlexNet(image_size=47, fc_width=8)(torch.zeros(1, 3, 47, 47)).shape == (1, 10)
    assert AlexNet(image_size=67, fc_width=8, **PAPER)(torch.zeros(1, 3, 67, 67)).shape == (1, 10)
    assert LeNet5(image_size=13)(torch.zeros(1, 3, 13, 13)).shape == (1, 10)


def test_torchvision_is_built_for_the_installed_torch():
    """A torchvision for another torch version imports without its operators."""
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
