"""Test helpers: compose configs, run train.py, compare runs, create image datasets."""

import csv
import html.parser
import io
import json
import multiprocessing
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
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_pl.config.hydra_versions import VERSION_BASE
from alexnet_pl.figures.image_grids import png
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.run import run

REPOSITORY = Path(__file__).resolve().parent.parent

PATIENCE = 1800
"""Seconds after which a test gives up waiting. Tests wait for conditions; a busy machine may be very slow."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

SHORT_RUN = ("model=lenet5", "data=digits", "trainer=smoke", "trainer.accelerator=cpu", "trainer.precision=32-true")
"""Overrides of the shortest run: two epochs of two batches each, two test batches."""

NO_FIGURES = "callbacks.dashboard.figures=false"
"""Only the tests of figures draw them: they take two seconds per run."""

KEEP = "callbacks.resume.keep=true"
"""Tests compare the final training state, which a finished run removes by default."""


# --- running --------------------------------------------------------------------------------------------------------


def _kept(overrides: Sequence[str]) -> list[str]:
    return [] if any("callbacks.resume.keep" in override for override in overrides) else [KEEP]


def config(*overrides: str, run_dir: Path = Path("unused"), figures: bool = False) -> DictConfig:
    """Return the config that ``train.py`` composes from these overrides, without figures unless asked for."""
    with initialize_config_dir(str(REPOSITORY / "conf"), **VERSION_BASE):
        lean = _kept(overrides) + ([] if figures else [NO_FIGURES])
        lean += [] if any(override.startswith("local=") for override in overrides) else ["local=none"]
        return compose("train", overrides=[*overrides, *lean, hydra_override("run_dir", run_dir)])


def train(*overrides: str, cwd: Path, figures: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``train.py`` as a user does, from the directory ``cwd``, without figures unless asked for."""
    lean = [] if figures or any("callbacks.dashboard" in override for override in overrides) else [NO_FIGURES]
    lean += _kept(overrides)
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *overrides, *lean],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


START_MANY = f"""
import json, os, runpy, sys
import alexnet_pl.training.run  # imported once for all runs: most of a short run's time

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
    """Run ``train.py`` once per list of overrides, each in its own process, sequentially or all at once.

    The processes are forked from one that has imported torch, so they start within milliseconds of each other. Their
    output stays in ``cwd`` as ``0.out``, ``0.err``, ``1.out``, …
    """
    done = subprocess.run(
        [sys.executable, "-c", START_MANY, json.dumps([at_once, *commands])],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(
            command, code, *((cwd / f"{i}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        )
        for i, (command, code) in enumerate(zip(commands, json.loads(done.stdout), strict=True))
    ]


# --- comparing runs -------------------------------------------------------------------------------------------------

TIMING = {"epoch_seconds", "images_per_second"}


def metric_rows(run_dir: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv as text, without the columns that differ between identical runs."""
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a run's latest checkpoint."""
    return read_checkpoint(run_dir / "checkpoints" / "latest.ckpt")["state_dict"]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM, phase: str = "training") -> None:
    """Send this process a real signal inside the given step, counted from 1 across epochs."""
    method, steps = f"{phase}_step", []
    original = getattr(ImageClassifier, method)

    def stopping(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, method, stopping)


def run_until_stopped(cfg, monkeypatch, step: int, exit_code: int = 143, **how) -> None:
    """Train until a signal stops the run in the given step; ``how`` goes to :func:`stop_at`."""
    with monkeypatch.context() as patch:
        stop_at(step, patch, **how)
        with pytest.raises(SystemExit) as exit:
            run(cfg)
    assert exit.value.code == exit_code


def assert_same_run(resumed: Path, whole: Path) -> None:
    """Assert that two runs have the same metrics, weights, results and TensorBoard scalars, bit for bit."""
    assert metric_rows(resumed) == metric_rows(whole)
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = finished_result(resumed), finished_result(whole)
    for key in ("val/acc", "val/loss", "test/acc", "test/loss", "best_epoch", "epochs"):
        assert ours[key] == theirs[key], key
    logged = [EventAccumulator(str(folder / "tensorboard")).Reload() for folder in (resumed, whole)]
    for name in ("train/loss", "val/loss", "lr"):
        steps = [sorted((event.step, event.value) for event in events.Scalars(name)) for events in logged]
        assert steps[0] == steps[1], name


# --- datasets -------------------------------------------------------------------------------------------------------

ClassFolderMaker = Callable[..., Path]


@dataclass
class OfficialArchive:
    """The CIFAR-10 archive on a local server, and the paths requested so far."""

    path: Path
    requests: list[str]


CLASSES = ("ant", "bee", "cat")


def make_image(label: int, index: int, width: int = 40, height: int = 30) -> Image.Image:
    """Return a smooth image, which JPEG preserves, with a brightness that identifies the class."""
    y, x = np.mgrid[:height, :width]
    gray = 60 * label + 40 + 20 * np.sin(x / 9 + index) + 15 * np.cos(y / 7)
    return Image.fromarray(np.stack([gray, gray[:, ::-1], 255 - gray], 2).clip(0, 255).astype(np.uint8))


def make_image_folder(root: Path, train: int = 12, val: int = 4, test: int = 0) -> Path:
    """Create an ImageFolder layout with the given numbers of PNG images per class and return ``root``."""
    for split, count in (("train", train), ("val", val), ("test", test)):
        for label, name in enumerate(CLASSES if count else ()):
            directory = root / split / name
            directory.mkdir(parents=True)
            for index in range(count):
                make_image(label, index).save(directory / f"{index:03}.png")
    return root


def shard_contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of all shards and their index, by file name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".tar", ".npz", ".json")}


def pixels(figure: Figure) -> np.ndarray:
    """Return a figure as an ``(H, W, 3)`` array of its PNG file."""
    return np.asarray(Image.open(io.BytesIO(png(figure))))


class ReportPage(html.parser.HTMLParser):
    """Parser of report.html that checks that tags close in order, and collects text, images and fetched addresses."""

    VOID = ("meta", "img", "link", "br", "hr", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open_tags: list[str] = []
        self.images: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        if tag not in self.VOID:
            self.open_tags.append(tag)
        values = dict(attributes)
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"] or "")
        addresses = [value or "" for name, value in attributes if name in ("src", "href")]
        self.fetched += [address for address in addresses if not address.startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_report(run_dir: Path) -> ReportPage:
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    return ReportPage(text)


def run_in_fresh_process(function: Callable[..., None], *arguments: object) -> None:
    """Call ``function``, defined in a test module, in a new interpreter: what it checks depends on all that ran before.

    An assertion that fails there fails here; its text is on the captured stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
