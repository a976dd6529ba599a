"""How fast training is: ``python -m alexnet_pl benchmark``.

Three loops train the tutorial's network (alexnet_bn, 50×50, batch 128), an epoch of each in turn, in one process:

1. *tutorial*: as the tutorial has it: PIL transforms for every image, DataLoader, plain Adam, float32 on a CPU,
   autocast and GradScaler on a GPU, glibc's memory allocator as it comes;
2. *hand-written*: the shortest PyTorch loop with this project's tensors, precision, memory order, compilation and fused
   Adam: the floor for anything built on Lightning;
3. *project*: :func:`alexnet_pl.training.run.run`, which is what ``train.py`` calls, with metrics, loggers and checks.
   Its checkpoints are timed apart and added as often as a run saves them.

An epoch is training and validation. Medians of the repeats; a first epoch of each does not count. Images are random,
labels too: no time depends on them.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from alexnet_pl.config.resolve import resolve_auto
from alexnet_pl.data.cifar10 import CLASS_NAMES, CIFAR10DataModule
from alexnet_pl.data.in_memory import ImageSource, LabelledImages
from alexnet_pl.data.transforms import normalize
from alexnet_pl.models.layers import LocalResponseNorm
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.system import (
    device_name,
    git_commit,
    package_versions,
    raise_malloc_thresholds,
    restore_malloc_thresholds,
)
from alexnet_pl.training.run import run

ROOT = Path(__file__).resolve().parents[2]

EPOCH = 45_000
"""Training images of CIFAR-10, which every figure for an epoch is worked out for."""

IMAGES = {"cpu": 10_240, "cuda": 50_000}
"""Training and validation images of an epoch as it is timed."""

NAMES = ("tutorial", "handwritten", "project")

LRN_SHAPES = ((128, 96, 11, 11), (128, 256, 5, 5), (32, 96, 55, 55), (32, 256, 27, 27))
"""After conv1 and conv2, for 50×50 and for ImageNet's 227×227 pixels."""


# --- the three loops ------------------------------------------------------------------------------------------------


class RandomImages(CIFAR10DataModule):
    """CIFAR-10's shape without its images.

    Args:
        count: training and validation images together; the test set is small.
        settings: those of ``conf/data/cifar10.yaml``.
    """

    def __init__(self, count: int, **settings: Any):
        super().__init__(root="", **settings)
        self.count = count

    def prepare_data(self) -> None:
        """Nothing to download."""

    def load(self) -> ImageSource:
        return ImageSource(random_images(self.count), random_images(200), "random images")


def random_images(count: int) -> LabelledImages:
    """``count`` images of 32×32 random pixels, with as many of each class."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return LabelledImages(pixels, np.arange(count) % len(CLASS_NAMES))


class TutorialLoop:
    """The tutorial's program: its transforms, its loaders, its training loop and its validation."""

    def __init__(self, cfg: DictConfig, data: RandomImages, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.net = instantiate(cfg.model).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.cuda)
        self.criterion = nn.CrossEntropyLoss(reduction="sum")
        images = random_images(data.count)
        # Workers have cores of their own beside a GPU; beside a CPU's own work they only get in its way.
        settings = {"batch_size": cfg.data.batch_size, "num_workers": 4 if self.cuda else 0}
        size = cfg.data.image_size
        train, val = (
            PILImages(images, loader.indices.cpu().numpy(), size)
            for loader in (data.train_dataloader(), data.val_dataloader())
        )
        self.train = DataLoader(train, shuffle=True, drop_last=True, **settings)
        self.val = DataLoader(val, **settings)

    def epoch(self) -> None:
        self.net.train()
        for images, labels in self.train:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            with self._autocast():
                loss = self.criterion(self.net(images), labels)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.net.eval()
        correct, loss_sum = 0, 0.0
        with torch.inference_mode():
            for images, labels in self.val:
                images, labels = images.to(self.device), labels.to(self.device)
                with self._autocast():
                    logits = self.net(images)
                correct += (logits.max(dim=1)[1] == labels).sum().item()
                loss_sum += self.criterion(logits, labels).cpu().item()

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.float16) if self.cuda else nullcontext()


class PILImages(Dataset):
    """What ``torchvision.datasets.CIFAR10`` with the tutorial's transforms gives, image by image."""

    def __init__(self, images: LabelledImages, indices: np.ndarray, size: int):
        self.images, self.indices = images, indices
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.indices[position]
        return self.transform(Image.fromarray(self.images.images[index])), int(self.images.labels[index])


class HandwrittenLoop:
    """Nothing but what has to be done: gather, normalise, forward, backward, update."""

    def __init__(self, cfg: DictConfig, data: RandomImages, device: torch.device, batch_size: int | None = None):
        self.cfg, self.device = cfg, device
        self.batch_size = batch_size or cfg.data.batch_size
        self.precision = str(cfg.trainer.precision)
        self.net = instantiate(cfg.model).to(device)
        if cfg.channels_last:
            self.net.to(memory_format=torch.channels_last)
        if cfg.compile is not None:
            self.net.compile(mode=cfg.compile)
        self.optimizer = instantiate(cfg.optimizer)(self.net.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "16-mixed")
        train, val = data.train_dataloader(), data.val_dataloader()
        self.images, self.labels = train.images, train.labels
        self.train, self.val = train.indices.to(device), val.indices.to(device)

    def epoch(self) -> None:
        order = self.train[torch.randperm(len(self.train), device=self.device)]
        self.steps(order.split(self.batch_size)[: len(self.train) // self.batch_size])
        self.net.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        loss_sum = torch.zeros((), device=self.device)
        with torch.inference_mode():
            for batch in self.val.split(self.batch_size):
                images, labels = self._batch(batch)
                with self._autocast():
                    logits = self.net(images)
                correct += (logits.argmax(1) == labels).sum()
                loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        float(loss_sum), int(correct)

    def steps(self, batches: Sequence[Tensor]) -> None:
        self.net.train()
        for batch in batches:
            images, labels = self._batch(batch)
            with self._autocast():
                logits = self.net(images)
            loss = F.cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _batch(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        images = normalize(self.images.index_select(0, batch), tuple(self.cfg.data.mean), tuple(self.cfg.data.std))
        return images, self.labels.index_select(0, batch)

    def _autocast(self) -> Any:
        dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


class Interleave(Callback):
    """Runs the two other loops at the start of every epoch of the project's run, and times all three.

    Args:
        cfg_file: the run's configuration.
        times_file: gets ``{loop: [seconds of each epoch]}`` and what else is timed here.
    """

    def __init__(self, cfg_file: str, times_file: str):
        self.cfg = OmegaConf.load(cfg_file)
        self.times_file = Path(times_file)
        self.times: dict[str, list[float]] = {name: [] for name in NAMES}
        self.made = time.perf_counter()
        self.first_step: float | None = None
        self.since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tutorial = TutorialLoop(self.cfg, trainer.datamodule, pl_module.device)
        self.handwritten = HandwrittenLoop(self.cfg, trainer.datamodule, pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.first_step is None:
            synchronize(trainer.strategy.root_device)
            self.first_step = time.perf_counter() - self.since

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        synchronize(device)
        if trainer.current_epoch > 0:
            self.times["project"].append(time.perf_counter() - self.since)
        restore_malloc_thresholds()
        self.times["tutorial"].append(seconds(self.tutorial.epoch, device))
        raise_malloc_thresholds()
        self.handwritten.steps(self.handwritten.train.split(self.handwritten.batch_size)[:2])  # gets the memory back
        self.times["handwritten"].append(seconds(self.handwritten.epoch, device))
        self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = time.perf_counter()
        trainer.save_checkpoint(Path(self.cfg.run_dir) / "checkpoints" / "timed.ckpt")
        found = {
            "seconds": self.times,
            "checkpoint_seconds": time.perf_counter() - start,
            "first_step": self.first_step,
        }
        self.times_file.write_text(json.dumps(found))


# --- measuring ------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of ``work``, with all that it set going on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def medians(works: dict[Any, Callable[[], Any]], device: torch.device, repeats: int) -> dict[Any, float]:
    """Median seconds of each after two that do not count, taken in turn."""
    times: dict[Any, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 2):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def make_config(device: str, run_dir: Path, *overrides: str) -> DictConfig:
    """The tutorial's experiment as ``train.py`` would run it on ``device``.

    Raises:
        ConfigError: there is no ``conf/`` beside the package: this is no checkout.
    """
    if not (ROOT / "conf").is_dir():
        raise ConfigError(f"{ROOT / 'conf'} does not exist: the benchmark needs a checkout of the project.")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "train",
            overrides=[
                *("experiment=tutorial", f"trainer.accelerator={device}", f"run_dir={run_dir}", "data.root=unused"),
                *overrides,
            ],
        )
    resolve_auto(cfg)
    return cfg


def bench_loops(device: str, count: int, repeats: int, compile_mode: str | None) -> dict[str, Any]:
    """Time the three loops. ``count`` images, of which a tenth is for validation."""
    with tempfile.TemporaryDirectory() as folder:
        cfg_file, times_file = Path(folder) / "bench.yaml", Path(folder) / "times.json"
        cfg = make_config(
            device,
            Path(folder) / "run",
            "data._target_=alexnet_pl.benchmark.loops.RandomImages",
            "~data.root",
            f"+data.count={count}",
            "+callbacks.interleave._target_=alexnet_pl.benchmark.loops.Interleave",
            f"+callbacks.interleave.cfg_file={cfg_file}",
            f"+callbacks.interleave.times_file={times_file}",
            f"trainer.max_epochs={repeats + 2}",
            "callbacks.resume.min_interval_seconds=1e9",
            f"compile={compile_mode or 'null'}",
        )
        OmegaConf.save(cfg, cfg_file, resolve=True)
        run(cfg)
        found = json.loads(times_file.read_text())
    batch = cfg.data.batch_size
    images = count * 9 // 10 // batch * batch
    epochs = {name: statistics.median(found["seconds"][name][1 : repeats + 1]) * EPOCH / images for name in NAMES}
    every = max(epochs["project"], OmegaConf.load(ROOT / "conf/callbacks/default.yaml").resume.min_interval_seconds)
    checkpoints = found["checkpoint_seconds"] * epochs["project"] / every
    epochs["project"] += checkpoints
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(0).ru_maxrss
    return {
        "project_vs_tutorial": epochs["tutorial"] / epochs["project"],
        "project_vs_handwritten": epochs["handwritten"] / epochs["project"],
        "images_per_second": {name: EPOCH / epochs[name] for name in NAMES},
        "epoch_seconds": epochs,
        "checkpoint_seconds": {"each": found["checkpoint_seconds"], "an_epoch": checkpoints},
        "lightning_ms_a_step": 1e3 * (epochs["project"] - checkpoints - epochs["handwritten"]) / (EPOCH / batch),
        "first_step_seconds": found["first_step"],
        "peak_memory_gb": memory / 1e9,
        "precision": cfg.trainer.precision,
        "channels_last": cfg.channels_last,
        "compile": cfg.compile,
    }


def make_data(cfg: DictConfig, count: int, device: torch.device) -> RandomImages:
    settings = {key: value for key, value in cfg.data.items() if key not in ("_target_", "root", "augment")}
    data = RandomImages(count, **settings, augment=instantiate(cfg.augment))
    data.setup()
    data.move_to(device)
    return data


def bench_steps(cfg: DictConfig, device: torch.device, repeats: int) -> dict[str, Any]:
    """A step of the hand-written loop at three batch sizes, and at 128 in other precisions and memory orders."""
    data = make_data(cfg, 5120, device)

    def step(batch_size: int = 128, **settings: Any) -> Callable[[], None]:
        changed = cfg.copy()
        changed.trainer.precision = settings.pop("precision", cfg.trainer.precision)
        changed.update(settings)
        loop = HandwrittenLoop(changed, data, device, batch_size)
        batches = [torch.arange(batch_size, device=device) + start for start in (0, 1024)]
        return lambda: loop.steps(batches)

    sizes = {size: step(size) for size in (128, 512, 2048)}
    by_size = {size: taken / 2 for size, taken in medians(sizes, device, max(repeats // 2, 2)).items()}
    sixteen = "16-mixed" if device.type == "cuda" else "bf16-mixed"
    variants = {
        f"{precision}, {'channels_last' if order else 'contiguous'}": step(precision=precision, channels_last=order)
        for precision in ("32-true", sixteen)
        for order in (False, True)
    }
    if device.type == "cuda":
        for order in (False, True):
            name = f"{sixteen}, {'channels_last' if order else 'contiguous'}, reduce-overhead"
            variants[name] = step(channels_last=order, compile="reduce-overhead")
    by_variant = {name: taken / 2 for name, taken in medians(variants, device, repeats).items()}
    return {
        "step_ms": {str(size): 1e3 * taken for size, taken in by_size.items()},
        "step_images_per_second": {str(size): size / taken for size, taken in by_size.items()},
        "step_ms_at_128": {name: 1e3 * taken for name, taken in by_variant.items()},
    }


def bench_input(device: torch.device, count: int, repeats: int) -> dict[str, Any]:
    """Training batches without training: gather, augment, normalise."""

    def rate(augment: str) -> float:
        cfg = make_config(device.type, Path("unused"), f"augment={augment}")
        data = make_data(cfg, count, device)
        loader = data.train_dataloader()

        def iterate() -> None:
            for images, _ in loader:
                normalize(data.augment(images), data.mean, data.std)

        return len(loader) * loader.batch_size / medians({augment: iterate}, device, repeats)[augment]

    return {"input_images_per_second": rate("none"), "input_images_per_second_crop_flip": rate("crop_flip")}


def bench_lrn(device: torch.device, repeats: int) -> dict[str, Any]:
    """Forward and backward of LRN in float32 against ``torch.nn.LocalResponseNorm``. The ratio is the smallest one."""
    found = {}
    for shape in LRN_SHAPES:
        maps, gradient = (torch.randn(shape, device=device) for _ in range(2))
        maps.requires_grad_()

        def forward_backward(layer: nn.Module, maps: Tensor = maps, gradient: Tensor = gradient) -> None:
            maps.grad = None
            layer(maps).backward(gradient)

        layers = {"ours": LocalResponseNorm(shape[1]), "torch": nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)}
        works = {name: lambda layer=layer: forward_backward(layer) for name, layer in layers.items()}
        taken = medians(works, device, repeats)
        found["×".join(map(str, shape))] = {
            "ms": 1e3 * taken["ours"],
            "torch_ms": 1e3 * taken["torch"],
            "ratio": taken["torch"] / taken["ours"],
        }
    return {"lrn_vs_torch": min(entry["ratio"] for entry in found.values()), "lrn": found}


def hardware_floor(cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """What the arithmetic and Adam's memory traffic take at the rates that this device reaches on nothing else.

    Counted: the floating-point operations of forward and backward, and 28 bytes a parameter for Adam (it reads the
    parameter, the gradient and two moments, and writes three of them). Measured: a large matrix product in the run's
    precision, and a large copy.
    """
    net = instantiate(cfg.model).to(device)
    images = torch.zeros(cfg.data.batch_size, 3, cfg.data.image_size, cfg.data.image_size, device=device)
    with FlopCounterMode(display=False) as counter:
        net(images).sum().backward()
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(str(cfg.trainer.precision), torch.float32)
    side, copied = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = torch.zeros(copied, device=device), torch.zeros(copied, device=device)
    works = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    taken = medians(works, device, repeats=5)
    rate, bandwidth = 2 * side**3 / taken["product"], 2 * 4 * copied / taken["copy"]
    operations, traffic = counter.get_total_flops(), 28 * sum(p.numel() for p in net.parameters())
    step = operations / rate + traffic / bandwidth
    return {
        "gflop_an_image": operations / cfg.data.batch_size / 1e9,
        "adam_gb_a_step": traffic / 1e9,
        "measured_tflops": rate / 1e12,
        "measured_gb_per_second": bandwidth / 1e9,
        "step_ms": 1e3 * step,
        "epoch_seconds": step * EPOCH / cfg.data.batch_size,
    }


def bench_startup(device: str) -> dict[str, float]:
    """Seconds of ``train.py --cfg job`` and of the smallest whole run, each a new process."""
    commands = {
        "cfg_job_seconds": ["--cfg", "job"],
        "smoke_run_seconds": ["trainer=smoke", "model=lenet5", "data=digits", f"trainer.accelerator={device}"],
    }
    taken = {}
    for name, arguments in commands.items():
        times = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, str(ROOT / "train.py"), *arguments], cwd=folder, check=True, capture_output=True
                )
                times.append(time.perf_counter() - start)
        taken[name] = statistics.median(times)
    return taken


# --- the command ----------------------------------------------------------------------------------------------------


def bench(device: str, repeats: int, compile_mode: str | None) -> dict[str, Any]:
    """Measure everything; the keys are explained in ``docs/results/bench-cpu.md``."""
    root_device = torch.device(device)
    count = IMAGES[device]
    cfg = make_config(device, Path("unused"))
    raise_malloc_thresholds()
    return {
        "device": device_name(root_device),
        **bench_loops(device, count, repeats, compile_mode),
        **bench_input(root_device, count, repeats),
        **bench_lrn(root_device, max(repeats, 5)),
        **bench_steps(cfg, root_device, repeats),
        "hardware_floor": hardware_floor(cfg, root_device),
        **bench_startup(device),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
