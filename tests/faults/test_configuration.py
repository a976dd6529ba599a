"""Faults in the configuration: refused in one to three lines, with exit code 2, before any data is read."""

from pathlib import Path

import pytest
import torch
from helpers import train_many

UNKNOWN = pytest.mark.fault("unknown key", "the nearest name suggested, exit 2")
LR = pytest.mark.fault("optimizer.lr=abc", "the key, its value and what is allowed, exit 2")
NEGATIVE = pytest.mark.fault("negative learning rate", "the key, its value and what is allowed, exit 2")
MONITOR = pytest.mark.fault("monitor typo", "the nearest logged name suggested, exit 2")
DEVICE = pytest.mark.fault("missing device", "the devices that there are, exit 2")
RANGE = pytest.mark.fault("value out of range", "the key, its value and what is allowed, exit 2")

REFUSED = [
    pytest.param("model.widht=8", "model.widht=8: key model.widht not found. Did you mean model.fc_width?",
                 marks=UNKNOWN),
    pytest.param("+model.widht=8", "model.widht=8 is not possible: AlexNet has no argument widht. Did you mean "
                 "fc_width?", marks=UNKNOWN),
    pytest.param("+sede=2", "sede=2: nothing reads a key sede. Did you mean seed?", marks=UNKNOWN),
    pytest.param("optimizer.lr=abc", "optimizer.lr=abc is not possible: it is a number above 0.", marks=LR),
    pytest.param("optimizer.lr=-0.1", "optimizer.lr=-0.1 is not possible: it is a number above 0.", marks=NEGATIVE),
    pytest.param("callbacks.best.monitor=val_acc", "callbacks.best.monitor=val_acc is never logged. Did you mean "
                 "val/acc?", marks=MONITOR),
    pytest.param("trainer.accelerator=gpu", "trainer.accelerator=gpu is not possible", marks=[
        DEVICE, pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")]),
    pytest.param("data.val_fraction=1", "data.val_fraction=1 is invalid: expected a number above 0 and below 1.",
                 marks=RANGE),
    pytest.param("model.num_classes=9", "model.num_classes=9 is too few: the data has 10 classes.", marks=RANGE),
]  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What ``train.py data=cifar10`` without any CIFAR-10 says to each of the overrides."""
    folder = tmp_path_factory.mktemp("refused")
    overrides = [parameters.values[0] for parameters in REFUSED]
    done = train_many([["data=cifar10", f"data.root={folder}/data", override] for override in overrides], folder)
    return dict(zip(overrides, done, strict=True))


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_cannot_work_is_refused(refusals, override, message):
    done = refusals[override]
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"error: {message}")
    assert 1 <= done.stderr.count("\n") <= 3
    assert "Traceback" not in done.stderr
    root = Path(done.args[1].removeprefix("data.root="))
    assert not root.exists()  # nothing was downloaded
    assert not list(root.parent.glob("runs/*/*/config.yaml"))
