"""Running a study: Hydra makes the points and hands each to :func:`run_point`, which runs it once, whatever happens."""

import gc
import logging
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.runtime.errors import ConfigError, user_message
from alexnet_pl.runtime.logging import StdoutHandler
from alexnet_pl.runtime.run_folder import read_trial
from alexnet_pl.runtime.signals import raise_if_interrupted
from alexnet_pl.studies.hydra_callback import described
from alexnet_pl.studies.session import as_worker, current_command, print_line, say_how_to_go_on
from alexnet_pl.studies.store import LOCKS, Study, config_hash, progress

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
    return Study(Path(_root_.hydra.sweep.dir)).folder(config_hash(_root_)).name


def in_sweep() -> bool:
    """Whether Hydra runs a point of a sweep, not a single run."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def run_trial(cfg: DictConfig) -> float:
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
    if (command := current_command()) is not None:
        raise_if_interrupted()
        command.points += [name] if name not in command.points else []
        return _run_point(cfg, study, folder, command.points)
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
            print_line(f"{folder.name} has finished before: val acc {score:.4f}")
            return score
        print_line(f"\npoint   {folder.name}")
        score = _run_or_note(cfg, folder)
    except Timeout:
        print_line(f"{folder.name} is left to another process, which is running it")
        return float("nan")
    except SystemExit:  # a signal
        lock.release()
        say_how_to_go_on()
        raise
    finally:
        lock.release()
    collect_garbage()
    print_line(f"\n{progress(study, names)}")
    return score


# --- results --------------------------------------------------------------------------------------------------------


def finished_score(folder: Path) -> float | None:
    """The validation accuracy of a finished run, NaN where its result.json lacks it; None of any other."""
    result = read_trial(folder)
    if result.get("status") != "finished":
        return None
    score = result.get("val/acc")
    return float(score) if isinstance(score, int | float) else float("nan")


def _run_or_note(cfg: DictConfig, folder: Path) -> float:
    try:
        from alexnet_pl.training.resume import PLACES
        from alexnet_pl.training.run import run

        prepare(cfg, folder)
        return run(cfg, named=PLACES)
    except Exception as error:
        record_failure(cfg, folder, error)
        return float("nan")


def prepare(cfg: DictConfig, folder: Path) -> None:
    """Clear away a failed attempt that is of no use, and let ``cfg.resume`` name a run that is there to go on with."""
    from alexnet_pl.training.checkpoint_io import CheckpointError, latest_valid

    failure = read_trial(folder)
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


def record_failure(cfg: DictConfig, folder: Path, error: Exception) -> None:
    """Write a result.json that says why the point failed, and say so."""
    from alexnet_pl.runtime.run_folder import write_result
    from alexnet_pl.runtime.system import git_commit, package_versions

    known = user_message(error)
    message = known[0] if known else f"{type(error).__name__}: {' '.join(str(error).split())}"
    if known is None:
        log.error("".join(traceback.format_exception(error)))
    log.info(f"failed  {message}")
    if current_command() is None:
        print_line(f"{folder.name} has failed: {message}")
    result = {
        "status": "failed",
        "error": message,
        # The disk or the memory: what was learned before is as good as ever. Else it may be what went wrong.
        "resumable": isinstance(error, OSError) or type(error).__name__ in ("CheckpointError", "OutOfMemoryError"),
        "seed": cfg.get("seed"),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_result(folder / "result.json", result)
    except OSError as reason:
        print_line(f"{folder / 'result.json'} could not be written ({reason.strerror}).")


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
