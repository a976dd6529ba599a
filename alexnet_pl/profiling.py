"""Where the time of a training step goes: ``trainer.profile=true`` writes a trace of ten of them."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule

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
