"""Resolution of a config: fast_dev_run, fused optimizers with gradient clipping, paths, threads."""

from pathlib import Path

import pytest
import torch
from helpers import config

from alexnet_pl.config import resolve
from alexnet_pl.config.resolve import drop_disabled, resolve_auto, resolve_threads
from alexnet_pl.config.validate import validate


def resolved(*overrides: str):
    cfg = config(*overrides)
    resolve_auto(cfg)
    return cfg


LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches")


@pytest.mark.parametrize("experiment", ["", "tutorial", "quickstart", "paper_imagenet"])
def test_a_smoke_run_is_short_whatever_the_experiment_says(experiment):
    chosen = [f"experiment={experiment}"] if experiment else []
    cfg = resolved(*chosen, "trainer=smoke", "data.batch_size=8")
    assert cfg.trainer.max_epochs == 2
    assert [cfg.trainer[key] for key in LIMITS] == [2, 2, 2]
    assert cfg.callbacks.dashboard.num_neighbor_images == 16
    assert cfg.trainer.fast_dev_run is False  # Lightning's own meaning would drop checkpoints and loggers


def test_fast_dev_run_means_the_same_as_a_smoke_run():
    assert resolved("+trainer.fast_dev_run=2").trainer == resolved("trainer=smoke").trainer
    one = resolved("+trainer.fast_dev_run=true")
    assert [one.trainer[key] for key in LIMITS] == [1, 1, 1]
    assert one.trainer.max_epochs == 2


def test_fast_dev_run_shortens_and_never_lengthens():
    cfg = resolved("+trainer.fast_dev_run=5", "trainer.max_epochs=1", "trainer.limit_val_batches=3",
                   "trainer.limit_train_batches=0.5", "callbacks.dashboard.num_neighbor_images=0")  # fmt: skip
    assert cfg.trainer.max_epochs == 1
    assert [cfg.trainer[key] for key in LIMITS] == [5, 3, 5]
    assert cfg.callbacks.dashboard.num_neighbor_images == 0
    assert resolved("trainer=smoke", "trainer.max_epochs=-1", "+trainer.max_steps=3").trainer.max_epochs == 2
    assert resolved("+trainer.fast_dev_run=false").trainer.max_epochs == 30


def test_a_warm_up_fits_the_shortened_run():
    """Otherwise the saved config would be refused when the run is resumed."""
    large = ("optimizer=sgd", "optimizer.lr=0.08", "scheduler=warmup_plateau")
    assert resolved("trainer=smoke", *large).scheduler.warmup_epochs == 2
    assert resolved(*large).scheduler.warmup_epochs == 5


def test_a_schedule_follows_the_shortened_run():
    cfg = resolved("trainer=smoke", "~scheduler", "+scheduler.T_max=${trainer.max_epochs}")
    assert cfg.scheduler.T_max == 2


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        (["trainer.precision=bf16-mixed"], True),
        (["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"], False),
        (["trainer.precision=bf16", "trainer.gradient_clip_val=1.0", "optimizer=sgd"], False),
        (["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0"], True),
        (["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=null"], True),
        (["trainer.precision=32-true", "trainer.gradient_clip_val=1.0"], True),
        (["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0", "~optimizer.fused"], None),
    ],
    ids=str,
)
def test_the_optimizer_is_not_fused_if_gradients_are_clipped_in_mixed_precision(overrides, fused):
    assert resolved(*overrides).optimizer.get("fused") is fused


def test_paths_become_absolute():
    assert resolved("data=cifar10", "data.root=here").data.root == str(Path("here").absolute())
    assert resolved("data=shards", "data.root=s3://bucket/x").data.root == "s3://bucket/x"


def test_null_leaves_out_a_callback_or_a_logger():
    cfg = config("callbacks.dashboard=null", "logger.tensorboard=null", figures=True)
    drop_disabled(cfg)
    assert "dashboard" not in cfg.callbacks
    assert "tensorboard" not in cfg.logger
    validate(cfg)


@pytest.mark.parametrize(
    ("overrides", "environment", "used", "threads"),
    [
        ([], None, 0.2, 8),
        ([], None, 3.1, 5),
        ([], None, 30.0, 1),
        ([], "6", 3.1, 8),  # torch has read the variable: its number of threads follows it
        (["threads=3"], None, 7.0, 3),
    ],
)
def test_threads_leave_cores_to_busy_programs(overrides, environment, used, threads, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(resolve, "usable_cores", lambda: 8)
    monkeypatch.setattr(resolve, "cores_in_use_by_others", lambda: used)
    cfg = config("trainer.accelerator=cpu", *overrides)
    with caplog.at_level("INFO"):
        resolve_threads(cfg)
    assert cfg.threads == threads
    assert ("other programs keep" in caplog.text) == (threads in (5, 1))


def test_threads_of_a_run_on_a_gpu_stay(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(resolve, "cores_in_use_by_others", lambda: 7.0)
    cfg = config("trainer.accelerator=gpu")
    resolve_threads(cfg)
    assert cfg.threads == 8
