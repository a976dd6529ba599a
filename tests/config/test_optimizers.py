"""Parameter groups: which parameter gets which learning rate and weight decay, by name."""

import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from torch import nn

from alexnet_pl.config.optimizers import Grouping, matches, optimizer_factory, parameter_groups
from alexnet_pl.config.validate import validate
from alexnet_pl.models import AlexNet
from alexnet_pl.runtime.errors import ConfigError


def network() -> nn.Module:
    """Return AlexNet with BatchNorm and the names of its parameters, without memory."""
    with torch.device("meta"):
        return AlexNet(norm=nn.BatchNorm2d, channels=(8, 8, 8, 8, 8), fc_width=8)


def rules(grouping: Grouping, lr: float = 0.1, weight_decay: float = 0.01) -> dict[str, tuple[float, float]]:
    """Return name → learning rate and weight decay of each parameter, checking that each is in one group."""
    net = network()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net.named_parameters(), lr, weight_decay, grouping)
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
    assert len({group["name"] for group in groups}) == len(groups)
    return found


def test_the_rules_by_name():
    layers = {"conv*": {"weight_decay": 0.0}, "fc8": {"lr_multiplier": 0.5}, "conv5": {"lr_multiplier": 0.25}}
    found = rules(Grouping(decay_biases_and_norms=False, bias_lr_multiplier=2, layers=layers))
    expected = {"features.conv5.weight": (0.025, 0.01), "features.conv5.bias": (0.05, 0.0)}  # the last pattern counts
    expected |= {"classifier.fc8.weight": (0.05, 0.01), "classifier.fc8.bias": (0.1, 0.0)}
    for name in ("conv1", "conv2", "conv3", "conv4"):
        expected |= {f"features.{name}.weight": (0.1, 0.0), f"features.{name}.bias": (0.2, 0.0)}
    for name in ("fc6", "fc7"):
        expected |= {f"classifier.{name}.weight": (0.1, 0.01), f"classifier.{name}.bias": (0.2, 0.0)}
    for name in ("norm1", "norm2"):
        expected |= {f"features.{name}.weight": (0.1, 0.0), f"features.{name}.bias": (0.2, 0.0)}
    assert found == expected


def test_groups_at_the_full_rate_come_first_and_have_telling_names():
    grouping = Grouping(decay_biases_and_norms=False, bias_lr_multiplier=2, layers={"conv1": {"lr_multiplier": 0.1}})
    groups = parameter_groups(network().named_parameters(), 0.1, 0.01, grouping)
    assert [group["name"] for group in groups] == ["norms", "weights", "conv1 weights", "conv1 biases", "biases"]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.1, 0.01, 0.02, 0.2])


@pytest.mark.parametrize(
    ("pattern", "is_match"),
    [
        ("conv1", True),
        ("features.conv1", True),
        ("conv[12]", True),
        ("features.*", True),
        ("conv1.weight", True),
        ("weight", True),
        ("conv", False),
        ("onv1", False),
        ("features", False),
    ],
)
def test_patterns_match_the_ends_of_dotted_names(pattern, is_match):
    assert matches("features.conv1.weight", pattern) is is_match


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_defaults_make_the_group_that_torch_makes(name):
    cfg = config(f"optimizer={name}")
    net = AlexNet(channels=(8, 8, 8, 8, 8), fc_width=8)
    ours = optimizer_factory(instantiate(cfg.optimizer))(net.named_parameters())
    plain = {key: value for key, value in cfg.optimizer.items() if key not in ("_target_", "_partial_")}
    plain = {key: plain[key] for key in plain if key not in Grouping.__dataclass_fields__}
    theirs = getattr(torch.optim, {"adam": "Adam", "sgd": "SGD"}[name])(net.parameters(), **plain)
    assert ours.param_groups == theirs.param_groups


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+optimizer.layers.conv9.lr_multiplier=2"], "optimizer.layers.conv9 is invalid: no layer matches"),
        (["+optimizer.layers.conv1.lr=2"], "optimizer.layers.conv1.lr=2 is invalid: no such key. Available: lr_mu"),
        (["+optimizer.layers.conv1.weight_decay=-1"], "weight_decay=-1 is invalid: expected a number ≥ 0"),
        (["+optimizer.layers.conv1=3"], "optimizer.layers.conv1=3 is invalid: expected a mapping with"),
        (["optimizer.layers=3"], "optimizer.layers=3 is invalid: expected a mapping"),
        (["optimizer.bias_lr_multiplier=0"], "optimizer.bias_lr_multiplier=0 is invalid: expected a number above 0"),
        (["optimizer.bias_lr_multiplier=twice"], "optimizer.bias_lr_multiplier=twice is invalid: expected a number"),
        (["optimizer.decay_biases_and_norms=1"], "optimizer.decay_biases_and_norms=1 is invalid: expected true or"),
        (["optimizer=muon", "optimizer.momentum=1"], "optimizer.momentum=1 is invalid: expected a number from 0"),
        (["optimizer=muon", "optimizer.adamw_lr=0"], "optimizer.adamw_lr=0 is invalid: expected a number above 0"),
        (["optimizer=muon", "optimizer.betas=[0.9,1]"], r"optimizer.betas\[1\]=1 is invalid"),
        (["optimizer=muon", "optimizer.betas=[0.9]"], r"optimizer.betas=\[0.9\] is invalid: expected a list of two"),
        (["optimizer=adamw", "+optimizer.betas=[0.9]"], r"optimizer.betas=\[0.9\] is invalid: expected a list of two"),
        (["optimizer=muon", "optimizer.weight_decay=-1"], "optimizer.weight_decay=-1 is invalid"),
        (["optimizer=muon", "optimizer.newton_schulz_steps=0"], "newton_schulz_steps=0 is invalid: expected a whole"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused_before_data_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(config("model=alexnet_lrn", *overrides))


def test_patterns_of_any_optimizer_are_accepted():
    validate(
        config("optimizer._target_=torch.optim.RMSprop", "~optimizer.fused", "+optimizer.layers.fc8.lr_multiplier=2")
    )


@pytest.mark.parametrize("pattern", ["norm1", "fc8.bias", "*.bias"])
def test_a_decay_of_what_is_exempt_is_refused(pattern):
    """Issue: it was accepted and stayed 0."""
    layers = {pattern: {"weight_decay": 0.1}}
    with pytest.raises(ConfigError, match=r"weight_decay=0.1 is invalid: expected weights, but only biases or norm"):
        rules(Grouping(decay_biases_and_norms=False, layers=layers))
    found = rules(Grouping(layers=layers))
    name = "features.norm1.weight" if pattern == "norm1" else "classifier.fc8.bias"
    assert found[name] == (0.1, 0.1)
