"""Faults around the run directory."""

import os
import re
from pathlib import Path

import pytest
from helpers import train_many

from alexnet_pl.runtime.run_folder import finished_result, run_lock

from .processes import DIGITS, Command, Run, wait_for


@pytest.mark.fault("8 runs started in the same second", "8 run directories, each with a finished run")
def test_simultaneous_runs_have_their_own_directories(tmp_path: Path):
    command = ["model=lenet5", "data=digits", "trainer=smoke", "trainer.accelerator=cpu"]
    runs = train_many([command] * 8, tmp_path, at_once=True)
    assert [run.returncode for run in runs] == [0] * 8, [run.stderr for run in runs]
    directories = {next(iter(re.findall(r"(?m)(\S*runs/lenet5_digits/\S+?)/?$", run.stdout))) for run in runs}
    assert len(directories) == 8
    assert all(finished_result(tmp_path / directory) is not None for directory in directories)


@pytest.mark.fault("two processes on one run directory", "the second is refused with the first's pid, exit 2")
def test_second_fresh_process_is_refused(tmp_path):
    """The first has not written its config yet."""
    with run_lock(tmp_path / "run"):
        second = Run(*DIGITS, run_dir=tmp_path / "run")
        assert second.wait() == 2, second.text
    assert second.errors[0].startswith(
        f"error: run_dir={tmp_path}/run is in use by another process (pid {os.getpid()})."
    )
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.fault("two processes on one run directory", "the second is refused with the first's pid, exit 2")
def test_second_resuming_process_is_refused(tmp_path):
    first = Run(*DIGITS, "trainer.max_epochs=5000", run_dir=tmp_path / "run")
    wait_for((tmp_path / "run" / "metrics.csv").exists, first)
    second = Run("resume=here", run_dir=tmp_path / "run")
    assert second.wait() == 2, second.text
    (error,) = second.errors
    assert error.startswith(f"error: run_dir={tmp_path}/run is in use by another process (pid {first.process.pid}).")
    first.process.kill()
    first.process.join()
    written = (tmp_path / "run" / "metrics.csv").stat().st_mtime_ns
    third = Run("resume=here", run_dir=tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").stat().st_mtime_ns > written, third)


@pytest.mark.fault("a link in a run directory that leads out of it", "resuming is refused before anything is written")
@pytest.mark.security
@pytest.mark.parametrize("name", ["train.log", ".hydra/config.yaml", "checkpoints/latest.ckpt", "tensorboard"])
def test_planted_link_is_refused(name, tmp_path):
    (tmp_path / "precious").write_text("mine")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("run_dir: run\n")
    link.symlink_to(tmp_path / "precious")
    refused = Command("resume=run", cwd=tmp_path)
    assert refused.wait() == 2, refused.text
    (error,) = refused.errors
    assert "is a link that leaves the run directory" in error
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.fault("a FIFO, directory or hard link in place of a file of the run", "resuming is refused, exit 2")
@pytest.mark.security
@pytest.mark.parametrize("name", ["train.log", ".hydra/config.yaml", "metrics.csv"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "hard link"])
def test_planted_entry_is_refused(name, kind, tmp_path):
    """Hydra opens the first two before this project's code runs; a FIFO would block it."""
    (tmp_path / "precious").write_text("mine")
    entry = tmp_path / "run" / name
    entry.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("run_dir: run\n")
    {"fifo": os.mkfifo, "directory": os.mkdir, "hard link": lambda path: path.hardlink_to(tmp_path / "precious")}[kind](
        entry
    )
    refused = Command("resume=run", cwd=tmp_path)
    assert refused.wait() == 2, refused.text
    (error,) = refused.errors
    replaced = kind == "hard link" and name == "metrics.csv"  # as a whole, which leaves the other name alone
    assert replaced or f"resume=run is refused: {entry}" in error
    assert (tmp_path / "precious").read_text() == "mine"
