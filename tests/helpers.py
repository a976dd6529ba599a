"""Helpers of the tests: composing configs, running train.py, comparing runs, making image directories."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.run import run

REPOSITORY = Path(__file__).resolve().parent.parent


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


UNDRAWN = "callbacks.dashboard.figures=false"
"""Figures take two seconds a run: only the tests of figures draw them."""


def config(*overrides: str, run_dir: Path = Path("unused"), figures: bool = False) -> DictConfig:
    """What ``train.py`` with these overrides hands to ``alexnet_pl.training.run.run``, figures apart."""
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        lean = [] if figures else [UNDRAWN]
        return compose("train", overrides=[*overrides, *lean, f"run_dir={run_dir}"])


def train(*overrides: str, cwd: Path, figures: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``train.py`` as a user does, from another folder; figures apart, which take two seconds."""
    lean = [] if figures or any("callbacks.dashboard" in override for override in overrides) else [UNDRAWN]
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *overrides, *lean],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


START_MANY = f"""
import json, os, runpy, sys
import alexnet_pl.training.run  # loaded once for all: that is most of a short run's time

at_once, *commands = json.loads(sys.argv[1])
started = []
for index, overrides in enumerate(commands):
    if (pid := os.fork()) == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{index}}.{{name}}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        sys.argv = ["train.py", *overrides]
        runpy.run_path({str(REPOSITORY / "train.py")!r}, run_name="__main__")
        sys.exit()
    started.append(pid if at_once else os.waitpid(pid, 0)[1])
statuses = [os.waitpid(pid, 0)[1] for pid in started] if at_once else started
print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]))
"""


def train_many(
    commands: Sequence[Sequence[str]], cwd: Path, at_once: bool = False
) -> list[subprocess.CompletedProcess[str]]:
    """Run ``train.py`` once for each list of overrides, in a process each, one after the other or all at once.

    The processes are forked from one that has loaded torch: in seconds instead of half a minute, and at once means
    within milliseconds. What they print is left in ``cwd`` as ``0.out``, ``0.err``, ``1.out``, …
    """
    done = subprocess.run(
        [sys.executable, "-c", START_MANY, json.dumps([at_once, *commands])],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(command, code, (cwd / f"{i}.out").read_text(), (cwd / f"{i}.err").read_text())
        for i, (command, code) in enumerate(zip(commands, json.loads(done.stdout), strict=True))
    ]


TreeMaker = Callable[..., Path]


@dataclass
class OfficialArchive:
    """The archive that is served, and the paths that were asked for so far."""

    path: Path
    requests: list[str]


TIMING = {"epoch_seconds", "images_per_second"}


def figures(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run_dir / "checkpoints" / "latest.ckpt")["state_dict"]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM, phase: str = "training") -> None:
    """Send this process a real signal in the middle of a step, counted from 1 over all that follow."""
    method, taken = f"{phase}_step", []
    real = getattr(ImageClassifier, method)

    def stopping(self, batch, batch_idx):
        taken.append(batch_idx)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, method, stopping)


def run_until_stopped(cfg, monkeypatch, step: int, exit_code: int = 143, **how) -> None:
    with monkeypatch.context() as patch:
        stop_at(step, patch, **how)
        with pytest.raises(SystemExit) as exit:
            run(cfg)
    assert exit.value.code == exit_code


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert figures(resumed) == figures(whole)
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = finished_result(resumed), finished_result(whole)
    for key in ("val/acc", "val/loss", "test/acc", "test/loss", "best_epoch", "epochs"):
        assert ours[key] == theirs[key], key
    logged = [EventAccumulator(str(folder / "tensorboard")).Reload() for folder in (resumed, whole)]
    for name in ("train/loss", "val/loss", "lr"):
        steps = [[(event.step, event.value) for event in events.Scalars(name)] for events in logged]
        assert steps[0] == steps[1], name


CLASSES = ("ant", "bee", "cat")


def picture(label: int, index: int, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth, so that JPEG keeps it, with a level that tells the class."""
    y, x = np.mgrid[:height, :width]
    grey = 60 * label + 40 + 20 * np.sin(x / 9 + index) + 15 * np.cos(y / 7)
    return Image.fromarray(np.stack([grey, grey[:, ::-1], 255 - grey], 2).clip(0, 255).astype(np.uint8))


def make_tree(root: Path, train: int = 12, val: int = 4, test: int = 0) -> Path:
    for split, count in (("train", train), ("val", val), ("test", test)):
        for label, name in enumerate(CLASSES if count else ()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture(label, index).save(folder / f"{index:03}.png")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".npz", ".json")}
