"""Epoch lines, progress lines, timing and norms, with every way to validate and to end a run."""

import csv
import re
from pathlib import Path

import pytest
import torch
from helpers import SHORT_RUN, config

from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.logging import Heartbeat
from alexnet_pl.training.callbacks.monitoring import EpochReport, StopAtTrainingError, format_duration
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.run import run

BATCHES = ("trainer.limit_train_batches=4", "trainer.limit_val_batches=2")


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def epoch_lines(text: str) -> list[str]:
    return re.findall(r"epoch \d+/\d+  +[\d.]+ s .*", text)


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level("INFO")


def test_the_epoch_line_has_both_losses_of_its_epoch_and_the_time_left(tmp_path, caplog):
    run(config(*SHORT_RUN, "trainer.max_epochs=3", run_dir=tmp_path / "run"))
    lines, rows = epoch_lines(caplog.text), read_rows(tmp_path / "run")
    assert len(lines) == len(rows)
    for index, (line, row) in enumerate(zip(lines, rows, strict=True), start=1):
        assert line.startswith(f"epoch {index}/{len(rows)}  ")
        for label, name in (("train loss", "train/loss"), ("val loss", "val/loss"), ("val acc", "val/acc")):
            assert f"{label} {float(row[name]):.4f}" in line
        assert ("left" in line) == (index < len(rows))
    assert re.search(r"about \d+ s left$", lines[0])


@pytest.mark.parametrize(
    ("settings", "validated"),
    [
        (("+trainer.check_val_every_n_epoch=2",), [False, True]),
        (("trainer.accumulate_grad_batches=3",), [True, True]),
    ],
)
def test_an_epoch_without_validation_has_its_line(settings, validated, tmp_path, caplog):
    plain = ("trainer=default", "trainer.max_epochs=2", *BATCHES, *settings)
    run(config(*SHORT_RUN, *plain, run_dir=tmp_path / "run"))
    lines, rows = epoch_lines(caplog.text), read_rows(tmp_path / "run")
    assert [" val loss " in line for line in lines] == validated
    for row in rows:
        assert float(row["epoch_seconds"]) > 0
        assert float(row["images_per_second"]) > 0
        assert float(row["grad_norm"]) > 0
        assert float(row["images_per_second"]) >= 4 * 64 / float(row["epoch_seconds"])  # validation does not count


def test_a_run_limited_by_steps_has_speed_norms_and_time_left(tmp_path, caplog):
    plain = ("trainer=default", "+trainer.max_steps=6", *BATCHES)
    run(config(*SHORT_RUN, *plain, run_dir=tmp_path / "run"))
    first, last = read_rows(tmp_path / "run")
    assert float(first["images_per_second"]) > 0
    assert float(last["images_per_second"]) > 0
    assert float(last["grad_norm"]) > 0  # of step 6, in the middle of the second epoch
    lines = [line for line in caplog.messages if re.match(r"epoch .*train loss", line)]
    assert re.search(r"about \d+ s left$", lines[0])
    assert "left" not in lines[1]


def test_a_long_epoch_validation_and_test_log_their_progress(tmp_path, caplog, monkeypatch):
    """A slow machine whose output is not a terminal: here, every interval is long enough."""
    monkeypatch.setattr(Heartbeat, "is_due", lambda self: True)
    plain = ("trainer=default", "trainer.max_epochs=1", "trainer.limit_test_batches=3", *BATCHES)
    run(config(*SHORT_RUN, *plain, "callbacks.dashboard.figures=true", run_dir=tmp_path / "run"))
    for line in ("epoch 1/1  batch 1/4", "epoch 1/1  batch 3/4", "epoch 1/1  validation batch 1/2", "test batch 2/3"):
        assert line in caplog.messages, line
    assert "epoch 1/1  batch 4/4" not in caplog.messages  # the epoch line follows


def test_feature_extraction_logs_its_progress(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Heartbeat, "is_due", lambda self: True)
    run(config(*SHORT_RUN, "callbacks.dashboard.num_neighbor_images=100", run_dir=tmp_path / "run", figures=True))
    assert "figures features of 64/100 training images" in caplog.messages


def test_a_heartbeat_is_due_once_per_interval(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    heartbeat, due = Heartbeat(10), []
    for now[0] in (1.0, 9.9, 10.0, 11.0, 19.9, 20.1, 25.0):
        due.append(heartbeat.is_due())
    assert due == [False, False, True, False, False, True, False]


def test_timing_of_an_interrupted_epoch_excludes_the_time_between(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    before = EpochReport()
    before.on_train_epoch_start(None, None)
    now[0] += 7
    state = before.state_dict()
    now[0] = 1000.0
    after = EpochReport()
    after.load_state_dict({**state, "images": 320})
    now[0] += 50  # decoding the dataset again
    after.on_train_start(None, None)
    now[0] += 3
    assert after.state_dict() == {"seconds": 10.0, "trained": 10.0, "images": 320}


def test_norms_are_those_of_the_last_step_and_the_weights_after_it(tmp_path):
    """Plain SGD moves the weights by the learning rate times the gradient."""
    sgd = ("optimizer._target_=torch.optim.SGD", "~optimizer.fused", "optimizer.lr=0.5", "callbacks.resume.keep=true")
    weights = []
    for steps in (1, 2):
        limits = ("trainer=default", "trainer.max_epochs=1", f"trainer.limit_train_batches={steps}")
        run(config(*SHORT_RUN, *limits, *sgd, run_dir=tmp_path / str(steps)))
        state = read_checkpoint(tmp_path / str(steps) / "checkpoints" / "latest.ckpt")["state_dict"].values()
        weights.append(torch.cat([value.flatten().double() for value in state]))
    (row,) = read_rows(tmp_path / "2")
    assert float(row["grad_norm"]) == pytest.approx(float((weights[1] - weights[0]).norm() / 0.5), rel=1e-4)
    assert float(row["weight_norm"]) == pytest.approx(float(weights[1].norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (40, "40 s"), (100, "2 min"), (3600, "60 min"), (11_100, "3 h 05 min"), (90_000, "25 h 00 min")],
)
def test_durations_are_rounded_for_reading(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("error", [0, 1, -0.5])
def test_a_training_error_out_of_range_is_refused(error):
    with pytest.raises(ConfigError, match=f"StopAtTrainingError.error={error} is invalid: expected a number above 0"):
        StopAtTrainingError(error)
