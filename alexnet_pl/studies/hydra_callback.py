"""studies.hydra_callback."""

import os
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from alexnet_pl.runtime.errors import ConfigError, UserError, one_line_errors
from alexnet_pl.runtime.run_folder import read_trial
from alexnet_pl.runtime.signals import GracefulShutdown
from alexnet_pl.studies.session import (
    OWNER,
    WAITS,
    _Command,
    current_command,
    print_line,
    say_how_to_go_on,
    set_command,
    stop_workers,
)
from alexnet_pl.studies.store import LOCKS, Study, config_hash, progress

# --- all points -----------------------------------------------------------------------------------------------------


class StudyCallback(Callback):
    """Hydra's door to the study: notes its points before the first one runs, and sums up after the last one."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _exit_on_error(register_trials, config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _exit_on_error(summarize)


def _exit_on_error(function: Callable[..., None], *arguments: Any) -> None:
    """Hydra turns an exception in a callback into a warning, and goes on."""
    try:
        with one_line_errors():
            function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def register_trials(config: DictConfig) -> None:
    """Compose every point of the sweep and note it in ``study.json``.

    Raises:
        ConfigError: two points that are the same, or a setting that no sweep can have.
        UserError: a damaged ``study.json``.
    """
    if config.get("resume") is not None:
        raise ConfigError("resume is for a single run. A study goes on when its command is given again.")
    if "ten_crop_of" in config:
        raise ConfigError("experiment=ten_crop evaluates the runs of one study, and is no sweep: leave -m out.")
    sweeper = config.hydra.sweeper
    root = Path(config.hydra.sweep.dir)
    study = Study(root)
    loader = GlobalHydra.instance().config_loader()
    wanted: Sequence[Sequence[str]] = ()
    if sweeper._target_.endswith(".BasicSweeper"):  # others choose their points as they go
        given = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + list(config.hydra.overrides.task)
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
        wanted = BasicSweeper.split_arguments(parsed, None)[0]
    points: dict[str, dict[str, Any]] = {}
    before = HydraConfig.instance().cfg
    for overrides in wanted:
        cfg = loader.load_sweep_config(config, list(overrides))
        HydraConfig.instance().set_config(cfg)
        name = config_hash(cfg)
        if name in points:
            same = " ".join(f"{key}={value}" for key, value in points[name]["overrides"].items())
            raise ConfigError(f"{same}\nand {' '.join(overrides)}\nare the same point: they compute the same numbers.")
        points[name] = described(overrides, cfg.hydra.runtime.choices)
    HydraConfig.instance().cfg = before
    columns = [point["overrides"] for point in points.values()]
    axes = [key for key in (columns[0] if columns else ()) if len({column.get(key) for column in columns}) > 1]
    launcher = str(config.hydra.runtime.choices.get("hydra/launcher"))
    try:
        study.add(shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), launcher, axes, points)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or root} cannot be written ({error.strerror}). Choose another hydra.sweep.dir."
        ) from error
    named = config.get("study") is not None or "hydra.sweep.dir" in str(config.hydra.overrides.hydra)
    again = f"The same command goes on with it{'' if named else f', with hydra.sweep.dir={root}'}."
    command = _Command(study, [*points], again)
    set_command(command)
    os.environ[OWNER] = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    if launcher in WAITS:
        command.stop = GracefulShutdown(then=stop_workers)
        command.stop.wait = True
        command.stop.install()
    print_line(progress(study, command.points))


def described(overrides: Sequence[str], choices: Mapping[str, Any]) -> dict[str, Any]:
    """What ``study.json`` says of a point: its overrides by key, and the option of every group."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    options = {group: choice for group, choice in choices.items() if "hydra" not in group}
    return {"overrides": {key: value for key, _, value in pairs}, "choices": options}


def summarize() -> None:
    """Say how the study stands; the process then ends with 1 if a point of this command has failed."""
    command = current_command()
    if command is None:
        return
    study, names, stop = command.study, command.points, command.stop
    if stop is not None:
        stop.restore()
        for leftover in (study.root / LOCKS).glob(f"{os.environ[OWNER]}.stop"):
            leftover.unlink(missing_ok=True)
        if stop.received is not None:
            say_how_to_go_on()
            sys.exit(128 + stop.received)
    states = {name: study.state(name) for name in names}
    print_line("")
    for name, state in states.items():
        if state == "failed":
            print(f"error: {study.folder(name)}: {read_trial(study.folder(name))['error']}", file=sys.stderr)
        if state == "running":
            print_line(f"{study.folder(name).name} is still being run by another process")
        if state in ("stopped", "missing"):
            print(f"error: {study.folder(name)} has not ended. {command.again}", file=sys.stderr)
    try:
        from alexnet_pl.studies.report import (
            write_report,  # after all points, for pandas and matplotlib take their time
        )

        write_report([study.root], study.root)
        print_line(f"report {study.root / 'report.md'}")
    except UserError as error:  # nothing has finished, or the disk is full
        print_line(f"there is no report: {error}")
    print_line(f"study folder {study.root}")
    if any(state in ("failed", "stopped", "missing") for state in states.values()):
        sys.exit(1)
