"""Everything that is to be proved on a GPU, in one call: ``alexnet benchmark --device cuda``."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from alexnet_pl.benchmark.components import bench_input_path, bench_lrn, bench_steps, environment, make_data
from alexnet_pl.benchmark.loops import bench_loops, make_config, random_data
from alexnet_pl.benchmark.seeds import StackedSeeds
from alexnet_pl.benchmark.timing import note, wall_seconds
from alexnet_pl.benchmark.workers import SCALES, multi_process_service, train_side_by_side
from alexnet_pl.data.loaders import TensorLoader
from alexnet_pl.runtime.errors import one_line
from alexnet_pl.runtime.run_folder import read_metrics
from alexnet_pl.training.run import run


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements, chosen so that all of them take less than eight minutes on one H100.

    Attributes:
        images: training and validation images of a timed epoch of the loops.
        repeats: counted rounds.
        batch_sizes: of the loops.
        step_sizes: of the timed steps.
        modes: of compilation; None is eager.
        epoch_images, epochs: of the tutorial's whole run.
        workers: trials of a study that share the GPU.
        worker_images: per epoch of each.
        seeds: networks trained as one.
        seed_steps: timed steps.
    """

    images: int = 20_480
    repeats: int = 3
    batch_sizes: tuple[int, ...] = (128, 512)
    step_sizes: tuple[int, ...] = (128, 512, 2048)
    modes: tuple[str | None, ...] = (None, "reduce-overhead")
    epoch_images: int = 50_000
    epochs: int = 30
    workers: tuple[int, ...] = (1, 2, 4, 8)
    worker_images: int = 50_000
    seeds: tuple[int, ...] = (1, 2, 4, 8)
    seed_steps: int = 50


def bench_gpu(device: str, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Measure loops, LRN, steps, input path, a whole run, shared use and stacked seeds; a part that fails says why."""
    root_device, start = torch.device(device), time.perf_counter()
    found: dict[str, Any] = {"kind": "gpu", **environment(root_device), "repeats": sizes.repeats}
    parts: dict[str, Callable[[], Any]] = {
        **{
            f"loops, batch {batch_size}, {mode or 'eager'}": _loops(device, sizes, batch_size, mode)
            for batch_size in sizes.batch_sizes
            for mode in sizes.modes
        },
        "lrn": lambda: bench_lrn(root_device, max(sizes.repeats, 5)),
        "steps": lambda: bench_steps(make_config(device, Path("unused")), root_device, sizes.repeats, sizes.step_sizes),
        "input": lambda: bench_input_path(root_device, sizes.images, sizes.repeats),
        "tutorial": lambda: whole_run(device, sizes.epoch_images, sizes.epochs),
        "workers": lambda: shared_device(device, sizes),
        "seeds": lambda: stacked_seeds(device, sizes),
    }
    for name, measure in parts.items():
        note(name)
        try:
            found[name] = measure()
        except Exception as error:  # one missing feature must not cost the rest of a lent machine's time
            found[name] = {"error": f"{type(error).__name__}: {one_line(error)[:300]}"}
    return {**found, "seconds": time.perf_counter() - start}


def _loops(device: str, sizes: Sizes, batch_size: int, mode: str | None) -> Callable[[], Any]:
    return lambda: bench_loops(device, sizes.images, sizes.repeats, mode, f"data.batch_size={batch_size}")


def whole_run(device: str, count: int, epochs: int) -> dict[str, float]:
    """Train the tutorial's run from start to report on random images, and return its seconds in all and per epoch."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        cfg = make_config(device, run_dir, *random_data(count), f"trainer.max_epochs={epochs}")
        start = time.perf_counter()
        run(cfg)
        whole = time.perf_counter() - start
        seconds = sorted(row["epoch_seconds"] for row in read_metrics(run_dir))
    return {"epochs": epochs, "seconds": whole, "median_epoch_seconds": seconds[len(seconds) // 2]}


def shared_device(device: str, sizes: Sizes) -> dict[str, Any]:
    """Return the images per second of all workers together by their number, at lab scale, without and with MPS."""
    found: dict[str, Any] = {"without MPS": {}, "with MPS": {}}
    with multi_process_service() as clients:
        for name, environment_ in (("without MPS", {}), ("with MPS", clients)):
            if environment_ is None:
                found[name] = {"error": "nvidia-cuda-mps-control not found or not permitted"}
                continue
            for workers in sizes.workers:
                note(f"{workers} workers {name}")
                rates = train_side_by_side(workers, device, sizes.worker_images, SCALES["lab"], environment_)
                found[name][str(workers)] = sum(rates)
    return found


def stacked_seeds(device: str, sizes: Sizes) -> dict[str, Any]:
    """Return the images per second of all seeds together by their number, at lab scale."""
    root_device = torch.device(device)
    precision = "32-true" if device == "cpu" else "bf16-mixed"
    cfg = make_config(device, Path("unused"), *SCALES["lab"], f"trainer.precision={precision}")
    data = make_data(cfg, max(4096, 2 * cfg.data.batch_size), root_device)
    train, found = cast(TensorLoader, data.train_dataloader()), {}
    for count in sizes.seeds:
        stacked = StackedSeeds(cfg, train, range(count), root_device)
        batches = stacked.batches(epoch=0)

        def steps(stacked: StackedSeeds = stacked, batches: torch.Tensor = batches, count: int = 1) -> None:
            for index in range(count):
                stacked.step(batches[index % len(batches)])

        steps(count=2)
        taken = wall_seconds(lambda: steps(count=sizes.seed_steps), root_device)
        found[str(count)] = count * cfg.data.batch_size * sizes.seed_steps / taken
    return found
