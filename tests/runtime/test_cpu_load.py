"""Cores that other programs keep busy: counted, rounded, and followed by the number of torch's threads."""

import os
import sys
import time

import pytest
import torch

from alexnet_pl.benchmark.load import busy_processes
from alexnet_pl.runtime import cpu_load
from alexnet_pl.runtime.cpu_load import CpuTimes, cores_in_use_by_others, free_cores, read_cpu_times, torch_threads
from alexnet_pl.runtime.system import usable_cores

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells CPU times per core")


@pytest.mark.parametrize(
    ("used", "cores", "free"),
    [(0.0, 2, 2), (0.49, 2, 2), (0.5, 2, 1), (1.3, 2, 1), (2.0, 2, 1), (5.0, 2, 1), (0.7, 16, 15), (8.4, 16, 8)],
)
def test_free_cores(used, cores, free):
    assert free_cores(used, cores) == free


@linux
def test_only_usable_cores_and_programs_of_usual_priority_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 10})
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 7 20 5 5 3 4 8 2 1\ncpu1 9 9 9 9 9 9 9 9 9 9\ncpu10 1 0 0 0 0 0 0 0 0 0\n"
        "intr 12345\n"
    )
    ticks = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(os, "nice", lambda increment: 0)
    assert read_cpu_times(stat).busy == pytest.approx((100 + 20 + 3 + 4 + 1) / ticks)
    monkeypatch.setattr(os, "nice", lambda increment: 10)
    assert read_cpu_times(stat).busy == pytest.approx((100 + 7 + 20 + 3 + 4 + 1) / ticks)


@pytest.mark.parametrize("text", ["", "cpu0 1 2\n", "cpu 1 2 3 4 5 6 7\n", "\n", "\xff", "cpu0 a b c d e f g\n"])
def test_a_kernel_that_does_not_tell_counts_as_idle(text, tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text(text, encoding="latin-1")
    assert read_cpu_times(stat) is None
    assert read_cpu_times(tmp_path / "missing") is None
    monkeypatch.setattr(cpu_load, "read_cpu_times", lambda: None)
    assert cores_in_use_by_others() == 0.0


def test_own_time_is_not_counted(monkeypatch):
    readings = iter([CpuTimes(12.0, 107.5, 51.0)])
    monkeypatch.setattr(cpu_load, "_since", CpuTimes(10.0, 105.0, 50.0))
    monkeypatch.setattr(cpu_load, "read_cpu_times", lambda: next(readings))
    assert cores_in_use_by_others() == pytest.approx((2.5 - 1.0) / 2)


@pytest.mark.parametrize("ago", [0.01, 100.0])
def test_too_short_and_too_long_ago_is_measured_again(ago, monkeypatch):
    readings = iter([CpuTimes(10.0, 200.0, 50.0), CpuTimes(10.5, 200.5, 50.0)])
    monkeypatch.setattr(cpu_load, "_since", CpuTimes(10.0 - ago, 0.0, 0.0))
    monkeypatch.setattr(cpu_load, "read_cpu_times", lambda: next(readings))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert cores_in_use_by_others() == pytest.approx(1.0)


@linux
def test_busy_processes_are_seen(monkeypatch):
    with busy_processes(4 * usable_cores()):
        cores_in_use_by_others()  # the window begins now
        monkeypatch.setattr(cpu_load, "LONGEST", 0.0)
        # Beside them, this process has little time of its own.
        assert cores_in_use_by_others() > usable_cores() / 2


def test_threads_are_set_for_a_while_and_never_exceed_the_cores():
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    with torch_threads(None):
        assert torch.get_num_threads() == before
    with torch_threads(10_000):
        assert torch.get_num_threads() == max(before, usable_cores())
    assert torch.get_num_threads() == before
