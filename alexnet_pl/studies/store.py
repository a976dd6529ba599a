"""The points of a study: what tells them apart, where they lie and how they stand.

A study's folder holds a run folder for each point and ``study.json``, which says what points there are to be.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import read_trial

STUDY = "study.json"

LOCKS = ".locks"

ELSEWHERE = ("run_dir", "study", "resume", "allow_changes", "logger")
"""Top-level keys without a say in a run's numbers: where it lies, what it belongs to, how it is called and recorded."""

WATCHING = (
    "alexnet_pl.training.Dashboard",
    "alexnet_pl.training.ResumeCheckpoint",
    "alexnet_pl.training.NaNMonitor",
)
"""Callbacks that draw, save, or end a run in an error: whatever their settings, a run that finishes is the same."""


# --- identity -------------------------------------------------------------------------------------------------------


def config_hash(cfg: DictConfig) -> str:
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


def trial_name(overrides: dict[str, str], axes: Sequence[str]) -> str:
    """A name for people, fit for a folder and for the command line: ``norm_lrn-pool_overlapping-seed_1``."""
    axes = sorted(axes, key=lambda key: key == "seed")  # last
    parts = (f"{re.split(r'[./]', key)[-1]}_{overrides[key]}" for key in axes if key in overrides)
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part) for part in parts)[:100].strip("-._")


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
                        filter(None, (trial_name(point["overrides"], self.axes), name))
                    )
                    self.points[name] = {"folder": folder, **point}
            self.commands = [known for known in self.commands if known["command"] != command]
            started = {"command": command, "launcher": launcher, "started": time.time(), "points": [*points]}
            self.commands.append(started)
            self.write()

    def include(self, name: str, point: dict[str, Any]) -> None:
        """Note a point that the latest command did not know in advance."""
        with FileLock(self.root / LOCKS / "study.lock"):
            self.read()
            self.points[name] = {"folder": self._existing(name) or name, **point}
            if self.commands:
                self.commands[-1]["points"].append(name)
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
        status = read_trial(folder).get("status")
        if status == "finished":
            return status
        if self.is_running(name):
            return "running"
        if status == "failed" and (folder / "result.json").stat().st_mtime >= since:
            return status
        return "stopped" if status is None and (folder / "config.yaml").is_file() else "missing"


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
