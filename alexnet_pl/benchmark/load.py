"""Speed beside other programs: the fraction of its fair share that a training run keeps, ``alexnet benchmark --load``.

A run of the tutorial's network is started beside 0, 1, 2 and 4 busy processes in turn, over several rounds, so that all
loads see the same machine. Its fair share is what a scheduler that treats all threads alike leaves
it: of its quiet speed, two threads on two cores are due 2/3 beside one busy process, and 1/3 beside four.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from alexnet_pl.benchmark.loops import peak_memory
from alexnet_pl.benchmark.timing import note
from alexnet_pl.benchmark.workers import train_side_by_side
from alexnet_pl.runtime.system import usable_cores
from alexnet_pl.runtime.threads import WAIT_VARIABLES

LOADS = (0, 1, 2, 4)
"""Numbers of busy processes."""

IMAGES = 640
"""Training and validation images per epoch."""

BUSY = """
import os, sys
os.write(1, b"x")
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""
"""Program of a busy process. It ends with the process whose number it is given, however that ends."""


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep ``count`` processes computing, each of which uses as much of one core as it gets."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())], stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None
            process.stdout.read(1)  # it has started
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def fair_share(threads: int, cores: int, busy: int) -> float:
    """Return the fraction of its quiet speed, in (0, 1], that ``threads`` threads are due beside ``busy`` processes."""
    return min(1.0, cores / (threads + busy)) / min(1.0, cores / threads)


def bench_load(
    rounds: int, count: int = IMAGES, loads: Sequence[int] = LOADS, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure the project's run on the CPU beside each number of busy processes, which are there before it starts.

    Args:
        rounds: how often each load has its turn.
        count: training and validation images per epoch.
        loads: numbers of busy processes; 0, the quiet machine, has to be one of them.
        overrides: further overrides of ``experiment=tutorial``.
    """
    seconds: dict[int, list[float]] = {load: [] for load in loads}
    for turn in range(rounds):
        for load in loads:
            note(f"load: round {turn + 1} of {rounds}, {load} busy processes")
            with busy_processes(load):
                seconds[load].append(1 / train_side_by_side(1, "cpu", count, overrides)[0])
    threads = torch.get_num_threads()
    return {
        "waiting": {name: os.environ[name] for name in WAIT_VARIABLES if name in os.environ},
        "rounds": rounds,
        "cores": usable_cores(),
        "loads": summarize_loads(seconds, threads, usable_cores()),
        "memory_gb": peak_memory("cpu") / 1e9,
    }


def summarize_loads(seconds: dict[int, list[float]], threads: int, cores: int) -> dict[str, dict[str, float]]:
    """Return per load the speed and what is kept of the fair share; ``kept`` is the median of the rounds' ratios.

    Args:
        seconds: seconds per image in every round, by the number of busy processes.
        threads, cores: as for :func:`fair_share`, on the quiet machine.
    """
    found = {}
    for load, taken in seconds.items():
        share = fair_share(threads, cores, load)
        kept = [quiet / loaded / share for quiet, loaded in zip(seconds[0], taken, strict=True)]
        found[str(load)] = {
            "images_per_second": 1 / statistics.median(taken),
            "fair_share": share,
            "kept": statistics.median(kept),
            "kept_min": min(kept),
            "kept_max": max(kept),
        }
    return found
