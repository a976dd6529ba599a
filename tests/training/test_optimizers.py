"""Muon against NumPy and AdamW, and runs whose optimizer has several parameter groups."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, assert_same_run, config, metric_rows, run_until_stopped, weights
from hydra.utils import instantiate
from torch import nn

from alexnet_pl.config.optimizers import convolution_groups, optimizer_factory
from alexnet_pl.runtime.run_folder import finished_result, read_config
from alexnet_pl.training.callbacks.checkpoint import TrainingEnd
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.optimizers import Muon, orthogonalize
from alexnet_pl.training.run import run

GROUPS = ("optimizer.decay_biases_and_norms=false", "optimizer.bias_lr_multiplier=2")


# --- Muon -----------------------------------------------------------------------------------------------------------


def newton_schulz(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """Apply the quintic polynomial to the singular values, which is what the iteration amounts to, in float64."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
def test_orthogonalize_is_the_polynomial_of_the_singular_values(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    ours = orthogonalize(torch.from_numpy(matrix).float()).double().numpy()
    np.testing.assert_allclose(ours, newton_schulz(matrix), atol=2e-5)
    rounded = orthogonalize(torch.from_numpy(matrix).bfloat16()).double().numpy()
    np.testing.assert_allclose(rounded, newton_schulz(matrix), atol=0.1)
    values = np.linalg.svd(ours, compute_uv=False)
    assert 0.6 < values.min() <= values.max() < 1.25


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_on_a_convolution_follow_the_formula(nesterov):
    random = np.random.default_rng(1)
    start, gradients = random.normal(size=(6, 2, 3, 3)), random.normal(size=(4, 6, 2, 3, 3))
    weight = nn.Parameter(torch.from_numpy(start).float().contiguous(memory_format=torch.channels_last))
    optimizer = Muon([weight], lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.01, bfloat16=False)
    expected, buffer = start.reshape(6, 18), np.zeros((6, 18))
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        g = gradient.reshape(6, 18)
        buffer = 0.8 * buffer + 0.2 * g
        update = newton_schulz(0.8 * buffer + 0.2 * g if nesterov else buffer)
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * max(1, 6 / 18) ** 0.5 * update
    np.testing.assert_allclose(weight.detach().numpy().reshape(6, 18), expected, atol=1e-5)


def test_the_groups_of_a_convolution_are_matrices_of_their_own():
    """A grouped convolution is updated like separate ones, each of which reads its part of the inputs."""
    cfg = config("optimizer=muon", "optimizer.bfloat16=false")
    layers = (nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(4, 24, 1, groups=2))
    net = nn.Sequential(*layers, nn.Conv2d(2, 4, 1))
    apart = nn.ModuleList(
        nn.Conv2d(conv.in_channels // conv.groups, conv.out_channels // conv.groups, conv.kernel_size)
        for conv in net
        for _ in range(conv.groups)
    )
    make = optimizer_factory(instantiate(cfg.optimizer))
    whole, separate = make(net.named_parameters(), convolution_groups(net)), make(apart.named_parameters())

    def parts() -> list[torch.Tensor]:
        return [chunk for conv in net for chunk in conv.weight.chunk(conv.groups)]

    with torch.no_grad():
        for part, chunk in zip(apart, parts(), strict=True):
            part.weight.copy_(chunk)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for conv in net:
            conv.weight.grad = torch.randn(conv.weight.shape, generator=generator)
        gradients = [chunk for conv in net for chunk in conv.weight.grad.chunk(conv.groups)]
        for part, gradient in zip(apart, gradients, strict=True):
            part.weight.grad = gradient
        whole.step()
        separate.step()
    for part, chunk in zip(apart, parts(), strict=True):
        torch.testing.assert_close(chunk, part.weight, rtol=0, atol=1e-6)


def test_a_run_tells_its_optimizer_the_groups_of_convolutions():
    cfg = config("optimizer=muon", "model=alexnet_paper", "data.image_size=96", "model.channels=[8,16,24,24,16]",
                 "model.fc_width=16")  # fmt: skip
    model = ImageClassifier(instantiate(cfg.model), 10, instantiate(cfg.optimizer))
    parts = model.configure_optimizers()["optimizer"].parts
    assert parts == {model.net.get_parameter(f"features.conv{number}.weight"): 2 for number in (2, 4, 5)}


def test_a_tall_matrix_moves_further():
    moved = []
    for shape in ((4, 4), (16, 4)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.eye(*shape)
        Muon([weight], lr=1.0, momentum=0).step()
        moved.append(weight.detach().norm().item())
    assert moved[1] == pytest.approx(2 * moved[0], rel=1e-5)


def test_vectors_are_left_to_adamw():
    net, twin = nn.Linear(3, 4), nn.Linear(3, 4)
    twin.load_state_dict(net.state_dict())
    ours = Muon(net.parameters(), lr=0.02, weight_decay=0.1, adamw_lr=0.005)
    theirs = torch.optim.AdamW([twin.bias], lr=0.005, weight_decay=0.1)
    for step in range(3):
        net.bias.grad = twin.bias.grad = torch.randn(4, generator=torch.Generator().manual_seed(step))
        net.weight.grad = torch.ones(4, 3)
        ours.step()
        theirs.step()
    assert torch.equal(net.bias, twin.bias)
    assert [group["lr"] for group in ours.param_groups] == [0.02, 0.005]
    assert not torch.equal(net.weight, twin.weight)


def test_biases_and_locally_connected_weights_are_left_to_adamw():
    """A bias per position is a matrix by its shape, and no weight; ``(36, 32, 576)`` is none of Muon's shapes."""
    for overrides in ((), ("optimizer.decay_biases_and_norms=true",)):
        cfg = config("optimizer=muon", "model=cuda_convnet_13pct", *overrides)
        net = instantiate(cfg.model)
        optimizer = optimizer_factory(instantiate(cfg.optimizer))(net.named_parameters())
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        found = [names[id(p)] for group in optimizer.param_groups if group["is_muon"] for p in group["params"]]
        assert found
        assert all(name.endswith(".weight") and "local" not in name for name in found)
        counted = sum(len(group["params"]) for group in optimizer.param_groups)
        assert counted == len(names)


@pytest.mark.parametrize("make", [Muon, partial(torch.optim.SGD, momentum=0.9)])
def test_one_cycle_cycles_the_momentum(make):
    """Torch's schedule would cycle AdamW's first beta instead if Muon had one by default."""
    net = nn.Linear(3, 4)
    optimizer = make(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=21, pct_start=0.5)
    momenta = []
    for _ in range(20):
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        schedule.step()
    assert (momenta[0], min(momenta)) == pytest.approx((0.95, 0.85), abs=0.002)
    assert momenta[-1] > 0.94
    assert "betas" not in optimizer.param_groups[0]
    if make is Muon:
        assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)


def test_a_loaded_state_continues_both_parts():
    def steps(net: nn.Module, optimizer: Muon, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    net = nn.Linear(3, 4)
    optimizer = Muon(net.parameters())
    steps(net, optimizer, range(3))
    twin = nn.Linear(3, 4)
    twin.load_state_dict(net.state_dict())
    resumed = Muon(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares tensors
    for pair in ((net, optimizer), (twin, resumed)):
        steps(*pair, range(3, 6))
    assert torch.equal(net.bias, twin.bias)
    assert torch.equal(net.weight, twin.weight)


# --- runs with several groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [("optimizer=muon",), ("optimizer=sgd", "+optimizer.layers.fc3.lr_multiplier=0.5", *GROUPS)]
)
def test_a_run_with_groups_resumes_bit_for_bit(optimizer, tmp_path, monkeypatch):
    settings = (*SHORT_RUN, *optimizer, "scheduler=one_cycle", "trainer.fast_dev_run=3",
                "callbacks.resume.min_interval_seconds=0")  # fmt: skip
    run(config(*settings, run_dir=tmp_path / "whole"))
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, step=5)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_every_group_follows_the_schedule_and_is_logged(tmp_path, monkeypatch):
    seen: list[list[float]] = []
    monkeypatch.setattr(
        TrainingEnd,
        "on_before_optimizer_step",
        lambda self, trainer, module, optimizer: seen.append([group["lr"] for group in optimizer.param_groups]),
        raising=False,
    )
    settings = ("optimizer=sgd", "optimizer.lr=0.1", "scheduler=one_cycle", *GROUPS, "trainer.gradient_clip_val=1")
    run(config(*SHORT_RUN, *settings, "+optimizer.layers.fc5.weight_decay=0.1", run_dir=tmp_path / "run"))
    assert len(seen) == 4
    for first, *others in seen:
        assert others == pytest.approx([first, 2 * first])
    assert max(first for first, *_ in seen) == pytest.approx(0.1, rel=0.5)
    rows = metric_rows(tmp_path / "run")
    assert [float(row["lr/biases_fc5_biases"]) for row in rows] == pytest.approx([2 * float(row["lr"]) for row in rows])
    assert "lr/fc5_weights" in rows[0]


def test_clipping_can_begin_on_a_resume_in_mixed_precision(tmp_path):
    """A fused optimizer, the default, cannot be clipped then: a new run is not fused either."""
    settings = (*SHORT_RUN, "trainer.precision=bf16-mixed", "callbacks.resume.keep=true")
    run(config(*settings, run_dir=tmp_path / "run"))
    changed = ("resume=here", "allow_changes=true", "trainer.gradient_clip_val=1.0", "trainer.max_epochs=3")
    run(config(*changed, run_dir=tmp_path / "run"), named=[key.split("=")[0] for key in changed[2:]])
    assert finished_result(tmp_path / "run")["epochs"] == 3
    assert read_config(tmp_path / "run")["optimizer"]["fused"] is False


def test_changed_groups_restart_the_optimizer(tmp_path):
    run(config(*SHORT_RUN, "optimizer=sgd", run_dir=tmp_path / "run"))
    changed = ("resume=here", "allow_changes=true", *GROUPS, "trainer.max_epochs=3")
    before = weights(tmp_path / "run")
    run(config(*changed, run_dir=tmp_path / "run"), named=[key.split("=")[0] for key in changed[2:]])
    assert finished_result(tmp_path / "run")["epochs"] == 3
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())
