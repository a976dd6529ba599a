"""Python interface: ``train`` and ``study`` run what ``alexnet train`` runs, in a notebook, a script or a thread."""

import logging
import os
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig
from torch import nn

from alexnet_pl.config.compose import as_list, compose, config_dir_arguments, to_overrides, to_sweep
from alexnet_pl.config.hydra_versions import named_targets
from alexnet_pl.inference.trained_run import TrainedRun, load_run
from alexnet_pl.runtime.commands import train_command
from alexnet_pl.runtime.errors import ConfigError, UserError, user_environment, user_errors
from alexnet_pl.runtime.logging import StdoutHandler
from alexnet_pl.runtime.run_folder import LOG, METRICS, Leftovers, finished_result, removing, results_table
from alexnet_pl.runtime.system import restore_malloc_thresholds
from alexnet_pl.studies.store import STUDY
from alexnet_pl.training.resume import named_settings
from alexnet_pl.training.run import run

LOGGERS = ("alexnet_pl", "lightning.pytorch")
"""Loggers whose lines belong in a run's train.log."""

TRUSTED = ("alexnet_pl.", "torch.", "torchvision.", "lightning.")
"""Packages that a run's config may name without being told so."""


@dataclass(frozen=True)
class Figure:
    """A figure of a run or a study, which a notebook shows.

    Attributes:
        path: PNG file.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Run:
    """A finished run. Figures and network are read from its directory when they are first used.

    Attributes:
        directory: run directory, also the argument of ``load_run`` and of every command.
        trust: modules of the user's own that the run's config names.
    """

    directory: Path
    trust: tuple[str, ...] = ()

    @cached_property
    def result(self) -> dict[str, Any]:
        """Contents of result.json: validation and test metrics, best epoch, time, versions, hardware."""
        return finished_result(self.directory) or {}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Contents of metrics.csv: one row per epoch, a column per metric, NaN where an epoch has no value."""
        return pd.read_csv(self.directory / METRICS)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Figures by name, such as ``learning_curves``; {} without ``callbacks.dashboard.figures``."""
        return _figures(self.directory / "figures")

    @cached_property
    def trained(self) -> TrainedRun:
        """The run as :func:`alexnet_pl.load_run` returns it: network, preprocessing, class names, config."""
        return load_run(self.directory, self.trust)

    @property
    def net(self) -> nn.Module:
        """Network of the best epoch in eval mode on the CPU: normalized images ``(N, 3, S, S)`` → logits."""
        return self.trained.net

    def __repr__(self) -> str:
        metrics = [f"{name} {self.result[name]:.4f}" for name in ("val/acc", "test/acc") if name in self.result]
        return f"Run {self.directory}: {', '.join(metrics) or 'not finished'}"

    def __str__(self) -> str:
        return f"Run {self.directory}\n{results_table(self.result)}"

    def _repr_markdown_(self) -> str:
        return f"```\n{self}\n```"


@dataclass(frozen=True)
class StudyRun:
    """A study that has been run.

    Attributes:
        directory: the study's directory, also the argument of ``alexnet study``.
    """

    directory: Path

    @cached_property
    def results(self) -> pd.DataFrame:
        """Contents of results.csv: one row per trial with its settings and metrics."""
        return pd.read_csv(self.directory / "results.csv")

    @cached_property
    def report(self) -> str:
        """Markdown of report.md: means, 95% intervals and paired effects."""
        return (self.directory / "report.md").read_text(encoding="utf-8")

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Figures by name, such as ``results``."""
        return _figures(self.directory)

    def _repr_markdown_(self) -> str:
        return self.report

    def __repr__(self) -> str:
        return f"Study {self.directory}: {len(self.results)} trials"


def _figures(directory: Path) -> dict[str, Figure]:
    return {path.stem: Figure(path) for path in sorted(directory.glob("*.png"))}


# --- one run --------------------------------------------------------------------------------------------------------


def train(
    overrides: Sequence[str] | DictConfig | None = None,
    *,
    config_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Train and test a network, as ``alexnet train`` does, and return the finished run::

        run = alexnet_pl.train(model="lenet5", data="digits", trainer={"max_epochs": 3})
        run.result["test/acc"], run.metrics, run.figures["conv1_kernels"], run.net

    Nothing of it stays behind in the process: Hydra, logging, warnings, signal handlers, random generators and torch's
    settings are as they were before. Ctrl-C, or interrupting the cell, saves the run's state first.

    Args:
        overrides: as on the command line, or a config from :func:`alexnet_pl.compose`.
        config_dir: directory with options of your own, laid out as ``conf/``.
        settings: overrides as keywords: ``data="digits"``, ``trainer={"max_epochs": 3}``, ``resume=run.directory``.

    Raises:
        ConfigError: invalid config; raised before any data is read.
        UserError: missing data, a full disk, diverged training: as on the command line, where it is one line.
        KeyboardInterrupt: the run was interrupted, after its state was saved.
    """
    if isinstance(overrides, DictConfig):
        if settings or config_dir is not None:
            raise ConfigError("settings are invalid beside a config: set them in the config, or pass them to compose.")
        if overrides.get("resume") is not None:  # what it changes is known from overrides only
            raise ConfigError("resume is invalid in a config. Pass it with the changes: train(resume=…, …).")
        cfg, named, command = overrides, [], "alexnet_pl.train(config)"
    else:
        cfg = compose(overrides or (), config_dir=config_dir, **settings)
        given = [*(overrides or ()), *to_overrides(settings)]
        named = named_settings(given)
        command = train_command(*config_dir_arguments(config_dir), *given)
    if cfg.get("study") is not None or "ten_crop_of" in cfg:
        raise ConfigError("a study is invalid here: expected a single run. Use alexnet_pl.study.")
    run_dir = Path(cfg.run_dir)
    try:
        with user_errors(), removing(Leftovers(run_dir)), _logging_to(run_dir), _process_restored():
            run(cfg, named, command)
    except SystemExit as stopped:  # a signal, after the state was saved
        if stopped.code == 130:
            raise KeyboardInterrupt from stopped
        raise
    own = [name for name in named_targets(cfg) if not name.startswith(TRUSTED)]
    finished = Run(run_dir, tuple(own))
    _ = finished.result, finished.metrics  # read now: the run may be extended later
    return finished


class _LogFile(logging.FileHandler):
    """Handler of train.log that creates the run directory with the first line."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / LOG, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


@contextmanager
def _logging_to(run_dir: Path) -> Iterator[None]:
    """Show the run's log lines, write them to train.log, and leave the application's logging alone."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    handlers: list[logging.Handler] = [StdoutHandler(), _LogFile(run_dir)]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()


@contextmanager
def _process_restored() -> Iterator[None]:
    """Restore what a run sets for the whole process: seeds, warning filters, torch's flags, allocator thresholds."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")
    environment = {name: os.environ.get(name) for name in names}
    fabric = logging.getLogger("lightning.fabric").level
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    with warnings.catch_warnings(), isolate_rng():
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.benchmark = benchmark
            logging.getLogger("lightning.fabric").setLevel(fabric)
            restore_malloc_thresholds()
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


# --- a study --------------------------------------------------------------------------------------------------------


def study(
    name: str,
    overrides: Sequence[str] | None = None,
    *,
    config_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> StudyRun:
    """Train every combination of the listed values, as ``alexnet train -m`` does, and return the study::

        alexnet_pl.study("pooling", model=["alexnet_lrn", "alexnet_bn"], seed=[1, 2, 3], data="digits")

    The trials run in a process of their own, which a script, a notebook or a thread can wait for. Calling it again
    skips finished trials, resumes interrupted ones and retries failures.

    Args:
        name: of the directory in ``multirun/``.
        overrides: as on the command line.
        config_dir: directory with options of your own, laid out as ``conf/``.
        settings: as for :func:`train`, but a list is swept: one trial per value and combination.

    Raises:
        UserError: an invalid config, or trials that have not finished, with the command's own words.
    """
    words = [*config_dir_arguments(config_dir), "-m", *to_overrides({"study": name}), *as_list(overrides or ())]
    command = [sys.executable, "-m", "alexnet_pl", "train", *words, *to_sweep(settings)]
    environment = {**user_environment(os.environ), "PYTHONIOENCODING": "utf-8"}
    last: deque[str] = deque(maxlen=5)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, encoding="utf-8", errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process only, which stops the command
    ) as process:  # fmt: skip
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                last.append(line.strip())
        except BaseException:
            process.terminate()  # it saves first
            raise
    directory = Path("multirun") / name
    if process.returncode != 0 or not (directory / STUDY).is_file():
        errors = [line.removeprefix("error: ") for line in last if line.startswith("error: ")]
        raise UserError("\n".join(errors or last))
    return StudyRun(directory)
