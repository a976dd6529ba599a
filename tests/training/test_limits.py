"""Runs of limited length: max_steps, validation every few epochs, limited batches; also stopped and resumed."""

import json
from pathlib import Path

import pytest
from helpers import assert_same_run, config, metric_rows, run_until_stopped

from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.run import run

from .test_averaging import validation_metrics

# 1,293 images: 20 batches of 64 per epoch.
RUN = (
    *("model=lenet5", "data=digits", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=3"),
    "callbacks.resume.min_interval_seconds=0",
)


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def assert_the_best_is_what_was_validated(run_dir: Path) -> None:
    result = result_of(run_dir)
    loss, accuracy = validation_metrics(run_dir, load_run(run_dir).net)
    assert loss == pytest.approx(result["val/loss"], rel=1e-4)
    assert accuracy == pytest.approx(result["val/acc"], abs=1e-6)


@pytest.mark.parametrize("steps", [3, 20, 23, 47])
def test_a_run_ends_after_max_steps_with_a_validation(steps, tmp_path):
    score = run(config(*RUN, f"+trainer.max_steps={steps}", run_dir=tmp_path / "run"))
    rows = metric_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [str(min(20 * (n + 1), steps)) for n in range(len(rows))]
    assert all(row["val/loss"] and row["train/loss"] for row in rows)
    result = result_of(tmp_path / "run")
    assert score == result["val/acc"] == max(float(row["val/acc"]) for row in rows)
    assert_the_best_is_what_was_validated(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 20, 22])
def test_a_run_with_max_steps_resumes_bit_for_bit(stop, uninterrupted_run, tmp_path, monkeypatch):
    settings = (*RUN, "+trainer.max_steps=23")
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, stop)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted_run(*settings))


@pytest.mark.parametrize("phase", ["validation", "test"])
def test_a_run_stopped_after_its_last_step_is_only_tested(phase, uninterrupted_run, tmp_path, monkeypatch):
    settings = (*RUN, "+trainer.max_steps=23")
    # Three validation batches per validation: one after epoch 1, one after step 23.
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, 5 if phase == "validation" else 1,
                      phase=phase)  # fmt: skip
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted_run(*settings))


@pytest.mark.slow
@pytest.mark.parametrize("number", [23, 40])
def test_more_steps_continue_inside_the_epoch(number, uninterrupted_run, tmp_path, monkeypatch):
    """Training continues with the images that the epoch has left, as one run of that length does."""
    whole = uninterrupted_run(*RUN, "+trainer.max_steps=30")
    run(config(*RUN, f"+trainer.max_steps={min(number, 29)}", run_dir=tmp_path / "run"))
    monkeypatch.setattr("alexnet_pl.training.run.named_on_the_command_line", lambda: ["trainer.max_steps"])
    run(config("resume=here", "allow_changes=true", "+trainer.max_steps=30", run_dir=tmp_path / "run"))
    ours, theirs = metric_rows(tmp_path / "run"), metric_rows(whole)
    for name in ("train/loss", "train/acc", "val/loss", "val/acc", "step"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name


def test_validation_every_second_epoch(tmp_path):
    """The best comes from a validated epoch, and the last epoch is validated in any case."""
    run(config(*RUN, "trainer.max_epochs=5", "+trainer.check_val_every_n_epoch=2", run_dir=tmp_path / "run"))
    rows = metric_rows(tmp_path / "run")
    assert [bool(row["val/loss"]) for row in rows] == [False, True, False, True, True]
    result = result_of(tmp_path / "run")
    assert result["best_epoch"] in (2, 4, 5)
    assert rows[result["best_epoch"] - 1]["test/acc"]
    assert_the_best_is_what_was_validated(tmp_path / "run")


def test_the_plateau_counts_validations_not_epochs(tmp_path):
    """Patience 1, nothing improves after the first validation: the rate falls after the third, which is epoch 6."""
    still = ("optimizer.lr=1e-7", "scheduler.patience=1", "trainer.limit_train_batches=2", "trainer.max_epochs=8")
    run(config(*RUN, *still, "+trainer.check_val_every_n_epoch=2", run_dir=tmp_path / "run"))
    rates = [float(row["lr"]) for row in metric_rows(tmp_path / "run")]
    assert rates == pytest.approx([1e-7] * 6 + [1e-8] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("step", [15, 20, 25, 40])
def test_validation_every_second_epoch_resumes_bit_for_bit(step, uninterrupted_run, tmp_path, monkeypatch):
    settings = (*RUN, "+trainer.check_val_every_n_epoch=2", "scheduler.patience=0", "+scheduler.threshold=0.5")
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, step)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted_run(*settings))


@pytest.mark.parametrize(
    "overrides",
    [
        ["+trainer.val_check_interval=1", "trainer.limit_train_batches=12", "optimizer.lr=0.02"],
        ["+trainer.val_check_interval=0.5"],
        ["+trainer.check_val_every_n_epoch=null", "+trainer.val_check_interval=7"],
    ],
)
def test_several_validations_per_epoch_are_refused_before_data_is_read(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr("alexnet_pl.data.digits.DigitsDataModule.load", lambda self: pytest.fail("data was read"))
    with pytest.raises(
        ConfigError, match="trainer.(val_check_interval|check_val_every_n_epoch)=.* is invalid: expected"
    ):
        run(config(*RUN, *overrides, run_dir=tmp_path / "run"))


def test_the_result_records_the_limits_and_the_images_that_were_used(tmp_path):
    limits = ("trainer.limit_train_batches=10", "trainer.limit_val_batches=2", "trainer.limit_test_batches=0.5")
    run(config(*RUN, *limits, run_dir=tmp_path / "limited"))
    data = result_of(tmp_path / "limited")["data"]
    assert {key: data[key] for key in ("train", "val", "test")} == {"train": 640, "val": 128, "test": 192}
    assert data["limits"] == {"limit_train_batches": 10, "limit_val_batches": 2, "limit_test_batches": 0.5}
    run(config(*RUN, "trainer.max_epochs=1", run_dir=tmp_path / "whole"))
    assert "limits" not in result_of(tmp_path / "whole")["data"]


def test_a_limit_that_leaves_no_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a limit of 0.01 on 20 batches leaves none"):
        run(config(*RUN, "trainer.limit_train_batches=0.01", run_dir=tmp_path / "run"))


def test_latest_is_kept_on_request_only(tmp_path):
    for keep, expected in (("true", {"best.ckpt", "latest.ckpt", "previous.ckpt"}), ("false", {"best.ckpt"})):
        run_dir = tmp_path / keep
        run(config(*RUN, "trainer.max_epochs=1", f"callbacks.resume.keep={keep}", run_dir=run_dir))
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {*expected, "SHA256SUMS"}
        assert read_checkpoint(run_dir / "checkpoints" / "best.ckpt")["epoch"] == 0
