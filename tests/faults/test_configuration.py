"""Faults in a config: refused in one to three lines, with exit status 2, before any data is read."""

from pathlib import Path

import pytest
import torch
from helpers import config, train_many

from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.run import run

UNKNOWN = pytest.mark.fault("unknown key", "suggests the nearest name, exit 2")
LR = pytest.mark.fault("optimizer.lr=abc", "names the key, its value and the valid range, exit 2")
NEGATIVE = pytest.mark.fault("negative learning rate", "names the key, its value and the valid range, exit 2")
MONITOR = pytest.mark.fault("typo in a monitor", "suggests the nearest logged name, exit 2")
DEVICE = pytest.mark.fault("missing device", "lists the available devices, exit 2")
RANGE = pytest.mark.fault("value out of range", "names the key, its value and the valid range, exit 2")
GROUP = pytest.mark.fault("model.norm=batch instead of model/norm=batch", "says how to choose an option, exit 2")
TRAINER = pytest.mark.fault("a Trainer argument that would break the result", "names the supported one, exit 2")

REFUSED = [
    pytest.param("model.widht=8", "model.widht=8: key model.widht not found. Did you mean model.fc_width?",
                 marks=UNKNOWN),
    pytest.param("+model.widht=8", "model.widht=8 is invalid: AlexNet has no argument widht. Did you mean "
                 "fc_width?", marks=UNKNOWN),
    pytest.param("+sede=2", "sede=2 is invalid: no other key refers to sede. Did you mean seed?", marks=UNKNOWN),
    pytest.param("optimizer=adam.lr", "optimizer=adam.lr is invalid: expected one of: adam, ", marks=UNKNOWN),
    pytest.param("optimizer.lr=abc", "optimizer.lr=abc is invalid: expected a number above 0.", marks=LR),
    pytest.param("optimizer.lr=-0.1", "optimizer.lr=-0.1 is invalid: expected a number above 0.", marks=NEGATIVE),
    pytest.param("callbacks.best.monitor=val_acc", "callbacks.best.monitor=val_acc is invalid: it is never logged. "
                 "Did you mean val/acc?", marks=MONITOR),
    pytest.param("trainer.accelerator=gpu", "trainer.accelerator=gpu is invalid: expected one of: auto, cpu", marks=[
        DEVICE, pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")]),
    pytest.param("data.val_fraction=1", "data.val_fraction=1 is invalid: expected a number above 0 and below 1.",
                 marks=RANGE),
    pytest.param("model.num_classes=9", "model.num_classes=9 is invalid: expected at least 10, the classes of the "
                 "data.", marks=RANGE),
    pytest.param("model.norm=batch", "model.norm=batch is invalid: expected a mapping with _target_. Choose an option: "
                 "model/norm=batch", marks=GROUP),
    pytest.param("+trainer.val_check_interval=0.5", "trainer.val_check_interval=0.5 is invalid: expected null or 1.0. "
                 "Every validation belongs to an epoch. Set trainer.check_val_every_n_epoch.", marks=TRAINER),
    pytest.param("+trainer.overfit_batches=2", "trainer.overfit_batches=2 is invalid: expected 0", marks=TRAINER),
]  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Run ``train.py data=cifar10`` without CIFAR-10 once per override; return override → finished process."""
    folder = tmp_path_factory.mktemp("refused")
    overrides = [parameters.values[0] for parameters in REFUSED]
    done = train_many([["data=cifar10", f"data.root={folder}/data", override] for override in overrides], folder)
    return dict(zip(overrides, done, strict=True))


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_an_invalid_override_is_refused(refusals, override, message):
    done = refusals[override]
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"error: {message}")
    assert 1 <= done.stderr.count("\n") <= 3
    assert "Traceback" not in done.stderr
    root = Path(done.args[1].removeprefix("data.root="))
    assert not root.exists()  # nothing was downloaded
    assert not list(root.parent.glob("runs/*/*"))


SMALL = ("model=lenet5", "data=digits", "trainer.accelerator=cpu")


@pytest.mark.fault("trainer=smoke with an experiment of 20 epochs", "two epochs of two batches")
def test_a_smoke_run_shortens_an_experiment(tmp_path):
    run(config("experiment=quickstart", "trainer=smoke", "model=lenet5", "model.channels=[6,16]", "~model.fc_width",
               "trainer.accelerator=cpu", run_dir=tmp_path / "run"))  # fmt: skip
    result = finished_result(tmp_path / "run")
    assert result["epochs"] == 2
    assert result["data"]["train"] == 64


@pytest.mark.fault("gradient clipping in mixed precision", "the optimizer is not fused")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_in_mixed_precision(tmp_path, algorithm):
    clip = ("trainer.gradient_clip_val=1.0", f"trainer.gradient_clip_algorithm={algorithm}")
    run(config(*SMALL, "trainer=smoke", "trainer.precision=bf16-mixed", *clip, run_dir=tmp_path / "run"))
    assert finished_result(tmp_path / "run")


@pytest.mark.fault("gradient clipping with accumulation", "the averaged gradient is clipped")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_optimizer_gets_clipped_gradients(algorithm, tmp_path, monkeypatch):
    """A limit far below the gradients, so that every step is at it."""
    seen = []

    def step(self, closure):
        closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.cat([gradient.flatten() for gradient in gradients])
        seen.append(float(norm.norm() if algorithm == "norm" else norm.abs().max()))

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run(config(*SMALL, "trainer=smoke", "optimizer=sgd", "trainer.precision=32-true", "trainer.gradient_clip_val=0.001",
               "trainer.accumulate_grad_batches=2", f"trainer.gradient_clip_algorithm={algorithm}",
               run_dir=tmp_path / "run"))  # fmt: skip
    assert seen
    assert seen == pytest.approx([0.001] * len(seen), rel=1e-3)


@pytest.mark.fault("callbacks and loggers of the user's own, or no logger", "the run finishes")
@pytest.mark.parametrize(
    "overrides",
    [
        ["~logger.tensorboard"],
        ["~logger.csv"],
        ["~logger"],
        ["+callbacks.mc={_target_:lightning.pytorch.callbacks.ModelCheckpoint,monitor:val/acc,mode:max}"],
        ["+callbacks.mc={_target_:lightning.pytorch.callbacks.ModelCheckpoint}", "~logger"],
        ["+logger.mine={_target_:lightning.pytorch.loggers.CSVLogger,save_dir:'${run_dir}'}"],
    ],
    ids=str,
)
def test_callbacks_and_loggers_of_the_users_own_work(tmp_path, overrides):
    run(config(*SMALL, "trainer=smoke", *overrides, run_dir=tmp_path / "run"))
    assert finished_result(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").count("\n") == 3
