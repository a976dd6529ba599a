"""Sharing of trials between studies: a trial that a neighboring study has finished is taken over, not trained again.

Studies are neighbors if they lie in the same directory, ``multirun`` by default. What is taken over is a copy, so that
either study may be deleted.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.config.hydra_versions import named_targets
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import CONFIG, METRICS, RESULT, read_config, read_trial, write_result
from alexnet_pl.runtime.system import NUMERICS
from alexnet_pl.studies.store import LOCKS, STUDY, Study

VERSIONED = ("alexnet_pl.", "torch.", "torchvision.", "lightning.")
"""Modules whose version is known. A trial with classes of one's own, which may change at any time, is not shared."""

COPIED = ("checkpoints", "figures", "tensorboard", METRICS, "report.html", "commands.txt", CONFIG)
"""Files and directories of a run that are taken over, in this order. result.json, which makes it finished, is last."""


DECIDING = 60
"""Seconds to wait for another study's decision, which may copy a run; a process that was stopped does not end it."""


@contextmanager
def deciding(cfg: DictConfig, study: Study, run_dir: Path) -> Iterator[bool]:
    """Hold the lock under which neighboring studies decide, one after the other, which of them runs a shared trial.

    This process holds the lock of its own trial by then, keeps it while it runs the trial, and releases it in the block
    if it leaves the trial to a neighbor. Two that looked for each other at once would leave the trial to each other.

    A neighbor that nothing is seen of yet will hold its own trial's lock later than this process and see it. So the
    lock, which is in the studies' common directory, is taken only if a neighbor has the trial, and only then does this
    process look for a run that it could leave the trial to.

    Yields:
        True if a neighbor has the trial.
    """
    with ExitStack() as held:
        has_neighbors = is_shared(cfg) and any(_same_trials(study, run_dir))
        if has_neighbors:
            locks = study.root.absolute().parent / LOCKS
            # The directory is read-only: the neighbors are another user's. Or a process was stopped inside.
            with suppress(OSError):
                locks.mkdir(exist_ok=True)
                held.enter_context(FileLock(locks / f"{run_dir.name.rpartition('-')[2]}.lock", timeout=DECIDING))
        yield has_neighbors


def take_over(cfg: DictConfig, study: Study, run_dir: Path) -> str | None:
    """Copy a finished run of the same trial from a neighboring study into ``run_dir``, whose lock this process holds.

    It has to be the same by its config hash, the version of what a config computes, the release of torch, the kind
    of device and the directory of the data. Sweeps without a name run everything themselves.

    Returns:
        The run that was taken over, as ``study/run directory``, or None if there is none.
    """
    for source in _same_trials(study, run_dir) if is_shared(cfg) else ():
        result = read_trial(source)
        if result.get("status") != "finished" or not _is_equivalent(cfg, source, result):
            continue
        name = f"{source.parent.name}/{source.name}"
        try:
            _copy(source, run_dir)
            write_result(run_dir / RESULT, {**result, "taken_over_from": name})
        except OSError:  # the source is being deleted, or the disk is full
            remove(run_dir, COPIED)
            continue
        return name
    return None


def running_elsewhere(cfg: DictConfig, study: Study, run_dir: Path) -> str | None:
    """Return the name of a neighboring study in which a process is running the same trial, or None.

    One whose config.yaml names another copy of the data does not count, because its trial will not be taken over.
    """
    digits = run_dir.name.rpartition("-")[2]
    for source in _same_trials(study, run_dir) if is_shared(cfg) else ():
        if _has_same_data(cfg, source) is False:
            continue
        with suppress(UserError):  # its study.json is corrupt
            if Study(source.parent).is_running(digits):
                return source.parent.name
    return None


def is_shared(cfg: DictConfig) -> bool:
    """Return True if a trial belongs to a study with a name and has no classes of the user's own."""
    names = named_targets(
        OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    )
    return cfg.get("study") is not None and all(name.startswith(VERSIONED) for name in names)


def remove(run_dir: Path, entries: tuple[str, ...]) -> None:
    """Remove some files and directories of a run, in order."""
    for entry in entries:
        path = run_dir / entry
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _same_trials(study: Study, run_dir: Path) -> Iterator[Path]:
    """Yield the run directories of the same trial in neighboring studies."""
    digits = run_dir.name.rpartition("-")[2]
    root = study.root.absolute()
    for source in sorted(root.parent.glob(f"*/*{digits}")):
        is_trial = source.name.rpartition("-")[2] == digits and (source.parent / STUDY).is_file()
        if is_trial and source.parent != root and source.is_dir() and not source.is_symlink():
            yield source


def _is_equivalent(cfg: DictConfig, source: Path, result: dict[str, Any]) -> bool:
    """Return True if the run in ``source`` computed what this process would compute with ``cfg``."""
    then = str((result.get("versions") or {}).get("torch", ""))
    if result.get("numerics") != NUMERICS or then.split(".")[:2] != version("torch").split(".")[:2]:
        return False
    if not _has_same_data(cfg, source):
        return False
    from alexnet_pl.config.resolve import on_cuda  # start-up time: loads torch, and is needed for few trials only

    return str(result.get("device", "")).startswith("cuda") == on_cuda(str(cfg.trainer.get("accelerator", "auto")))


def _has_same_data(cfg: DictConfig, source: Path) -> bool | None:
    """Return True if the run in ``source`` reads the directory of ``cfg``; None if its config is not written yet."""
    try:
        before = (read_config(source).get("data") or {}).get("root")
    except UserError:  # or it is corrupt
        return None
    now = cfg.data.get("root")
    return before == now or not (before is None or now is None or os.path.realpath(before) != os.path.realpath(now))


def _copy(source: Path, run_dir: Path) -> None:
    """Copy the files of a run; no hard links, which are refused in a run directory that is resumed.

    Raises:
        OSError: a file cannot be read or written.
    """
    remove(run_dir, (*COPIED, RESULT))
    for entry in COPIED:
        for path in sorted((source / entry).rglob("*")) if (source / entry).is_dir() else [source / entry]:
            if path.is_symlink() or not path.is_file():
                continue
            target = run_dir / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
