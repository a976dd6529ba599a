"""Training that breaks down, and batches that do not fit into memory."""

import re

import pytest

from alexnet_pl.training.checkpoint_io import latest_valid

from .processes import DIGITS, Run
from .test_stopping import SLOW

BREAKING = [override for override in SLOW if not override.startswith("+model.how")]


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
