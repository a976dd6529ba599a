"""Early stopping: its end, its combination with averaged weights, and resumed runs."""

import json
from pathlib import Path

import pytest
from helpers import SHORT_RUN, assert_same_run, config, run_until_stopped

from alexnet_pl.config.validate import validate
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.run import run

# Nothing counts as an improvement, so that a run ends after 1 + patience epochs. SHORT_RUN has at most two.
STOPPING = (
    *SHORT_RUN[:2], "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.limit_train_batches=2",
    "trainer.max_epochs=6", "callbacks.early_stopping.min_delta=100", "callbacks.early_stopping.patience=2",
    "callbacks.resume.min_interval_seconds=0",
)  # fmt: skip


def epochs(run_dir: Path) -> int:
    return json.loads((run_dir / "result.json").read_text())["epochs"]


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["early_stopping", "[ema,early_stopping]"])
def test_a_run_ends_after_its_patience_also_if_it_is_resumed(callbacks, tmp_path, monkeypatch):
    settings = (f"callbacks={callbacks}", *STOPPING)
    run(config(*settings, run_dir=tmp_path / "whole"))
    assert epochs(tmp_path / "whole") == 3
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, 4)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_was_interrupted_in_its_test_trains_no_further_epoch(tmp_path, monkeypatch):
    settings = ("callbacks=early_stopping", *STOPPING)
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, 1, phase="test")
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert epochs(tmp_path / "run") == 3


def test_a_resumed_run_may_have_more_patience(tmp_path):
    run(config("callbacks=early_stopping", *STOPPING, run_dir=tmp_path / "run"))
    changes = ("callbacks.early_stopping.patience=3",)
    run(
        config("resume=here", "allow_changes=true", "callbacks=early_stopping", *changes, run_dir=tmp_path / "run"),
        named=["callbacks.early_stopping.patience"],
    )
    assert epochs(tmp_path / "run") == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks.early_stopping.monitor=val/los", "callbacks.early_stopping.monitor=val/los is invalid"),
        ("callbacks.early_stopping.mode=max", "callbacks.early_stopping.mode=max is invalid: expected min"),
        ("callbacks.early_stopping.patience=few", "callbacks.early_stopping.patience=few is invalid: expected a whole"),
    ],
)
def test_invalid_settings_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        validate(config("callbacks=early_stopping", override))
