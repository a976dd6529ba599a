"""Speed of the training loop, measured against the tutorial's program and against a hand-written PyTorch loop.

Three loops train the tutorial's network (alexnet_bn, 50×50, batch 128). They take turns in one process, one epoch each:

1. *tutorial*: the program of the tutorial, with PIL transforms per image, DataLoader, plain Adam, float32 on a CPU or
   autocast and GradScaler on a GPU, and glibc's default allocator settings;
2. *handwritten*: the shortest PyTorch loop with this project's tensors, precision, memory format, compilation and fused
   Adam, which is a lower bound for anything built on Lightning;
3. *project*: :func:`alexnet_pl.training.run.run`, the function behind ``train.py``, with metrics, loggers and checks.
   The time of a checkpoint is measured separately and added as often as a run saves one.

An epoch is training plus validation. The results are medians over epochs; the first epoch of each loop is not counted.
Images and labels are random, which affects no timing.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from alexnet_pl.benchmark.timing import note, synchronize, wall_seconds
from alexnet_pl.config.compose import CONF, compose
from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.config.optimizers import convolution_groups, optimizer_factory
from alexnet_pl.config.resolve import resolve_auto
from alexnet_pl.data.cifar10 import CLASS_NAMES, CIFAR10DataModule
from alexnet_pl.data.in_memory import ImageSource, LabeledImages
from alexnet_pl.data.loaders import TensorLoader
from alexnet_pl.data.transforms import normalize
from alexnet_pl.models.layers import OverlappingMaxPool2d
from alexnet_pl.runtime.system import raise_malloc_thresholds, restore_malloc_thresholds
from alexnet_pl.training.run import run

EPOCH = 45_000
"""Training images of CIFAR-10 per epoch, to which all epoch times are scaled."""

NAMES = ("tutorial", "handwritten", "project")
"""The three loops."""

WARM_UP = 3
"""Steps of a loop that come first and are not timed: they claim back the memory that a loop before them returned."""

AUTOCAST_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""``trainer.precision`` -> dtype of autocast. Other precisions do not use autocast."""


# --- data and configuration -----------------------------------------------------------------------------------------


def random_images(count: int) -> LabeledImages:
    """Return ``count`` images of 32×32 random pixels with equally frequent labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return LabeledImages(pixels, np.arange(count) % len(CLASS_NAMES))


class RandomImages(CIFAR10DataModule):
    """Data module with the shape of CIFAR-10 and random pixels.

    Args:
        count: number of training and validation images together. The test set has 200.
        settings: arguments of ``conf/data/cifar10.yaml``, except ``root``.
    """

    def __init__(self, count: int, **settings: Any):
        super().__init__(root="", **settings)
        self.count = count

    def prepare_data(self) -> None:
        """Do nothing: there is nothing to download."""

    def load(self) -> ImageSource:
        return ImageSource(random_images(self.count), random_images(200), "random images")


def random_data(count: int) -> list[str]:
    """Return the overrides that replace CIFAR-10 by :class:`RandomImages`."""
    return ["data._target_=alexnet_pl.benchmark.loops.RandomImages", "~data.root", f"+data.count={count}"]


def make_config(device: str, run_dir: Path, *overrides: str) -> DictConfig:
    """Return the config of ``experiment=tutorial`` for ``device``, composed and resolved as in ``train.py``."""
    fixed = ("experiment=tutorial", f"trainer.accelerator={device}", f"run_dir={run_dir}", "data.root=unused")
    threads = f"threads={torch.get_num_threads()}"  # those of the other loops
    cfg = compose([*fixed, threads, *overrides])
    resolve_auto(cfg)
    return cfg


# --- the three loops ------------------------------------------------------------------------------------------------


class InMemoryCIFAR10(datasets.CIFAR10):  # type: ignore[misc]  # torchvision ships no annotations
    """torchvision's CIFAR10 with its own ``__getitem__``, on images in memory instead of files."""

    def __init__(self, images: LabeledImages, image_size: int):
        steps = [
            transforms.Resize((image_size, image_size)),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
        datasets.VisionDataset.__init__(self, root="", transform=transforms.Compose(steps))
        self.data, self.targets = images.images, images.labels.tolist()


def with_torch_pooling(net: nn.Module) -> nn.Module:
    """Return ``net`` with the pooling layers of the tutorial's program, which compute the same but take longer."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, OverlappingMaxPool2d):
                setattr(module, name, nn.MaxPool2d(child.kernel_size, child.stride, child.padding))
    return net


class TutorialLoop:
    """Training and validation as the tutorial's program does them.

    Args:
        cfg: config of the run.
        train, val: loaders of the run, which decide the split.
        device: device of the network.
    """

    def __init__(self, cfg: DictConfig, train: TensorLoader, val: TensorLoader, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.net = with_torch_pooling(instantiate(cfg.model)).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.cuda)
        self.criterion = nn.CrossEntropyLoss(reduction="sum")
        # Next to a GPU, workers have cores of their own. On a CPU they compete with training for the same cores.
        settings = {"batch_size": cfg.data.batch_size, "num_workers": 4 if self.cuda else 0}
        images = random_images(len(train.indices) + len(val.indices))

        def dataset(loader: TensorLoader) -> InMemoryCIFAR10:
            chosen = loader.indices.cpu().numpy()
            return InMemoryCIFAR10(LabeledImages(images.images[chosen], images.labels[chosen]), cfg.data.image_size)

        self.train: DataLoader[Any] = DataLoader(dataset(train), shuffle=True, drop_last=True, **settings)
        self.val: DataLoader[Any] = DataLoader(dataset(val), **settings)

    def epoch(self) -> tuple[float, int]:
        """Train and validate once. Return the sum of the validation losses and the number of correct predictions."""
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
                correct += int((logits.max(dim=1)[1] == labels).sum().item())
                loss_sum += self.criterion(logits, labels).cpu().item()
        return loss_sum, correct

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.float16) if self.cuda else nullcontext()


class HandwrittenLoop:
    """Gather, normalize, forward, backward and update, with nothing around them.

    Args:
        cfg: config of the run, which sets precision, memory format, compilation and optimizer.
        train, val: loaders of the run, whose tensors and split are used.
        device: device of the network.
        batch_size: images per step, by default ``data.batch_size``.
    """

    def __init__(
        self,
        cfg: DictConfig,
        train: TensorLoader,
        val: TensorLoader,
        device: torch.device,
        batch_size: int | None = None,
    ):
        self.device = device
        self.batch_size: int = batch_size or cfg.data.batch_size
        self.mean, self.std = tuple(cfg.data.mean), tuple(cfg.data.std)
        precision = str(cfg.trainer.precision)
        self.dtype = AUTOCAST_DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
        self.net = instantiate(cfg.model).to(device)
        if cfg.channels_last:
            self.net.to(memory_format=torch.channels_last)
        if cfg.compile is not None:
            self.net.compile(mode=cfg.compile)
        make_optimizer = optimizer_factory(instantiate(cfg.optimizer))
        self.optimizer = make_optimizer(self.net.named_parameters(), convolution_groups(self.net))
        self.images, self.labels = train.images, train.labels
        self.train, self.val = train.indices.to(device), val.indices.to(device)

    def epoch(self) -> tuple[float, int]:
        """Train and validate once. Return the sum of the validation losses and the number of correct predictions."""
        order = self.train[torch.randperm(len(self.train), device=self.device)]
        self.steps(order.split(self.batch_size)[: len(self.train) // self.batch_size])
        self.net.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        loss_sum = torch.zeros((), device=self.device)
        with torch.inference_mode():
            for indices in self.val.split(self.batch_size):
                images, labels = self._batch(indices)
                with self._autocast():
                    logits = self.net(images)
                correct += (logits.argmax(1) == labels).sum()
                loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        return float(loss_sum), int(correct)

    def steps(self, batches: Sequence[Tensor]) -> None:
        """Take one training step per batch of ``(batch_size,)`` image indices."""
        self.net.train()
        for indices in batches:
            images, labels = self._batch(indices)
            with self._autocast():
                logits = self.net(images)
            loss = F.cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = normalize(self.images.index_select(0, indices), self.mean, self.std)
        return images, self.labels.index_select(0, indices)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()


class Interleave(Callback):
    """Callback that runs the two other loops at the start of each epoch of the project's run and times all three.

    Args:
        cfg_file: config of the run.
        times_file: receives as JSON ``seconds`` (loop -> seconds per epoch), ``once`` (seconds of the project's epochs
            outside their batches), ``checkpoint_seconds`` and ``first_step``.
    """

    def __init__(self, cfg_file: str, times_file: str):
        self.cfg = cast(DictConfig, OmegaConf.load(cfg_file))
        self.times_file = Path(times_file)
        self.times: dict[str, list[float]] = {name: [] for name in NAMES}
        self.once: list[float] = []
        self.first_step: float | None = None
        self.epoch_start = self.first_end = self.validation_start = self.batches = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        train = cast(TensorLoader, trainer.train_dataloader)
        val = cast(TensorLoader, trainer.val_dataloaders)
        self.tutorial = TutorialLoop(self.cfg, train, val, pl_module.device)
        self.handwritten = HandwrittenLoop(self.cfg, train, val, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = int(trainer.num_training_batches)
        first = min(WARM_UP, steps) - 1
        last = max(steps - 2, first)
        if batch_idx not in (0, first, last):
            return
        synchronize(trainer.strategy.root_device)
        now = time.perf_counter()
        if batch_idx == 0:
            self.first_step = self.first_step or now - self.epoch_start
        if batch_idx == first:
            self.first_end = now
        if batch_idx == last:
            # What precedes these steps and ends the epoch (the norm of the gradient) is counted once per epoch.
            self.batches = (now - self.first_end) * steps / max(last - first, 1)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.validation_start = time.perf_counter()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == trainer.num_val_batches[0] - 1:
            synchronize(trainer.strategy.root_device)
            self.batches += time.perf_counter() - self.validation_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        self._end_epoch(trainer)
        note(f"loops: round {trainer.current_epoch + 1} of {trainer.max_epochs}")
        restore_malloc_thresholds()
        self.times["tutorial"].append(wall_seconds(self.tutorial.epoch, device))
        raise_malloc_thresholds()
        self.handwritten.steps(self.handwritten.train.split(self.handwritten.batch_size)[:WARM_UP])
        self.times["handwritten"].append(wall_seconds(self.handwritten.epoch, device))
        self.epoch_start = time.perf_counter()

    def _end_epoch(self, trainer: Trainer) -> None:
        synchronize(trainer.strategy.root_device)
        if trainer.current_epoch > 0:
            seconds = time.perf_counter() - self.epoch_start
            self.times["project"].append(seconds)
            self.once.append(seconds - self.batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch(trainer)
        start = time.perf_counter()
        trainer.save_checkpoint(Path(self.cfg.run_dir) / "checkpoints" / "timed.ckpt")
        found = {
            "seconds": self.times,
            "once": self.once,
            "checkpoint_seconds": time.perf_counter() - start,
            "first_step": self.first_step,
        }
        self.times_file.write_text(json.dumps(found), encoding="utf-8")


def bench_loops(device: str, count: int, repeats: int, compile_mode: str | None, *overrides: str) -> dict[str, Any]:
    """Time the three loops over ``repeats`` epochs of ``count`` images, a tenth of which is for validation.

    Args:
        overrides: of the tutorial's config, such as ``data.batch_size=512``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cfg_file, times_file = Path(scratch) / "benchmark.yaml", Path(scratch) / "times.json"
        cfg = make_config(
            device,
            Path(scratch) / "run",
            *random_data(count),
            "+callbacks.interleave._target_=alexnet_pl.benchmark.loops.Interleave",
            f"+callbacks.interleave.cfg_file={cfg_file}",
            f"+callbacks.interleave.times_file={times_file}",
            f"trainer.max_epochs={repeats + 1}",
            "callbacks.resume.min_interval_seconds=1e9",
            f"compile={compile_mode or 'null'}",
            *overrides,
        )
        OmegaConf.save(cfg, cfg_file, resolve=True)
        run(cfg)
        found = json.loads(times_file.read_text(encoding="utf-8"))
    return {
        **summarize_loops(cfg, found, count, repeats),
        "rounds": found["seconds"],
        "first_step_seconds": found["first_step"],
        "peak_memory_gb": peak_memory(device) / 1e9,
        "precision": cfg.trainer.precision,
        "channels_last": cfg.channels_last,
        "compile": cfg.compile,
    }


def summarize_loops(cfg: DictConfig, found: dict[str, Any], count: int, repeats: int) -> dict[str, Any]:
    """Return rates, epoch times and ratios from what :class:`Interleave` measured, scaled to ``EPOCH`` images.

    What the project does once per epoch is not scaled: an epoch of the benchmark is short.
    """
    batch_size = cfg.data.batch_size
    images = count * 9 // 10 // batch_size * batch_size
    counted = slice(1, repeats + 1)
    once = statistics.median(found["once"][counted])
    seconds = {name: statistics.median(found["seconds"][name][counted]) for name in NAMES}
    epochs = {name: taken * EPOCH / images for name, taken in seconds.items()}
    epochs["project"] = (seconds["project"] - once) * EPOCH / images + once
    default_interval = OmegaConf.load(CONF / "callbacks/base.yaml").resume.min_interval_seconds
    checkpoints = found["checkpoint_seconds"] * epochs["project"] / max(epochs["project"], default_interval)
    overhead = epochs["project"] - epochs["handwritten"]
    epochs["project"] += checkpoints
    return {
        "project_vs_tutorial": epochs["tutorial"] / epochs["project"],
        "project_vs_handwritten": epochs["handwritten"] / epochs["project"],
        "images_per_second": {name: EPOCH / epochs[name] for name in NAMES},
        "epoch_seconds": epochs,
        "once_per_epoch_seconds": once,
        "checkpoint_seconds": {"each": found["checkpoint_seconds"], "per_epoch": checkpoints},
        "lightning_ms_per_step": 1e3 * overhead / (EPOCH / batch_size),
    }


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # Windows has none, and the package must import there

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
