"""NaNMonitor names the step, batch and images of a non-finite loss or gradient, however late it is detected."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from alexnet_pl.training.callbacks.nan_monitor import NaNMonitor, NonFiniteError


class NonFiniteAt(LightningModule):
    """Module whose loss is NaN, or whose gradient is infinite, at a single step."""

    def __init__(self, at: int, what: str):
        super().__init__()
        self.weight, self.at, self.what = nn.Parameter(torch.ones(3)), at, what

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        breaks = self.global_step == self.at
        if breaks and self.what == "gradient":
            self.weight.register_hook(lambda gradient: gradient * float("inf"))
        return self.weight.sum() * (float("nan") if breaks and self.what == "loss" else 1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Batches:
    """Loader of ten batches of four images."""

    batch_size = 4

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.zeros(4)] * 10)

    def batches(self) -> list[Tensor]:
        return [torch.arange(4) + 4 * batch for batch in range(10)]

    def images_before(self, batch: int) -> int:
        return 4 * batch


class DeferredNaNMonitor(NaNMonitor):
    """NaNMonitor that reads its flag every few steps, as it does on a GPU."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._is_immediate = False


def trainer_with(callback: NaNMonitor, directory: Path, **settings: int) -> Trainer:
    return Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=directory, callbacks=[callback],
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("every", "detected_at"), [(1, 13), (5, 15), (50, 20)])
def test_a_non_finite_loss_is_named_however_late_it_is_detected(every, detected_at, tmp_path):
    trainer = trainer_with(DeferredNaNMonitor(check_every_n_steps=every), tmp_path)
    message = r"the loss is nan at step 12 \(epoch 2, batch 2, 4 images: 8, 9, 10, 11;"
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(NonFiniteAt(at=12, what="loss"), Batches(), Batches())
    assert trainer.global_step == detected_at


@pytest.mark.parametrize("at", [12, 19])
def test_a_non_finite_gradient_is_named_one_step_later_or_before_validation(at, tmp_path):
    trainer = trainer_with(NaNMonitor(), tmp_path)
    with pytest.raises(NonFiniteError, match=rf"the gradient is nan at step {at} \(epoch 2, batch {at - 10}, 4 images"):
        trainer.fit(NonFiniteAt(at=at, what="gradient"), Batches(), Batches())
    assert trainer.global_step == at + 1


@pytest.mark.parametrize("callback", [NaNMonitor(), DeferredNaNMonitor(check_every_n_steps=5)])
def test_the_batch_is_named_when_gradients_are_accumulated(callback, tmp_path):
    """Three batches per step: step 1 consists of batches 3 to 5, and the check after batch 4 comes one batch late."""
    trainer = trainer_with(callback, tmp_path, accumulate_grad_batches=3)
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan at step 1 \(epoch 1, batch 3, 4 images: 12, 13, 14, 15;"
    ):
        trainer.fit(NonFiniteAt(at=1, what="loss"), Batches(), Batches())


def test_an_epoch_without_validation_is_checked_at_its_end(tmp_path):
    trainer = trainer_with(DeferredNaNMonitor(check_every_n_steps=50), tmp_path, check_val_every_n_epoch=4)
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 2 \(epoch 1, batch 2, 4 images: 8, 9, 10, 11;"):
        trainer.fit(NonFiniteAt(at=2, what="loss"), Batches(), Batches())
    assert trainer.global_step == 10


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("scales", "stops"), [([8, 4, 2, 1, 0.5], True), ([8, 4, 8, 4, 8], False)])
def test_steps_that_the_loss_scaler_skips_are_counted(accumulated, scales, stops, tmp_path, monkeypatch):
    """Issue: with accumulated gradients, every batch without a step of the optimizer reset the count."""
    batches = [scale for scale in scales for _ in range(accumulated)]
    calls = iter(batches)
    monkeypatch.setattr(
        "alexnet_pl.training.callbacks.nan_monitor.loss_scale", lambda trainer: torch.tensor(float(next(calls)))
    )
    trainer = trainer_with(DeferredNaNMonitor(max_skipped=4), tmp_path, accumulate_grad_batches=accumulated,
                           limit_train_batches=len(batches))  # fmt: skip
    if stops:
        with pytest.raises(NonFiniteError, match="the gradient, in 4 consecutive steps, is infinite"):
            trainer.fit(NonFiniteAt(at=-1, what="loss"), Batches(), Batches())
    else:
        trainer.fit(NonFiniteAt(at=-1, what="loss"), Batches(), Batches())
