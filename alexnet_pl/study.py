"""What a study has found: tables with intervals, paired effects, plots, and what is missing.

``python -m alexnet_pl.study FOLDER [FOLDER]`` reads the folders that ``train.py -m study=NAME`` made; a study that ends
does it by itself. Nothing here trains or waits for torch.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from alexnet_pl.effects import Cell, Effect, Estimate, Values, epochs_to, estimate, interaction, main_effect
from alexnet_pl.errors import UserError, one_line_errors
from alexnet_pl.figures import read_curves
from alexnet_pl.points import STUDY, Study, read_point

NOT_FACTORS = ("study", "seed", "data.root", "resume", "resume_with_changes", "hydra", "logger", "callbacks.dashboard",
               "callbacks.resume", "callbacks.finite")  # fmt: skip
"""Keys, and all below them, that may differ between points without being what the study is about."""

FIGURES = ("val/acc", "val/acc_top5", "val/loss", "test/acc", "test/acc_top5", "test/loss")
STOP = "alexnet_pl.callbacks.StopAtTrainingError"
STUDY_FACTOR = "study"


@dataclass(frozen=True)
class Published:
    """What a paper reports of ``level`` instead of ``base``: points of top-1 / top-5 error, or a ratio of epochs."""

    factor: str
    base: str
    level: str
    effect: str
    source: str
    is_ratio: bool = False


PAPER = "Krizhevsky et al. 2012"
PUBLISHED = (
    Published("model/norm", "none", "lrn", "−1.4 / −1.2", f"ImageNet, {PAPER}, section 3.3; on CIFAR-10 13% → 11%"),
    Published("model/pool", "non_overlapping", "overlapping", "−0.4 / −0.3", f"ImageNet, {PAPER}, section 3.4"),
    Published("augment", "crop_flip", "crop_flip_color", "more than −1 / –", f"ImageNet, {PAPER}, section 4.1"),
    Published("views", "1", "10", "−1.5 / −1.3", f"ILSVRC-2010, {PAPER}, section 6: 39.0 / 18.3 → 37.5 / 17.0"),
    Published("model/activation", "relu", "tanh", "about 6", f"CIFAR-10, {PAPER}, figure 1", is_ratio=True),
)  # fmt: skip


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
        identity: see :func:`alexnet_pl.points.identity`.
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
    state, point.result = study.state(name), read_point(folder)
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


# --- tables ---------------------------------------------------------------------------------------------------------


def percent(value: Estimate | None, signed: bool = False) -> str:
    """``71.20 ± 0.31 [70.43, 71.97]``, in percent or points; without an interval for n = 1."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    text = f"{100 * value.mean:{sign}.2f}"
    if value.std is not None and not signed:
        text += f" ± {100 * value.std:.2f}"
    if value.low is not None and value.high is not None:
        text += f" [{100 * value.low:{sign}.2f}, {100 * value.high:{sign}.2f}]"
    return text.replace("-", "−")


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; what a cell holds cannot break it."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def configurations(table: Table) -> str:
    """Means over seeds, a row a configuration."""
    rows, cost = [], []
    for cell, points in table.cells().items():
        means = [
            percent(estimate([measured(point, name) for point in points]))
            for name in ("val/acc", "val/error", "test/acc", "test/error")
        ]
        rows.append([*cell, len(points), *means])
        top5 = percent(estimate([measured(point, "test/error_top5") for point in points]))
        seconds = statistics.mean(point.result["seconds"] for point in points)
        parameters = " or ".join(dict.fromkeys(f"{point.result['parameters']:,}" for point in points))
        epochs = " or ".join(map(str, sorted({point.result["epochs"] for point in points})))
        best = ", ".join(str(point.result.get("best_epoch", "?")) for point in points)
        cost.append([*cell, top5, parameters, epochs, best, f"{seconds:,.0f} s"])
    heads = [factor.name for factor in table.factors]
    first = markdown([*heads, "n", "validation accuracy", "validation error", "test accuracy", "test error"], rows)
    second = markdown([*heads, "test top-5 error", "parameters", "epochs", "best epoch", "time a run"], cost)
    return f"{first}\n\n{second}"


def pairs(factor: Factor) -> list[tuple[str, str]]:
    """``(base, level)`` for every two levels of a factor, the way round that a paper reports where one does."""
    plain = ("none", "False", "0", "0.0", "null", "None")
    found = []
    for base, level in itertools.combinations(factor.levels, 2):
        known = [(entry.base, entry.level) for entry in PUBLISHED if entry.factor == factor.key]
        turned = (level, base) in known or (level in plain and base not in plain)
        found.append((level, base) if turned else (base, level))
    return found


def published(factor: Factor, base: str, level: str, is_ratio: bool = False) -> str:
    """What a paper reports for an effect; – where there is nothing."""
    for entry in PUBLISHED:
        if entry.is_ratio != is_ratio:
            continue
        keys, levels, bases = factor.key.split(" + "), level.split(", "), base.split(", ")
        if entry.factor in keys:
            place = keys.index(entry.factor)
            if len(levels) == len(bases) == len(keys) and (levels[place], bases[place]) == (entry.level, entry.base):
                return f"{entry.effect} ({entry.source})"
    return "–"


EFFECT_MEASURES = ("val/error", "test/error", "test/error_top5")
EFFECT_HEADS = ("validation error", "test error", "test top-5 error")


def effects(table: Table) -> tuple[str, list[str]]:
    """Main effects as differences between runs of equal seeds, and what is left out of them."""
    by_measure = {measure: table.values(measure) for measure in EFFECT_MEASURES}
    rows, left_out = [], []
    for place, factor in enumerate(table.factors):
        for base, level in pairs(factor):
            found = [main_effect(values, place, base, level) for values in by_measure.values()]
            name = f"{level} instead of {base}" + (f" ({factor.name})" if factor.name not in (level, base) else "")
            rows.append([name, *_shown(found), published(factor, base, level)])
            left_out += _left_out(name, found[0])
    head = ["effect", "n", *EFFECT_HEADS, "published (top-1 / top-5 error)"]
    return markdown(head, rows) if rows else "", left_out


def interactions(table: Table) -> tuple[str, list[str]]:
    """Two-way interactions, paired likewise."""
    by_measure = {measure: table.values(measure) for measure in EFFECT_MEASURES}
    rows, left_out = [], []
    for (i, one), (j, other) in itertools.combinations(enumerate(table.factors), 2):
        for (base, level), (other_base, other_level) in itertools.product(pairs(one), pairs(other)):
            found = [
                interaction(values, (i, j), (base, other_base), (level, other_level)) for values in by_measure.values()
            ]
            if found[0].estimate is None and not found[0].cells:
                continue  # the two do not cross
            name = f"({level} instead of {base}), with {other_level} instead of {other_base}"
            rows.append([name, *_shown(found)])
            left_out += _left_out(name, found[0])
    return markdown(["interaction", "n", *EFFECT_HEADS], rows) if rows else "", left_out


def _shown(found: Sequence[Effect]) -> list[str]:
    n = found[0].estimate.n if found[0].estimate else 0
    return [str(n), *(percent(effect.estimate, signed=True) for effect in found)]


def _left_out(name: str, effect: Effect) -> list[str]:
    if not effect.left_out:
        return []
    seeds = ", ".join(map(str, effect.left_out))
    many = len(effect.left_out) > 1
    return [f"{name}: left out seed{'s' * many} {seeds}, of which a run is missing"]


def times(table: Table, target: float) -> str:
    """Epochs to the training error that the points stop at, and their ratios, paired by seed."""
    found = {(table.cell(point), point.seed): reached(point, target) for point in table.counted}
    known = {key: value for key, value in found.items() if value is not None}
    rows = []
    for cell in table.cells():
        values = [value for (other, _), value in known.items() if other == cell]
        if not values:
            continue
        mean, hits = estimate([value.epochs for value in values]), sum(value.reached for value in values)
        if hits == len(values):
            text = f"{mean.mean:.2f}" + (
                f" ± {mean.std:.2f} [{mean.low:.2f}, {mean.high:.2f}]" if mean.std is not None else ""
            )
        else:
            short = [value.epochs for value in values if not value.reached]
            text = f"more than {mean.mean:.2f}: {len(short)} of {len(values)} not within {max(short):.0f} epochs"
        rows.append([*cell, len(values), f"{hits} of {len(values)}", text])
    lines = [
        markdown(
            [*(factor.name for factor in table.factors), "n", "reached", f"epochs to {target:.0%} training error"], rows
        )
    ]
    ratios = []
    logs = {key: math.log(value.epochs) for key, value in known.items() if value.epochs > 0}
    for place, factor in enumerate(table.factors):
        for base, level in pairs(factor):
            effect = main_effect(logs, place, base, level)
            if effect.estimate is None:
                continue
            ratio = effect.estimate.transformed(math.exp)
            short = {key[0][place] for key, value in known.items() if not value.reached} & {base, level}
            if not short:
                text = f"{ratio.mean:.2f}" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.low is not None else "")
            elif short == {level}:
                text = f"more than {ratio.mean:.2f}: {level} did not always get there"
            elif short == {base}:
                text = f"less than {ratio.mean:.2f}: {base} did not always get there"
            else:
                text = "unknown: neither always got there"
            ratios.append([f"{level} to {base}", ratio.n, text, published(factor, base, level, is_ratio=True)])
    if ratios:
        lines.append(markdown(["ratio of epochs", "n", "geometric mean over seeds", "published"], ratios))
    lines.append(
        "Training error is the mean over an epoch's batches while the network learns; between two epochs it is taken "
        "to be linear. A ratio's interval is that of the logarithms' differences between runs of equal seeds."
    )
    return "\n\n".join(lines)


# --- the report -----------------------------------------------------------------------------------------------------


def report(table: Table) -> str:
    """The whole report as Markdown. It shows ``results.png`` and ``curves.png`` beside it."""
    target = target_of(table)
    counted, excluded = table.counted, [point for point in table.points if point.excluded]
    parts = [f"# Study {table.name}"]
    seeds = sorted({str(point.seed) for point in counted})
    parts.append(
        f"{len(counted)} of {len(table.points)} points, seeds {', '.join(seeds)}. Accuracies and errors are in "
        "percent: mean over seeds ± sample standard deviation [95% t-interval of the mean]; one seed has neither. "
        "Validation figures are those of the best epoch, which they chose; test figures were read once, there."
    )
    if table.notes:
        parts.append("\n".join(f"- **Note:** {note}." for note in table.notes))
    parts += ["## Configurations", configurations(table), "![Test error by configuration](results.png)"]
    if target is not None:
        parts += [f"## Epochs to {target:.0%} training error", times(table, target)]
    text, left_out = effects(table)
    if text:
        parts += [
            "## Effects",
            "Points of error, as differences between runs of equal seeds: for each seed the mean over the other "
            "factors, then mean and 95% t-interval over seeds. Below zero is better. The intervals are not adjusted "
            "for their number."
            + (" These runs stopped at a training error, at different epochs." if target is not None else ""),
            text,
        ]
    more, more_left_out = interactions(table)
    if more:
        parts += [
            "## Interactions",
            "By how much the first effect is larger in the second case, in points of error.",
            more,
        ]
    if left_out or more_left_out:
        parts.append("\n".join(f"- {line}" for line in [*left_out, *more_left_out]))
    parts += ["## Learning curves", "Mean over seeds, in a band of one sample standard deviation."]
    parts += ["![Learning curves](curves.png)", "## Points that do not count"]
    rows = [[point.folder.name, *table.cell(point), point.seed, point.excluded] for point in excluded]
    heads = ["folder", *(factor.name for factor in table.factors), "seed", "why"]
    parts.append(markdown(heads, rows) if rows else "None: every point has finished.")
    parts += ["## How it was made", provenance(table)]
    return "\n\n".join(parts) + "\n"


def provenance(table: Table) -> str:
    """Commands, settings, data, hardware and versions."""
    results = [point.result for point in table.counted]

    def distinct(values: Sequence[Any]) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values))

    data = distinct([
        f"{result.get('data', {}).get('source')} ({result.get('data', {}).get('train', 0):,} train, "
        f"{result.get('data', {}).get('val', 0):,} validation, {result.get('data', {}).get('test', 0):,} test images)"
        for result in results
    ])  # fmt: skip
    lines = [
        *(f"- command: `{command}`" for command in table.commands),
        f"- in common: {', '.join(f'{key}={value}' for key, value in table.common.items() if value) or 'the defaults'}",
        f"- data: {data}",
        f"- split seed: {distinct([result.get('split_seed') for result in results])}",
        f"- hardware: {distinct([result.get('device') for result in results])}",
        f"- precision: {distinct([result.get('precision') for result in results])}",
        f"- versions: {distinct([versions(result) for result in results])}",
        f"- commit: {distinct([result.get('git_commit') for result in results])}",
        f"- time: {sum(result['seconds'] for result in results) / 3600:.2f} hours of training and validation in all",
    ]
    return "\n".join(lines)


def frame(table: Table) -> pd.DataFrame:
    """A row a point, those that do not count included."""
    target, rows = target_of(table), []
    for point in table.points:
        counts = not point.excluded
        row: dict[str, Any] = {"folder": str(point.folder), "identity": point.identity, "counts": counts}
        row |= {factor.key: point.settings[factor.key] for factor in table.factors} | {"seed": point.seed}
        row |= {"why_not": point.excluded}
        if counts:
            row |= {name: point.result[name] for name in FIGURES}
            row |= {f"{split}/error": measured(point, f"{split}/error") for split in ("val", "test")}
            names = (
                "best_epoch",
                "epochs",
                "seconds",
                "images_per_second",
                "parameters",
                "device",
                "precision",
                "git_commit",
            )
            row |= {name: point.result.get(name) for name in names}
            row |= {"data": point.result.get("data", {}).get("source")}
            if target is not None and (when := reached(point, target)) is not None:
                row |= {"epochs_to_target": when.epochs, "reached_target": when.reached}
        rows.append(row)
    return pd.DataFrame(rows)


def write_report(folders: Sequence[Path], out: Path) -> Table:
    """Write report.md, results.csv, results.{png,svg} and curves.{png,svg} into ``out``.

    Raises:
        UserError: nothing to report, or ``out`` cannot be written.
    """
    from alexnet_pl.study_figures import curves_figure, results_figure

    table = tabulate(folders)
    try:
        out.mkdir(parents=True, exist_ok=True)
        frame(table).to_csv(out / "results.csv", index=False)
        for name, figure in (("results", results_figure(table)), ("curves", curves_figure(table))):
            for kind in ("png", "svg"):
                figure.savefig(out / f"{name}.{kind}", dpi=130)
        (out / "report.md").write_text(report(table))
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written ({error.strerror}). Give another folder: --out"
        ) from error
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl.study",
        description="Write report.md, results.csv and plots of a study, or of two and the difference between them.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of a study, such as multirun/norm_x_pool"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: the study's; of two: A_B in the working folder"
    )
    given = parser.parse_args(arguments)
    if len(given.folders) > 2:
        parser.error("give one study, or two to compare")
    if len(given.folders) == 2 and given.folders[0].resolve() == given.folders[1].resolve():
        parser.error("give two different studies")
    out = given.out or given.folders[0]
    if given.out is None and len(given.folders) == 2:
        out = Path("_".join(folder.resolve().name for folder in given.folders))
    table = write_report(given.folders, out)
    print(configurations(table))
    print(f"\n{len(table.counted)} of {len(table.points)} points; {out / 'report.md'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
