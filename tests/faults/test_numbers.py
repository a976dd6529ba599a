"""Wrong numbers: divergence, memory, averaged weights, several validations, per-step schedules, limited batches."""

import re

import pytest

from alexnet_pl.inference.evaluation import evaluate
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.run_folder import finished_result, read_metrics
from alexnet_pl.training.checkpoint_io import latest_valid

from .processes import DIGITS, Run
from .test_stopping import STUCK

BREAKING = [override for override in STUCK if not override.startswith("+model.how")]


@pytest.mark.fault("NaN or infinite loss or gradient", "stops at that step and names it, exit 1, checkpoint kept")
@pytest.mark.parametrize("how", ["nan loss", "inf loss", "nan gradient", "inf gradient"])
def test_numbers_that_are_not_finite(how, tmp_path):
    run = Run(*BREAKING, f"+model.how={how}", "callbacks.resume.interval_minutes=0", run_dir=tmp_path / "run")
    assert run.wait() == 1, run.text
    (error,) = run.errors
    value, _, where = how.partition(" ")
    expected = (
        rf"the {where} is {'nan' if value == 'nan' else '(infinite|nan)'} at step 4 \(epoch 1, batch 4, 64 images"
    )
    assert re.search(expected, error), error
    assert "learning rate 0.001" in error
    _, checkpoint = latest_valid(tmp_path / "run" / "checkpoints")
    assert checkpoint["position"]["step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.fault("a learning rate that makes training diverge", "stops instead of finishing with NaN")
def test_a_learning_rate_far_too_high(tmp_path):
    run = Run(*DIGITS, "optimizer.lr=1e25", run_dir=tmp_path / "run")
    assert run.wait() == 1
    assert "Try a smaller optimizer.lr" in run.text
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.fault("out of memory", "one line that suggests a smaller batch, exit 1")
def test_out_of_memory(tmp_path):
    large = ("model=alexnet_bn", "data=digits", "data.image_size=160", "data.batch_size=1024", *DIGITS[2:])
    run = Run(*large, run_dir=tmp_path / "run", memory=1_200_000_000)
    assert run.wait() == 1, run.text
    (error,) = run.errors
    assert "out of memory with data.batch_size=1024. Try data.batch_size=512." in error


EMA = ("+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "+callbacks.ema.decay=0.9")


@pytest.mark.fault("averaged weights", "the best checkpoint holds the validated ones; averages never validated refused")
@pytest.mark.parametrize("averaging", [EMA, ("callbacks=ema",)])
def test_averaged_weights(averaging, tmp_path):
    run = Run(*DIGITS, *averaging, "trainer.max_epochs=2", run_dir=tmp_path / "run")
    assert run.wait() == 0, run.text
    result = finished_result(tmp_path / "run")
    found = evaluate(load_run(tmp_path / "run"), "val").figures
    assert found["val/acc"] == pytest.approx(result["val/acc"], abs=1e-6)


@pytest.mark.fault("several validations per epoch", "refused before data is read; max_steps and every n-th epoch work")
def test_several_validations_per_epoch(tmp_path):
    settings = (*DIGITS, "trainer.max_epochs=2")
    refused = Run(*settings, "+trainer.val_check_interval=1", run_dir=tmp_path / "refused")
    assert refused.wait() == 2
    assert "error: trainer.val_check_interval=1 is invalid" in refused.text
    for limit in ("+trainer.max_steps=3", "+trainer.check_val_every_n_epoch=2"):
        run = Run(*settings, limit, run_dir=tmp_path / limit.partition("=")[0])
        assert run.wait() == 0, run.text
        result = finished_result(run.run_dir)
        assert result["best_epoch"] == (1 if "steps" in limit else 2)


@pytest.mark.fault("a per-step schedule stepped per epoch", "refused before data is read; one_cycle follows the run")
def test_a_per_step_schedule(tmp_path):
    cycle = ("~scheduler.factor", "~scheduler.patience", "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR",
             "+scheduler.max_lr=0.01", "+scheduler.total_steps=40")  # fmt: skip
    refused = Run(*DIGITS, *cycle, run_dir=tmp_path / "refused")
    assert refused.wait() == 2
    assert "error: scheduler.interval=epoch is invalid: OneCycleLR expects step" in refused.text
    run = Run(*DIGITS, "scheduler=one_cycle", "trainer.max_epochs=2", run_dir=tmp_path / "run")
    assert run.wait() == 0, run.text
    assert read_metrics(tmp_path / "run")[-1]["lr"] < 1e-3 / 25


@pytest.mark.fault("limited batches", "result.json records the limits and the images used")
def test_limited_batches(tmp_path):
    run = Run(*DIGITS, "trainer=smoke", "data.batch_size=16", run_dir=tmp_path / "run")
    assert run.wait() == 0, run.text
    data = finished_result(tmp_path / "run")["data"]
    assert (data["train"], data["val"], data["test"]) == (32, 32, 32)
    assert data["limits"] == {f"limit_{split}_batches": 2 for split in ("train", "val", "test")}
