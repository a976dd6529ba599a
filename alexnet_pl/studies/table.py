"""What a study has found: tables with intervals, paired effects, plots, and what is missing.

``python -m alexnet_pl study FOLDER [FOLDER]`` reads the folders that ``train.py -m study=NAME`` made; a study that ends
does it by itself. Nothing here trains or waits for torch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alexnet_pl.figures.charts import read_curves
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import read_trial
from alexnet_pl.studies.statistics import Cell, Values, epochs_to
from alexnet_pl.studies.store import STUDY, Study

NOT_FACTORS = ("study", "seed", "data.root", "resume", "allow_changes", "hydra", "logger", "callbacks.dashboard",
               "callbacks.resume", "callbacks.nan_monitor")  # fmt: skip
"""Keys, and all below them, that may differ between points without being what the study is about."""

FIGURES = ("val/acc", "val/acc_top5", "val/loss", "test/acc", "test/acc_top5", "test/loss")

STOP = "alexnet_pl.training.StopAtTrainingError"

STUDY_FACTOR = "study"


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass
class Factor:
    """What a study varies: a key or group (or several that go together), and its levels in the order of the points."""

    key: str
    levels: list[str]

    @property
    def name(self) -> str:
        """Without the sections in front: ``norm`` for ``model/norm``."""
        return " + ".join(part.replace("/", ".").rpartition(".")[2] for part in self.key.split(" + "))


@dataclass
class Point:
    """One point of a study.

    Attributes:
        identity: see :func:`alexnet_pl.studies.store.identity`.
        folder: its run folder.
        settings: overrides that it was made by, and then what :func:`factors_of` looked up.
        choices: the option of every group.
        excluded: why it is in no table; empty for one that is.
        result: its result.json.
        config: its config.yaml.
    """

    study: str
    identity: str
    folder: Path
    settings: dict[str, str]
    choices: dict[str, Any]
    excluded: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int | str:
        seed = self.result.get("seed", self.settings.get("seed", "?"))
        return int(seed) if str(seed).isdigit() else str(seed)


def read_study(folder: Path) -> tuple[Study, list[Point]]:
    """A study's points, finished or not.

    Raises:
        UserError: no study, an empty one, or a damaged study.json.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. Give the folder of a study, such as multirun/my_study.")
    if not (folder / STUDY).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{STUDY}"))
        hint = f"Studies in it: {', '.join(inside)}." if inside else "A study is made by train.py -m study=NAME …"
        raise UserError(f"{folder} is no study: it has no {STUDY}. {hint}")
    study = Study(folder)
    if not study.points:
        raise UserError(f"{folder} is a study without points.")
    return study, [_read(study, name) for name in study.points]


def _read(study: Study, name: str) -> Point:
    known, folder = study.points[name], study.folder(name)
    point = Point(study.root.name, name, folder, dict(known["overrides"]), known["choices"])
    state, point.result = study.state(name), read_trial(folder)
    try:
        point.config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    except Exception:  # yaml's and OmegaConf's own; what is missing is looked up elsewhere or not at all
        point.config = {}
    if not isinstance(point.config, dict):
        point.config = {}
    if state == "finished":
        point.excluded = _unusable(point.result)
    elif state == "failed":
        point.excluded = "failed: " + str(point.result.get("error", "")).partition("\n")[0]
    elif (folder / "result.json").exists():
        point.excluded = "result.json is damaged" + (", running again" if state == "running" else "")
    else:
        point.excluded = {"running": "running", "stopped": "stopped, can go on"}.get(state, "not begun")
    return point


def _unusable(result: dict[str, Any]) -> str:
    """What keeps a finished result out of the tables; empty where nothing does."""
    for key in (*FIGURES, "epochs", "seconds", "parameters"):
        value = result.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"result.json lacks {key}"
        if not math.isfinite(value) or ("/acc" in key and not 0 <= value <= 1):
            return f"result.json has {key}={value}"
    return ""


def factors_of(points: Sequence[Point], axes: Sequence[str]) -> tuple[list[Factor], dict[str, str]]:
    """What varies over the points, and what they have in common; ``settings`` of the points are completed.

    A setting that one command gave and another left at its default is looked up. Settings that determine each other,
    such as an activation and the learning rate that goes with it, are one factor.

    Args:
        axes: keys in the order to show them in; others follow.
    """
    given = dict.fromkeys([*axes, *(key for point in points for key in point.settings)])
    keys = [key for key in given if not any(key == no or key.startswith(f"{no}.") for no in NOT_FACTORS)]
    for point in points:
        point.settings |= {key: _setting(point, key) for key in keys}
    varied: list[Factor] = []
    common: dict[str, str] = {}
    for key in keys:
        levels = list(dict.fromkeys(point.settings[key] for point in points))
        if len(levels) == 1:
            common[key] = levels[0]
            continue
        for factor in varied:
            if factor.key == STUDY_FACTOR:
                continue
            pairs = {(point.settings[factor.key], point.settings[key]) for point in points}
            if len(pairs) == len(levels) == len(factor.levels):
                joined = f"{factor.key} + {key}"
                for point in points:
                    point.settings[joined] = f"{point.settings[factor.key]}, {point.settings[key]}"
                factor.key = joined
                factor.levels = list(dict.fromkeys(point.settings[joined] for point in points))
                break
        else:
            varied.append(Factor(key, levels))
    return varied, common


def _setting(point: Point, key: str) -> str:
    """The value of a key or group in a point: 1e-3 and 0.001 are the same."""
    if key in point.choices:
        return str(point.choices[key])
    value: Any = point.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        given = point.settings.get(key)
        if given is None:
            return "default"
        try:
            value = OmegaConf.from_dotlist([f"x={given}"]).x
        except Exception:  # not every override is YAML
            value = given
    return str(value)


@dataclass
class Table:
    """Everything a report is made from.

    Attributes:
        name: of the study or studies.
        factors: what varies.
        points: all, those that count first.
        common: settings that all points have in common.
        commands: that made them.
        notes: what a reader must know before trusting the numbers.
    """

    name: str
    factors: list[Factor]
    points: list[Point]
    common: dict[str, str]
    commands: list[str]
    notes: list[str]

    @property
    def counted(self) -> list[Point]:
        return [point for point in self.points if not point.excluded]

    def cell(self, point: Point) -> Cell:
        """A point's levels, one a factor."""
        return tuple(point.settings[factor.key] for factor in self.factors)

    def cells(self) -> dict[Cell, list[Point]]:
        """The points that count, by configuration, in the order of the factors' levels."""
        order = [{level: rank for rank, level in enumerate(factor.levels)} for factor in self.factors]
        found: dict[Cell, list[Point]] = {}
        for point in sorted(
            self.counted, key=lambda point: [o[v] for o, v in zip(order, self.cell(point), strict=True)]
        ):
            found.setdefault(self.cell(point), []).append(point)
        return found

    def values(self, measure: str) -> Values:
        """``{(cell, seed): value}``; see :func:`measured`."""
        found = {(self.cell(point), point.seed): measured(point, measure) for point in self.counted}
        return {key: value for key, value in found.items() if value is not None}

    def title(self, cell: Cell) -> str:
        """A configuration's name in plots."""
        return ", ".join(cell) or self.name


def measured(point: Point, measure: str) -> float | None:
    """A figure of a finished point; an error is 1 − the accuracy. None where it has none."""
    if "/error" in measure:
        return 1 - point.result[measure.replace("error", "acc")]
    value = point.result.get(measure)
    return value if isinstance(value, int | float) else None


def tabulate(folders: Sequence[Path]) -> Table:
    """Read one study, or two to compare.

    Raises:
        UserError: no study, nothing finished, or two studies without a configuration in common.
    """
    read = [read_study(folder) for folder in folders]
    names = [study.root.resolve().name for study, _ in read]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    points = [point for _, found in read for point in found]
    axes = list(dict.fromkeys(key for study, _ in read for key in study.axes))
    factors, common = factors_of(points, axes)
    differences: list[str] = []
    if len(read) > 1:
        for name, (_, found) in zip(names, read, strict=True):
            for point in found:
                point.settings[STUDY_FACTOR] = name
        varied, factors = factors, [Factor(STUDY_FACTOR, names)]
        for factor in varied:
            sides = [list(dict.fromkeys(point.settings[factor.key] for point in found)) for _, found in read]
            if all(len(levels) == 1 for levels in sides):  # what makes the one study differ from the other
                differences.append(f"{factor.key} ({' against '.join(side[0] for side in sides)})")
            else:
                factors.append(factor)
    commands = [command["command"] for study, _ in read for command in study.commands]
    table = Table(" and ".join(names), factors, points, common, commands, [])
    leave_out_doubles(table)
    table.points.sort(key=lambda point: bool(point.excluded))
    table.notes = notes(table)
    if differences:
        table.notes.insert(0, f"the studies differ in {', '.join(differences)}")
    if not table.counted:
        reasons = "; ".join(dict.fromkeys(point.excluded for point in table.points))
        raise UserError(f"{table.name} has no finished point yet ({reasons}).")
    if len(read) > 1:
        sides = [{cell[1:] for cell in table.cells() if cell[0] == name} for name in names]
        if not sides[0] & sides[1]:
            raise UserError(
                f"{names[0]} and {names[1]} have no finished configuration in common; nothing can be compared."
            )
    return table


def leave_out_doubles(table: Table) -> None:
    """Of finished points with the same levels and seed, only the latest counts.

    They are there when a configuration got a new key since: other identities, the same settings.
    """
    latest: dict[tuple[Cell, int | str], Point] = {}
    for point in table.counted:
        key = (table.cell(point), point.seed)
        older = latest.get(key)
        if older is not None and _time(older) > _time(point):
            older, point = point, older
        if older is not None:
            older.excluded = f"made anew since, with other settings: {point.folder.name}"
        latest[key] = point


def _time(point: Point) -> float:
    return (point.folder / "result.json").stat().st_mtime


def notes(table: Table) -> list[str]:
    """What mixes in the points that count, and which combinations of levels no point has."""
    found = []
    sources = {
        "copies of the data": lambda result: result.get("data", {}).get("source"),
        "commits of the code": lambda result: result.get("git_commit"),
        "versions": lambda result: versions(result),
        "devices": lambda result: result.get("device"),
        "precisions": lambda result: result.get("precision"),
    }
    for what, get in sources.items():
        values = list(dict.fromkeys(str(get(point.result)) for point in table.counted))
        if len(values) > 1:
            found.append(f"mixed {what}: {'; '.join(values)}")
    dirty = [point for point in table.counted if str(point.result.get("git_commit")).endswith("-dirty")]
    if dirty:
        found.append(f"{len(dirty)} points ran from a checkout with changes that no commit has")
    present = {table.cell(point) for point in table.points}
    absent = [cell for cell in itertools.product(*(factor.levels for factor in table.factors)) if cell not in present]
    if absent:
        listed = "; ".join(table.title(cell) for cell in absent[:6]) + ("; …" if len(absent) > 6 else "")
        found.append(f"the axes do not cross: {len(absent)} combinations have no point ({listed})")
    lengths = {point.result["epochs"] for point in table.counted}
    if len(lengths) > 1 and target_of(table) is None and "trainer.max_epochs" not in {f.key for f in table.factors}:
        found.append(f"runs of different lengths: {', '.join(map(str, sorted(lengths)))} epochs")
    return found


def versions(result: dict[str, Any]) -> str:
    """Versions of Python and the packages of a run, as one line."""
    return ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())


# --- epochs to a training error -------------------------------------------------------------------------------------


def target_of(table: Table) -> float | None:
    """The training error that the study's points stop at; None where they do not."""
    found = {_target(point) for point in table.counted}
    return found.pop() if len(found) == 1 else None


def _target(point: Point) -> float | None:
    callbacks = point.config.get("callbacks") or {}
    for callback in callbacks.values():
        if isinstance(callback, dict) and callback.get("_target_") == STOP:
            return callback.get("error", 0.25)
    return None


@dataclass(frozen=True)
class Reached:
    """Epochs to the target; where it was not reached, the epochs that were not enough."""

    epochs: float
    reached: bool


def reached(point: Point, target: float) -> Reached | None:
    """When a point's training error fell to ``target``; None without metrics.csv."""
    try:
        errors = read_curves(point.folder)["train/error"]
    except (UserError, KeyError, ValueError, IndexError):
        return None
    guessing = 1 - 1 / int(point.config["model"]["num_classes"])
    epochs = epochs_to(errors, target, start=guessing)
    return Reached(len(errors), False) if epochs is None else Reached(epochs, True)
