"""A study: a sweep whose points are told apart by what they compute, so that the same command goes on with it.

Hydra makes the points and hands each to :func:`run_point`. The study's folder (``hydra.sweep.dir``) holds a run folder
for each point and ``study.json``, which says what points there are to be.
"""

import gc
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.errors import ConfigError, UserError, message_for_people, one_line_errors

log = logging.getLogger(__name__)

STUDY = "study.json"
LOCKS = ".locks"

ELSEWHERE = ("run_dir", "study", "resume", "resume_with_changes", "logger")
"""Top-level keys without a say in a run's numbers: where it lies, what it belongs to, how it is called and recorded."""

WATCHING = (
    "alexnet_pl.dashboard.",
    "alexnet_pl.checkpoints.ResumeCheckpoint",
    "alexnet_pl.callbacks.StopWhenNotFinite",
)
"""Callbacks that draw, save, or end a run in an error: whatever their settings, a run that finishes is the same."""

AFRESH = ("checkpoints", "metrics.csv", "tensorboard", "config.yaml", "result.json")
"""What is removed before a failed point is run anew; result.json, which says that it failed, goes last."""


# --- identity -------------------------------------------------------------------------------------------------------


def identity(cfg: DictConfig) -> str:
    """Ten hexadecimal digits that stand for the numbers a run with this configuration computes.

    They are the SHA-256 of the resolved configuration without ``ELSEWHERE``, ``data.root`` (another path may hold the
    same data; the report says which copies there were) and callbacks that only watch. What is left to the
    machine counts as written: with ``trainer.precision=auto`` a study may go on elsewhere, and the report says so.
    Neither the commit nor the version counts; a new key in ``conf/`` does, whatever its value.
    """
    left = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    OmegaConf.set_struct(left, False)
    for key in ELSEWHERE:
        left[key] = None  # others refer to them: ${run_dir}/checkpoints
    settings: dict[str, Any] = OmegaConf.to_container(left, resolve=True)
    (settings.get("data") or {}).pop("root", None)
    callbacks = settings.get("callbacks") or {}
    settings["callbacks"] = {
        name: callback
        for name, callback in callbacks.items()
        if callback and not str(callback.get("_target_")).startswith(WATCHING)
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def label(overrides: dict[str, str], axes: Sequence[str]) -> str:
    """A name for people, fit for a folder and for the command line: ``norm_lrn-pool_overlapping-seed_1``."""
    axes = sorted(axes, key=lambda key: key == "seed")  # last
    parts = (f"{re.split(r'[./]', key)[-1]}_{overrides[key]}" for key in axes if key in overrides)
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part) for part in parts)[:100].strip("-._")


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


# --- the study's folder ---------------------------------------------------------------------------------------------


@dataclass
class Study:
    """A study's folder and what ``study.json`` in it says.

    Attributes:
        root: the sweep's folder.
        axes: keys and groups that were swept so far, in the order of the first command.
        points: identity → ``{"folder": name, "overrides": {key: value}, "choices": {group: option}}``.
        commands: ``{"command", "launcher", "started" (seconds since 1970), "points": [identity, …]}``, the latest last.
    """

    root: Path
    axes: list[str] = field(default_factory=list)
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.read()

    def read(self) -> None:
        """Take over what ``study.json`` says; without the file, nothing.

        Raises:
            UserError: it is damaged.
        """
        path = self.root / STUDY
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text())
            self.axes, self.points, self.commands = found["axes"], found["points"], found["commands"]
            complete = all({"folder", "overrides", "choices"} <= point.keys() for point in self.points.values())
            if not (complete and isinstance(self.axes, list) and isinstance(self.commands, list)):
                raise ValueError("keys are missing")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({' '.join(str(error).split())}).\n"
                "Delete it and give the study's command again: it is written anew, and finished points are kept."
            ) from error

    def write(self) -> None:
        """Write ``study.json`` whole or not at all."""
        content = {"study": self.root.name, "axes": self.axes, "points": self.points, "commands": self.commands}
        scratch = self.root / f".{STUDY}"
        scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.replace(scratch, self.root / STUDY)

    def add(self, command: str, launcher: str, axes: Sequence[str], points: dict[str, dict[str, Any]]) -> None:
        """Note a command and its points (identity → overrides and choices), and give new points their folders."""
        (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / LOCKS / "study.lock"):
            self.read()
            self.axes += [key for key in axes if key not in self.axes]
            for name, point in points.items():
                if name not in self.points:
                    folder = self._existing(name) or "-".join(
                        filter(None, (label(point["overrides"], self.axes), name))
                    )
                    self.points[name] = {"folder": folder, **point}
            self.commands = [known for known in self.commands if known["command"] != command]
            started = {"command": command, "launcher": launcher, "started": time.time(), "points": [*points]}
            self.commands.append(started)
            self.write()

    def _existing(self, name: str) -> str | None:
        """The folder of a point that a lost ``study.json`` knew."""
        return next((path.name for path in sorted(self.root.glob(f"*{name}")) if path.is_dir()), None)

    def folder(self, name: str) -> Path:
        """The run folder of the point with this identity."""
        return self.root / (self.points[name]["folder"] if name in self.points else self._existing(name) or name)

    def lock(self, name: str) -> FileLock:
        """The lock that whoever runs the point holds: the system's, so it ends with its owner, however that ends."""
        return FileLock(self.root / LOCKS / f"{name}.lock")

    def is_running(self, name: str) -> bool:
        """Whether a process is running the point. It is taken for a moment: see :func:`run_point`."""
        if not (self.root / LOCKS / f"{name}.lock").exists():
            return False
        lock = self.lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:  # somebody else's study, which can only be read
            return False
        lock.release()
        return False

    def state(self, name: str, since: float = 0.0) -> str:
        """Of a point: ``finished``, ``failed``, ``running``, ``stopped`` (can go on) or ``missing`` (not begun).

        What failed before the time ``since`` is to be tried again: it counts as missing.
        """
        folder = self.folder(name)
        status = read_point(folder).get("status")
        if status == "finished":
            return status
        if self.is_running(name):
            return "running"
        if status == "failed" and (folder / "result.json").stat().st_mtime >= since:
            return status
        return "stopped" if status is None and (folder / "config.yaml").is_file() else "missing"


def read_point(folder: Path) -> dict[str, Any]:
    """What a point's result.json says; nothing where there is none, or a damaged one."""
    try:
        result = json.loads((folder / "result.json").read_text())
        return result if isinstance(result, dict) and result.get("status") in ("finished", "failed") else {}
    except (OSError, ValueError):
        return {}


def progress(study: Study, names: Sequence[str]) -> str:
    """One line: how many points are done, running, failed and left, for how long, and for about how long still."""
    started = study.commands[-1]["started"] if study.commands else 0.0
    states = Counter(study.state(name, since=started) for name in names)
    left = states["missing"] + states["stopped"]
    line = f"study {study.root.name}: {states['finished']} done, {states['running']} running, "
    line += f"{states['failed']} failed, {left} left"
    elapsed = max(time.time() - started, 0)
    line += f"; {timedelta(seconds=round(elapsed))} elapsed"
    results = [study.folder(name) / "result.json" for name in names]
    ended = sum(path.is_file() and path.stat().st_mtime >= started for path in results)
    if ended and (left or states["running"]):
        # The one that runs counts as a whole one: rather too long than too short.
        line += f", about {timedelta(seconds=round(elapsed / ended * (left + states['running'])))} to go"
    return line


# --- one point ------------------------------------------------------------------------------------------------------


@dataclass
class _Command:
    """The command that this process carries out."""

    study: Study
    points: list[str]


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
    name = folder.name.rpartition("-")[2]
    names = [*study.points] if _command is None else _command.points
    (study.root / LOCKS).mkdir(exist_ok=True)
    lock = study.lock(name)
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
        say(f"{progress(study, names)}\nThe same command goes on with the study.")
        raise
    finally:
        lock.release()
    collect_garbage()
    say(f"\n{progress(study, names)}")
    return score


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
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        return  # its points are not known in advance
    root = Path(config.hydra.sweep.dir)
    study = Study(root)
    loader = GlobalHydra.instance().config_loader()
    given = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + list(config.hydra.overrides.task)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    points: dict[str, dict[str, Any]] = {}
    before = HydraConfig.instance().cfg
    for overrides in BasicSweeper.split_arguments(parsed, None)[0]:
        cfg = loader.load_sweep_config(config, list(overrides))
        HydraConfig.instance().set_config(cfg)
        name = identity(cfg)
        if name in points:
            same = " ".join(f"{key}={value}" for key, value in points[name]["overrides"].items())
            raise ConfigError(f"{same}\nand {' '.join(overrides)}\nare the same point: they compute the same numbers.")
        pairs = (override.lstrip("+~").partition("=") for override in overrides)
        choices = {group: choice for group, choice in cfg.hydra.runtime.choices.items() if "hydra" not in group}
        points[name] = {"overrides": {key: value for key, _, value in pairs}, "choices": choices}
    HydraConfig.instance().cfg = before
    columns = [point["overrides"] for point in points.values()]
    axes = [key for key in columns[0] if len({column.get(key) for column in columns}) > 1]
    launcher = str(config.hydra.runtime.choices.get("hydra/launcher"))
    try:
        study.add(shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), launcher, axes, points)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or root} cannot be written ({error.strerror}). Choose another hydra.sweep.dir."
        ) from error
    _command = _Command(study, [*points])
    say(progress(study, _command.points))


def sum_up() -> None:
    """Say how the study stands; the process then ends with 1 if a point of this command has failed."""
    if _command is None:
        return
    study, names = _command.study, _command.points
    states = {name: study.state(name) for name in names}
    say("")
    for name, state in states.items():
        if state == "failed":
            print(f"error: {study.folder(name)}: {read_point(study.folder(name))['error']}", file=sys.stderr)
        if state == "running":
            say(f"{study.folder(name).name} is still being run by another process")
    say(f"study folder {study.root}")
    if any(state in ("failed", "stopped", "missing") for state in states.values()):
        sys.exit(1)
