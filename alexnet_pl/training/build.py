"""Where the time of a training step goes: ``trainer.profile=true`` writes a trace of ten of them."""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule
from omegaconf import DictConfig
from torch import Tensor, nn

from alexnet_pl.distributed.environment import get_world
from alexnet_pl.training.callbacks.monitoring import EpochReport, Norms, ProgressBar, ReseedEachEpoch
from alexnet_pl.training.checkpoint_io import SafeCheckpointIO

log = logging.getLogger(__name__)


class Trainer(lightning.Trainer):
    """Lightning's Trainer with a key of its own.

    Args:
        profile: write a trace of ten training steps to ``profile/trace.json`` in the run folder.
        settings: Lightning's.
    """

    def __init__(self, *, profile: bool = False, **settings: Any):
        if profile:
            path = Path(settings.get("default_root_dir") or ".") / "profile" / "trace.json"
            settings["callbacks"] = [*(settings.get("callbacks") or ()), Trace(path)]
        super().__init__(**settings)


class Trace(Callback):
    """``trainer.profile=true``: a profile of a few training steps, for Perfetto or ``chrome://tracing``.

    Args:
        path: JSON file to write.
        wait: steps that are passed over first: they allocate memory and choose kernels.
        steps: that are recorded; fewer where the epoch has fewer.
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
    """Have ``net`` compiled, in place so that the keys of its state dict stay; left as it is where that fails.

    A compiler can fail on the first batch: there may be no C++ compiler, or a GPU too new for it. So it is tried on
    a copy first, forward and backward. Neither ``net`` nor the random generators notice. Dropout draws the same masks
    as without the compiler.

    Args:
        mode: of ``torch.compile``.
        images: a batch of the shape that the network is going to see.
    """
    device = trainer.strategy.root_device
    twin = copy.deepcopy(net).to(device)
    # Compiled code has its own random numbers unless told otherwise.
    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True}
    twin.compile(options=options)
    try:
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            twin(images.to(device)).float().sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise anything
        torch.compiler.reset()
        reason = " ".join(str(error).split())[:200]
        log.warning(f"warning: compile={mode} failed, the run goes on without it ({type(error).__name__}: {reason})")
    else:
        net.compile(options=options)


def make_trainer(cfg: DictConfig, callbacks: list[Any], loggers: list[Any]) -> Trainer:
    """The trainer of ``cfg.trainer`` with the callbacks that every run has; a progress bar on a terminal only."""
    from rich import get_console

    on_terminal = get_console().is_terminal
    bar = [ProgressBar()] if on_terminal else []
    # The report counts a batch before the checkpoint callback saves the count.
    callbacks = [EpochReport(), Norms(), *callbacks, ReseedEachEpoch(cfg.seed), *bar]
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers,
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=on_terminal and get_world().rank == 0,
        enable_checkpointing=False,  # Lightning's own; the callbacks above save
    )
    # Of several processes Lightning asks the first in every step whether it was to stop, and waits for its GPU to
    # answer. ResumeCheckpoint has them agree.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def quiet_lightning() -> None:
    """Keep Lightning's banners out of the log; its warnings stay, but for those that nobody here can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # between lightning and newer torch
    warnings.filterwarnings("ignore", message=".*sync_dist=True")  # the metrics sum over processes
    warnings.filterwarnings(
        "ignore", message=".*it is recommended to use `Trainer\\(devices=1"
    )  # no image counts twice
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")  # nothing is logged by step
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # start_image resumes it
