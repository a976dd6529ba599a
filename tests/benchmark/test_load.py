"""The load benchmark: fair shares, busy processes, and a small measurement from end to end."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import KEEP, NO_FIGURES, PATIENCE, SHORT_RUN

from alexnet_pl.benchmark.components import environment
from alexnet_pl.benchmark.load import BUSY, bench_load, busy_processes, fair_share, summarize_loads
from alexnet_pl.benchmark.render import markdown, number
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.runtime.system import usable_cores


@pytest.mark.parametrize(
    ("threads", "cores", "busy", "share"),
    [
        (2, 2, 0, 1),
        (2, 2, 1, 2 / 3),
        (2, 2, 2, 1 / 2),
        (2, 2, 4, 1 / 3),
        (1, 2, 1, 1),
        (1, 2, 3, 1 / 2),
        (4, 2, 4, 1 / 2),
    ],
)
def test_fair_share_is_what_equal_treatment_of_all_threads_leaves(threads, cores, busy, share):
    assert fair_share(threads, cores, busy) == pytest.approx(share)


def test_busy_processes_run_until_the_block_ends():
    with busy_processes(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert None not in [process.poll() for process in processes]


def test_busy_process_ends_without_its_parent():
    not_its_parent = "0"
    done = subprocess.run([sys.executable, "-c", BUSY, not_its_parent], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, b"x")


def test_kept_compares_rounds_with_the_quiet_turn_of_the_same_round():
    # The machine became twice as slow in the second round, which concerns no ratio.
    found = summarize_loads({0: [0.1, 0.2, 0.1], 1: [0.3, 0.6, 0.2]}, threads=2, cores=2)
    assert found["0"] == {"images_per_second": 10, "fair_share": 1, "kept": 1, "kept_min": 1, "kept_max": 1}
    assert found["1"]["kept"] == pytest.approx(0.5)
    assert (found["1"]["kept_min"], found["1"]["kept_max"]) == (pytest.approx(0.5), pytest.approx(0.75))
    assert found["1"]["images_per_second"] == pytest.approx(1 / 0.3)


@pytest.mark.slow
def test_a_run_is_measured_beside_each_load():
    small = ("model=lenet5", "data.image_size=32", "data.batch_size=8", "scheduler=constant")
    found = {"kind": "load", **environment(torch.device("cpu")), **bench_load(1, 200, (0, 1), small)}
    assert [*found["loads"]] == ["0", "1"]
    assert all(row["images_per_second"] > 0 for row in found["loads"].values())
    rate = number(found["loads"]["1"]["images_per_second"])
    assert f"| beside 1 busy processes, images/s | {rate} " in markdown(found)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or usable_cores() < 2, reason="needs Linux and two cores")
def test_a_run_beside_busy_processes_takes_fewer_threads_and_keeps_them(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "alexnet_pl", "train", *SHORT_RUN, NO_FIGURES, KEEP, "hydra.run.dir=run"]

    def train(*arguments: str) -> None:
        subprocess.run([*command[:4], *arguments], cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)

    with busy_processes(2 * usable_cores()):
        train(*command[4:])
    threads = finished_result(tmp_path / "run")["threads"]
    assert threads < usable_cores()
    assert "other programs keep" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    train("resume=run", "trainer.max_epochs=3", "allow_changes=true")
    assert finished_result(tmp_path / "run")["threads"] == threads
