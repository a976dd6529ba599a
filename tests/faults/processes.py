"""Runs as real processes that start quickly, and a network that fails on demand.

A fork server imports torch and Lightning once. Every run is then a process of its own, with real signals, without ten
seconds of imports.
"""

import atexit
import logging
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import PATIENCE, REPOSITORY, config
from omegaconf import DictConfig
from torch import Tensor, nn

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["alexnet_pl.training.run", "alexnet_pl.studies.report", "alexnet_pl.studies.plots"])

EVERY_EPOCH = "callbacks.resume.min_interval_seconds=0"
DIGITS = ("model=lenet5", "data=digits", "trainer.accelerator=cpu", "trainer.precision=32-true", EVERY_EPOCH)


_started: list[multiprocessing.process.BaseProcess] = []


@atexit.register
def kill_started() -> None:
    """Kill what a test has left running, such as a run of many epochs after a failed assertion."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            process.kill()
            process.join()


class Started:
    """A process forked from the fork server, with its output in a file.

    Args:
        target: called with ``arguments`` in the process.
        output: file for stdout and stderr.
    """

    def __init__(self, target: Callable[..., None], *arguments: object, output: Path):
        self.output = output
        self.output.touch()
        self.process = CONTEXT.Process(target=_redirected, args=(target, arguments, output))
        self.process.start()
        _started.append(self.process)

    def wait(self) -> int:
        """Wait for the end and return the exit status, negative after a signal without a handler."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the run hangs:\n{self.text}")
        return self.process.exitcode

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


class Run(Started):
    """A run as a process, with its output in a file beside the run directory.

    Args:
        memory: limit of the address space, in bytes beyond what the fork server has.
    """

    def __init__(
        self, *overrides: str, run_dir: Path, memory: int | None = None, environment: dict[str, str] | None = None
    ):
        self.run_dir, output = run_dir, run_dir.with_name(f"{run_dir.name}.{time.monotonic_ns()}.log")
        super().__init__(_run, config(*overrides, run_dir=run_dir), memory, environment or {}, output=output)


class Command(Started):
    """``python train.py`` with these overrides, called from the directory ``cwd``.

    Args:
        fresh: start a new interpreter. Commands that start processes need it: joblib's workers end with the
            interpreter, while a forked one waits for them.
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
    os.environ["OMP_NUM_THREADS"] = "1"  # as in forked ones, for the same last digits
    os.execv(sys.executable, [sys.executable, str(REPOSITORY / "train.py"), *overrides])


def _run(cfg: DictConfig, memory: int | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

    from alexnet_pl.runtime.errors import one_line_errors
    from alexnet_pl.training.run import run

    if memory is not None:
        import resource  # does not exist on Windows

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    with one_line_errors():
        run(cfg)


def wait_for(condition: Callable[[], object], run: Started | None = None) -> None:
    """Wait until ``condition`` holds; fail if the run ends first."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {PATIENCE} s"
        assert run is None or run.process.is_alive(), run.text
        time.sleep(0.001)


class BreakingNet(nn.Module):
    """A linear classifier whose fifth training step fails.

    Args:
        how: ``nan loss``, ``inf loss``, ``nan gradient``, ``inf gradient``, or ``stuck``: the step never ends.
    """

    def __init__(self, how: str, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.linear, self.how, self.steps = nn.Linear(3 * image_size**2, num_classes), how, 0

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images.flatten(1))
        self.steps += self.training
        if not self.training or self.steps != 5:
            return logits
        if self.how == "stuck":
            print("stuck", flush=True)
            time.sleep(2 * PATIENCE)
        value, _, where = self.how.partition(" ")
        if where == "gradient":
            logits.register_hook(lambda gradient: gradient * float(value))
            return logits
        # Minus infinity for every class but 0 makes the loss of the others infinite.
        broken = torch.full_like(logits, -torch.inf if value == "inf" else torch.nan)
        broken[:, 0] = 0
        return logits + broken.where(broken.isfinite(), broken)
