"""The paper's training: update rule, learning rates, and the experiment that combines them."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from torch import nn

from alexnet_pl.config.optimizers import optimizer_factory
from alexnet_pl.config.resolvers import scale_lr
from alexnet_pl.config.schedules import schedule_factory
from alexnet_pl.config.validate import validate
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.lr_schedules import WarmupPlateau
from alexnet_pl.training.run import run

# The whole recipe on small images with a narrow network: 256/224 of 67 pixels is 77.
SMALL = (
    *("experiment=paper_imagenet", "data=digits", "data.image_size=67", "data.resize_size=77", "model.conv1_padding=0"),
    *("model.channels=[8,12,16,16,12]", "model.fc_width=16", "model.num_classes=10"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true"),
)


# --- the update rule ------------------------------------------------------------------------------------------------


def torch_steps(gradients: np.ndarray, rates: list[float], start: np.ndarray) -> np.ndarray:
    """Weights after each step of ``optimizer=sgd``, in float64."""
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = optimizer_factory(instantiate(config("optimizer=sgd").optimizer))([("weight", weight)])
    weights = []
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        weights.append(weight.detach().numpy().copy())
    return np.array(weights)


def paper_steps(gradients: np.ndarray, rates: list[float], start: np.ndarray, rescaled: bool = False) -> np.ndarray:
    """Section 5 as printed: v ← 0.9·v − 0.0005·ε·w − ε·g, w ← w + v; ``rescaled``: v follows a change of ε."""
    w, v, before, weights = start.copy(), np.zeros_like(start), rates[0], []
    for g, rate in zip(gradients, rates, strict=True):
        kept = v * rate / before if rescaled else v
        v = 0.9 * kept - 0.0005 * rate * w - rate * g
        w, before = w + v, rate
        weights.append(w)
    return np.array(weights)


def test_sgd_is_the_papers_rule_as_long_as_the_rate_stays():
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=7), random.normal(size=(40, 7))
    rates = [0.01] * 40
    np.testing.assert_allclose(torch_steps(gradients, rates, start), paper_steps(gradients, rates, start), rtol=1e-12)
    without_decay = np.array(paper_steps(gradients, rates, start) - paper_steps(gradients, rates, 0 * start))
    assert np.abs(without_decay[-1] - start).max() > 1e-4  # the decay is large enough to be seen here


def test_when_the_rate_changes_torch_rescales_the_velocity_and_the_paper_does_not():
    random = np.random.default_rng(1)
    start, gradients = random.normal(size=5), random.normal(size=(60, 5))
    rates = [0.01] * 20 + [0.001] * 20 + [0.0005] * 20
    ours = torch_steps(gradients, rates, start)
    np.testing.assert_allclose(ours, paper_steps(gradients, rates, start, rescaled=True), rtol=1e-12)
    np.testing.assert_allclose(ours[:20], paper_steps(gradients, rates, start)[:20], rtol=1e-12)
    assert np.abs(ours - paper_steps(gradients, rates, start))[20:].max() > 1e-4


def test_that_difference_amounts_to_eight_steps_at_the_old_rate():
    """docs/paper-network.md: a velocity v at the drop to a tenth carries the paper's weights 9·v on, torch's 0.9·v."""
    gradients, start = np.zeros((300, 1)), np.zeros(1)
    gradients[0] = -1
    rates = [0.01] + [0.001] * 299
    velocity = 0.01
    # The paper's own weight decay on these weights is of the order of 1e-6 and left out.
    assert paper_steps(gradients, rates, start)[-1] - velocity == pytest.approx(9 * velocity, rel=1e-2)
    assert torch_steps(gradients, rates, start)[-1] - velocity == pytest.approx(0.9 * velocity, rel=1e-2)


# --- learning rates -------------------------------------------------------------------------------------------------


def schedule(lr: float = 0.01, *overrides: str) -> tuple[WarmupPlateau, torch.optim.Optimizer]:
    cfg = config("optimizer=sgd", "scheduler=warmup_plateau", f"optimizer.lr={lr}", *overrides)
    optimizer = optimizer_factory(instantiate(cfg.optimizer))([("bias", nn.Parameter(torch.zeros(1)))])
    return schedule_factory(instantiate(cfg.scheduler))(optimizer), optimizer


def rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def test_the_rate_falls_to_a_tenth_three_times_and_no_more():
    plateau, optimizer = schedule(0.01, "scheduler.patience=1", "scheduler.warmup_epochs=0")
    seen = []
    for error in [0.9, 0.8, *[0.8] * 12]:
        plateau.step(error)
        seen.append(rate(optimizer))
    assert seen == pytest.approx([0.01] * 3 + [1e-3] * 2 + [1e-4] * 2 + [1e-5] * 7)


def test_the_warm_up_is_linear_by_step_and_nothing_falls_in_it():
    plateau, optimizer = schedule(0.08, "scheduler.warmup_epochs=2", "scheduler.patience=0")
    seen = []
    for epoch in range(5):
        for batch in range(4):
            plateau.warm_up(epoch + batch / 4)
            seen.append(rate(optimizer))
        plateau.step(0.5)  # never improves after the first epoch
    assert seen[:8] == pytest.approx(np.linspace(0.01, 0.08, 9)[:8])
    assert seen[8:] == pytest.approx([0.08] * 4 + [0.008] * 4 + [0.0008] * 4)
    assert seen[8] == 0.08  # exactly


def test_a_learning_rate_that_is_no_higher_has_no_warm_up():
    for lr in (0.01, 0.001):
        plateau, optimizer = schedule(lr)
        for progress in (0, 0.5, 4.9, 5, 5.5):
            plateau.warm_up(progress)
            assert rate(optimizer) == lr


def test_a_schedule_recreated_after_the_warm_up_keeps_the_rate():
    """``allow_changes`` recreates it for a learning rate that was already reduced."""
    plateau, optimizer = schedule(0.08, "scheduler.warmup_epochs=2")
    optimizer.param_groups[0]["lr"] = 0.008
    plateau.warm_up(7.25)
    assert rate(optimizer) == 0.008


def test_the_state_of_the_schedule_is_plain_values(tmp_path):
    plateau, _ = schedule(0.08)
    plateau.warm_up(0.5)
    torch.save(plateau.state_dict(), tmp_path / "state.pt")
    other, optimizer = schedule(0.08)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.warm_up(6.0)
    assert rate(optimizer) == 0.08


def test_the_linear_rule():
    assert (scale_lr(0.01, 128), scale_lr(0.01, 1024), scale_lr(0.01, 64)) == (0.01, 0.08, 0.005)
    for batch, lr in ((128, 0.01), (512, 0.04)):
        cfg = config("experiment=paper_imagenet", f"data.batch_size={batch}")
        assert cfg.optimizer.lr == pytest.approx(lr)
    assert config("experiment=paper_imagenet", "optimizer.lr=0.5").optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scheduler.warmup_epochs=-1", "scheduler.warmup_epochs=-1 is invalid: expected 0 or more epochs."),
        ("scheduler.warmup_epochs=inf", "scheduler.warmup_epochs=inf"),
        ("scheduler.warmup_epochs=soon", "scheduler.warmup_epochs=soon is invalid: expected a number"),
        ("scheduler.warmup_lr=0", "scheduler.warmup_lr=0 is invalid: expected a number above 0."),
        ("scheduler.max_reductions=-1", "scheduler.max_reductions=-1"),
        ("scheduler.factor=2", "scheduler.factor=2"),
        ("scheduler.monitor=val/eror", "scheduler.monitor=val/eror is invalid: .* Did you mean val/error[?]"),
        (
            "scheduler.monitor=val/acc",
            "scheduler.mode=min .the default. is invalid: expected max. It would keep the worst val/acc. "
            "Set .scheduler.mode=max",
        ),
        ("+scheduler.patients=3", "scheduler.patients=3 is invalid: WarmupPlateau has no argument patients."),
        ("optimizer.momentum=-1", "Invalid momentum value: -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        validate(config("optimizer=sgd", "scheduler=warmup_plateau", override))


def test_the_plateau_watches_what_it_is_told_to():
    cfg = config("optimizer=sgd", "scheduler=warmup_plateau")
    model = ImageClassifier(nn.Linear(1, 1), 10, instantiate(cfg.optimizer), instantiate(cfg.scheduler))
    assert model.configure_optimizers()["lr_scheduler"]["monitor"] == "val/error"
    cfg = config("scheduler=plateau")
    model = ImageClassifier(nn.Linear(1, 1), 10, instantiate(cfg.optimizer), instantiate(cfg.scheduler))
    assert model.configure_optimizers()["lr_scheduler"]["monitor"] == "val/loss"


# --- the experiment -------------------------------------------------------------------------------------------------


def test_the_experiment_is_the_papers_training():
    cfg = config("experiment=paper_imagenet")
    validate(cfg)
    assert (cfg.model.num_classes, cfg.model.groups, cfg.model.dropout_placement) == (1000, 2, "after_fc")
    assert (cfg.data.image_size, cfg.data.resize_size, cfg.data.test_crops) == (224, 256, 10)
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (128, 90)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.01, 0.9, 5e-4)
    assert (cfg.scheduler.factor, cfg.scheduler.max_reductions, cfg.scheduler.monitor) == (0.1, 3, "val/error")
    augment = instantiate(cfg.augment)
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    assert augment(images).shape == (2, 3, 224, 224)
    assert (augment.transforms["color"].alpha_std, augment.transforms["crop"].padding) == (0.1, 0)


def test_the_whole_recipe_trains_on_any_data(tmp_path):
    """Crops, flips, color noise, SGD, warm-up for a larger batch, ten-crop test; rates of each epoch's last step."""
    run(config(*SMALL, "model.initialization=torch", "data.batch_size=256", "scheduler.warmup_epochs=2",
               "trainer.max_epochs=3", run_dir=tmp_path / "run"))  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished"
    assert {"test/acc", "test/acc_top5", "test/loss"} <= result.keys()
    assert {"test/acc_ten_crop", "test/acc_top5_ten_crop", "test/loss_ten_crop"} <= result.keys()
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # 1,293 images, 256 a step: five steps an epoch. From 0.01 to 0.02 in ten steps.
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.014, 0.019, 0.02])
    tested = [row for row in rows if row["test/acc"]]
    assert len(tested) == 1
    assert float(tested[0]["test/error_ten_crop"]) == pytest.approx(1 - result["test/acc_ten_crop"], abs=1e-6)
