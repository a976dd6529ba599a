"""What becomes of a study whose processes are killed, stopped or run twice at once: real processes, real signals."""

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
from alexnet_pl.studies.store import Study
from alexnet_pl.training.checkpoint_io import LATEST, read_checkpoint

from .processes import DIGITS, Command, wait_for

FIGURES = "callbacks.dashboard.figures=false"
STUDY = ("-m", "study=s", *DIGITS, "trainer.max_epochs=12", "model/pool=overlapping,non_overlapping", "seed=1,2",
         "callbacks.resume.interval_minutes=0", FIGURES)  # fmt: skip


def points(cwd: Path) -> list[Path]:
    """The folders of the study's points; Hydra makes one before anything runs in it."""
    return sorted(path.parent for path in (cwd / "multirun" / "s").glob("*/config.yaml"))


def numbers(folder: Path) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    timing = {"epoch_seconds", "images_per_second"}
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name not in timing} for row in csv.DictReader(file)]
    return rows, read_checkpoint(folder / "checkpoints" / LATEST)["state_dict"]


def assert_same_numbers(one: Path, other: Path) -> None:
    (rows, weights), (other_rows, other_weights) = numbers(one), numbers(other)
    assert rows == other_rows
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def progress(cwd: Path, command: Command) -> tuple[int, int, int]:
    """Epochs that the command has seen, points that have begun, points that have ended."""
    return command.text.count("epoch "), len(points(cwd)), len(list(cwd.glob("multirun/s/*/result.json")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study that nobody disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    command = Command(*STUDY, cwd=cwd)
    assert command.wait() == 0, command.text
    return cwd


def assert_complete(cwd: Path, whole: Path) -> None:
    """Every point once, each with the numbers of the undisturbed study."""
    study = Study(cwd / "multirun" / "s")
    assert Counter(study.state(name) for name in study.points) == {"finished": 4}
    assert [path.name for path in points(cwd)] == [path.name for path in points(whole)]
    for folder, undisturbed in zip(points(cwd), points(whole), strict=True):
        assert_same_numbers(folder, undisturbed)


@pytest.mark.fault("SIGKILL of a study at 8 moments", "the same command completes it: every point once, same numbers")
def test_a_study_killed_again_and_again(tmp_path, whole):
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


@pytest.mark.fault("SIGTERM or SIGINT in a study", "stops with 128 + signal, the same command goes on, same numbers")
def test_a_study_stopped_by_signals(tmp_path, whole):
    for number, begun in ((signal.SIGTERM, 1), (signal.SIGINT, 3)):
        command = Command(*STUDY, cwd=tmp_path)
        while progress(tmp_path, command)[0] == 0 or len(points(tmp_path)) < begun:
            assert command.process.is_alive(), command.text
            time.sleep(0.001)
        command.send(number)
        assert command.wait() == 128 + number, command.text
        assert command.text.rstrip().endswith("The same command goes on with it."), command.text
        assert "Traceback" not in command.text
    last = Command(*STUDY, cwd=tmp_path)
    assert last.wait() == 0, last.text
    assert_complete(tmp_path, whole)


@pytest.mark.fault("two processes on one study", "no point runs twice, both end with 0")
def test_two_processes_on_one_study(tmp_path, whole):
    commands = [Command(*STUDY, cwd=tmp_path) for _ in range(2)]
    assert [command.wait() for command in commands] == [0, 0], "\n".join(command.text for command in commands)
    begun = Counter(line for command in commands for line in command.text.splitlines() if line.startswith("point   "))
    assert set(begun.values()) == {1}
    assert len(begun) == 4
    assert_complete(tmp_path, whole)


@pytest.mark.fault("SIGKILL of one of two processes on a study", "the lock ends with it: the other or a third goes on")
def test_a_lock_ends_with_its_owner(tmp_path, whole):
    killed = Command(*STUDY, cwd=tmp_path)
    wait_for(lambda: "epoch " in killed.text, killed)
    killed.process.kill()
    killed.process.join()
    study = Study(tmp_path / "multirun" / "s")
    assert Counter(study.state(name) for name in study.points) == {"stopped": 1, "missing": 3}
    last = Command(*STUDY, cwd=tmp_path)
    assert last.wait() == 0, last.text
    assert_complete(tmp_path, whole)


@pytest.mark.fault(
    "SIGTERM with two workers (joblib)", "the workers save, exit 143, the same command goes on, same numbers"
)
def test_parallel_points_stop_and_go_on(tmp_path, whole):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    parallel = (*STUDY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    command = Command(*parallel, cwd=tmp_path, fresh=True)
    wait_for(lambda: len(list(tmp_path.glob("multirun/s/*/checkpoints/latest.ckpt"))) == 2, command)
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM, command.text
    assert "The same command goes on with it." in command.text
    assert "Traceback" not in command.text
    assert not list(tmp_path.glob("multirun/s/.locks/*.worker"))
    last = Command(*parallel, cwd=tmp_path, fresh=True)
    assert last.wait() == 0, last.text
    assert_complete(tmp_path, whole)
    assert (tmp_path / "multirun" / "s" / "report.md").is_file()


@pytest.mark.fault("a failing point on a cluster (submitit, local executor)", "the others finish, exit 1, same numbers")
def test_points_as_jobs_of_a_cluster(tmp_path, whole):
    pytest.importorskip("submitit")
    jobs = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1")
    some = [override for override in STUDY if not override.startswith("seed=")]
    command = Command(*some, "seed=1", *jobs, cwd=tmp_path, fresh=True)
    assert command.wait() == 0, command.text
    alone = {path.name.rpartition("-")[2]: path for path in points(whole)}  # there the seed is in the names too
    for folder in points(tmp_path):
        assert_same_numbers(folder, alone[folder.name.rpartition("-")[2]])
    shutil.rmtree(tmp_path / "multirun")
    failing = Command(*some, "seed=1,-1", *jobs, cwd=tmp_path, fresh=True)
    assert failing.wait() == 1, failing.text
    study = Study(tmp_path / "multirun" / "s")
    assert Counter(study.state(name) for name in study.points) == {"finished": 2, "failed": 2}
    assert len([line for line in failing.errors if "seed=-1 is not possible" in line]) == 2
