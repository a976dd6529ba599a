"""Progress bar in a notebook: one line of HTML that is updated in place and needs no widget extension."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from alexnet_pl.runtime.logging import Heartbeat


class NotebookProgressBar(ProgressBar):
    """Progress of the current epoch, validation or test in Jupyter and Colab. It disappears when the run ends.

    Args:
        interval_seconds: shortest time between two updates: each is a message to the browser.
    """

    def __init__(self, interval_seconds: float = 0.25) -> None:
        super().__init__()
        self._heartbeat = Heartbeat(interval_seconds)
        self._handle: Any = None  # IPython's DisplayHandle, created at the first update
        self._is_enabled = True

    def disable(self) -> None:
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        self._update(f"epoch {trainer.current_epoch + 1}{total}", batch_idx + 1, self.total_train_batches)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._update("validation", batch_idx, self.total_val_batches_current_dataloader)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        self._update("test", batch_idx, self.total_test_batches_current_dataloader)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._handle is not None:
            self._handle.update({"text/html": "", "text/plain": ""}, raw=True)

    def _update(self, phase: str, batch: int, batches: float) -> None:
        """Show the phase and how many of its batches are done, unless the last update was a moment ago."""
        if not self._is_enabled or not self._heartbeat.is_due():
            return
        text = f"{phase}  batch {batch}/{batches}"
        bar = f'<progress value="{batch}" max="{batches}" style="width: 20em"></progress> {text}'
        message = {"text/html": bar, "text/plain": text}
        if self._handle is None:
            from IPython.display import display  # in a notebook only

            self._handle = display(message, raw=True, display_id=True)
        else:
            self._handle.update(message, raw=True)
