"""Faults of studies: killed, stopped, or run twice at once, with real processes and real signals."""

import csv
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.studies.session import RESUME_HINT
from alexnet_pl.studies.store import Study
from alexnet_pl.training.checkpoint_io import LATEST, read_checkpoint

from .processes import DIGITS, Command, wait_for

FIGURES = "callbacks.dashboard.figures=false"
STUDY = ("-m", "study=s", *DIGITS, "trainer.max_epochs=12", "model/pool=overlapping,non_overlapping", "seed=1,2",
         "callbacks.resume.interval_minutes=0", "callbacks.resume.keep=true", FIGURES)  # fmt: skip


def run_dirs(cwd: Path) -> list[Path]:
    """Return the run directories of trials that have begun; Hydra creates a directory before anything runs in it."""
    return sorted(path.parent for path in (cwd / "multirun" / "s").glob("*/config.yaml"))


def numbers(run_dir: Path) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    timing = {"epoch_seconds", "images_per_second"}
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name not in timing} for row in csv.DictReader(file)]
    return rows, read_checkpoint(run_dir / "checkpoints" / LATEST)["state_dict"]


def assert_same_numbers(one: Path, other: Path) -> None:
    (rows, weights), (other_rows, other_weights) = numbers(one), numbers(other)
    assert rows == other_rows
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def progress(cwd: Path, command: Command) -> tuple[int, int, int]:
    """Return the epochs the command has logged, the trials that have begun, and the trials that have ended."""
    return command.text.count("epoch "), len(run_dirs(cwd)), len(list(cwd.glob("multirun/s/*/result.json")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the study without any fault."""
    cwd = tmp_path_factory.mktemp("whole")
    command = Command(*STUDY, cwd=cwd)
    assert command.wait() == 0, command.text
    return cwd


def assert_complete(cwd: Path, whole: Path) -> None:
    """Check that every trial ran once and has the numbers of the undisturbed study."""
    study = Study(cwd / "multirun" / "s")
    assert Counter(study.state(name) for name in study.trials) == {"finished": 4}
    assert [path.name for path in run_dirs(cwd)] == [path.name for path in run_dirs(whole)]
    for run_dir, undisturbed in zip(run_dirs(cwd), run_dirs(whole), strict=True):
        assert_same_numbers(run_dir, undisturbed)


@pytest.mark.fault(
    "SIGKILL of a study at 8 moments", "re-running the command completes it: every trial once, same numbers"
)
def test_study_killed_again_and_again(tmp_path, whole):
    moments, kills = random.Random(0), 0
    results: dict[Path, int] = {}
    while kills < 8:
        command = Command(*STUDY, cwd=tmp_path)
        before = progress(tmp_path, command)
        while command.process.is_alive() and progress(tmp_path, command)[kills % 3] == before[kills % 3]:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        command.process.kill()
        command.process.join()
        kills += 1
        for path in tmp_path.glob("multirun/s/*/result.json"):
            assert finished_result(path.parent) is not None, "half a result"
            assert results.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "ran twice"
    last = Command(*STUDY, cwd=tmp_path)
    assert last.wait() == 0, last.text
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in results.items())
    assert_complete(tmp_path, whole)


@pytest.mark.fault("SIGTERM, SIGINT or SIGHUP in a study", "exits with 128 + signal, re-running resumes, same numbers")
def test_study_stopped_by_signals(tmp_path, whole):
    for number, begun in ((signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGHUP, 3)):
        command = Command(*STUDY, cwd=tmp_path)
        while progress(tmp_path, command)[0] == 0 or len(run_dirs(tmp_path)) < begun:
            assert command.process.is_alive(), command.text
            time.sleep(0.001)
        command.send(number)
        assert command.wait() == 128 + number, command.text
        assert command.text.rstrip().endswith(RESUME_HINT), command.text
        assert "Traceback" not in command.text
    last = Command(*STUDY, cwd=tmp_path)
    assert last.wait() == 0, last.text
    assert_complete(tmp_path, whole)


@pytest.mark.fault("two processes on one study", "no trial runs twice, both exit with 0")
def test_two_processes_on_one_study(tmp_path, whole):
    commands = [Command(*STUDY, cwd=tmp_path) for _ in range(2)]
    assert [command.wait() for command in commands] == [0, 0], "\n".join(command.text for command in commands)
    begun = Counter(line for command in commands for line in command.text.splitlines() if line.startswith("trial   "))
    assert set(begun.values()) == {1}
    assert len(begun) == 4
    assert_complete(tmp_path, whole)


@pytest.mark.fault("SIGKILL of one of two processes on a study", "its lock is released: another process resumes")
def test_lock_ends_with_its_owner(tmp_path, whole):
    killed = Command(*STUDY, cwd=tmp_path)
    wait_for(lambda: "epoch " in killed.text, killed)
    killed.process.kill()
    killed.process.join()
    study = Study(tmp_path / "multirun" / "s")
    assert Counter(study.state(name) for name in study.trials) == {"stopped": 1, "missing": 3}
    last = Command(*STUDY, cwd=tmp_path)
    assert last.wait() == 0, last.text
    assert_complete(tmp_path, whole)


@pytest.mark.fault("SIGTERM with two workers (joblib)", "the workers save, exit 143, re-running resumes, same numbers")
def test_parallel_trials_stop_and_resume(tmp_path, whole):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    parallel = (*STUDY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    command = Command(*parallel, cwd=tmp_path, fresh=True)
    wait_for(lambda: len(list(tmp_path.glob("multirun/s/*/checkpoints/latest.ckpt"))) == 2, command)
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM, command.text
    assert RESUME_HINT in command.text
    assert "Traceback" not in command.text
    assert not list(tmp_path.glob("multirun/s/.locks/*.worker"))
    last = Command(*parallel, cwd=tmp_path, fresh=True)
    assert last.wait() == 0, last.text
    assert_complete(tmp_path, whole)
    assert (tmp_path / "multirun" / "s" / "report.md").is_file()


@pytest.mark.fault("a failing trial on a cluster (submitit, local executor)", "the others finish, exit 1, same numbers")
def test_trials_as_cluster_jobs(tmp_path, whole):
    pytest.importorskip("submitit")
    jobs = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1")
    some = [override for override in STUDY if not override.startswith("seed=")]
    command = Command(*some, "seed=1", *jobs, cwd=tmp_path, fresh=True)
    assert command.wait() == 0, command.text
    alone = {path.name.rpartition("-")[2]: path for path in run_dirs(whole)}  # whose names have the seed too
    for run_dir in run_dirs(tmp_path):
        assert_same_numbers(run_dir, alone[run_dir.name.rpartition("-")[2]])
    shutil.rmtree(tmp_path / "multirun")
    failing = Command(*some, "seed=1,-1", *jobs, cwd=tmp_path, fresh=True)
    assert failing.wait() == 1, failing.text
    study = Study(tmp_path / "multirun" / "s")
    assert Counter(study.state(name) for name in study.trials) == {"finished": 2, "failed": 2}
    assert len([line for line in failing.errors if "seed=-1 is invalid" in line]) == 2
