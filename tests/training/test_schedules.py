"""Learning-rate schedules of conf/scheduler in whole runs: closed forms as oracles, also after a resume."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import config, metric_rows, run_until_stopped
from hydra.utils import instantiate
from lightning import Trainer
from torch import nn

from alexnet_pl.config.optimizers import optimizer_factory
from alexnet_pl.config.schedules import RunLength, schedule_factory
from alexnet_pl.config.validate import validate
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.callbacks.checkpoint import TrainingEnd
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.lr_schedules import WarmupPlateau
from alexnet_pl.training.run import run

# 1,293 images: 10 batches of 128 per epoch.
RUN = (
    *("model=lenet5", "data=digits", "data.batch_size=128", "optimizer=sgd", "optimizer.lr=0.1"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=3"),
    "callbacks.resume.min_interval_seconds=0",
)


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """Collect the learning rate of every optimizer step that runs take."""
    seen: list[float] = []

    def record(self, trainer, pl_module, optimizer):
        seen.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(TrainingEnd, "on_before_optimizer_step", record, raising=False)
    return seen


def one_cycle(step: int, total: int, peak: float) -> float:
    """Return the rate of ``step`` as Smith and Topin's cycle with cosine annealing has it, from 0."""
    rise = 0.3 * total - 1
    start, end = peak / 25, peak / 25 / 1e4

    def cosine(a: float, b: float, fraction: float) -> float:
        return b + (a - b) / 2 * (1 + math.cos(math.pi * fraction))

    return cosine(start, peak, step / rise) if step <= rise else cosine(peak, end, (step - rise) / (total - 1 - rise))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["scheduler=one_cycle"], [one_cycle(k, 30, 0.1) for k in range(30)]),
        (["scheduler=one_cycle", "trainer.limit_train_batches=4"], [one_cycle(k, 12, 0.1) for k in range(12)]),
        (["scheduler=one_cycle", "+trainer.max_steps=17"], [one_cycle(k, 17, 0.1) for k in range(17)]),
        (["scheduler=one_cycle", "trainer.accumulate_grad_batches=4"], [one_cycle(k, 9, 0.1) for k in range(9)]),
        (["scheduler=cosine"], [0.05 * (1 + math.cos(math.pi * (k // 10) / 3)) for k in range(30)]),
        (["scheduler=cosine", "scheduler.interval=step"], [0.05 * (1 + math.cos(math.pi * k / 30)) for k in range(30)]),
        (["scheduler=step", "scheduler.step_size=1"], [0.1 * 0.1 ** (k // 10) for k in range(30)]),
        (["scheduler=step", "scheduler.interval=step"], [0.1 * 0.1 ** (k // 10) for k in range(30)]),
        (["scheduler=constant"], [0.1] * 30),
        (["~scheduler"], [0.1] * 30),
        (["scheduler=constant", "scheduler.warmup_epochs=1.5"], [0.1 * min(1, (k + 1) / 15) for k in range(30)]),
        (["scheduler=cosine", "scheduler.interval=step", "scheduler.warmup_epochs=0.5"],
         [0.05 * (1 + math.cos(math.pi * k / 30)) * min(1, (k + 1) / 5) for k in range(30)]),
        (["scheduler=step", "scheduler.step_size=1", "scheduler.warmup_epochs=2"],
         [0.1 * 0.1 ** (k // 10) * min(1, (k + 1) / 20) for k in range(30)]),
    ],
)  # fmt: skip
def test_every_step_has_the_rate_of_the_closed_form(overrides, expected, rates, tmp_path):
    run(config(*RUN, *overrides, run_dir=tmp_path / "run"))
    assert rates == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("overrides", ["scheduler=one_cycle", "scheduler=cosine scheduler.warmup_epochs=2"])
@pytest.mark.parametrize("step", [7, 10, pytest.param(20, marks=pytest.mark.slow)])  # inside an epoch and at ends
def test_the_rates_of_a_resumed_run_are_those_of_an_uninterrupted_one(overrides, step, rates, tmp_path, monkeypatch):
    run(config(*RUN, *overrides.split(), run_dir=tmp_path / "whole"))
    whole = rates.copy()
    rates.clear()
    run_until_stopped(config(*RUN, *overrides.split(), run_dir=tmp_path / "run"), monkeypatch, step)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert rates == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scheduler=one_cycle", "scheduler.interval=epoch"], "scheduler.interval=epoch is invalid: OneCycleLR"),
        (["scheduler.interval=step"], "scheduler.interval=step is invalid: ReduceLROnPlateau expects epoch"),
        (["scheduler.interval=batch"], "scheduler.interval=batch is invalid: expected epoch or step"),
        (["scheduler=cosine", "scheduler.T_max=soon"], "scheduler.T_max=soon is invalid"),
        (["scheduler.patience=auto"], "scheduler.patience=auto is invalid"),
        (["scheduler.warmup_epochs=-1"], "scheduler.warmup_epochs=-1 is invalid: expected 0 or more epochs"),
        (["scheduler=cosine", "scheduler.warmup_epochs=4"], "scheduler.warmup_epochs=4 is invalid: expected at most 3"),
        (["optimizer=sgd", "optimizer.lr=0.08", "scheduler=warmup_plateau"],
         "scheduler.warmup_epochs=5 is invalid: expected at most 3, the trainer.max_epochs"),
        (["optimizer.lr=0.003", "scheduler=cosine", "+scheduler.eta_min=0.005"],
         "scheduler.eta_min=0.005 is invalid: expected at most 0.003, the learning rate.$"),
        (["optimizer=muon", "scheduler=cosine", "+scheduler.eta_min=0.005"],
         "scheduler.eta_min=0.005 is invalid: expected at most 0.001, the learning rate of biases AdamW"),
        (["optimizer=sgd", "+optimizer.layers.conv1={lr_multiplier:0}", "scheduler=cosine", "+scheduler.eta_min=1e-5"],
         "scheduler.eta_min=1e-05 is invalid: expected at most 0, the learning rate of conv1 weights"),
        (["scheduler=cosine", "+scheduler.eta_min=-1"], "scheduler.eta_min=-1 is invalid: expected a number ≥ 0"),
        (["~optimizer.lr", "scheduler=cosine", "scheduler.warmup_epochs=4"],
         "scheduler.warmup_epochs=4 is invalid: expected at most 3"),
        (["scheduler=one_cycle", "scheduler.pct_start=1.0"], "scheduler.pct_start=1.0 is invalid: expected a number b"),
        (["scheduler=one_cycle", "scheduler.pct_start=0.7", "+scheduler.three_phase=true"],
         "scheduler.pct_start=0.7 is invalid: expected at most 0.5 with scheduler.three_phase=true"),
        (["scheduler=cosine", "+scheduler.last_epoch=3"], "scheduler.last_epoch=3 is invalid: expected no such key"),
        (["+scheduler.mode=max"], "scheduler.mode=max is invalid: expected min. It would keep the worst val/loss"),
        (["scheduler=warmup_plateau", "scheduler.warmup_epochs=0", "~scheduler.monitor", "+scheduler.mode=max"],
         "scheduler.mode=max is invalid: expected min. It would keep the worst val/error"),
        (["scheduler=step", "scheduler.step_size=0"], "scheduler.step_size=0 is invalid: expected a number of interv"),
        (["scheduler=step", "scheduler.gamma=-1"], "scheduler.gamma=-1 is invalid: expected a number above 0"),
        (["scheduler=one_cycle", "scheduler.max_lr=-1"], "scheduler.max_lr=-1 is invalid: expected a number above 0"),
        (["scheduler.warmup_epochs=some"], "scheduler.warmup_epochs=some is invalid: expected a number"),
        (["scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "~scheduler.factor", "~scheduler.patience",
          "+scheduler.max_lr=0.01", "+scheduler.total_steps=40"], "scheduler.interval=epoch is invalid: OneCycleLR"),
    ],
)  # fmt: skip
def test_intervals_that_cannot_work_are_refused_before_data_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(config(*RUN, *overrides))


def test_a_cycle_shorter_than_the_run_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="scheduler.total_steps=20 is invalid: expected at least 30, the steps of this"
    ):
        run(config(*RUN, "scheduler=one_cycle", "scheduler.total_steps=20", run_dir=tmp_path / "run"))


@pytest.mark.parametrize(
    "overrides",
    [("scheduler=cosine", "scheduler.warmup_epochs=4"),
     ("optimizer=sgd", "optimizer.lr=0.08", "scheduler=warmup_plateau", "scheduler.warmup_epochs=4")],
)  # fmt: skip
def test_a_warm_up_longer_than_the_run_is_refused_however_it_ends(overrides, tmp_path):
    length = ("trainer.max_epochs=-1", "+trainer.max_steps=30")
    with pytest.raises(
        ConfigError, match="scheduler.warmup_epochs=4 is invalid: expected at most 3, those of this run"
    ):
        run(config(*RUN, *overrides, *length, run_dir=tmp_path / "run"))


def test_a_schedule_of_the_users_own_needs_no_interval():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    described = "{_target_:torch.optim.lr_scheduler.MultiStepLR,_partial_:true,milestones:[1,2]}"
    factory = schedule_factory(instantiate(config("~scheduler", f"+scheduler={described}").scheduler))
    assert (factory.interval, factory.auto) == ("epoch", ())
    assert type(factory(optimizer, RunLength(3, 30))).__name__ == "MultiStepLR"


def test_every_option_states_its_interval():
    for name in ("plateau", "warmup_plateau", "cosine", "one_cycle", "step", "constant"):
        assert config(f"scheduler={name}").scheduler.interval in ("epoch", "step")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler=constant", "scheduler.warmup_epochs=2"],
        ["scheduler=step", "scheduler.step_size=1"],
        ["scheduler=one_cycle"],
        ["scheduler=cosine", "scheduler.warmup_epochs=1.5"],
    ],
)
def test_the_logged_rate_is_that_of_the_last_step(overrides, rates, tmp_path):
    """Torch has set the rate of the next step, or epoch, by the time it is logged."""
    run(config(*RUN, *overrides, run_dir=tmp_path / "run"))
    assert [float(row["lr"]) for row in metric_rows(tmp_path / "run")] == pytest.approx(rates[9::10])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=sgd", "optimizer.momentum=0.5"], "optimizer.momentum=0.5 is invalid with a schedule that moves it "
         "between 0.85 and 0.95: to keep it, set scheduler.cycle_momentum=false"),
        (["optimizer=sgd", "optimizer.momentum=0"], "optimizer.momentum=0 is invalid with a schedule"),
        (["optimizer=muon", "optimizer.momentum=0.8"], "optimizer.momentum=0.8 is invalid with a schedule"),
        (["optimizer=adamw", "+optimizer.betas=[0.8,0.95]"], r"optimizer.betas\[0\]=0.8 is invalid with a schedule"),
    ],
)  # fmt: skip
def test_a_momentum_that_the_cycle_would_replace_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(config("scheduler=one_cycle", *overrides))
    validate(config("scheduler=one_cycle", *overrides, "scheduler.cycle_momentum=false"))
    # Muon's momentum is cycled, not the first beta of the AdamW beside it.
    validate(config("scheduler=one_cycle", "optimizer=muon", "optimizer.betas=[0.8,0.95]"))


@pytest.mark.parametrize(
    ("rate", "period", "blocked", "reductions"),
    [(0.001, 1, 0, [0, 0, 1, 1, 2, 2, 3, 3]), (0.08, 1, 5, [0, 1, 1]), (0.08, 4, 2, [0, 1, 1, 2, 2, 3])],
)
def test_a_plateau_schedule_waits_for_its_warm_up_and_for_no_other(rate, period, blocked, reductions):
    """Issue: a rate below ``warmup_lr`` had its reductions undone for five epochs; validations counted as epochs."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    plateau = WarmupPlateau(optimizer, warmup_epochs=5, warmup_lr=0.01, patience=1)
    rates = []  # after each of eight validations, none of which is better than the first
    for epoch in range(8 * period):
        for batch in range(3):
            plateau.warm_up(epoch + batch / 3)
        if (epoch + 1) % period == 0:
            plateau.step(0.5)
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates[blocked:] == pytest.approx([rate * 0.1**count for count in reductions])


# --- milestones -----------------------------------------------------------------------------------------------------

CODE_OF_2012 = ("optimizer=sgd", "optimizer.bias_lr_multiplier=2", "+optimizer.layers.conv1={}", "scheduler=milestones")


def rates_by_epoch(epochs: int, *overrides: str) -> dict[str, list[float]]:
    """Return the learning rates of each parameter group of LeNet-5 during each of the first epochs."""
    cfg = config("model=lenet5", *overrides)
    optimizer = optimizer_factory(instantiate(cfg.optimizer))(instantiate(cfg.model).named_parameters())
    scheduler = schedule_factory(instantiate(cfg.scheduler))(optimizer)
    rates: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}
    for _ in range(epochs):
        for group in optimizer.param_groups:
            rates[group["name"]].append(group["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_milestones_of_2012_lower_the_weights_and_hold_the_biases():
    """0.01 for 2 epochs, 0.001 for 2 more; conv1 has milestones of its own."""
    rates = rates_by_epoch(
        6, *CODE_OF_2012, "scheduler.epochs=[2,4]", "scheduler.factors=[0.1,0.01]", "scheduler.hold_biases=true",
        "+scheduler.layers.conv1={epochs:[3,5],factors:[0.1,0]}",
    )  # fmt: skip
    assert rates.keys() == {"weights", "biases", "conv1 weights", "conv1 biases"}
    assert rates["weights"] == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert rates["biases"] == pytest.approx([0.02] * 6)
    assert rates["conv1 weights"] == pytest.approx([0.01, 0.01, 0.01, 0.001, 0.001, 0])
    assert rates["conv1 biases"] == pytest.approx([0.02, 0.02, 0.02, 0.002, 0.002, 0])


def test_milestones_concern_weights_or_biases_of_a_layer():
    rates = rates_by_epoch(
        3, *CODE_OF_2012, "scheduler.epochs=[9]", "scheduler.factors=[0.1]", "scheduler.hold_biases=true",
        "+scheduler.layers={conv1 weights:{epochs:[1],factors:[0.1]},conv1 biases:{epochs:[2],factors:[0]}}",
    )  # fmt: skip
    assert rates["conv1 weights"] == pytest.approx([0.01, 0.001, 0.001])
    assert rates["conv1 biases"] == pytest.approx([0.02, 0.02, 0])
    assert rates["weights"] == pytest.approx([0.01] * 3)


def test_milestones_lower_biases_too_by_default():
    rates = rates_by_epoch(3, *CODE_OF_2012, "scheduler.epochs=[1]", "scheduler.factors=[0.5]")
    for name, (first, *later) in rates.items():
        assert later == pytest.approx([first / 2] * 2), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scheduler.epochs=[2,2,3]"], r"^scheduler.epochs=\[2, 2, 3\] is invalid: expected increasing whole numbers"),
        (["scheduler.epochs=[0,2,3]"], r"^scheduler.epochs=\[0, 2, 3\] is invalid"),
        (["scheduler.factors=[0.1]"], r"^scheduler.factors=\[0.1\] is invalid: expected 3 numbers ≥ 0, one per mile"),
        (["scheduler.factors=[0.1,-1,0]"], r"^scheduler.factors=\[0.1, -1, 0\] is invalid"),
        (["scheduler.hold_biases=true"], "^scheduler.hold_biases=true is invalid: .*bias_lr_multiplier"),
        (["+scheduler.layers.conv2={epochs:[1],factors:[0]}", "+optimizer.layers.conv1={}"],
         r"^scheduler.layers=conv2 is invalid: .*Add optimizer.layers.conv2=\{\}"),
        (["+scheduler.layers.conv1={epochs:[1],factors:[]}", "+optimizer.layers.conv1={}"],
         r"^scheduler.layers.conv1.factors=\[\] is invalid"),
    ],
)  # fmt: skip
def test_invalid_milestones_are_refused_before_data_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(config("model=lenet5", "optimizer=sgd", "scheduler=milestones", *overrides))


def test_scales_of_normalization_layers_are_not_held_with_the_biases():
    """Issue: with decay_biases_and_norms=false alone, which the error recommended, BatchNorm's scales were held too."""
    settings = ("model=alexnet_bn", "model.fc_width=8", "optimizer=sgd", "scheduler=milestones",
                "scheduler.hold_biases=true", "optimizer.decay_biases_and_norms=false")  # fmt: skip
    with pytest.raises(ConfigError, match=r"hold_biases=true is invalid: expected biases in a .*bias_lr_multiplier=2"):
        validate(config(*settings))
    validate(config(*settings, "optimizer.bias_lr_multiplier=2"))


def test_a_cycle_that_cannot_rise_is_refused(tmp_path):
    settings = ("scheduler=one_cycle", "scheduler.pct_start=0.1", "trainer.limit_train_batches=5")
    with pytest.raises(ConfigError, match="scheduler.pct_start=0.1 is invalid in a run of 10 steps: expected a"):
        run(config(*RUN, *settings, "trainer.max_epochs=2", run_dir=tmp_path / "run"))


def test_a_single_group_keeps_its_own_rate():
    """A multiplier that covers all parameters leaves one group."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.01}], lr=0.1, momentum=0.9)
    factory = schedule_factory(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps="auto"))
    factory = replace(factory, interval="step")
    factory(optimizer, RunLength(epochs=1, steps=20))
    assert optimizer.param_groups[0]["max_lr"] == pytest.approx(0.01)


def test_the_last_accumulated_step_of_an_epoch_is_an_average_as_well(tmp_path):
    """Ten batches in steps of four, four and two: Lightning divides all by four."""
    seen = []

    class Line(ImageClassifier):
        def _step(self, batch, metrics):
            super()._step(batch, metrics)
            return self.net[1].bias.sum() / 10, None  # its gradient is 0.1 for each of the ten biases

        def on_before_optimizer_step(self, optimizer):
            seen.append(float(self.net[1].bias.grad.sum()))

    data = instantiate(config(*RUN).data)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    trainer = Trainer(max_epochs=2, accumulate_grad_batches=4, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
                      limit_val_batches=0, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(Line(net, 10, partial(torch.optim.SGD, lr=0.1)), data)
    assert seen == pytest.approx([1.0] * 6)
