"""Speed beside other programs: the fraction of its fair share that a training run keeps, ``alexnet benchmark --load``.

A run of the tutorial's network trains beside 0, 1, 2 and 4 busy processes in turn, a few steps each, over several
rounds, so that all loads see the same machine. Its fair share is what a scheduler that treats all threads alike leaves
it: of its quiet speed, two threads on two cores are due 2/3 beside one busy process, and 1/3 beside four.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from alexnet_pl.benchmark.loops import make_config
from alexnet_pl.runtime.system import device_name, git_commit, package_versions, usable_cores
from alexnet_pl.runtime.threads import WAIT_VARIABLES
from alexnet_pl.training.run import run

LOADS = (0, 1, 2, 4)
"""Numbers of busy processes."""

UNTIMED = 1
"""Steps after each change of the load that are not timed."""

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


class LoadRounds(Callback):
    """Callback that changes the number of busy processes every few steps and times the steps of each load.

    Args:
        loads: numbers of busy processes, taken in turn.
        steps: timed steps per load and round.
        results_file: receives the seconds per step of every round, by load, as JSON.
    """

    def __init__(self, loads: Sequence[int], steps: int, results_file: str):
        self.loads, self.steps, self.results_file = [*loads], steps, Path(results_file)
        self.seconds: dict[int, list[float]] = {load: [] for load in self.loads}
        self._busy = ExitStack()
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        block, step = divmod(batch_idx, UNTIMED + self.steps)
        if step == 0:
            self._busy.close()
            self._busy.enter_context(busy_processes(self.loads[block % len(self.loads)]))
        if step == UNTIMED:
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        block, step = divmod(batch_idx, UNTIMED + self.steps)
        if step == UNTIMED + self.steps - 1:
            load = self.loads[block % len(self.loads)]
            self.seconds[load].append((time.perf_counter() - self._start) / self.steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._busy.close()
        self.results_file.write_text(json.dumps(self.seconds), encoding="utf-8")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._busy.close()


def bench_load(
    rounds: int, steps: int = 6, loads: Sequence[int] = LOADS, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure the project's run on the CPU beside each number of busy processes.

    Args:
        rounds: how often each load has its turn.
        steps: timed steps per turn.
        loads: numbers of busy processes; 0, the quiet machine, has to be one of them.
        overrides: further overrides of ``experiment=tutorial``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        results_file = Path(scratch) / "seconds.json"
        cfg = make_config(
            "cpu",
            Path(scratch) / "run",
            "data._target_=alexnet_pl.benchmark.loops.RandomImages",
            "~data.root",
            "callbacks.dashboard=null",
            "+callbacks.load._target_=alexnet_pl.benchmark.load.LoadRounds",
            f"+callbacks.load.loads=[{','.join(map(str, loads))}]",
            f"+callbacks.load.steps={steps}",
            f"+callbacks.load.results_file={results_file}",
            "trainer.max_epochs=1",
            "trainer.limit_val_batches=1",
            "trainer.limit_test_batches=1",
            "callbacks.resume.min_interval_seconds=1e9",
            *overrides,
            "+data.count=1",
        )
        batches = rounds * len(loads) * (UNTIMED + steps)
        cfg.trainer.limit_train_batches = batches
        # A tenth is for validation, which has to have an image of each of the ten classes.
        cfg.data.count = max(200, -(-(batches + 1) * cfg.data.batch_size * 10 // 9))
        run(cfg)
        seconds = {int(load): taken for load, taken in json.loads(results_file.read_text(encoding="utf-8")).items()}
    return {
        "device": device_name(torch.device("cpu")),
        "precision": cfg.trainer.precision,
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "waiting": {name: os.environ[name] for name in WAIT_VARIABLES if name in os.environ},
        "rounds": rounds,
        "loads": summarize_loads(seconds, cfg.data.batch_size, torch.get_num_threads(), usable_cores()),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }


def summarize_loads(
    seconds: dict[int, list[float]], batch_size: int, threads: int, cores: int
) -> dict[str, dict[str, float]]:
    """Return per load the speed and what is kept of the fair share; ``kept`` is the median of the rounds' ratios.

    Args:
        seconds: seconds per step in every round, by the number of busy processes.
        batch_size: images per step.
        threads, cores: as for :func:`fair_share`.
    """
    found = {}
    for load, taken in seconds.items():
        share = fair_share(threads, cores, load)
        kept = [quiet / loaded / share for quiet, loaded in zip(seconds[0], taken, strict=True)]
        found[str(load)] = {
            "images_per_second": batch_size / statistics.median(taken),
            "fair_share": share,
            "kept": statistics.median(kept),
            "kept_min": min(kept),
            "kept_max": max(kept),
        }
    return found


def load_report(found: dict[str, Any]) -> str:
    """Return the numbers of :func:`bench_load` as aligned text."""
    waiting = ", ".join(f"{name}={value}" for name, value in found["waiting"].items()) or "OpenMP's default waiting"
    return "\n".join([
        f"{found['device']}, torch {found['versions']['torch']}, {found['threads']} threads, {found['precision']}, "
        f"{waiting}; median of {found['rounds']} rounds",
        "",
        f"{'busy processes':16}{'images/s':>10}{'fair share':>12}{'kept':>8}   {'range':12}",
        *(
            f"{load:16}{row['images_per_second']:10,.1f}{row['fair_share']:12.2f}{row['kept']:8.2f}"
            f"   {row['kept_min']:.2f} to {row['kept_max']:.2f}"
            for load, row in found["loads"].items()
        ),
    ])  # fmt: skip
