"""Throughput of several trainings side by side: N processes of M threads each, or N processes on one GPU."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from alexnet_pl.benchmark.loops import peak_memory, random_data
from alexnet_pl.benchmark.timing import note
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import read_config, read_metrics
from alexnet_pl.runtime.system import usable_cores

SCALES = {
    "lab": ("model.channels=[48,128,192,192,128]", "model.fc_width=1024"),
    "full": (),
}
"""Overrides of the two sizes that studies train."""

LAYOUT_EPOCHS = 4
"""Epochs per run; the first one, in which the others may still be starting, is not counted."""


def bench_layouts(count: int, repeats: int, cores: int | None = None) -> dict[str, Any]:
    """Compare one worker on all cores with one worker per core, by scale; layouts take turns.

    Args:
        count: training and validation images per epoch.
        repeats: rounds, in which every layout runs once.
        cores: by default those that this process may use.
    """
    cores = cores or usable_cores()
    layouts = {f"{workers} × {threads}": (workers, threads) for workers, threads in ((1, cores), (cores, 1))}
    found: dict[str, dict[str, list[float]]] = {scale: {name: [] for name in layouts} for scale in SCALES}
    for turn in range(repeats):
        for scale, overrides in SCALES.items():
            for name, (workers, threads) in layouts.items():
                note(f"workers: round {turn + 1} of {repeats}, {scale} scale, {name}")
                rates = train_side_by_side(workers, "cpu", count, overrides, {"OMP_NUM_THREADS": str(threads)})
                found[scale][name].append(sum(rates))
    return {
        "layouts": {
            scale: {name: {"images_per_second": statistics.median(r), "rounds": r} for name, r in by_layout.items()}
            for scale, by_layout in found.items()
        },
        "cores": cores,
        "memory_gb": peak_memory("cpu") / 1e9,
    }


def train_side_by_side(
    workers: int,
    device: str,
    count: int,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    epochs: int = LAYOUT_EPOCHS,
) -> list[float]:
    """Train ``workers`` runs at the same time, each in a process, and return the images per second of each.

    A run's rate is that of its median epoch but for the first, validation included. The runs wait for each other before
    they train, so that all of them have the others beside them.

    Raises:
        UserError: a run failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        base = [
            *("experiment=tutorial", f"trainer.accelerator={device}", "trainer.devices=1", *random_data(count)),
            *(f"trainer.max_epochs={epochs}", "callbacks.dashboard=null", *overrides),
            "+callbacks.start._target_=alexnet_pl.benchmark.workers.StartTogether",
            f"+callbacks.start.directory={scratch}",
            f"+callbacks.start.count={workers}",
        ]
        runs = [Path(scratch) / f"run-{index}" for index in range(workers)]
        logs = [Path(scratch) / f"run-{index}.err" for index in range(workers)]
        processes = []
        for index, (run_dir, log) in enumerate(zip(runs, logs, strict=True)):
            command = [sys.executable, "-m", "alexnet_pl", "train", *base, f"seed={index}", f"hydra.run.dir={run_dir}"]
            with log.open("w", encoding="utf-8") as file:
                settings = {**os.environ, **(environment or {})}
                processes.append(
                    subprocess.Popen(command, cwd=scratch, env=settings, stdout=subprocess.DEVNULL, stderr=file)
                )
        codes = [process.wait() for process in processes]
        for code, log in zip(codes, logs, strict=True):
            if code:
                reason = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
                raise UserError(f"a run of the benchmark failed: {' '.join(reason) or f'exit code {code}'}")
        seconds = [statistics.median(row["epoch_seconds"] for row in read_metrics(run)[1:]) for run in runs]
        batch_size = int(read_config(runs[0])["data"]["batch_size"])
        images = count * 9 // 10 // batch_size * batch_size  # without the incomplete batch, which is dropped
        return [images / taken for taken in seconds]


class StartTogether(Callback):
    """Callback that waits at the start of training until all ``count`` runs have arrived.

    Args:
        directory: where every run leaves a file.
        count: runs to wait for.
        patience: seconds after which the run goes on alone: another one has failed.
    """

    def __init__(self, directory: str, count: int, patience: float = 120.0):
        self.directory, self.count, self.patience = Path(directory), count, patience

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.directory / f"{os.getpid()}.ready").touch()
        end = time.monotonic() + self.patience
        while len([*self.directory.glob("*.ready")]) < self.count and time.monotonic() < end:
            time.sleep(0.02)


@contextmanager
def multi_process_service() -> Iterator[dict[str, str] | None]:
    """Run NVIDIA's MPS daemon for a while; yield the environment of its clients, or None if there is no daemon here."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        clients = {"CUDA_MPS_PIPE_DIRECTORY": f"{scratch}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{scratch}/log"}
        for directory in clients.values():
            Path(directory).mkdir()
        environment = {**os.environ, **clients}
        started = subprocess.run([control, "-d"], env=environment, capture_output=True, timeout=30)
        try:
            yield clients if started.returncode == 0 else None
        finally:
            subprocess.run([control], input=b"quit\n", env=environment, capture_output=True, timeout=60)
