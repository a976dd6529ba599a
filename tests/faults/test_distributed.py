"""Distributed training with two ranks on one node: the metrics of a single process, and failures of ranks."""

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
from helpers import PATIENCE, REPOSITORY, make_image_folder, metric_rows, train_many

from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import LATEST, latest_valid, read_checkpoint

from .processes import DIGITS, Run, wait_for

# 20 batches per epoch; the last validation batch has 16 of 64 images, the last test batch 40.
RUN = (*DIGITS, "trainer.max_epochs=3", "augment=none")
DDP = (*RUN[:2], "trainer=ddp", "trainer.devices=2", *RUN[2:])
FILES = {
    "checkpoints",
    "commands.txt",
    "config.yaml",
    "figures",
    "metrics.csv",
    "report.html",
    "result.json",
    "tensorboard",
}
UNUSED = ("channels", "fc_widths", "norm", "norm_placement", "pool", "activation")
BREAKING = ("model._target_=faults.processes.BreakingNet", *(f"~model.{key}" for key in UNUSED))


class Pair:
    """Two ranks of one run, with the environment that ``torchrun`` sets."""

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

    def wait(self) -> list[int]:
        """Return the exit status of both ranks."""
        return [rank.wait() for rank in self.ranks]

    @property
    def text(self) -> str:
        return "".join(rank.text for rank in self.ranks)


def assert_same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """Assert that two runs have the same metrics in every epoch, the same result and the same weights."""
    for ours, theirs in zip(metric_rows(one), metric_rows(other), strict=True):
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
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks, shared by tests that only read it."""
    run_dir = tmp_path_factory.mktemp("two_ranks") / "run"
    assert Pair(*DDP, run_dir=run_dir).wait() == [0, 0]
    return run_dir


@pytest.mark.fault("two ranks instead of one", "the same metrics and weights for the same batch, one set of files")
def test_two_ranks_train_like_one(two_ranks, tmp_path):
    assert Run(*RUN, run_dir=tmp_path / "run").wait() == 0
    assert_same(two_ranks, tmp_path / "run", tolerance=2e-5)
    assert {path.name for path in two_ranks.iterdir()} == FILES - {"figures", "report.html"}  # not drawn here
    assert finished_result(two_ranks)["device"].startswith("2 × cpu (")


AVERAGED = (
    *("scheduler=one_cycle", "callbacks=ema", "callbacks.ema.decay=0.7", "loss.label_smoothing=0.1"),
    *("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1.0"),
)


@pytest.mark.fault("two ranks with today's training", "the same metrics and weights for the same batch")
@pytest.mark.parametrize(
    "recipe",
    [
        ("optimizer=adamw", "augment=[crop,alternating_flip,cutout]"),
        ("optimizer=muon", "optimizer.bfloat16=false", "augment=none"),  # amplifies how gradients were rounded
    ],
)
def test_two_ranks_accumulate_clip_average_and_augment_like_one(recipe, tmp_path):
    """Each image is augmented by its place in the dataset, not by its rank."""
    assert Run(*RUN[:-1], *recipe, *AVERAGED, run_dir=tmp_path / "one").wait() == 0
    pair = Pair(*DDP[:-1], *recipe, *AVERAGED, run_dir=tmp_path / "two")
    assert pair.wait() == [0, 0], pair.text
    assert_same(tmp_path / "two", tmp_path / "one", tolerance=2e-4)


@pytest.mark.fault("two ranks that mix images", "the run finishes, with a higher training loss")
def test_two_ranks_mix_images(two_ranks, tmp_path):
    pair = Pair(*DDP[:-1], "augment=mixup", run_dir=tmp_path / "run")
    assert pair.wait() == [0, 0], pair.text
    mixed, plain = (metric_rows(run_dir)[-1] for run_dir in (tmp_path / "run", two_ranks))
    assert float(mixed["train/loss"]) > float(plain["train/loss"])


@pytest.mark.fault("two ranks on shards", "the same metrics and weights for the same batch")
def test_two_ranks_share_shards(tmp_path):
    make_shards(list_splits(make_image_folder(tmp_path / "tree", train=30, val=7)), tmp_path / "out", 16, per_shard=20)
    data = ("data=shards", f"data.root={tmp_path / 'out'}", "data.image_size=16", "data.batch_size=8")
    settings = ("model=lenet5", *data, *DIGITS[2:], "trainer.max_epochs=2")
    assert Run(*settings, run_dir=tmp_path / "one").wait() == 0
    pair = Pair(*settings[:1], "trainer=ddp", "trainer.devices=2", *settings[1:], run_dir=tmp_path / "two")
    assert pair.wait() == [0, 0], pair.text
    assert_same(tmp_path / "two", tmp_path / "one", tolerance=2e-5)


@pytest.mark.fault("SIGTERM to one of two ranks", "both save at the same step, exit 143; resumed bit for bit")
def test_signal_to_one_rank(tmp_path):
    # Dropout and crops, so that both ranks' random generators must be restored as well.
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
    assert position["batch"] in range(0, 161, 10)  # 0 on a busy machine, on which the epoch has not begun
    assert Pair("resume=here", run_dir=tmp_path / "run").wait() == [0, 0]
    assert_same(tmp_path / "run", whole)


@pytest.mark.fault("NaN in one of two ranks", "both name the step, one error line each, exit 1")
@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("nan loss", "the loss is nan at step 4 "),
        ("inf loss", "the loss is infinite at step 4 "),
        ("nan gradient", "the loss is nan at step 5 "),  # ranks check a step later, when the weights are NaN as well
    ],
)
def test_nan_in_one_rank(how, named, tmp_path):
    pair = Pair(DDP[0], *BREAKING, f"+model.how={how}", *DDP[1:], run_dir=tmp_path / "run")
    assert pair.wait() == [1, 1]
    for rank in pair.ranks:
        assert len(rank.errors) == 1
        assert named in rank.errors[0]
        assert "Traceback" not in rank.text


# --- started as a user does -----------------------------------------------------------------------------------------


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
    """Return the process ID of each rank started by ``process``."""
    found = {}
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): int(child) for each in variables if each.startswith(b"RANK=")}
    return found


def alive(process: int) -> bool:
    """Return True unless the process has ended, waited for or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LONG = ("model=lenet5", "data=digits", "trainer=ddp", "trainer.devices=2", *DIGITS[2:], "trainer.max_epochs=5000",
        "callbacks.resume.min_interval_seconds=0")  # fmt: skip


@pytest.mark.fault("SIGKILL of one of two ranks", "the other ends too, one error names the killed one, exit 1")
def test_killed_rank_ends_the_run(started, tmp_path):
    process = start(started, str(REPOSITORY / "train.py"), *LONG, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "error: rank 1 of 2 was killed by SIGKILL" in errors
    assert f"To resume: python {REPOSITORY}/train.py resume={tmp_path}/run" in errors
    assert "Traceback" not in errors
    assert not any(map(alive, ranks.values()))
    assert latest_valid(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.fault(
    "SIGTERM or SIGHUP to the launcher of two ranks", "saves once, prints the resume command, exit 128 + signal"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_launcher(number, started, tmp_path):
    process = start(started, str(REPOSITORY / "train.py"), *LONG, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    ranks = children(process.pid)
    process.send_signal(number)
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, errors
    assert said.splitlines()[-1] == f"To resume: python {REPOSITORY}/train.py resume={tmp_path}/run"
    assert "Traceback" not in errors
    assert not any(map(alive, ranks.values()))


@pytest.mark.fault("SIGKILL of the launcher of two ranks", "they save and end by themselves")
def test_killed_launcher(started, tmp_path):
    process = start(started, str(REPOSITORY / "train.py"), *LONG, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    ranks = children(process.pid)
    assert sorted(ranks) == [0, 1]
    process.kill()
    wait_for(lambda: not any(map(alive, ranks.values())))


@pytest.mark.fault("torchrun without a run directory", "all ranks use the one that rank 0 creates")
def test_torchrun(started, tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(REPOSITORY / "train.py"))
    overrides = ("model=lenet5", "data=digits", "trainer=ddp", *DIGITS[2:], "trainer.max_epochs=1")
    process = start(started, *command, *overrides, cwd=tmp_path)
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    (run_dir,) = (tmp_path / "runs" / "lenet5_digits").iterdir()
    assert finished_result(run_dir)["status"] == "finished"
    assert re.findall("^run directory (.*)$", said, re.MULTILINE) == [str(run_dir)]
    assert FILES | {"train.log"} == {path.name for path in run_dir.iterdir()}


@pytest.mark.fault("an invalid number of ranks", "the reason in one line, exit 2")
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
            "data.batch_size=64 is invalid: expected a multiple of the 3 ranks",
            "trainer.num_nodes=2 is invalid: expected 1, or a start by torchrun or srun.",
            "trainer.sync_batchnorm=true is invalid: expected false on a CPU",
        ],
        strict=True,
    ):
        assert each.returncode == 2
        assert each.stderr.startswith(f"error: {message}")
        assert len(each.stderr.splitlines()) == 1


@pytest.mark.fault("a sweep with several ranks per trial", "no trial runs, the reason in one line, exit 2")
def test_sweep_with_several_ranks(tmp_path):
    settings = ("model=lenet5", "data=digits", "trainer=ddp", *DIGITS[2:], "trainer.devices=2", "seed=1,2")
    (done,) = train_many([["-m", "study=s", *settings]], tmp_path)
    assert done.returncode == 2
    message = "error: 2 ranks are invalid in a sweep (-m): each of them would run the whole sweep."
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "multirun" / "s").exists()
