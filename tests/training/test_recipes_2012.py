"""Recipes of the authors' code: rates and decays by parameter, the update rule, resuming."""

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, assert_same_run, config, run_until_stopped
from hydra.utils import instantiate
from torch import nn

from alexnet_pl.config.optimizers import optimizer_factory
from alexnet_pl.config.schedules import schedule_factory
from alexnet_pl.training.run import run

SMALL = ("model.channels=[8,8,8,8,8]", "model.fc_width=8")


def network_and_optimizer(*overrides: str) -> tuple[nn.Module, torch.optim.Optimizer, object]:
    cfg = config(*overrides)
    net = instantiate(cfg.model)
    optimizer = optimizer_factory(instantiate(cfg.optimizer))(net.named_parameters())
    return net, optimizer, cfg


def rules(*overrides: str) -> dict[str, tuple[float, float]]:
    """Return name → learning rate and weight decay."""
    net, optimizer, _ = network_and_optimizer(*overrides)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(
    ("experiment", "decays"),
    [
        ("cuda_convnet_80sec", {"conv1": 0.004, "conv2": 0.004, "conv3": 0.004, "fc4": 0.03, "fc5": 0.03}),
        ("cuda_convnet_18pct", {"conv1": 0.004, "conv2": 0.004, "conv3": 0.004, "fc4": 1}),
        ("cuda_convnet_13pct", {"conv1": 0, "conv2": 0, "local3": 0.004, "local4": 0.004, "fc5": 0.004}),
        ("cuda_convnet_11pct", {"conv1": 0, "conv2": 0, "local3": 0.004, "local4": 0.004, "fc5": 0.01}),
        ("lrn_cuda_convnet", {"conv1": 0, "conv2": 0, "local3": 0.004, "local4": 0.004, "fc5": 0.01}),
    ],
)
def test_rates_and_decays_of_the_networks_for_cifar10(experiment, decays):
    """layer-params-*.cfg: epsW 0.001, epsB 0.002, wc as here on weights and none on biases."""
    found = {tuple(name.split(".")[1:]): value for name, value in rules(f"experiment={experiment}").items()}
    weights = {(layer, "weight"): (0.001, decay) for layer, decay in decays.items()}
    assert found == weights | {(layer, "bias"): (0.002, 0) for layer in decays}


def test_rates_of_figure_1_by_the_recipe_of_2012():
    rates = {("2012", "relu"): 0.002, ("2012", "tanh"): 0.016,
             ("unit_variance", "relu"): 0.02, ("unit_variance", "tanh"): 0.04}  # fmt: skip
    for (name, activation), rate in rates.items():
        found = rules(f"experiment=relu_vs_tanh_{name}", f"model/activation={activation}")
        assert {value for name, value in found.items() if name.endswith("weight")} == {(rate, 0)}
        assert {value for name, value in found.items() if name.endswith("bias")} == {(2 * rate, 0)}


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_figure_1_on_unit_variance_starts_as_the_same_function(activation):
    """The scale of the input moves into conv1's weights; a step of SGD then changes its outputs 63² times less."""
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs, steps = [], []
    for experiment in ("relu_vs_tanh_2012", "relu_vs_tanh_unit_variance"):
        cfg = config(f"experiment={experiment}", f"model/activation={activation}")
        mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (cfg.data.mean, cfg.data.std))
        assert torch.equal(std, std[0].expand(3, 1, 1))
        torch.manual_seed(1)
        net = instantiate(cfg.model).double()
        inputs = ((images - mean) / std).double()
        outputs.append(net(inputs))
        nn.functional.cross_entropy(outputs[-1], torch.arange(8)).backward()
        with torch.no_grad():
            weight = net.features.conv1.weight
            steps.append(nn.functional.conv2d(inputs, weight.grad, padding=2))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-12)
    largest = steps[0].abs().max().item()
    assert largest > 0
    torch.testing.assert_close(steps[0], (0.247 * 255) ** 2 * steps[1], rtol=0, atol=1e-5 * largest)


def test_rates_and_decays_of_the_network_of_2012_over_91_epochs():
    """layer-params-145.cfg and its comments for ILSVRC-2012."""
    _, optimizer, cfg = network_and_optimizer("experiment=imagenet_2012", *SMALL)
    scheduler = schedule_factory(instantiate(cfg.scheduler))(optimizer)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "weights": 5e-4, "biases": 0, "conv1 weights": 5e-4, "conv1 biases": 0
    }  # fmt: skip
    rates: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}
    for _ in range(cfg.trainer.max_epochs):
        for group in optimizer.param_groups:
            rates[group["name"]].append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates["weights"] == pytest.approx([0.01] * 25 + [0.001] * 26 + [1e-4] * 28 + [1e-5] * 12)
    assert rates["conv1 weights"] == pytest.approx([0.01] * 25 + [0.001] * 26 + [1e-4] * 16 + [1e-5] * 5 + [0.0] * 19)
    assert rates["biases"] == pytest.approx([0.02] * 91)
    assert rates["conv1 biases"] == pytest.approx([0.02] * 72 + [0.0] * 19)


def test_steps_are_those_of_the_authors_code():
    """weights.cuh: inc = mom * inc + eps * grad - eps * wc * w, w += inc; the biases without wc, at twice the rate."""
    net, optimizer, _ = network_and_optimizer("experiment=lrn_cuda_convnet", "optimizer.lr=0.1")
    layer = net.features.local3
    values = [parameter.detach().double().numpy().copy() for parameter in (layer.weight, layer.bias)]
    increments = [np.zeros_like(value) for value in values]
    for seed in range(5):
        generator = np.random.default_rng(seed)
        for place, (parameter, eps, decay) in enumerate(((layer.weight, 0.1, 0.004), (layer.bias, 0.2, 0.0))):
            gradient = generator.standard_normal(values[place].shape)
            parameter.grad = torch.from_numpy(gradient).float()
            increments[place] = 0.9 * increments[place] - eps * gradient - eps * decay * values[place]
            values[place] = values[place] + increments[place]
        optimizer.step()
    for parameter, value in zip((layer.weight, layer.bias), values, strict=True):
        np.testing.assert_allclose(parameter.detach(), value, rtol=1e-4, atol=1e-5)


def test_the_recipe_resumes_bit_for_bit_across_the_end_of_the_color_noise(tmp_path, monkeypatch):
    settings = (
        *SHORT_RUN, "augment=paper_2012", "augment/color=cifar10_2012", "augment.color.epochs=1",
        "augment.crop.shared_by=16", "data.resize_size=36", "optimizer=sgd", "optimizer.bias_lr_multiplier=2",
        "scheduler=milestones", "scheduler.epochs=[1]", "scheduler.factors=[0.1]", "scheduler.hold_biases=true",
        "callbacks.resume.min_interval_seconds=0",
    )  # fmt: skip
    run(config(*settings, run_dir=tmp_path / "whole"))
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, step=2)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
