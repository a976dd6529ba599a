"""Signals to real processes."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import PATIENCE, REPOSITORY

from alexnet_pl.runtime.commands import train_command
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import latest_valid

from .processes import DIGITS, Run, wait_for

LONG = (*DIGITS, "trainer.max_epochs=5000")
STUCK = (
    *("model=lenet5", "model._target_=faults.processes.BreakingNet", "+model.how=stuck", *DIGITS[1:]),
    *(f"~model.{key}" for key in ("channels", "fc_widths", "norm", "norm_placement", "pool", "activation")),
)


@pytest.mark.fault(
    "SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 inside an epoch",
    "saves, prints the resume command, exit 128 + signal",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_saves_and_exits(number, tmp_path):
    run_dir = tmp_path / "lr=0.01 (a)"
    run = Run(*LONG, run_dir=run_dir)
    wait_for(lambda: "epoch    2/" in run.text, run)
    run.send(number)
    assert run.wait() == 128 + number
    assert run.text.splitlines()[-1] == f"To resume: {train_command(resume=run_dir)}"
    assert "Traceback" not in run.text
    assert latest_valid(run_dir / "checkpoints")[1]["position"]["step"] > 20


@pytest.mark.fault(
    "the terminal is closed (ssh disconnects)", "the run saves, although nothing can be printed any more"
)
def test_closed_terminal_saves(tmp_path):
    run_dir = tmp_path / "run"
    seldom = "callbacks.resume.min_interval_seconds=1000000"  # only the signal makes it save
    overrides = [*LONG, seldom, f"hydra.run.dir={run_dir}"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(
            sys.executable,
            [sys.executable, str(REPOSITORY / "train.py"), *overrides],
            {**os.environ, "OMP_NUM_THREADS": "1"},
        )
    os.set_blocking(terminal, False)
    shown = bytearray()

    def has_trained() -> bool:
        try:  # read, so that the run does not wait for a full buffer
            shown.extend(os.read(terminal, 2**16))
        except BlockingIOError:
            return (run_dir / "metrics.csv").exists()
        except OSError as error:  # the run has ended
            raise AssertionError(shown.decode(errors="replace")) from error
        return False

    wait_for(has_trained)
    assert latest_valid(run_dir / "checkpoints") is None
    os.close(terminal)  # the kernel sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert latest_valid(run_dir / "checkpoints") is not None
    assert finished_result(run_dir) is None


@pytest.mark.fault("SIGHUP to a run under nohup", "ignored, as nohup promises")
def test_nohup(tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        ["nohup", sys.executable, REPOSITORY / "train.py", *LONG, f"hydra.run.dir={run_dir}"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        rows = run_dir / "metrics.csv"
        wait_for(lambda: rows.exists() or process.poll() is not None)
        process.send_signal(signal.SIGHUP)
        written = rows.stat().st_mtime_ns
        time.sleep(1)
        wait_for(lambda: rows.stat().st_mtime_ns > written or process.poll() is not None)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.fault("SIGINT twice", "exits at once with 130")
def test_second_sigint_does_not_wait_for_the_step(tmp_path):
    run = Run(*STUCK, run_dir=tmp_path / "run")
    wait_for(lambda: "stuck" in run.text, run)
    run.send(signal.SIGINT)
    wait_for(lambda: "Press Ctrl-C again" in run.text, run)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert "To resume" not in run.text


@pytest.mark.fault(
    "SIGTERM in a sweep", "the sweep stops with 143, finished trials stay, the current one can be resumed"
)
def test_sigterm_in_a_sweep(tmp_path):
    sweep = tmp_path / "sweep"
    overrides = [*DIGITS, "trainer.max_epochs=2,5001,3", f"hydra.sweep.dir={sweep}"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), "-m", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def trial(epochs: int) -> Path:
        return next(sweep.glob(f"max_epochs_{epochs}-*"), sweep / "absent")

    wait_for(lambda: (trial(5001) / "metrics.csv").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert finished_result(trial(2)) is not None
    assert finished_result(trial(5001)) is None
    assert latest_valid(trial(5001) / "checkpoints") is not None
    assert not (trial(3) / "config.yaml").exists()
