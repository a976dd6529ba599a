"""Speed of the parts of training: steps, input path, LRN, start-up, and the lower bound that the hardware sets."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_pl.benchmark.loops import (
    AUTOCAST_DTYPES,
    EPOCH,
    HandwrittenLoop,
    RandomImages,
    bench_loops,
    make_config,
)
from alexnet_pl.benchmark.timing import Work, median_seconds, note, wall_timer
from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.config.torch_internals import has_bf16_instructions
from alexnet_pl.data.loaders import TensorLoader
from alexnet_pl.data.transforms import normalize
from alexnet_pl.models.layers import LocalResponseNorm
from alexnet_pl.runtime.errors import one_line
from alexnet_pl.runtime.system import device_name, git_commit, package_versions, raise_malloc_thresholds

IMAGES = {"cpu": 2_560, "cuda": 50_000}
"""Training and validation images of a timed epoch."""

FULL_IMAGES = {"cpu": 10_240, "cuda": 50_000}
"""The same with ``--full``: longer epochs, in which the end of an epoch weighs as little as in training."""

BATCH_SIZES, FULL_BATCH_SIZES = (128, 512), (128, 512, 2048)

LRN_SHAPES = ((128, 96, 11, 11), (128, 256, 5, 5), (32, 96, 55, 55), (32, 256, 27, 27))
"""Feature maps after conv1 and conv2, for inputs of 50×50 and of ImageNet's 227×227 pixels."""


def bench(device: str, repeats: int, compile_mode: str | None, full: bool = False) -> dict[str, Any]:
    """Measure everything. ``docs/speed.md`` explains the metrics.

    Args:
        full: longer epochs and a batch of 2,048 as well.
    """
    root_device = torch.device(device)
    count, batch_sizes = (FULL_IMAGES, FULL_BATCH_SIZES) if full else (IMAGES, BATCH_SIZES)
    cfg = make_config(device, Path("unused"))
    raise_malloc_thresholds()
    return {
        "kind": "training",
        **environment(root_device),
        **bench_loops(device, count[device], repeats, compile_mode),
        **bench_input_path(root_device, FULL_IMAGES[device], repeats),
        **bench_lrn(root_device, max(repeats, 5)),
        **bench_steps(cfg, root_device, repeats, batch_sizes),
        "hardware_floor": hardware_floor(cfg, root_device),
        **bench_startup(device, min(repeats, 3)),
        "repeats": repeats,
        "full": full,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Return what every result of a benchmark names: device, instruction set, threads, versions and commit."""
    return {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() + (", bf16" if has_bf16_instructions() else ""),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }


def make_data(cfg: DictConfig, count: int, device: torch.device) -> RandomImages:
    """Return ``count`` random images on ``device``, with the batch size, sizes and augmentation of ``cfg``."""
    settings = {key: value for key, value in cfg.data.items() if key not in ("_target_", "root", "augment")}
    data = RandomImages(count, **settings, augment=instantiate(cfg.augment))
    data.setup()
    data.move_to(device)
    return data


def bench_steps(
    cfg: DictConfig, device: torch.device, repeats: int, batch_sizes: Sequence[int] = FULL_BATCH_SIZES
) -> dict[str, Any]:
    """Time a step of the hand-written loop by batch size, and at 128 by precision and memory format.

    bf16 is left out on a CPU without instructions for it, where a step takes half a minute.
    """
    note("steps by batch size, precision and memory format")
    data = make_data(cfg, 5120, device)
    train, val = cast(TensorLoader, data.train_dataloader()), cast(TensorLoader, data.val_dataloader())

    def two_steps(batch_size: int = 128, **changes: Any) -> Work:
        changed = cfg.copy()
        changed.trainer.precision = changes.pop("precision", cfg.trainer.precision)
        changed.update(changes)
        loop = HandwrittenLoop(changed, train, val, device, batch_size)
        batches = [torch.arange(batch_size, device=device) + start for start in (0, 1024)]
        return lambda: loop.steps(batches)

    half_precision = "16-mixed" if device.type == "cuda" else "bf16-mixed"
    has_half = device.type == "cuda" or has_bf16_instructions()
    precisions = ("32-true", half_precision) if has_half else ("32-true",)
    compilations = [None, "reduce-overhead"] if device.type == "cuda" else [None]
    variants = {}
    for compilation in compilations:
        for precision in precisions if compilation is None else (half_precision,):
            for channels_last in (False, True):
                memory_format = "channels_last" if channels_last else "contiguous"
                name = ", ".join(filter(None, (precision, memory_format, compilation)))
                variants[name] = two_steps(precision=precision, channels_last=channels_last, compile=compilation)
    sizes = {size: two_steps(size) for size in batch_sizes}

    timer = wall_timer(device)
    by_size = {size: taken / 2 for size, taken in median_seconds(sizes, timer, max(repeats // 2, 2)).items()}
    by_variant = {name: taken / 2 for name, taken in median_seconds(variants, timer, repeats).items()}
    return {
        "step_ms": {str(size): 1e3 * taken for size, taken in by_size.items()},
        "step_images_per_second": {str(size): size / taken for size, taken in by_size.items()},
        "step_ms_at_128": {name: 1e3 * taken for name, taken in by_variant.items()},
    }


def bench_input_path(device: torch.device, count: int, repeats: int) -> dict[str, Any]:
    """Time training batches without training: gather, augment, normalize."""
    note("input path")

    def rate(augment: str) -> float:
        data = make_data(make_config(device.type, Path("unused"), f"augment={augment}"), count, device)
        loader = data.train_dataloader()

        def iterate() -> None:
            for images, _, *index in loader:
                normalize(data.augment_images(images, *index), data.mean, data.std)

        return len(loader) * data.batch_size / median_seconds({augment: iterate}, wall_timer(device), repeats)[augment]

    return {"input_images_per_second": rate("none"), "input_images_per_second_crop_flip": rate("crop_flip")}


def bench_lrn(device: torch.device, repeats: int) -> dict[str, Any]:
    """Time forward and backward of LRN in float32 against ``torch.nn.LocalResponseNorm``. Report the smallest ratio.

    Both layers are timed as they are and under ``torch.compile``.
    """
    found = _time_lrn(device, repeats, "lrn", lambda layer: layer)
    try:
        return found | _time_lrn(device, repeats, "lrn_compiled", torch.compile)
    except Exception as error:  # no C++ compiler, or a GPU that the compiler does not know
        return found | {"lrn_compiled_error": one_line(error)[:200]}


def _time_lrn(device: torch.device, repeats: int, name: str, wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    found = {}
    for shape in LRN_SHAPES:
        note(f"{name} of {'×'.join(map(str, shape))}")
        layers = {
            "ours": wrap(LocalResponseNorm(shape[1])),
            "torch": wrap(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)),
        }
        maps, gradient = (torch.randn(shape, device=device) for _ in range(2))
        works = {name: forward_backward(layer, maps.requires_grad_(), gradient) for name, layer in layers.items()}
        taken = median_seconds(works, wall_timer(device), repeats)
        found["×".join(map(str, shape))] = {
            "ms": 1e3 * taken["ours"],
            "torch_ms": 1e3 * taken["torch"],
            "ratio": taken["torch"] / taken["ours"],
        }
    return {f"{name}_vs_torch": min(entry["ratio"] for entry in found.values()), name: found}


def forward_backward(layer: Callable[[Tensor], Tensor], maps: Tensor, gradient: Tensor) -> Work:
    """Return a function that runs ``layer`` on ``maps`` and back-propagates ``gradient``."""

    def work() -> None:
        maps.grad = None
        layer(maps).backward(gradient)

    return work


def hardware_floor(cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """Return the time per step that arithmetic and Adam's memory traffic need at the peak rates of ``device``.

    Counted are the floating-point operations of forward and backward, and 28 bytes per parameter for Adam, which reads
    the parameter, the gradient and two moments and writes three of them. The peak rates are measured with a large
    matrix product in the run's precision and a large copy.
    """
    note("hardware floor")
    net = instantiate(cfg.model).to(device)
    images = torch.zeros(cfg.data.batch_size, 3, cfg.data.image_size, cfg.data.image_size, device=device)
    with FlopCounterMode(display=False) as counter:
        net(images).sum().backward()
    operations, traffic = counter.get_total_flops(), 28 * sum(p.numel() for p in net.parameters())

    side, copied = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    dtype = AUTOCAST_DTYPES.get(str(cfg.trainer.precision), torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = torch.zeros(copied, device=device), torch.zeros(copied, device=device)
    works: dict[str, Work] = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    taken = median_seconds(works, wall_timer(device), repeats=5)

    flops, bandwidth = 2 * side**3 / taken["product"], 2 * 4 * copied / taken["copy"]
    step = operations / flops + traffic / bandwidth
    return {
        "gflop_per_image": operations / cfg.data.batch_size / 1e9,
        "adam_gb_per_step": traffic / 1e9,
        "measured_tflops": flops / 1e12,
        "measured_gb_per_second": bandwidth / 1e9,
        "step_ms": 1e3 * step,
        "epoch_seconds": step * EPOCH / cfg.data.batch_size,
    }


def bench_startup(device: str, repeats: int = 3) -> dict[str, float]:
    """Time ``train.py --cfg job`` and the smallest complete run, in seconds, each in a new process."""
    note("start-up")
    commands = {
        "cfg_job_seconds": ["--cfg", "job"],
        "smoke_run_seconds": ["trainer=smoke", "model=lenet5", "data=digits", f"trainer.accelerator={device}"],
    }
    return {
        name: statistics.median(train_seconds(arguments) for _ in range(repeats))
        for name, arguments in commands.items()
    }


def train_seconds(arguments: list[str]) -> float:
    """Return the wall-clock seconds of ``train.py`` in an empty directory."""
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "alexnet_pl", "train", *arguments], cwd=scratch, check=True, capture_output=True
        )
        return time.perf_counter() - start
