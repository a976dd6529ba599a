"""Table of a study: reads ``study.json`` and run directories, finds the factors, and notes what a reader must know.

``alexnet study DIR [DIR]`` reads what ``train.py -m study=NAME`` wrote; a study that ends does so by itself. Nothing
here trains or loads torch.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from alexnet_pl.figures.charts import Curves, read_curves
from alexnet_pl.runtime.errors import UserError, printable
from alexnet_pl.runtime.run_folder import RESULT, TEST_VIEWS, read_commands, read_config, read_trial
from alexnet_pl.studies.statistics import SEED, Cell, epochs_to
from alexnet_pl.studies.store import STUDY, Study

NOT_FACTORS = ("study", "seed", "data.root", "data_dir", "local", "resume", "allow_changes", "trust", "threads",
               "hydra", "logger", "callbacks.dashboard", "callbacks.resume", "callbacks.nan_monitor")  # fmt: skip
"""Keys, and all below them, that may differ between trials without being what the study is about."""

METRIC_KEYS = ("val/acc", "val/acc_top5", "val/loss", "test/acc", "test/acc_top5", "test/loss")

VIEWS = {f"test/acc{suffix}": words for suffix, words in TEST_VIEWS.items()}
"""Accuracy with several views of each test image averaged → what is averaged."""

STOP = "alexnet_pl.training.StopAtTrainingError"

STUDY_FACTOR = "study"


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass
class Factor:
    """A key or config group that a study varies (or several that vary together), with its levels in trial order."""

    key: str
    levels: list[str]

    @property
    def name(self) -> str:
        """The key without its sections: ``norm`` for ``model/norm``."""
        return " + ".join(part.replace("/", ".").rpartition(".")[2] for part in self.key.split(" + "))


@dataclass
class Trial:
    """One trial of a study.

    Attributes:
        config_hash: see :func:`alexnet_pl.studies.store.config_hash`.
        run_dir: its run directory.
        settings: its overrides, completed by :func:`factors_of`.
        choices: the option chosen in each config group.
        excluded: why the trial is in no table, or "".
        result: its result.json.
        config: its config.yaml.
    """

    study: str
    config_hash: str
    run_dir: Path
    settings: dict[str, str]
    choices: dict[str, Any]
    excluded: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int | str:
        seed = self.result.get("seed", self.settings.get("seed", "?"))
        return int(seed) if str(seed).isdecimal() else str(seed)

    def data(self, key: str, default: Any = None) -> Any:
        """Return an entry of the result's ``data`` section, which describes the dataset."""
        return (self.result.get("data") or {}).get(key, default)


def read_study(root: Path) -> tuple[Study, list[Trial]]:
    """Read a study and its trials, finished or not.

    Raises:
        UserError: not a study, a study without trials, or a corrupt study.json.
    """
    if not root.is_dir():
        raise UserError(f"{root} not found. Give the directory of a study, such as multirun/my_study.")
    if not (root / STUDY).is_file():
        inside = sorted(path.parent.name for path in root.glob(f"*/{STUDY}"))
        hint = f"Studies in it: {', '.join(inside)}." if inside else "train.py -m study=NAME … creates a study."
        raise UserError(f"{root} is not a study: {STUDY} not found. {hint}")
    study = Study(root)
    if not study.trials:
        raise UserError(f"{root} is a study without trials.")
    return study, [_read(study, digits) for digits in study.trials]


def _read(study: Study, digits: str) -> Trial:
    known, run_dir = study.trials[digits], study.run_dir(digits)
    trial = Trial(study.root.name, digits, run_dir, dict(known["overrides"]), dict(known["choices"]))
    state, trial.result = study.state(digits), read_trial(run_dir)
    try:
        trial.config = read_config(run_dir)
    except UserError:  # settings that are missing here are looked up elsewhere
        trial.config = {}
    trial.choices |= _lists_of_options(trial)
    if state == "finished":
        trial.excluded = _exclusion_reason(trial.result)
    elif state == "failed":
        trial.excluded = "failed: " + str(trial.result.get("error", "")).partition("\n")[0]
    elif (run_dir / RESULT).exists():
        trial.excluded = "result.json is corrupt" + (", running again" if state == "running" else "")
    else:
        trial.excluded = {"running": "running", "stopped": "stopped, can be resumed"}.get(state, "not started")
    return trial


def _lists_of_options(trial: Trial) -> dict[str, str]:
    """Return the options of the config groups for which the trial's overrides list several: ``crop_flip, cutout``.

    Hydra names none for such a group, and the section that they are merged into may hold the trial's own directory.
    """
    found = {}
    for key, given in trial.settings.items():
        names = [name.strip(" '\"") for name in given[1:-1].split(",")]
        is_list = given.startswith("[") and all(re.fullmatch(r"[A-Za-z_][\w./-]*", name) for name in names)
        if is_list and "." not in key and not isinstance(trial.config.get(key), list):
            found[key] = ", ".join(names)
    return found


def _exclusion_reason(result: dict[str, Any]) -> str:
    """Return why a finished run is excluded from the tables, or ""."""
    for key in (*METRIC_KEYS, "epochs", "seconds", "parameters"):
        value = result.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"result.json lacks {key}"
        if not math.isfinite(value) or ("/acc" in key and not 0 <= value <= 1):
            return f"result.json has {key}={value}"
    return ""


def is_factor(key: str) -> bool:
    """Return True if an override of ``key`` may change what a trial computes, other than through its seed."""
    return not any(key == no or key.startswith(f"{no}.") for no in NOT_FACTORS)


def factors_of(trials: Sequence[Trial], axes: Sequence[str]) -> tuple[list[Factor], dict[str, str]]:
    """Return the factors that vary over the trials, and the settings they have in common.

    The trials' ``settings`` are completed: a setting that one command gave and another left at its default is looked
    up. Settings that determine each other, such as an activation and its learning rate, are one factor.

    Args:
        axes: keys in the order to show them in; others follow.
    """
    given = dict.fromkeys([*axes, *(key for trial in trials for key in trial.settings)])
    keys = [key for key in given if is_factor(key)]
    for trial in trials:
        trial.settings |= {key: _setting(trial, key) for key in keys}
    varied: list[Factor] = []
    common: dict[str, str] = {}
    for key in keys:
        levels = list(dict.fromkeys(trial.settings[key] for trial in trials))
        if len(levels) == 1:
            common[key] = levels[0]
        elif (factor := _determined_by(trials, key, levels, varied)) is not None:
            joined = f"{factor.key} + {key}"
            for trial in trials:
                trial.settings[joined] = f"{trial.settings[factor.key]}, {trial.settings[key]}"
            factor.key, factor.levels = joined, list(dict.fromkeys(trial.settings[joined] for trial in trials))
        else:
            varied.append(Factor(key, levels))
    return varied, common


def _determined_by(trials: Sequence[Trial], key: str, levels: list[str], factors: Sequence[Factor]) -> Factor | None:
    """Return the factor whose levels correspond one to one to those of ``key``, or None."""
    for factor in factors:
        pairs = {(trial.settings[factor.key], trial.settings[key]) for trial in trials}
        if len(pairs) == len(levels) == len(factor.levels):
            return factor
    return None


_MISSING = object()
"""Value of a key that a trial's config does not have."""


def _setting(trial: Trial, key: str) -> str:
    """Return a trial's value of a key or group, normalized: 1e-3 and 0.001 are equal."""
    if key in trial.choices:
        return str(trial.choices[key])
    value: Any = trial.config
    for part in key.split("."):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    if value is _MISSING:  # a null, by default or given, is a value
        given = trial.settings.get(key)
        if given is None:
            return "default"
        try:
            value = OmegaConf.from_dotlist([f"x={given}"]).x
        except Exception:  # of yaml or OmegaConf: not every override is YAML
            value = given
    if isinstance(value, dict):
        return _section(trial, value, is_given=trial.settings.get(key, "").startswith("{"))
    return str(value)


def _section(trial: Trial, section: dict[str, Any], is_given: bool) -> str:
    """Return a section as text: the names of its parts if an experiment lists them, otherwise its contents.

    The trial's own directory is written as ``${run_dir}``, or no two trials would have the same section.
    """
    parts = [name for name, part in section.items() if isinstance(part, dict) and "_target_" in part]
    if parts and not is_given:
        return ", ".join(parts)
    run_dir = str(trial.config.get("run_dir"))
    return str(section).replace(run_dir, "${run_dir}") if Path(run_dir).is_absolute() else str(section)


@dataclass
class Table:
    """Everything that a report is made from.

    Attributes:
        name: of the study or studies.
        factors: what varies.
        trials: all, those that count first.
        common: settings that all trials have in common.
        commands: that ran them.
        notes: what a reader must know before trusting the numbers.
    """

    name: str
    factors: list[Factor]
    trials: list[Trial]
    common: dict[str, str]
    commands: list[str]
    notes: list[str]

    @property
    def counted(self) -> list[Trial]:
        """Trials that are in the tables."""
        return [trial for trial in self.trials if not trial.excluded]

    def cell(self, trial: Trial) -> Cell:
        """Return a trial's levels, one per factor."""
        return tuple(trial.settings[factor.key] for factor in self.factors)

    def cells(self) -> dict[Cell, list[Trial]]:
        """Return the trials that count by configuration, in the order of the factors' levels."""
        order = [{level: rank for rank, level in enumerate(factor.levels)} for factor in self.factors]
        found: dict[Cell, list[Trial]] = {}
        for trial in sorted(
            self.counted, key=lambda trial: [o[v] for o, v in zip(order, self.cell(trial), strict=True)]
        ):
            found.setdefault(self.cell(trial), []).append(trial)
        return found

    def values(self, measure: str | Callable[[Trial], float | None]) -> pd.Series:
        """Return a measure of every trial that has it, indexed by the factors' keys and ``seed``.

        Args:
            measure: a name for :func:`measured`, or a function of a trial.
        """
        take = measure if callable(measure) else lambda trial: measured(trial, measure)
        rows = [(*self.cell(trial), trial.seed, take(trial)) for trial in self.counted]
        names = [*(factor.key for factor in self.factors), SEED]
        return pd.DataFrame(rows, columns=[*names, "value"]).set_index(names)["value"].dropna().astype(float)

    def title(self, cell: Cell) -> str:
        """Return a configuration's name for plots and notes."""
        return printable(", ".join(cell) or self.name)


def measured(trial: Trial, measure: str) -> float | None:
    """Return a metric of a finished trial, or None if it has none. An error is 1 − the accuracy."""
    if "/error" in measure:
        return 1 - float(trial.result[measure.replace("error", "acc")])
    value = trial.result.get(measure)
    return float(value) if isinstance(value, int | float) else None


def tabulate(roots: Sequence[Path]) -> Table:
    """Read one study, or two to compare.

    Raises:
        UserError: not a study, nothing finished, or two studies without a configuration in common.
    """
    read = [read_study(root) for root in roots]
    names = [study.root.resolve().name for study, _ in read]
    if len(set(names)) < len(names):
        names = [str(root) for root in roots]
    trials = [trial for _, found in read for trial in found]
    axes = list(dict.fromkeys(key for study, _ in read for key in study.axes))
    factors, common = factors_of(trials, axes)
    differences: list[str] = []
    if len(read) > 1:
        factors, differences = _between_studies(factors, names, [found for _, found in read])
    commands = [command["command"] for study, _ in read for command in study.commands]
    table = Table(" and ".join(names), factors, trials, common, commands, [])
    exclude_duplicates(table)
    table.trials.sort(key=lambda trial: bool(trial.excluded))
    table.notes = notes(table)
    if differences:
        table.notes.insert(0, f"the studies differ in {', '.join(differences)}")
    if not table.counted:
        reasons = "; ".join(dict.fromkeys(trial.excluded for trial in table.trials))
        raise UserError(f"{table.name} has no finished trial yet ({reasons}).")
    if len(read) > 1:
        sides = [{cell[1:] for cell in table.cells() if cell[0] == name} for name in names]
        if not sides[0] & sides[1]:
            raise UserError(
                f"{names[0]} and {names[1]} have no finished configuration in common, so they cannot be compared."
            )
    return table


def _between_studies(
    varied: Sequence[Factor], names: list[str], studies: Sequence[Sequence[Trial]]
) -> tuple[list[Factor], list[str]]:
    """Return the factors of two studies, the study first, and the settings that make one differ from the other."""
    factors, differences = [Factor(STUDY_FACTOR, names)], []
    for name, trials in zip(names, studies, strict=True):
        for trial in trials:
            trial.settings[STUDY_FACTOR] = name
    for factor in varied:
        sides = [list(dict.fromkeys(trial.settings[factor.key] for trial in trials)) for trials in studies]
        if all(len(levels) == 1 for levels in sides):
            differences.append(f"{factor.key} ({' against '.join(side[0] for side in sides)})")
        else:
            factors.append(factor)
    return factors, differences


def exclude_duplicates(table: Table) -> None:
    """Exclude all but the latest of finished trials with the same levels and seed.

    Duplicates exist if the config has gained a key since: their hashes differ, their settings do not.
    """
    latest: dict[tuple[Cell, int | str], Trial] = {}
    for trial in table.counted:
        key = (table.cell(trial), trial.seed)
        older = latest.get(key)
        if older is not None and last_start(older) > last_start(trial):
            older, trial = trial, older
        if older is not None:
            older.excluded = f"rerun since, with another config: {trial.run_dir.name}"
        latest[key] = trial


def last_start(trial: Trial) -> float:
    """Return when a finished trial was started or resumed last, in seconds since 1970.

    It is the time in commands.txt, because copying a study and cloning a repository change the times of files. Without
    one it is when result.json was written.
    """
    for time, _ in reversed(read_commands(trial.run_dir)):
        with suppress(ValueError):
            return datetime.strptime(time, "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC).timestamp()
    return (trial.run_dir / RESULT).stat().st_mtime


def notes(table: Table) -> list[str]:
    """Return what is mixed among the trials that count, and which combinations of levels have no trial."""
    found = []
    sources: dict[str, Callable[[Trial], Any]] = {
        "copies of the data": lambda trial: trial.data("source"),
        "commits": lambda trial: trial.result.get("git_commit"),
        "versions": versions,
        "devices": lambda trial: trial.result.get("device"),
        "precisions": lambda trial: trial.result.get("precision"),
    }
    for what, get in sources.items():
        values = list(dict.fromkeys(str(get(trial)) for trial in table.counted))
        if len(values) > 1:
            found.append(f"mixed {what}: {'; '.join(values)}")
    dirty = [trial for trial in table.counted if str(trial.result.get("git_commit")).endswith("-dirty")]
    if dirty:
        found.append(f"{_count(dirty, 'trial')} ran from a checkout with uncommitted changes")
    present = {table.cell(trial) for trial in table.trials}
    absent = [cell for cell in itertools.product(*(factor.levels for factor in table.factors)) if cell not in present]
    if absent:
        listed = "; ".join(table.title(cell) for cell in absent[:6]) + ("; …" if len(absent) > 6 else "")
        found.append(f"the axes are not fully crossed: no trial for {_count(absent, 'combination')} ({listed})")
    lengths = {trial.result["epochs"] for trial in table.counted}
    if len(lengths) > 1 and target_of(table) is None and "trainer.max_epochs" not in {f.key for f in table.factors}:
        found.append(f"runs of different lengths: {', '.join(map(str, sorted(lengths)))} epochs")
    return found


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def versions(trial: Trial) -> str:
    """Return the versions of Python and the packages of a run on one line."""
    return ", ".join(f"{name} {version}" for name, version in (trial.result.get("versions") or {}).items())


# --- epochs to a training error -------------------------------------------------------------------------------------


def target_of(table: Table) -> float | None:
    """Return the training error at which the study's trials stop, or None if they do not."""
    found = {_target(trial) for trial in table.counted}
    return found.pop() if len(found) == 1 else None


def _target(trial: Trial) -> float | None:
    for callback in (trial.config.get("callbacks") or {}).values():
        if isinstance(callback, dict) and callback.get("_target_") == STOP:
            return float(callback.get("error", 0.25))
    return None


@dataclass(frozen=True)
class Reached:
    """Epochs to the target error, or the epochs that did not suffice."""

    epochs: float
    reached: bool


def curves_of(trial: Trial) -> Curves:
    """Return a trial's learning curves, {} if its metrics.csv is missing or corrupt: only some tables need them."""
    try:
        return read_curves(trial.run_dir)
    except (UserError, KeyError, ValueError, IndexError):
        return {}


def epochs_to_target(trial: Trial, target: float) -> Reached | None:
    """Return when a trial's training error fell to ``target``, or None without learning curves."""
    errors = curves_of(trial).get("train/error")
    if errors is None:
        return None
    guessing = 1 - 1 / int(trial.config["model"]["num_classes"])
    epochs = epochs_to(errors, target, start=guessing)
    return Reached(len(errors), False) if epochs is None else Reached(epochs, True)
