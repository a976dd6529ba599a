"""Training by two processes on this machine: the same figures as by one, and the end of one is the end of both."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, figures, make_tree, train_many

from alexnet_pl.data.class_folders import list_tree
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import LATEST, latest_valid, read_checkpoint

from .processes import DIGITS, Run, wait_for

# 20 batches an epoch; the last batch of validation has 16 of 64 images, and of the test 40.
RUN = (*DIGITS, "trainer.max_epochs=3", "augment=none")
DDP = (*RUN[:2], "trainer=ddp", "trainer.devices=2", *RUN[2:])
FILES = {"checkpoints", "config.yaml", "figures", "metrics.csv", "report.html", "result.json", "tensorboard"}
UNUSED = ("channels", "fc_widths", "norm", "norm_placement", "pool", "activation")
BREAKING = ("model._target_=faults.processes.BreakingNet", *(f"~model.{key}" for key in UNUSED))


class Pair:
    """Two processes of one run, started as ``torchrun`` starts them."""

    def __init__(self, *overrides: str, run_dir: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
        self.ranks = [
            Run(*overrides, run_dir=run_dir, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    def wait(self, seconds: float = 300) -> list[int]:
        return [rank.wait(seconds) for rank in self.ranks]

    @property
    def text(self) -> str:
        return "".join(rank.text for rank in self.ranks)


def assert_same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """Every figure of every epoch, the result and the weights."""
    for ours, theirs in zip(figures(one), figures(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            mine, yours = (float(row[name] or -1) for row in (ours, theirs))
            assert mine == (yours if tolerance == 0 else pytest.approx(yours, rel=tolerance, abs=tolerance)), name
    weights = [read_checkpoint(folder / "checkpoints" / LATEST)["state_dict"] for folder in (one, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=10 * tolerance, atol=tolerance)
    ours, theirs = finished_result(one), finished_result(other)
    assert ours["data"] == theirs["data"]
    assert ours["test/acc"] == pytest.approx(theirs["test/acc"], abs=tolerance)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two processes, never to be written to."""
    run_dir = tmp_path_factory.mktemp("together") / "run"
    assert Pair(*DDP, run_dir=run_dir).wait() == [0, 0]
    return run_dir


@pytest.mark.fault("two processes instead of one", "the same figures and weights for the same batch, one set of files")
def test_two_processes_are_one(together, tmp_path):
    assert Run(*RUN, run_dir=tmp_path / "run").wait() == 0
    assert_same(together, tmp_path / "run", tolerance=2e-5)
    assert {path.name for path in together.iterdir()} == FILES - {"figures", "report.html"}  # not drawn here
    assert finished_result(together)["device"].startswith("2 × cpu (")


@pytest.mark.fault("two processes on shards", "the same figures and weights for the same batch")
def test_two_processes_share_shards(tmp_path):
    make_shards(list_tree(make_tree(tmp_path / "tree", train=30, val=7)), tmp_path / "out", 16, per_shard=20)
    data = ("data=shards", f"data.root={tmp_path / 'out'}", "data.image_size=16", "data.batch_size=8")
    settings = ("model=lenet5", *data, *DIGITS[2:], "trainer.max_epochs=2")
    assert Run(*settings, run_dir=tmp_path / "one").wait() == 0
    pair = Pair(*settings[:1], "trainer=ddp", "trainer.devices=2", *settings[1:], run_dir=tmp_path / "two")
    assert pair.wait() == [0, 0], pair.text
    assert_same(tmp_path / "two", tmp_path / "one", tolerance=2e-5)


@pytest.mark.fault("SIGTERM to one of two processes", "both save at the same step, exit 143; resumed bit for bit")
def test_a_signal_to_one(tmp_path):
    # Dropout and crops, so that the random generators of both have to be right too.
    net = ("model=alexnet_bn", "model.channels=[4,6,8,8,6]", "model.fc_width=16")
    settings = (*net, "trainer=ddp", "trainer.devices=2", "data=digits", "augment=crop_flip", *DIGITS[2:],
                "trainer.max_epochs=2", "data.batch_size=8")  # fmt: skip
    whole = tmp_path / "whole"
    assert Pair(*settings, run_dir=whole).wait() == [0, 0]
    pair = Pair(*settings, run_dir=tmp_path / "run")
    wait_for(lambda: "epoch 1/" in pair.text, pair.ranks[0])
    time.sleep(0.5)  # into the second epoch
    pair.ranks[1].send(signal.SIGTERM)
    assert pair.wait() == [143, 143], pair.text
    position = latest_valid(tmp_path / "run" / "checkpoints")[1]["position"]
    assert position["epoch"] == 1
    assert position["batch"] in range(10, 161, 10)
    assert Pair("resume=here", run_dir=tmp_path / "run").wait() == [0, 0]
    assert_same(tmp_path / "run", whole)


@pytest.mark.fault("NaN in one of two processes", "both name the step, one error line each, exit 1")
@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("nan loss", "the loss is nan at step 4 "),
        ("inf loss", "the loss is infinite at step 4 "),
        ("nan gradient", "the loss is nan at step 5 "),  # several processes look later, when the weights tell no more
    ],
)
def test_nan_in_both(how, named, tmp_path):
    pair = Pair(DDP[0], *BREAKING, f"+model.how={how}", *DDP[1:], run_dir=tmp_path / "run")
    assert pair.wait() == [1, 1]
    for rank in pair.ranks:
        assert len(rank.errors) == 1
        assert named in rank.errors[0]
        assert "Traceback" not in rank.text


# --- as a user starts them ------------------------------------------------------------------------------------------


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()


def start(started: list[subprocess.Popen], *command: str, cwd: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD"))}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started.append(process)
    return process


def children(process: int) -> dict[int, int]:
    """Process id of each rank that ``process`` has started."""
    found = {}
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): int(child) for each in variables if each.startswith(b"RANK=")}
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LONG = ("model=lenet5", "data=digits", "trainer=ddp", "trainer.devices=2", *DIGITS[2:], "trainer.max_epochs=5000",
        "callbacks.resume.min_interval_seconds=0")  # fmt: skip


@pytest.mark.fault("SIGKILL of one of two processes", "the other ends within a minute, one error says which, exit 1")
def test_a_killed_process_ends_the_run(started, tmp_path):
    process = start(started, str(REPOSITORY / "train.py"), *LONG, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists() or process.poll() is not None, seconds=600)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    begin = time.monotonic()
    said, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert process.returncode == 1
    assert "error: process 1 of 2 was killed by SIGKILL" in errors
    assert f"Go on with: python train.py resume={tmp_path}/run" in errors
    assert "Traceback" not in errors
    assert not any(map(alive, ranks.values()))
    assert latest_valid(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.fault("SIGTERM to a run of two processes", "saves once, prints the resume command, exit 143")
def test_a_signal_to_the_run(started, tmp_path):
    process = start(started, str(REPOSITORY / "train.py"), *LONG, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists() or process.poll() is not None, seconds=600)
    ranks = children(process.pid)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert said.splitlines()[-1] == f"go on with: python train.py resume={tmp_path}/run"
    assert "Traceback" not in errors
    assert not any(map(alive, ranks.values()))


@pytest.mark.fault("SIGKILL of what started two processes", "they save and end by themselves")
def test_a_killed_parent(started, tmp_path):
    process = start(started, str(REPOSITORY / "train.py"), *LONG, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists() or process.poll() is not None, seconds=600)
    ranks = children(process.pid)
    assert sorted(ranks) == [0, 1]
    process.kill()
    wait_for(lambda: not any(map(alive, ranks.values())), seconds=60)


@pytest.mark.fault("torchrun without a run folder", "all processes use the one that process 0 makes")
def test_torchrun(started, tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(REPOSITORY / "train.py"))
    overrides = ("model=lenet5", "data=digits", "trainer=ddp", *DIGITS[2:], "trainer.max_epochs=1")
    process = start(started, *command, *overrides, cwd=tmp_path)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    (run_dir,) = (tmp_path / "runs" / "lenet5_digits").iterdir()
    assert finished_result(run_dir)["status"] == "finished"
    assert re.findall("^run folder (.*)$", said, re.MULTILINE) == [str(run_dir)]
    assert FILES | {".hydra", "train.log"} == {path.name for path in run_dir.iterdir()}


@pytest.mark.fault("processes that cannot work", "the reason in one line, exit 2")
def test_refusals(tmp_path):
    ddp = ("model=lenet5", "data=digits", "trainer=ddp", *DIGITS[2:])
    done = train_many(
        [
            [*ddp, "trainer.devices=3"],
            [*ddp, "trainer.num_nodes=2"],
            [*ddp, "trainer.sync_batchnorm=true"],
        ],
        tmp_path,
    )
    for each, message in zip(
        done,
        [
            "data.batch_size=64 cannot be shared by 3 processes",
            "trainer.num_nodes=2: the processes of several machines are started by torchrun or srun.",
            "trainer.sync_batchnorm=true is not possible on a CPU",
        ],
        strict=True,
    ):
        assert each.returncode == 2
        assert each.stderr.startswith(f"error: {message}")
        assert len(each.stderr.splitlines()) == 1


@pytest.mark.fault("a sweep with several processes a point", "no point runs, the reason in one line, exit 2")
def test_a_sweep_by_several_processes(tmp_path):
    settings = ("model=lenet5", "data=digits", "trainer=ddp", *DIGITS[2:], "trainer.devices=2", "seed=1,2")
    (done,) = train_many([["-m", "study=s", *settings]], tmp_path)
    assert done.returncode == 2
    message = "error: 2 processes are not possible in a sweep (-m): each of them would run the whole sweep."
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert not [*tmp_path.glob("multirun/s/*/checkpoints")]
