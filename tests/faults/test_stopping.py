"""Signals to real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY

from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import LATEST, latest_valid

from .processes import DIGITS, Run, wait_for

LONG = (*DIGITS, "trainer.max_epochs=2000")
SLOW = (
    *("model=lenet5", "model._target_=faults.processes.BreakingNet", "+model.how=slow", *DIGITS[1:]),
    *(f"~model.{key}" for key in ("channels", "fc_widths", "norm", "norm_placement", "pool", "activation")),
)


@pytest.mark.fault("SIGTERM, SIGUSR1 or SIGINT inside an epoch", "saves, prints the resume command, exit 128 + signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal(number, tmp_path):
    run = Run(*LONG, run_dir=tmp_path / "run")
    wait_for(lambda: "epoch    2/" in run.text, run)
    run.send(number)
    assert run.wait(30) == 128 + number
    assert run.text.splitlines()[-1] == f"go on with: python train.py resume={tmp_path / 'run'}"
    assert "Traceback" not in run.text
    assert latest_valid(tmp_path / "run" / "checkpoints")[1]["position"]["step"] > 20


@pytest.mark.fault("SIGINT twice", "exits at once with 130")
def test_sigint_twice(tmp_path):
    run = Run(*SLOW, run_dir=tmp_path / "run")
    wait_for((tmp_path / "run" / "checkpoints" / LATEST).exists, run)
    time.sleep(0.3)  # into a step of two seconds
    run.send(signal.SIGINT)
    wait_for(lambda: "Press Ctrl-C again" in run.text, run)
    start = time.monotonic()
    run.send(signal.SIGINT)
    assert run.wait(30) == 130
    assert time.monotonic() - start < 1.5  # it did not wait for the step
    assert "go on with" not in run.text


@pytest.mark.fault("SIGTERM in a sweep", "the sweep stops with 143, finished points stay, the current one can go on")
def test_sigterm_in_a_sweep(tmp_path):
    sweep = tmp_path / "sweep"
    points = [*DIGITS, "trainer.max_epochs=2,2001,3", f"hydra.sweep.dir={sweep}"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), "-m", *points],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def point(epochs: int) -> Path:
        return next(sweep.glob(f"max_epochs_{epochs}-*"), sweep / "absent")

    wait_for(lambda: (point(2001) / "metrics.csv").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert finished_result(point(2)) is not None
    assert finished_result(point(2001)) is None
    assert latest_valid(point(2001) / "checkpoints") is not None
    assert not (point(3) / "config.yaml").exists()
