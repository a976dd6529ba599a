"""Running a study: Hydra makes the points and hands each to :func:`run_point`, which runs it once, whatever happens."""

import gc
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.console import StdoutHandler
from alexnet_pl.errors import ConfigError, UserError, message_for_people, one_line_errors
from alexnet_pl.points import LOCKS, Study, identity, progress, read_point
from alexnet_pl.stopping import RunStopped, StopRequest, stop_if_asked

log = logging.getLogger(__name__)

AFRESH = ("checkpoints", "metrics.csv", "tensorboard", "config.yaml", "result.json")
"""What is removed before a failed point is run anew; result.json, which says that it failed, goes last."""


# --- names, for Hydra ------------------------------------------------------------------------------------------------


def study_folder(study: Any, otherwise: str) -> str:
    """``multirun/<study>``, or the folder for a sweep without a name. A resolver, for ``hydra.sweep.dir``.

    Raises:
        ConfigError: the name could not be a folder's.
    """
    if study is None:
        return otherwise
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", str(study)):
        raise ConfigError(f"study={study} is not possible: a name has letters, digits, and _ . - inside.")
    return f"multirun/{study}"


def point_folder(*, _root_: DictConfig) -> str:
    """The name of a point's folder. A resolver, for ``hydra.sweep.subdir``."""
    return Study(Path(_root_.hydra.sweep.dir)).folder(identity(_root_)).name


# --- one point ------------------------------------------------------------------------------------------------------


@dataclass
class _Command:
    """The command that this process carries out."""

    study: Study
    points: list[str]
    again: str  # how to go on with it
    stop: StopRequest | None = None  # while workers run the points, who are to save before it ends


_command: _Command | None = None  # a worker of a parallel launcher does not know it


def in_sweep() -> bool:
    """Whether Hydra runs a point of a sweep, not a single run."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def run_point(cfg: DictConfig) -> float:
    """Run a point of a study to its end, go on with it, or leave it alone.

    A finished one is skipped. A stopped one goes on from its latest checkpoint, as if it had never stopped. One that
    failed is run afresh, unless what failed was the disk or the memory: then it goes on too. One that another process
    is running is left to it. An error is noted in the point's result.json and goes no further, so that the other
    points run.

    Returns:
        The best validation accuracy, in [0, 1]; NaN where there is none.
    """
    study, folder = Study(Path(HydraConfig.get().sweep.dir)), Path(cfg.run_dir)
    (study.root / LOCKS).mkdir(parents=True, exist_ok=True)
    name = folder.name.rpartition("-")[2]
    if name not in study.points:  # of a sweeper whose points are not known in advance
        study.include(name, described(HydraConfig.get().overrides.task, HydraConfig.get().runtime.choices))
    if _command is not None:
        stop_if_asked()
        _command.points += [name] if name not in _command.points else []
        return _run_point(cfg, study, folder, _command.points)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StdoutHandler):
            handler.setLevel(logging.WARNING)  # the lines of several points at once are of no use to anybody
    with as_worker(study) as stopped:
        return float("nan") if stopped else _run_point(cfg, study, folder, [*study.points])
    return float("nan")


def _run_point(cfg: DictConfig, study: Study, folder: Path, names: list[str]) -> float:
    lock = study.lock(folder.name.rpartition("-")[2])
    try:
        if (score := finished_score(folder)) is None:
            lock.acquire(timeout=2, poll_interval=0.02)  # Study.is_running of another process holds it for a moment
            score = finished_score(folder)  # by another process, just now
        if score is not None:
            say(f"{folder.name} has finished before: val acc {score:.4f}")
            return score
        say(f"\npoint   {folder.name}")
        score = _run_or_note(cfg, folder)
    except Timeout:
        say(f"{folder.name} is left to another process, which is running it")
        return float("nan")
    except SystemExit:  # a signal
        lock.release()
        say_how_to_go_on()
        raise
    finally:
        lock.release()
    collect_garbage()
    say(f"\n{progress(study, names)}")
    return score


def say_how_to_go_on() -> None:
    """The last words of a command that carries out a study; nothing of any other."""
    if _command is not None:
        say(f"\n{progress(_command.study, _command.points)}\n{_command.again}")


# --- workers of a parallel launcher -----------------------------------------------------------------------------------

OWNER = "ALEXNET_PL_STUDY"
"""Environment variable that names the process whose workers run the points."""

WAITS = ("joblib", "submitit_local")
"""Launchers whose workers end with the command, and are given the time to save."""


@contextmanager
def as_worker(study: Study) -> Iterator[bool]:
    """Stop when :func:`stop_workers` asks for it, and end with what was asked for, not with an error.

    Yields:
        Whether it has asked already. This worker is noted first: either it is found, or it finds the request.
    """
    owner = os.environ.get(OWNER, "")
    record = study.root / LOCKS / f"{socket.gethostname()}-{os.getpid()}.worker"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes; the owner passes it on
    stop = StopRequest()
    stop.install()
    try:
        record.write_text(owner)
        yield (study.root / LOCKS / f"{owner}.stop").exists()
    except (RunStopped, SystemExit):
        say(f"{study.root.name}: a worker has stopped")
    finally:
        stop.restore()
        record.unlink(missing_ok=True)


def stop_workers() -> None:
    """Ask the workers of this command to save and stop, and to begin no other point."""
    locks, owner, here = _command.study.root / LOCKS, os.environ[OWNER], socket.gethostname()
    (locks / f"{owner}.stop").touch()
    for record in locks.glob(f"{here}-*.worker"):
        with suppress(OSError):  # it has just ended
            if record.read_text() == owner:
                os.kill(int(record.stem.rpartition("-")[2]), signal.SIGTERM)


# --- results --------------------------------------------------------------------------------------------------------


def finished_score(folder: Path) -> float | None:
    """The validation accuracy of a finished run, NaN where its result.json lacks it; None of any other."""
    result = read_point(folder)
    if result.get("status") != "finished":
        return None
    score = result.get("val/acc")
    return float(score) if isinstance(score, int | float) else float("nan")


def _run_or_note(cfg: DictConfig, folder: Path) -> float:
    try:
        from alexnet_pl.resuming import PLACES
        from alexnet_pl.training import run

        prepare(cfg, folder)
        return run(cfg, named=PLACES)
    except Exception as error:
        note_failure(cfg, folder, error)
        return float("nan")


def prepare(cfg: DictConfig, folder: Path) -> None:
    """Clear away a failed attempt that is of no use, and let ``cfg.resume`` name a run that is there to go on with."""
    from alexnet_pl.checkpoints import CheckpointError, latest_valid

    failure = read_point(folder)
    if failure.get("status") == "failed":
        try:
            of_use = bool(failure.get("resumable")) and latest_valid(folder / "checkpoints") is not None
        except CheckpointError:
            of_use = False
        for entry in AFRESH[-1:] if of_use else AFRESH:
            path = folder / entry
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if (folder / "config.yaml").is_file():
        cfg.resume = str(folder)


def note_failure(cfg: DictConfig, folder: Path, error: Exception) -> None:
    """Write a result.json that says why the point failed, and say so."""
    from alexnet_pl.results import git_commit, package_versions, write_result

    known = message_for_people(error)
    message = known[0] if known else f"{type(error).__name__}: {' '.join(str(error).split())}"
    if known is None:
        log.error("".join(traceback.format_exception(error)))
    log.info(f"failed  {message}")
    if _command is None:
        say(f"{folder.name} has failed: {message}")
    result = {
        "status": "failed",
        "error": message,
        # The disk or the memory: what was learned before is as good as ever. Else it may be what went wrong.
        "resumable": isinstance(error, OSError) or type(error).__name__ in ("CheckpointError", "OutOfMemory"),
        "seed": cfg.get("seed"),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_result(folder / "result.json", result)
    except OSError as reason:
        say(f"{folder / 'result.json'} could not be written ({reason.strerror}).")


def collect_garbage() -> None:
    """Give the point's memory back, also a GPU's, and what torch.compile has made for its network."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # else the tenth network or so is no longer compiled


def say(text: str) -> None:
    """To the terminal alone: it is about the study, not for the log of a point."""
    print(text, flush=True)


# --- all points -----------------------------------------------------------------------------------------------------


class StudyCallback(Callback):
    """Hydra's door to the study: notes its points before the first one runs, and sums up after the last one."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _exit_on_error(plan, config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _exit_on_error(sum_up)


def _exit_on_error(function: Callable[..., None], *arguments: Any) -> None:
    """Hydra turns an exception in a callback into a warning, and goes on."""
    try:
        with one_line_errors():
            function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def plan(config: DictConfig) -> None:
    """Compose every point of the sweep and note it in ``study.json``.

    Raises:
        ConfigError: two points that are the same, or a setting that no sweep can have.
        UserError: a damaged ``study.json``.
    """
    global _command
    if config.get("resume") is not None:
        raise ConfigError("resume is for a single run. A study goes on when its command is given again.")
    if "views_of" in config:
        raise ConfigError("experiment=views evaluates the runs of one study, and is no sweep: leave -m out.")
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
        name = identity(cfg)
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
    _command = _Command(study, [*points], again)
    os.environ[OWNER] = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    if launcher in WAITS:
        _command.stop = StopRequest(then=stop_workers)
        _command.stop.wait = True
        _command.stop.install()
    say(progress(study, _command.points))


def described(overrides: Sequence[str], choices: Mapping[str, Any]) -> dict[str, Any]:
    """What ``study.json`` says of a point: its overrides by key, and the option of every group."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    options = {group: choice for group, choice in choices.items() if "hydra" not in group}
    return {"overrides": {key: value for key, _, value in pairs}, "choices": options}


def sum_up() -> None:
    """Say how the study stands; the process then ends with 1 if a point of this command has failed."""
    if _command is None:
        return
    study, names, stop = _command.study, _command.points, _command.stop
    if stop is not None:
        stop.restore()
        for leftover in (study.root / LOCKS).glob(f"{os.environ[OWNER]}.stop"):
            leftover.unlink(missing_ok=True)
        if stop.received is not None:
            say_how_to_go_on()
            sys.exit(128 + stop.received)
    states = {name: study.state(name) for name in names}
    say("")
    for name, state in states.items():
        if state == "failed":
            print(f"error: {study.folder(name)}: {read_point(study.folder(name))['error']}", file=sys.stderr)
        if state == "running":
            say(f"{study.folder(name).name} is still being run by another process")
        if state in ("stopped", "missing"):
            print(f"error: {study.folder(name)} has not ended. {_command.again}", file=sys.stderr)
    try:
        from alexnet_pl.study import write_report  # after all points, for pandas and matplotlib take their time

        write_report([study.root], study.root)
        say(f"report {study.root / 'report.md'}")
    except UserError as error:  # nothing has finished, or the disk is full
        say(f"there is no report: {error}")
    say(f"study folder {study.root}")
    if any(state in ("failed", "stopped", "missing") for state in states.values()):
        sys.exit(1)
