"""Study runner: Hydra hands every trial of a sweep to :func:`run_trial`, which runs, resumes, skips or retries it."""

import gc
import logging
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.runtime.errors import ConfigError, one_line, user_message
from alexnet_pl.runtime.logging import StdoutHandler
from alexnet_pl.runtime.run_folder import CONFIG, CORRUPTIONS, METRICS, RESULT, check_entries, read_trial, write_result
from alexnet_pl.runtime.signals import raise_if_interrupted
from alexnet_pl.runtime.system import git_commit, package_versions
from alexnet_pl.studies.forecast import progress
from alexnet_pl.studies.internals import clear_traced_modules
from alexnet_pl.studies.session import as_worker, current_session, print_line, print_resume_hint
from alexnet_pl.studies.sharing import deciding, remove, running_elsewhere, take_over
from alexnet_pl.studies.store import LOCKS, Study, config_hash, trial_entry

log = logging.getLogger(__name__)

REMOVED_BEFORE_RETRY = ("checkpoints", METRICS, "tensorboard", CONFIG, CORRUPTIONS, RESULT)
"""Files of a failed attempt; result.json, which records the failure, is removed last."""


# --- resolvers for Hydra --------------------------------------------------------------------------------------------


def study_dir(study: Any, otherwise: str) -> str:
    """Return ``multirun/<study>``, or ``otherwise`` for a sweep without a name. Resolver of ``hydra.sweep.dir``.

    Args:
        study: the config's value, which a user may have set to anything.

    Raises:
        ConfigError: the name is not a valid directory name.
    """
    if study is None:
        return otherwise
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", str(study)):
        raise ConfigError(f"study={study} is invalid: expected letters, digits and _ . - (not first), at most 100.")
    return f"multirun/{study}"


def trial_dir(*, _root_: DictConfig) -> str:
    """Return the name of a trial's run directory. Resolver of ``hydra.sweep.subdir``."""
    run_dir = Study(Path(_root_.hydra.sweep.dir)).run_dir(config_hash(_root_))
    if run_dir.is_dir():
        check_entries(run_dir)  # Hydra is about to write there
    return run_dir.name


def is_sweep_trial() -> bool:
    """Return True if Hydra is running a trial of a sweep, and False for a single run."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


# --- one trial ------------------------------------------------------------------------------------------------------


def run_trial(cfg: DictConfig) -> float:
    """Run a trial of a study, resume it, or skip it.

    A finished trial is skipped, and one that a neighboring study has finished is taken over. An interrupted one resumes
    from its latest checkpoint and computes what it would have computed without the interruption. A failed one is
    retried from scratch, unless the disk or the memory was at fault: then it resumes. One that another process is
    running, in this study or a neighboring one, is left to that process. An error is recorded in the trial's
    result.json and not raised, so that the other trials run.

    Returns:
        The best validation accuracy, in [0, 1]; NaN if there is none.

    Raises:
        SystemExit: a signal arrived; the status is 128 + its number.
        RunInterrupted: a signal arrived between two trials.
    """
    study, run_dir = Study(Path(HydraConfig.get().sweep.dir)), Path(cfg.run_dir)
    (study.root / LOCKS).mkdir(parents=True, exist_ok=True)
    digits = run_dir.name.rpartition("-")[2]
    if digits not in study.trials:  # of a sweeper that chooses its trials as it goes
        study.include(digits, trial_entry(HydraConfig.get().overrides.task, HydraConfig.get().runtime.choices))
    if (session := current_session()) is not None:
        raise_if_interrupted()
        session.trials += [digits] if digits not in session.trials else []
        return _run_locked(cfg, study, run_dir, session.trials)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StdoutHandler):
            handler.setLevel(logging.WARNING)  # lines of several trials at once would interleave on the terminal
    with as_worker(study) as is_stopped:
        return float("nan") if is_stopped else _run_locked(cfg, study, run_dir, [*study.trials])
    return float("nan")


def _run_locked(cfg: DictConfig, study: Study, run_dir: Path, trials: list[str]) -> float:
    """Run a trial unless it has finished, under its lock, and print the study's progress."""
    lock = study.lock(run_dir.name.rpartition("-")[2])
    try:
        if (score := finished_score(run_dir)) is None:
            lock.acquire(timeout=2, poll_interval=0.02)  # Study.is_running of another process holds it for a moment
            score = finished_score(run_dir)  # another process may have finished it just now
        if score is not None:
            print_line(f"{run_dir.name} has already finished: val acc {score:.4f}")
            return score
        with deciding(cfg, study, run_dir) as has_neighbors:
            source = take_over(cfg, study, run_dir)
            elsewhere = running_elsewhere(cfg, study, run_dir) if has_neighbors and source is None else None
            if elsewhere is not None:
                lock.release()  # before a neighbor looks, or it would leave the trial to this study
        if source is not None:
            score = finished_score(run_dir)
            print_line(f"{run_dir.name} is taken over from {source}: val acc {score:.4f}")
            return float("nan") if score is None else score
        if elsewhere is not None:
            print_line(f"{run_dir.name} is running in the study {elsewhere}, from which it can be taken over")
            return float("nan")
        print_line(f"\ntrial   {run_dir.name}")
        score = _run_or_record(cfg, run_dir)
    except Timeout:
        print_line(f"{run_dir.name} is in use: another process is running it")
        return float("nan")
    except SystemExit:  # a signal
        lock.release()
        print_resume_hint()
        raise
    finally:
        lock.release()
    collect_garbage()
    print_line(f"\n{progress(study, trials)}")
    return score


def finished_score(run_dir: Path) -> float | None:
    """Return a finished run's validation accuracy (NaN if its result.json lacks it), or None for any other run."""
    result = read_trial(run_dir)
    if result.get("status") != "finished":
        return None
    score = result.get("val/acc")
    return float(score) if isinstance(score, int | float) else float("nan")


def _run_or_record(cfg: DictConfig, run_dir: Path) -> float:
    try:
        # Here for start-up time: both load torch, and a study whose trials have all finished needs neither.
        from alexnet_pl.training.resume import PLACES
        from alexnet_pl.training.run import run

        prepare(cfg, run_dir)
        return run(cfg, named=PLACES)
    except Exception as error:
        record_failure(cfg, run_dir, error)
        return float("nan")


def prepare(cfg: DictConfig, run_dir: Path) -> None:
    """Remove a failed attempt that cannot be resumed, and point ``cfg.resume`` at a run that can."""
    from alexnet_pl.config.trust import refused_targets  # here for start-up time: both load torch
    from alexnet_pl.training.checkpoint_io import CheckpointError, latest_valid

    failure = read_trial(run_dir)
    if failure.get("status") == "failed":
        try:
            is_resumable = bool(failure.get("resumable")) and latest_valid(run_dir / "checkpoints") is not None
        except CheckpointError:
            is_resumable = False
        remove(run_dir, (RESULT,) if is_resumable else REMOVED_BEFORE_RETRY)
    if (run_dir / CONFIG).is_file():
        cfg.resume = str(run_dir)
        # A run directory may be untrusted, but the classes that this very command names are the user's own choice.
        cfg.trust = [*(cfg.get("trust") or ()), *refused_targets(cfg)]


def record_failure(cfg: DictConfig, run_dir: Path, error: Exception) -> None:
    """Write and log why the trial failed; a result.json that cannot be written is reported, not raised."""
    known = user_message(error)
    message = known[0] if known else f"{type(error).__name__}: {one_line(error)}"
    if known is None:
        log.error("".join(traceback.format_exception(error)))
    log.info(f"failed  {message}")
    if current_session() is None:
        print_line(f"{run_dir.name} has failed: {message}")
    result = {
        "status": "failed",
        "error": message,
        # After a full disk or out of memory, the weights are sound. After other errors they may be the cause.
        "resumable": isinstance(error, OSError) or type(error).__name__ in ("CheckpointError", "OutOfMemoryError"),
        "seed": cfg.get("seed"),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_result(run_dir / RESULT, result)
    except OSError as reason:
        print_line(f"{run_dir / RESULT} cannot be written: {reason.strerror}")


def collect_garbage() -> None:
    """Free a trial's memory, on a GPU too, with its traced and compiled networks, so that studies do not grow."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    clear_traced_modules()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # otherwise torch stops compiling after about ten networks
