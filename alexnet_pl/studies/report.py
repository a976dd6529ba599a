"""studies.report."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alexnet_pl.runtime.errors import UserError
from alexnet_pl.studies.statistics import Effect, Estimate, estimate, interaction, main_effect
from alexnet_pl.studies.table import FIGURES, Factor, Table, measured, reached, tabulate, target_of, versions


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
    from alexnet_pl.studies.plots import curves_figure, results_figure

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
