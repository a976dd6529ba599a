"""Study report: Markdown with intervals and paired effects beside published results, a CSV file, and plots."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from alexnet_pl.runtime.errors import UserError, csv_safe
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.studies.ladder import climbs, ladder_figure, ladder_table, remarks
from alexnet_pl.studies.markdown import render, text_table
from alexnet_pl.studies.plots import curves_figure, results_figure
from alexnet_pl.studies.robustness import robustness, robustness_figure
from alexnet_pl.studies.statistics import Effect, Estimate, estimate, interaction, main_effect
from alexnet_pl.studies.table import (
    METRIC_KEYS,
    VIEWS,
    Factor,
    Reached,
    Table,
    Trial,
    epochs_to_target,
    measured,
    tabulate,
    target_of,
    versions,
)


@dataclass(frozen=True)
class Published:
    """A published effect of ``level`` instead of ``base``: points of top-1 / top-5 error, or a ratio of epochs."""

    factor: str
    base: str
    level: str
    effect: str
    source: str
    is_ratio: bool = False


PAPER = "Krizhevsky et al. 2012"

PUBLISHED = (
    Published("model/norm", "none", "lrn", "−1.4 / −1.2", f"ImageNet, {PAPER}, section 3.3; on CIFAR-10 13% → 11%"),
    Published("model/norm", "none", "lrn_cifar", "−2 / –", f"CIFAR-10, {PAPER}, section 3.3: 13% → 11%"),
    Published("model/pool", "non_overlapping", "overlapping", "−0.4 / −0.3", f"ImageNet, {PAPER}, section 3.4"),
    Published("augment", "crop_flip", "crop_flip_color", "more than −1 / –", f"ImageNet, {PAPER}, section 4.1"),
    Published("data.test_crops", "1", "10", "−1.5 / −1.3", f"ILSVRC-2010, {PAPER}, section 6: 39.0/18.3 → 37.5/17.0"),
    Published("model/activation", "relu", "tanh", "about 6", f"CIFAR-10, {PAPER}, figure 1", is_ratio=True),
)  # fmt: skip


# --- numbers as text ------------------------------------------------------------------------------------------------


def percent(value: Estimate | None, signed: bool = False) -> Markup:
    """Return ``71.20 ± 0.31 [70.43, 71.97]``, in percent or points; without deviation and interval for n = 1."""
    if value is None:
        return Markup("–")
    return _with_interval(value, scale=100, sign="+" if signed else "")


def _with_interval(value: Estimate, scale: float = 1, sign: str = "") -> Markup:
    text = f"{scale * value.mean:{sign}.2f}"
    if value.std is not None and not sign:
        text += f" ± {scale * value.std:.2f}"
    if value.low is not None and value.high is not None:
        text += f" [{scale * value.low:{sign}.2f}, {scale * value.high:{sign}.2f}]"
    return Markup(text.replace("-", "−"))


# --- tables ---------------------------------------------------------------------------------------------------------


def accuracies(table: Table) -> pd.DataFrame:
    """Return accuracy and error over seeds, one row per configuration; averaged test views if all runs have them."""
    measures = {
        "validation accuracy": "val/acc",
        "validation error": "val/error",
        "test accuracy": "test/acc",
        "test error": "test/error",
    }
    for measure, words in VIEWS.items():
        if all(measured(trial, measure) is not None for trial in table.counted):
            measures[f"test accuracy, {words}"] = measure
    rows = []
    for cell, trials in table.cells().items():
        means = [percent(_estimate(trials, measure)) for measure in measures.values()]
        rows.append([*cell, len(trials), *means])
    return text_table(rows, [*_heads(table), "n", *measures])


def costs(table: Table) -> pd.DataFrame:
    """Return top-5 error, size, length and time, one row per configuration."""
    rows = []
    for cell, trials in table.cells().items():
        seconds = statistics.mean(trial.result["seconds"] for trial in trials)
        parameters = " or ".join(dict.fromkeys(f"{trial.result['parameters']:,}" for trial in trials))
        epochs = " or ".join(map(str, sorted({trial.result["epochs"] for trial in trials})))
        best = ", ".join(str(trial.result.get("best_epoch", "?")) for trial in trials)
        top5 = percent(_estimate(trials, "test/error_top5"))
        rows.append([*cell, top5, parameters, epochs, best, f"{seconds:,.0f} s"])
    heads = ["test top-5 error", "parameters", "epochs", "best epoch", "time per run"]
    return text_table(rows, [*_heads(table), *heads])


def _estimate(trials: Sequence[Trial], measure: str) -> Estimate:
    return estimate(value for trial in trials if (value := measured(trial, measure)) is not None)


def _heads(table: Table) -> list[str]:
    return [factor.name for factor in table.factors]


def configurations(table: Table) -> str:
    """Return accuracies and costs as aligned text for a terminal."""
    return "\n\n".join(frame.to_string(index=False) for frame in (accuracies(table), costs(table)))


def pairs(factor: Factor) -> list[tuple[str, str]]:
    """Return ``(base, level)`` for every two levels of a factor, in the direction that a paper reports if one does."""
    plain = ("none", "False", "0", "0.0", "null", "None")
    found = []
    for base, level in itertools.combinations(factor.levels, 2):
        known = [(entry.base, entry.level) for entry in PUBLISHED if entry.factor == factor.key]
        is_turned = (level, base) in known or (level in plain and base not in plain)
        found.append((level, base) if is_turned else (base, level))
    return found


def published(factor: Factor, base: str, level: str, is_ratio: bool = False) -> str:
    """Return the published value of an effect and its source, or –."""
    keys, levels, bases = factor.key.split(" + "), level.split(", "), base.split(", ")
    for entry in PUBLISHED:
        if entry.is_ratio == is_ratio and entry.factor in keys and len(levels) == len(bases) == len(keys):
            place = keys.index(entry.factor)
            if (levels[place], bases[place]) == (entry.level, entry.base):
                return f"{entry.effect} ({entry.source})"
    return "–"


EFFECT_MEASURES = {
    "validation error": "val/error",
    "test error": "test/error",
    "test top-5 error": "test/error_top5",
}


def effects(table: Table) -> tuple[pd.DataFrame | None, list[str]]:
    """Return main effects as paired differences (None if there are none), and the seeds left out of them."""
    values = [table.values(measure) for measure in EFFECT_MEASURES.values()]
    rows, left_out = [], []
    for factor in table.factors:
        for base, level in pairs(factor):
            found = [main_effect(series, factor.key, base, level) for series in values]
            name = f"{level} instead of {base}" + (f" ({factor.name})" if factor.name not in (level, base) else "")
            rows.append([name, *_effect_cells(found), published(factor, base, level)])
            left_out += _left_out(name, found[0])
    return _frame(rows, ["effect", "n", *EFFECT_MEASURES, "published (top-1 / top-5 error)"]), left_out


def interactions(table: Table) -> tuple[pd.DataFrame | None, list[str]]:
    """Return two-way interactions, paired likewise (None if no two factors cross), and the seeds left out of them."""
    values = [table.values(measure) for measure in EFFECT_MEASURES.values()]
    rows, left_out = [], []
    for one, other in itertools.combinations(table.factors, 2):
        for (base, level), (other_base, other_level) in itertools.product(pairs(one), pairs(other)):
            keys, bases, levels = (one.key, other.key), (base, other_base), (level, other_level)
            found = [interaction(series, keys, bases, levels) for series in values]
            if found[0].estimate is None and not found[0].cells:
                continue  # the two factors do not cross
            name = f"({level} instead of {base}), with {other_level} instead of {other_base}"
            rows.append([name, *_effect_cells(found)])
            left_out += _left_out(name, found[0])
    return _frame(rows, ["interaction", "n", *EFFECT_MEASURES]), left_out


def _frame(rows: list[list[Any]], heads: list[str]) -> pd.DataFrame | None:
    return text_table(rows, heads) if rows else None


def _effect_cells(found: Sequence[Effect]) -> list[Any]:
    n = found[0].estimate.n if found[0].estimate else 0
    return [n, *(percent(effect.estimate, signed=True) for effect in found)]


def _left_out(name: str, effect: Effect) -> list[str]:
    if not effect.left_out:
        return []
    seeds = ", ".join(map(str, effect.left_out))
    return [f"{name}: left out seed{'s' * (len(effect.left_out) > 1)} {seeds}, of which a run is missing"]


@dataclass(frozen=True)
class Speed:
    """Tables of the epochs to the training error ``target`` (as text) at which the trials stop, and of their ratios."""

    target: str
    epochs: pd.DataFrame
    ratios: pd.DataFrame | None


def speed(table: Table) -> Speed | None:
    """Return epochs to the training error at which the trials stop, or None if they do not stop at one.

    Ratios are geometric means of ratios between runs of equal seeds. If a configuration did not always reach the
    target, the last epoch is a lower bound, and so is the mean.
    """
    target = target_of(table)
    if target is None:
        return None
    found = {id(trial): epochs_to_target(trial, target) for trial in table.counted}
    rows = []
    for cell, trials in table.cells().items():
        if known := [value for trial in trials if (value := found[id(trial)]) is not None]:
            hits = sum(value.reached for value in known)
            rows.append([*cell, len(known), f"{hits} of {len(known)}", _epochs_text(known)])
    epochs = text_table(rows, [*_heads(table), "n", "reached", f"epochs to {target:.0%} training error"])

    def log_epochs(trial: Trial) -> float | None:
        value = found[id(trial)]
        return math.log(value.epochs) if value is not None and value.epochs > 0 else None

    logs, ratios = table.values(log_epochs), []
    for place, factor in enumerate(table.factors):
        short = {
            table.cell(trial)[place]
            for trial in table.counted
            if (value := found[id(trial)]) is not None and not value.reached
        }
        for base, level in pairs(factor):
            effect = main_effect(logs, factor.key, base, level)
            if effect.estimate is not None:
                ratio = effect.estimate.transformed(math.exp)
                text = _ratio_text(ratio, base, level, short)
                ratios.append([f"{level} to {base}", ratio.n, text, published(factor, base, level, is_ratio=True)])
    heads = ["ratio of epochs", "n", "geometric mean over seeds", "published"]
    return Speed(f"{target:.0%}", epochs, _frame(ratios, heads))


def _epochs_text(known: Sequence[Reached]) -> str:
    mean, short = estimate(value.epochs for value in known), [value.epochs for value in known if not value.reached]
    if not short:
        return _with_interval(mean)
    return f"more than {mean.mean:.2f}: {len(short)} of {len(known)} not within {max(short):.0f} epochs"


def _ratio_text(ratio: Estimate, base: str, level: str, short: set[str]) -> str:
    """Return a ratio, or a bound if the levels ``short`` did not always reach the target."""
    if base in short and level in short:
        return "unknown: neither always reached it"
    if level in short:
        return f"more than {ratio.mean:.2f}: {level} did not always reach it"
    if base in short:
        return f"less than {ratio.mean:.2f}: {base} did not always reach it"
    return _with_interval(ratio)


# --- the report -----------------------------------------------------------------------------------------------------


def report(table: Table) -> str:
    """Return the report as Markdown. It shows ``results.png`` and ``curves.png`` from its own directory."""
    ladder = ladders(table)
    main, main_left_out = effects(table) if not ladder else (None, [])
    crossed, crossed_left_out = interactions(table)
    rows = [[trial.run_dir.name, *table.cell(trial), trial.seed, trial.excluded] for trial in table.trials]
    return render(
        "report.md.j2",
        name=table.name,
        counted=len(table.counted),
        total=len(table.trials),
        seeds=", ".join(sorted({str(trial.seed) for trial in table.counted}, key=lambda seed: (len(seed), seed))),
        notes=[*table.notes, *remarks(table)],
        ladder=ladder,
        accuracies=accuracies(table),
        costs=costs(table),
        speed=speed(table),
        robustness=corruption_errors(table),
        effects=main,
        interactions=crossed,
        left_out=[*main_left_out, *crossed_left_out],
        excluded=_frame([row for row in rows if row[-1]], ["run directory", *_heads(table), "seed", "reason"]),
        commands=table.commands,
        provenance=provenance(table),
    )


def ladders(table: Table) -> list[pd.DataFrame]:
    """Return the climbs of a ladder as text; none if the study is not one. Steps take the place of pairwise effects."""
    frames = [ladder_table(table, order) for order in climbs(table)]
    return [
        text_table(
            [[rung, n, percent(accuracy), _step(step, n), *rest]
             for rung, n, accuracy, step, *rest in frame.itertuples(index=False)],
            [*frame.columns],
        )
        for frame in frames
    ]  # fmt: skip


def _step(step: Estimate | None, n: int) -> Markup:
    """Return a step as text, with its own number of seeds if some of the rung's are not among them."""
    text = percent(step, signed=True)
    return text if step is None or step.n == n else text + Markup(f" (n = {step.n})")


def corruption_errors(table: Table) -> pd.DataFrame | None:
    """Return the test error by severity, one row per configuration that was evaluated under corruptions."""
    rows = [[*cell, curve[0].n, *map(percent, curve)] for cell, curve in robustness(table).items()]
    return _frame(rows, [*_heads(table), "n", "no corruption", *(f"severity {level}" for level in range(1, 6))])


def provenance(table: Table) -> dict[str, str]:
    """Return settings, data, hardware and versions of the trials that count."""

    def distinct(take: Callable[[Trial], Any]) -> str:
        return "; ".join(dict.fromkeys(str(take(trial)) for trial in table.counted))

    def data(trial: Trial) -> str:
        train, val, test = (trial.data(split, 0) for split in ("train", "val", "test"))
        return f"{trial.data('source')} ({train:,} train, {val:,} validation, {test:,} test images)"

    common = ", ".join(f"{key}={value}" for key, value in table.common.items() if value)
    hours = sum(trial.result["seconds"] for trial in table.counted) / 3600
    return {
        "in common": common or "the defaults",
        "data": distinct(data),
        "split seed": distinct(lambda trial: trial.result.get("split_seed")),
        "hardware": distinct(lambda trial: trial.result.get("device")),
        "precision": distinct(lambda trial: trial.result.get("precision")),
        "versions": distinct(versions),
        "commit": distinct(lambda trial: trial.result.get("git_commit")),
        "time": f"{hours:.2f} hours of training and validation in all",
    }


RESULT_COLUMNS = ("best_epoch", "epochs", "seconds", "images_per_second", "parameters", "device", "precision",
                  "git_commit")  # fmt: skip


def results_frame(table: Table) -> pd.DataFrame:
    """Return one row per trial, excluded ones included. Text is safe to open in a spreadsheet."""
    target, rows = target_of(table), []
    for trial in table.trials:
        is_counted = not trial.excluded
        row: dict[str, Any] = {"run_dir": str(trial.run_dir), "config_hash": trial.config_hash, "counts": is_counted}
        row |= {factor.key: trial.settings[factor.key] for factor in table.factors} | {"seed": trial.seed}
        row |= {"reason": trial.excluded}
        if is_counted:
            row |= {name: trial.result[name] for name in METRIC_KEYS}
            row |= {f"{split}/error": measured(trial, f"{split}/error") for split in ("val", "test")}
            row |= {name: value for name in VIEWS if (value := measured(trial, name)) is not None}
            row |= {name: trial.result.get(name) for name in RESULT_COLUMNS}
            row |= {"data_source": trial.data("source")}
            if target is not None and (when := epochs_to_target(trial, target)) is not None:
                row |= {"epochs_to_target": when.epochs, "reached_target": when.reached}
        rows.append(_csv_safe(row))
    return pd.DataFrame(rows)


def _csv_safe(row: Mapping[str, Any]) -> dict[str, Any]:
    return {csv_safe(key): value if _is_number(value) else csv_safe(str(value)) for key, value in row.items()}


def _is_number(value: Any) -> bool:
    try:
        return value is None or math.isfinite(float(value))  # "-1" too, which no spreadsheet runs
    except (TypeError, ValueError):
        return False


def write_report(roots: Sequence[Path], out: Path) -> Table:
    """Write report.md, results.csv, results.{png,svg} and curves.{png,svg} into ``out``.

    Raises:
        UserError: nothing to report, or ``out`` cannot be written.
    """
    table = tabulate(roots)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "results.csv", results_frame(table).to_csv(index=False))
        figures = {"results": results_figure(table), "curves": curves_figure(table)}
        if climbs(table):
            figures["ladder"] = ladder_figure(table)
        if damaged := robustness(table):
            figures["corruptions"] = robustness_figure(table, damaged)
        for name, figure in figures.items():
            for kind in ("png", "svg"):
                figure.savefig(out / f"{name}.{kind}", dpi=130)
        write_atomic(out / "report.md", report(table))
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written ({error.strerror}). Give another directory: --out DIR"
        ) from error
    return table
