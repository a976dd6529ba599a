"""Fixtures of the inference tests: one trained run for all of them, and edited copies of its checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import config

from alexnet_pl.inference.trained_run import TrainedRun, load_run
from alexnet_pl.training.run import run as train_run
from inference import RUN


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of three epochs on the digits, moved after training."""
    trained = tmp_path_factory.mktemp("trained") / "before"
    train_run(config(*RUN, "trainer.max_epochs=3", run_dir=trained))
    return trained.rename(trained.with_name("moved"))


@pytest.fixture(scope="package")
def run(folder: Path) -> TrainedRun:
    return load_run(folder)


@pytest.fixture(scope="package")
def cropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on crops of 32 from 37 pixels that was tested with ten-crop."""
    folder = tmp_path_factory.mktemp("cropped") / "run"
    larger = ("data.resize_size=37", "data.test_crops=10", "augment=crop_flip")
    crop = ("augment.crop.padding=0", "augment.crop.size=32")
    train_run(config(*RUN, *larger, *crop, "trainer.max_epochs=2", run_dir=folder))
    return folder


@pytest.fixture
def edited(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a copy of the run's checkpoint whose config or other entries are changed by a function."""

    def edit(change: Callable[[dict], object], name: str = "edited.ckpt") -> Path:
        checkpoint = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / name)
        return tmp_path / name

    return edit
