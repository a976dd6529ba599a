"""Rehearsal of untrusted networks: what a config could make a network allocate, refused on the meta device."""

import resource

import pytest
import torch
from helpers import config
from omegaconf import OmegaConf
from torch import nn

from alexnet_pl.config.rehearsal import MAX_SIDE, rehearse
from alexnet_pl.config.trust import check_targets
from alexnet_pl.runtime.errors import ConfigError

pytestmark = pytest.mark.security

HUGE = 10**9


def network(name: str, **changes: object) -> dict:
    model = OmegaConf.to_container(config(f"model={name}").model, resolve=True)
    return {**model, **changes}


def lenet(activation: dict | None = None, **changes: object) -> dict:
    return network("lenet5", **changes, **({"activation": {**activation, "_partial_": True}} if activation else {}))


def sequence(*layers: dict) -> dict:
    return {"_target_": "torch.nn.Sequential", "_args_": [*layers]}


BOMBS = {
    "one class in 10⁹": lenet(num_classes=HUGE),
    "wide convolutions": lenet(channels=[HUGE, HUGE]),
    "wide fully connected layers": network("alexnet_plain", fc_width=10**6),
    "window of LRN": lenet(norm={"_target_": "alexnet_pl.models.LocalResponseNorm", "_partial_": True, "size": HUGE}),
    "pooling upwards": lenet(pool={"_target_": "torch.nn.AdaptiveAvgPool2d", "_partial_": True}),
    "padding": sequence({"_target_": "torch.nn.ZeroPad2d", "padding": 5000}),
    "upsampling": sequence({"_target_": "torch.nn.Upsample", "scale_factor": 3000}),
    "many layers": {"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": HUGE},
    "copied layers": {"_target_": "torch.nn.Transformer", "d_model": 8, "num_encoder_layers": HUGE},
    "many blocks": {"_target_": "torchvision.models.DenseNet", "block_config": [HUGE]},
    "many stages": {"_target_": "torchvision.models.ShuffleNetV2", "stages_repeats": [HUGE] * 3,
                    "stages_out_channels": [8] * 5},
    "many patches": {"_target_": "torchvision.models.VisionTransformer", "image_size": 32, "patch_size": 1,
                     "num_layers": HUGE, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8},
    "a wide layer": sequence({"_target_": "torch.nn.Flatten"},
                             {"_target_": "torch.nn.Linear", "in_features": 3072, "out_features": HUGE}),
}  # fmt: skip


@pytest.mark.parametrize("model", BOMBS.values(), ids=BOMBS)
def test_a_network_beyond_the_limits_is_refused_without_memory_for_it(model):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_targets({"model": model})
    with pytest.raises(ConfigError, match=r"^model.* is (refused|invalid)"):
        rehearse(model, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BOMBS["padding"], r"^model, for an image of 32×32, is refused: a tensor has 1,1\d\d MiB. Expected at "
         r"most 4 MiB, and 256 MiB for all together. If you trust it: --trust torch.nn.Sequential, for train trust="),
        (BOMBS["many blocks"], "^model is refused: it takes more than 10,000 operations."),
        (BOMBS["wide convolutions"], "^model is refused: a tensor has "),
        (network("alexnet_plain", image_size=50), "^model is invalid for an image of 32×32: "),
        ({"_target_": "torch.nn.Identity", "_partial_": True}, "^model._target_=torch.nn.Identity is invalid: expected "
         "a network class"),
    ],
)  # fmt: skip
def test_the_message_names_the_limit_and_the_way_out(model, message):
    with pytest.raises(ConfigError, match=message):
        rehearse(model, 32)


@pytest.mark.parametrize("side", [0, -1, 10**6, True, "32", 32.0, None])
def test_an_image_size_out_of_range_is_refused(side):
    with pytest.raises(ConfigError, match=f"data.image_size=.* is invalid: expected an integer from 1 to {MAX_SIDE}"):
        rehearse(lenet(), side)


def test_networks_of_usual_sizes_pass():
    for name, side in [("lenet5", 13), ("lenet5", 1024), ("cnn4", 32), ("alexnet_bn", 50), ("alexnet_paper", 227)]:
        net = rehearse(network(name, image_size=side), side)
        assert net is not None
        assert all(parameter.is_meta for parameter in net.parameters())
    for name in ("DenseNet", "GoogLeNet", "MobileNetV2", "SqueezeNet"):
        model = {"_target_": f"torchvision.models.{name}", "num_classes": 10}
        check_targets({"model": model})
        assert isinstance(rehearse(model, 224), nn.Module)


def test_a_network_that_the_user_trusts_is_not_rehearsed():
    model = {"_target_": "torch.nn.Flatten"}
    assert rehearse(model, 32) is not None
    assert rehearse(model, 32, trust=["torch.nn.Flatten"]) is None
    assert rehearse(model, 32, trust=["my_module"]) is not None


def test_nothing_is_left_of_a_rehearsal():
    state = torch.random.get_rng_state()
    rehearse(lenet(), 32)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.zeros(1).device.type == "cpu"
