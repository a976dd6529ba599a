"""Store of a study: the hash that identifies a trial, ``study.json``, run directories, locks and progress.

A study's directory holds one run directory per trial, and ``study.json``, which lists the trials.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.runtime.errors import UserError, one_line
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.run_folder import CONFIG, RESULT, read_trial

STUDY = "study.json"

LOCKS = ".locks"

UNHASHED = ("run_dir", "data_dir", "study", "resume", "allow_changes", "trust", "logger")
"""Top-level keys that cannot affect a run's numbers: directories, study and logs, and how it may be resumed."""

PASSIVE_CALLBACKS = (
    "alexnet_pl.training.Dashboard",
    "alexnet_pl.training.ResumeCheckpoint",
    "alexnet_pl.training.NaNMonitor",
)
"""Callbacks that draw, save or abort: their options do not change the numbers of a run that finishes."""

ORDERED = ("augment", "optimizer.layers", "scheduler.layers")
"""Sections whose entries count in their order: steps of the augmentation, patterns of which the last one applies."""


# --- identity -------------------------------------------------------------------------------------------------------


def config_hash(cfg: DictConfig) -> str:
    """Return ten hexadecimal digits that identify a trial by what its config computes.

    They are the start of the SHA-256 of the resolved config without ``UNHASHED``, ``data.root`` (another directory may
    hold the same data; the report lists the copies used) and passive callbacks. Values that are left to the machine are
    hashed as written, so a study with ``trainer.precision=auto`` may continue on another machine, which the report
    notes. Commit and version are not hashed. A new key in ``conf/`` changes the hash, whatever its value. The order of
    keys counts where the run's numbers depend on it (``ORDERED``) and it is not that of the alphabet.
    """
    return hash_of(numeric_settings(cfg))


def hash_of(settings: Mapping[str, Any]) -> str:
    """Return the hash of what :func:`numeric_settings` returns."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def numeric_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that :func:`config_hash` identifies a trial by, as plain values."""
    left = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    OmegaConf.set_struct(left, False)
    for key in UNHASHED:
        left[key] = None  # not deleted, because other keys interpolate them: ${run_dir}/checkpoints
    settings: dict[str, Any] = OmegaConf.to_container(left, resolve=True)  # type: ignore[assignment]  # of a DictConfig
    (settings.get("data") or {}).pop("root", None)
    settings.pop("scale", None)  # the widths that follow from it are in the section model
    settings.pop("threads", None)  # of the last digits alone, and left to the machine
    callbacks = settings.get("callbacks") or {}
    settings["callbacks"] = {
        name: callback
        for name, callback in callbacks.items()
        if callback and callback.get("_target_") not in PASSIVE_CALLBACKS
    }
    orders = {key: order for key in ORDERED if (order := _order(settings, key)) != sorted(order)}
    return {**settings, **({"order": orders} if orders else {})}


def _order(settings: Mapping[str, Any], key: str) -> list[str]:
    """Return the names of the entries of a section, in order, without its plain values."""
    section: Any = settings
    for part in key.split("."):
        section = (section or {}).get(part)
    return [str(name) for name, entry in (section or {}).items() if isinstance(entry, dict)]


def trial_name(overrides: Mapping[str, str], axes: Sequence[str]) -> str:
    """Return a readable name that is safe as a directory and on a command line: ``norm_lrn-pool_overlapping-seed_1``.

    It lists the axes' values, the seed last, in at most 100 characters.
    """
    axes = sorted(axes, key=lambda key: key == "seed")
    parts = (f"{re.split(r'[./]', key)[-1]}_{overrides[key]}" for key in axes if key in overrides)
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part) for part in parts)[:100].strip("-._")


def trial_entry(overrides: Sequence[str], choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's entry for ``study.json``: its overrides by key, and the option chosen in each config group."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    options = {group: choice for group, choice in choices.items() if "hydra" not in group and group != "local"}
    return {"overrides": {key: value for key, _, value in pairs}, "choices": options}


_RESULTS: dict[Path, tuple[tuple[int, int, int], dict[str, Any]]] = {}
"""Results read so far by run directory, with the version of the file."""


# --- the study's directory ------------------------------------------------------------------------------------------


@dataclass
class Study:
    """A study's directory and the contents of its ``study.json``.

    Attributes:
        root: the sweep's directory.
        axes: keys and groups swept so far, in the order of the first command.
        trials: config hash → ``{"run_dir": name, "overrides": {key: value}, "choices": {group: option}}``, and under
            ``cost`` what :func:`alexnet_pl.studies.forecast.trial_costs` returns.
        commands: ``{"command", "launcher", "started" (seconds since 1970), "trials": [config hash, …]}``, the latest
            last.
    """

    root: Path
    axes: list[str] = field(default_factory=list)
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.read()

    def read(self) -> None:
        """Read ``study.json``; change nothing if the file does not exist.

        Raises:
            UserError: the file is corrupt.
        """
        path = self.root / STUDY
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self.axes, self.trials, self.commands = found["axes"], found["trials"], found["commands"]
            for trial in self.trials.values():
                if not {"run_dir", "overrides", "choices"} <= trial.keys():
                    raise ValueError("a trial lacks keys")
                if Path(trial["run_dir"]).name != trial["run_dir"] or trial["run_dir"] == "..":
                    raise ValueError(f"run_dir {trial['run_dir']!r} lies outside the study")
            if not (isinstance(self.axes, list) and isinstance(self.commands, list)):
                raise ValueError("axes and commands must be lists")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is corrupt ({one_line(error)}).\n"
                "Delete it and re-run the study's command: it is rewritten, and finished trials are kept."
            ) from error

    def write(self) -> None:
        """Write ``study.json`` atomically."""
        content = {"study": self.root.name, "axes": self.axes, "trials": self.trials, "commands": self.commands}
        write_atomic(self.root / STUDY, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def add(
        self, command: str, launcher: str, axes: Sequence[str], trials: Mapping[str, dict[str, Any]],
        renews: bool = False,
    ) -> None:  # fmt: skip
        """Record a command and its trials (config hash → entry), and name the run directories of new ones.

        Args:
            renews: also replace the overrides of known trials, to which this command may add a key.
        """
        (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / LOCKS / "study.lock"):
            self.read()
            self.axes += [key for key in axes if key not in self.axes]
            for digits, trial in trials.items():
                if digits not in self.trials:
                    name = "-".join(filter(None, (trial_name(trial["overrides"], self.axes), digits)))
                    self.trials[digits] = {"run_dir": self._find(digits) or name, **trial}
                    continue
                if "cost" in trial:
                    self.trials[digits]["cost"] = trial["cost"]
                if renews:
                    self.trials[digits]["overrides"] = trial["overrides"]
            self.commands = [known for known in self.commands if known["command"] != command]
            started = {"command": command, "launcher": launcher, "started": time.time(), "trials": [*trials]}
            self.commands.append(started)
            self.write()

    def include(self, digits: str, trial: dict[str, Any]) -> None:
        """Record a trial that the latest command did not know in advance."""
        with FileLock(self.root / LOCKS / "study.lock"):
            self.read()
            self.trials[digits] = {"run_dir": self._find(digits) or digits, **trial}
            if self.commands:
                self.commands[-1]["trials"].append(digits)
            self.write()

    def _find(self, digits: str) -> str | None:
        """Return the name of an existing run directory, which a lost ``study.json`` listed."""
        return next((path.name for path in sorted(self.root.glob(f"*{digits}")) if path.is_dir()), None)

    def run_dir(self, digits: str) -> Path:
        """Return the run directory of the trial with this config hash."""
        known = self.trials.get(digits)
        return self.root / (known["run_dir"] if known else self._find(digits) or digits)

    def lock(self, digits: str) -> FileLock:
        """Return the lock held while a trial runs. The operating system releases it when its owner ends in any way."""
        return FileLock(self.root / LOCKS / f"{digits}.lock")

    def is_running(self, digits: str) -> bool:
        """Return True if a process is running the trial.

        The lock is acquired for a moment to find out, and :func:`alexnet_pl.studies.runner.run_trial` waits for that.
        """
        if not (self.root / LOCKS / f"{digits}.lock").exists():
            return False
        lock = self.lock(digits)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:  # another user's study, which is read-only
            return False
        lock.release()
        return False

    def ended(self, digits: str) -> float:
        """Return when the trial's result.json was written, in seconds since 1970; 0 if there is none."""
        try:
            return os.stat(self.run_dir(digits) / RESULT).st_mtime
        except OSError:
            return 0.0

    def result(self, digits: str) -> dict[str, Any]:
        """Return :func:`read_trial`; the file is parsed again only if it has changed: every trial asks for all."""
        run_dir = self.run_dir(digits)
        try:
            found = os.stat(run_dir / RESULT)
        except OSError:
            return {}
        version = found.st_mtime_ns, found.st_size, found.st_ino
        if _RESULTS.get(run_dir, (None,))[0] != version:
            _RESULTS[run_dir] = version, read_trial(run_dir)
        return _RESULTS[run_dir][1]

    def state(self, digits: str, since: float = 0.0) -> str:
        """Return a trial's state: ``finished``, ``failed``, ``running``, ``stopped`` (can be resumed) or ``missing``.

        A failure from before the time ``since`` (seconds since 1970) is due for a retry and counts as missing.
        """
        run_dir = self.run_dir(digits)
        status = self.result(digits).get("status")
        if status == "finished":
            return "finished"
        if self.is_running(digits):
            return "running"
        if status == "failed" and self.ended(digits) >= since:
            return "failed"
        return "stopped" if status is None and (run_dir / CONFIG).is_file() else "missing"
