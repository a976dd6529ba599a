"""Objects of a run, built from its config: data, model, callbacks, loggers, trainer, compiled network, profiler."""

import copy
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alexnet_pl import __version__
from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.config.schedules import RunLength
from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.data.loaders import BatchLoader
from alexnet_pl.distributed.environment import get_world
from alexnet_pl.models.alexnet_modern import PerUnit
from alexnet_pl.runtime.errors import ConfigError, invalid_value, one_line
from alexnet_pl.runtime.run_folder import METRICS
from alexnet_pl.runtime.system import raise_malloc_thresholds
from alexnet_pl.training.callbacks.averaging import check_supported
from alexnet_pl.training.callbacks.checkpoint import BestCheckpoint, ResumeCheckpoint, TrainingEnd
from alexnet_pl.training.callbacks.dashboard import Dashboard
from alexnet_pl.training.callbacks.monitoring import EpochReport, Norms, ReseedEachEpoch
from alexnet_pl.training.callbacks.notebook import NotebookProgressBar
from alexnet_pl.training.checkpoint_io import SafeCheckpointIO
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.lightning_internals import EpochProgressBar, disable_sigterm_broadcast, inductor_options
from alexnet_pl.training.loggers import MetricsCSV
from alexnet_pl.training.resume import START, Position

log = logging.getLogger(__name__)

TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


@dataclass(frozen=True)
class RunObjects:
    """The objects of a run before its data is read.

    Attributes:
        data: data module, not set up.
        model: network with loss, metrics, optimizer and schedule.
        callbacks: by their names in the config.
    """

    data: ImageDataModule
    model: ImageClassifier
    callbacks: dict[str, Callback]

    @property
    def best(self) -> BestCheckpoint:
        return cast(BestCheckpoint, self.callbacks["best"])

    @property
    def resume(self) -> ResumeCheckpoint:
        return cast(ResumeCheckpoint, self.callbacks["resume"])

    @property
    def dashboard(self) -> Dashboard | None:
        return cast(Dashboard | None, self.callbacks.get("dashboard"))


def build(cfg: DictConfig, named: Sequence[str], resuming: bool) -> RunObjects:
    """Build the data module, the model and the callbacks. No image is read.

    Args:
        cfg: resolved config; ``model.num_classes`` follows the data if the classes come from its files.
        named: settings given on the command line.
        resuming: the config is that of an earlier run, whose number of classes stands.

    Raises:
        ConfigError: too few classes, an argument that a constructor refuses, an unsupported callback.
    """
    seed_everything(cfg.seed, verbose=False)
    data: ImageDataModule = instantiate(cfg.data)
    if data.classes_from_files and not resuming and "model.num_classes" not in named:
        with open_dict(cfg):
            cfg.model.num_classes = len(data.class_names)
    if cfg.model.num_classes < len(data.class_names):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes} is invalid: "
            f"expected at least {len(data.class_names)}, the classes of the data."
        )
    model = ImageClassifier(
        net=instantiate(cfg.model),
        num_classes=cfg.model.num_classes,
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.get("scheduler")),
        loss=instantiate(cfg.get("loss")),
        hyperparameters={
            **cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)),
            "class_names": list(data.class_names),
            "version": __version__,
        },
    )
    ignored = getattr(model.loss, "ignore_index", -1)
    if data.mixing is not None and ignored >= 0:
        raise invalid_value("loss.ignore_index", ignored, "no such key with mixup or cutmix")
    check_batch_size(model.net, data.batch_size // get_world().size, bool(cfg.trainer.get("sync_batchnorm")))
    if cfg.channels_last:
        model.net.to(memory_format=torch.channels_last)
    raise_malloc_thresholds()
    callbacks = dict(instantiate(cfg.callbacks))
    check_supported(callbacks)
    return RunObjects(data, model, callbacks)


def check_batch_size(net: nn.Module, per_rank: int, synchronized: bool) -> None:
    """Check that a batch is large enough for a network that normalizes units over the images of a batch.

    Args:
        per_rank: images per batch and rank.
        synchronized: BatchNorm sees the images of all ranks.

    Raises:
        ConfigError: one image, of which BatchNorm has no variance.
    """
    world = get_world().size
    norms = [module.norm for module in net.modules() if isinstance(module, PerUnit)]
    synchronized = synchronized or any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    if per_rank > 1 or (synchronized and world > 1) or not any(isinstance(norm, _BatchNorm) for norm in norms):
        return
    raise ConfigError(
        f"data.batch_size={per_rank * world} is invalid for {type(net).__name__} with BatchNorm after its fully "
        "connected layers: expected 2 images or more per rank. Set data.batch_size, or model/norm=none."
    )


WHITENED = 5_000
"""Training images that a network is fitted to before training, as in cifar10-airbench."""


def fit_to_images(model: ImageClassifier, data: ImageDataModule) -> None:
    """Fit what a network computes from the training images, such as its whitening, if it has a method for it.

    A network that says that it ``is_fitted``, by the weights that it starts with, stays as it is. It sees ``WHITENED``
    evenly spaced images of the training split, normalized and not augmented, so that all ranks, seeds and batch sizes
    compute the same.
    """
    fit = getattr(model.net, "fit_to_images", None)
    if fit is not None and not getattr(model.net, "is_fitted", False):
        batches = data.training_images(WHITENED)
        fit(data.on_after_batch_transfer((images, None), 0)[0].cpu() for images in batches)


def build_loggers(cfg: DictConfig, run_dir: Path, position: Position) -> tuple[list[Logger], MetricsCSV]:
    """Build the configured loggers and the one of metrics.csv, which every run has.

    TensorBoard is told to hide what an interrupted run logged after the position to resume from.
    """
    configured = cfg.get("logger") or OmegaConf.create({})
    settings = cast(dict[str, Any], OmegaConf.to_container(configured, resolve=True))
    for logger in settings.values():
        if logger["_target_"] == TENSORBOARD:
            logger["purge_step"] = position.step or None
    loggers: dict[str, Logger] = dict(instantiate(settings))
    metrics = next((logger for logger in loggers.values() if isinstance(logger, MetricsCSV)), None)
    if metrics is None:
        metrics = loggers["csv"] = MetricsCSV(run_dir / METRICS)
    return [*loggers.values()], metrics


def build_trainer(cfg: DictConfig, callbacks: dict[str, Callback], loggers: list[Logger]) -> "Trainer":
    """Build the trainer with the callbacks that every run has, and a progress bar on a terminal or in a notebook."""
    bar = make_progress_bar()
    bars: list[Callback] = [callback for callback in callbacks.values() if isinstance(callback, ProgressBar)]
    bar = bars if bar and bars else bar  # configured ones stand in for ours, where one is shown
    # The resume checkpoint comes last, so that it saves what the other callbacks do after the same step.
    resume = cast(ResumeCheckpoint, callbacks["resume"])
    others = [callback for callback in callbacks.values() if callback is not resume and callback not in bars]
    together = [TrainingEnd(resume), EpochReport(), Norms(), *others, resume, ReseedEachEpoch(cfg.seed), *bar]
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=together,
        logger=loggers,
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=bool(bar),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in together),
    )
    disable_sigterm_broadcast(trainer)  # ResumeCheckpoint makes the ranks agree instead
    return trainer


def make_progress_bar() -> list[Callback]:
    """Return the progress bar that suits where this process writes; [] in a log file and on all ranks but 0."""
    from rich import get_console  # here for start-up time

    if get_world().rank > 0:
        return []
    if get_console().is_jupyter:
        return [NotebookProgressBar()]
    # Notebooks and CI ask for colors in pipes (FORCE_COLOR), which rich takes for a terminal.
    return [EpochProgressBar()] if get_console().is_terminal and sys.stdout.isatty() else []


def num_batches(loader: BatchLoader, limit: int | float) -> int:
    """Return the number of batches that a ``trainer.limit_*_batches`` leaves of a loader.

    Raises:
        ConfigError: a fraction that leaves none.
    """
    count = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
    if count == 0:
        raise ConfigError(
            f"a limit of {limit} on {len(loader)} batches leaves none. Set the trainer.limit_…_batches in question to "
            "a number of batches, such as 1."
        )
    return count


def images_used(trainer: "Trainer", data: ImageDataModule) -> dict[str, Any]:
    """Return the number of images used per epoch of each split, and under ``limits`` the limits that apply."""
    limits = {split: getattr(trainer, f"limit_{split}_batches") for split in ("train", "val", "test")}
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    used: dict[str, Any] = data.counts()
    for split, limit in limits.items():
        if (batches := num_batches(loaders[split], limit)) < len(loaders[split]):
            used[split] = min(used[split], batches * data.batch_size)
    set_ones = {f"limit_{s}_batches": limit for s, limit in limits.items() if isinstance(limit, int) or limit != 1.0}
    return {**used, "limits": set_ones} if set_ones else used


def run_length(trainer: "Trainer", loader: BatchLoader, position: Position = START, batch: int = 0) -> RunLength:
    """Return the epochs and optimizer steps that are left of a run, with accumulation, limits and ``max_steps``.

    Args:
        position: where it continues; the whole run by default.
        batch: batches of the epoch at ``position`` that are done, of the size that they have now.
    """
    per_epoch = -(-num_batches(loader, trainer.limit_train_batches) // trainer.accumulate_grad_batches)
    done = batch // trainer.accumulate_grad_batches
    limits = []
    if trainer.max_epochs and trainer.max_epochs > 0:
        limits.append((trainer.max_epochs - position.epoch) * per_epoch - done)
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps - position.step)
    if not limits:
        raise ConfigError("trainer.max_epochs=-1 is invalid: expected 1 or more, or a trainer.max_steps.")
    steps = max(1, min(limits))
    return RunLength(-(-(steps + done) // per_epoch), steps)


class Trainer(lightning.Trainer):
    """Lightning's Trainer with one more argument.

    Args:
        profile: write a trace of ten training steps to ``profile/trace.json`` in the run directory.
        settings: arguments of ``lightning.Trainer``.
    """

    def __init__(self, *, profile: bool = False, **settings: Any):
        if profile:
            path = Path(settings.get("default_root_dir") or ".") / "profile" / "trace.json"
            settings["callbacks"] = [*(settings.get("callbacks") or ()), Trace(path)]
        if settings.get("deterministic") is False and not torch.are_deterministic_algorithms_enabled():
            settings["deterministic"] = None  # start-up time: setting what is set already imports inductor
        super().__init__(**settings)


class Trace(Callback):
    """Profile of a few training steps for Perfetto or ``chrome://tracing``: ``trainer.profile=true``.

    Args:
        path: JSON file to write.
        wait: steps to skip first, which allocate memory and select kernels.
        steps: steps to record; fewer if the epoch has fewer.
    """

    def __init__(self, path: str | Path, wait: int = 5, steps: int = 10):
        self.path, self.wait, self.steps = Path(path), wait, steps
        self._profiler: torch.profiler.profile | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        if self.path.exists() or self._profiler is not None or not trainer.is_global_zero:
            return
        batches = int(min(trainer.num_training_batches, 1_000_000))
        steps = min(self.steps, batches)
        warm = min(1, batches - steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")  # an epoch of a few steps
            schedule = torch.profiler.schedule(
                skip_first=max(0, min(self.wait, batches - steps - warm)), wait=0, warmup=warm, active=steps, repeat=1
            )
        self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write, record_shapes=True)
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None:
            self._profiler.step()
            if self.path.exists():
                self._stop()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        if self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))
        log.info(f"profile {self.path}  (open it at https://ui.perfetto.dev or chrome://tracing)")


def compile_network(net: nn.Module, mode: str, images: Tensor, trainer: Trainer) -> None:
    """Compile ``net`` in place, which keeps the state-dict keys unchanged; fall back to eager mode with a warning.

    The compiler can fail on the first batch, for lack of a C++ compiler or because the GPU is too new for it. It is
    therefore tried on a copy first, forward and backward, with no effect on ``net`` or the random generators. Dropout
    draws the same masks as in eager mode.

    Args:
        mode: mode of ``torch.compile``.
        images: batch of the shape that the network will see.
    """
    device = trainer.strategy.root_device
    twin = copy.deepcopy(net).to(device)
    options = {**inductor_options(mode), "fallback_random": True}  # the generators of eager mode
    twin.compile(options=options)
    try:
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            twin(images.to(device)).float().sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise anything
        torch.compiler.reset()
        log.warning(
            f"warning: compile={mode} failed, falling back to eager mode "
            f"({type(error).__name__}: {one_line(error)[:200]})"
        )
    else:
        net.compile(options=options)


def quiet_lightning() -> None:
    """Silence Lightning's banners, and those of its warnings that nobody can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.* is deprecated",  # between lightning and newer torch
        ".*sync_dist=True",  # the metrics sum over ranks
        ".*it is recommended to use `Trainer\\(devices=1",  # no image counts twice
        ".*smaller than the logging interval",  # nothing is logged per step
        ".*your dataloader is not resumable",  # start_image resumes it
        ".*loading a checkpoint outside the 'fit' stage",  # the test loads averaged weights, as intended
        "Be aware that when using `ckpt_path`",  # a callback was removed with allow_changes
    ):
        warnings.filterwarnings("ignore", message=message)
