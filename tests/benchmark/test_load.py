"""The load benchmark: fair shares, busy processes, and a small measurement from end to end."""

import subprocess
import sys

import pytest
from helpers import PATIENCE

from alexnet_pl.benchmark.load import BUSY, bench_load, busy_processes, fair_share, load_report, summarize_loads


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
    found = summarize_loads({0: [0.1, 0.2, 0.1], 1: [0.3, 0.6, 0.2]}, batch_size=128, threads=2, cores=2)
    assert found["0"] == {
        "images_per_second": 1280, "fair_share": 1, "kept": 1, "kept_min": 1, "kept_max": 1,
    }  # fmt: skip
    assert found["1"]["kept"] == pytest.approx(0.5)
    assert (found["1"]["kept_min"], found["1"]["kept_max"]) == (pytest.approx(0.5), pytest.approx(0.75))
    assert found["1"]["images_per_second"] == pytest.approx(128 / 0.3)


def test_a_run_is_measured_beside_each_load():
    found = bench_load(1, 1, (0, 1), ("model=lenet5", "data.image_size=32", "data.batch_size=8", "scheduler=constant"))
    assert [*found["loads"]] == ["0", "1"]
    assert all(row["images_per_second"] > 0 for row in found["loads"].values())
    text = load_report(found)
    assert f"{found['threads']} threads" in text
    assert text.splitlines()[-1].split()[:3] == [
        "1", f"{found['loads']['1']['images_per_second']:,.1f}", f"{found['loads']['1']['fair_share']:.2f}",
    ]  # fmt: skip
