"""Runs in processes of their own that start in a moment, and networks that break down when they are told to.

A fork server imports torch and Lightning once; every run is then a real process with real signals, without the ten
seconds of imports.
"""

import logging
import multiprocessing
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import REPOSITORY, config
from omegaconf import DictConfig
from torch import Tensor, nn

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["alexnet_pl.training.run", "alexnet_pl.studies.report", "alexnet_pl.studies.plots"])

EVERY_EPOCH = "callbacks.resume.min_interval_seconds=0"
DIGITS = ("model=lenet5", "data=digits", "trainer.accelerator=cpu", "trainer.precision=32-true", EVERY_EPOCH)


class Started:
    """A process that imports nothing any more; what it prints goes to a file.

    Args:
        target: called with ``arguments`` in the process.
        output: the file.
    """

    def __init__(self, target: Callable[..., None], *arguments: object, output: Path):
        self.output = output
        self.output.touch()
        self.process = CONTEXT.Process(target=_redirected, args=(target, arguments, output))
        self.process.start()

    def wait(self, seconds: float = 300) -> int:
        """Exit status, negative after a signal that nobody handled."""
        self.process.join(seconds)
        assert not self.process.is_alive(), "the run hangs"
        return self.process.exitcode

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


class Run(Started):
    """One run as a process; what it prints goes to a file beside its folder."""

    def __init__(
        self, *overrides: str, run_dir: Path, memory: int | None = None, environment: dict[str, str] | None = None
    ):
        self.run_dir, output = run_dir, run_dir.with_name(f"{run_dir.name}.{time.monotonic_ns()}.log")
        super().__init__(_run, config(*overrides, run_dir=run_dir), memory, environment or {}, output=output)


class Command(Started):
    """``python train.py`` with these overrides, called from the folder ``cwd``.

    Args:
        fresh: in an interpreter that has imported nothing. What starts processes of its own has to be: joblib's workers
            end when the interpreter does, and a forked one waits for them instead.
    """

    def __init__(self, *overrides: str, cwd: Path, fresh: bool = False):
        target = _fresh_command if fresh else _command
        super().__init__(target, overrides, cwd, output=cwd / f"{time.monotonic_ns()}.log")


def _redirected(target: Callable[..., None], arguments: tuple, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    target(*arguments)


def _command(overrides: tuple[str, ...], cwd: Path) -> None:
    os.chdir(cwd)
    sys.argv = [str(REPOSITORY / "train.py"), *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _fresh_command(overrides: tuple[str, ...], cwd: Path) -> None:
    os.chdir(cwd)
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the others, for the same last digits
    os.execv(sys.executable, [sys.executable, str(REPOSITORY / "train.py"), *overrides])


def _run(cfg: DictConfig, memory: int | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

    from alexnet_pl.runtime.errors import one_line_errors
    from alexnet_pl.training.run import run

    if memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    with one_line_errors():
        run(cfg)


def wait_for(condition: Callable[[], object], run: Run | None = None, seconds: float = 120) -> None:
    """Until ``condition`` holds; fails when the run ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert run is None or run.process.is_alive(), run.text
        time.sleep(0.001)


class BreakingNet(nn.Module):
    """A linear classifier whose fifth training step goes wrong.

    Args:
        how: ``nan loss``, ``inf loss``, ``nan gradient``, ``inf gradient``, or ``slow``: every step takes two seconds.
    """

    def __init__(self, how: str, num_classes: int, image_size: int):
        super().__init__()
        self.linear, self.how, self.steps = nn.Linear(3 * image_size**2, num_classes), how, 0

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images.flatten(1))
        self.steps += self.training
        if self.training and self.how == "slow":
            time.sleep(2)
        if not self.training or self.steps != 5 or self.how == "slow":
            return logits
        value, _, where = self.how.partition(" ")
        if where == "gradient":
            logits.register_hook(lambda gradient: gradient * float(value))
            return logits
        # Minus infinity for every class but 0 makes the loss of the others infinite.
        broken = torch.full_like(logits, -torch.inf if value == "inf" else torch.nan)
        broken[:, 0] = 0
        return logits + broken.where(broken.isfinite(), broken)
