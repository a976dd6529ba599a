"""Ladder of a study over the group ``rung``: what each rung adds to the one before it, in accuracy, size and time."""

import statistics
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
from matplotlib.figure import Figure

from alexnet_pl.figures.charts import COLORS
from alexnet_pl.studies.markdown import text_table
from alexnet_pl.studies.statistics import Effect, Estimate, estimate, main_effect
from alexnet_pl.studies.table import VIEWS, Table, Trial, measured

RUNG = "rung"
"""Config group of the rungs, ``conf/rung``."""

ORDER = (
    "tutorial", "schedule", "crop_flip", "norm_everywhere", "full_resolution", "width", "label_smoothing", "cutout",
    "optimizer", "ema", "whitening", "gelu", "alternating_flip", "batch_size", "late_pooling", "regularization",
)  # fmt: skip
"""Rungs from the lowest to the highest; each inherits from the one before it."""

OTHER_ORDER = (
    "tutorial", "plateau_norm_everywhere", "plateau_full_resolution", "unaugmented_full_resolution", "full_resolution",
)  # fmt: skip
"""Rungs in the order of the second climb, which begins and ends on the first one and takes the same four steps."""


def climbs(table: Table) -> list[list[str]]:
    """Return the rungs that have runs, from low to high, for the first climb and, if it is complete, for the second.

    Rungs of the user's own come last. Empty if the study is no ladder: something else than the rung varies, or nothing
    does.
    """
    if [factor.key for factor in table.factors] != [RUNG]:
        return []
    present = [rung for (rung,) in table.cells()]
    apart = set(OTHER_ORDER[1:-1])
    first = [rung for rung in (*ORDER, *(rung for rung in present if rung not in ORDER)) if rung in present]
    second = list(OTHER_ORDER) if set(OTHER_ORDER) <= set(present) else []
    return [order for order in ([rung for rung in first if rung not in apart], second) if len(order) > 1]


def remarks(table: Table) -> list[str]:
    """Return what a reader of the ladder must know: rungs without runs, seeds that a step leaves out, or no ladder."""
    keys = [factor.key for factor in table.factors]
    if RUNG in keys and len(keys) > 1:
        others = ", ".join(key for key in keys if key != RUNG)
        return [f"no ladder is shown, because {others} varies as well; rungs are compared at one of its levels"]
    found = []
    for number, order in enumerate(climbs(table)):
        known = [rung for rung in ORDER if rung in order]
        between = ORDER[ORDER.index(known[0]) : ORDER.index(known[-1])] if known and not number else ()
        if skipped := [rung for rung in between if rung not in order]:
            found.append(f"{', '.join(skipped)}: no runs, so that the step after them spans more than one rung")
        for rung, _, step, _ in steps(table, order):
            if step is not None and step.left_out:
                seeds = ", ".join(map(str, step.left_out))
                noun, verb = ("seeds", "lack") if len(step.left_out) > 1 else ("seed", "lacks")
                found.append(f"step to {rung}: without {noun} {seeds}, which {verb} a run")
    return list(dict.fromkeys(found))


def steps(table: Table, order: Sequence[str]) -> Iterator[tuple[str, Estimate, Effect | None, list[Trial]]]:
    """Yield each rung of a climb: its name, test accuracy, the paired difference to the one before it, and its runs."""
    cells, accuracies = table.cells(), table.values("test/acc")
    for place, rung in enumerate(order):
        trials = cells[rung,]
        step = main_effect(accuracies, RUNG, order[place - 1], rung) if place else None
        yield rung, estimate(float(trial.result["test/acc"]) for trial in trials), step, trials


def views(trials: Sequence[Trial]) -> tuple[str, Estimate, list[float]] | None:
    """Return what averaging several views of each test image gives: its name, accuracy, and that of each run.

    None unless all runs have it.
    """
    for measure, name in VIEWS.items():
        found = [measured(trial, measure) for trial in trials]
        if all(value is not None for value in found):
            averaged = [float(value or 0) for value in found]
            return name, estimate(averaged), averaged
    return None


def ladder_table(table: Table, order: Sequence[str]) -> pd.DataFrame:
    """Return a climb as a table of estimates, one row per rung: what it adds, its parameters and the time of a run.

    Averaged views are a last row: another test of the last rung's runs, without training.
    """
    rows: list[list[object]] = []
    trials: list[Trial] = []
    for rung, accuracy, step, trials in steps(table, order):
        parameters = " or ".join(dict.fromkeys(f"{trial.result['parameters']:,}" for trial in trials))
        seconds = statistics.mean(float(trial.result["seconds"]) for trial in trials)
        rows.append([rung, len(trials), accuracy, step and step.estimate, parameters, f"{seconds / 60:,.1f} min"])
    if (averaged := views(trials)) is not None:
        name, accuracy, values = averaged
        gains = [value - float(trial.result["test/acc"]) for value, trial in zip(values, trials, strict=True)]
        rows.append([f"test: {name}", len(trials), accuracy, estimate(gains), "", ""])
    return text_table(rows, ["rung", "n", "test accuracy", "step", "parameters", "time per run"])


def ladder_figure(table: Table) -> Figure:
    """Plot test accuracy from rung to rung: one dot per seed, the mean, and its 95% t-interval; each climb a line.

    Averaged views are the highest row, as in :func:`ladder_table`.
    """
    orders = climbs(table)
    names = [*orders[0]]
    heights = {rung: float(row) for row, rung in enumerate(orders[0])}
    figure = Figure(figsize=(8, 1.9 + 0.38 * len(names)), layout="constrained")
    axes = figure.subplots()

    def draw(accuracy: Estimate, values: Iterable[float], row: float, color: str) -> None:
        dots = [100 * value for value in values]
        axes.plot(dots, [row] * len(dots), "o", color=COLORS[5], markersize=4, zorder=2)
        half = 100 * (accuracy.high - accuracy.mean) if accuracy.high is not None else 0
        axes.errorbar(100 * accuracy.mean, row, xerr=half, fmt="|", color=color, capsize=4, markersize=12)

    for number, order in enumerate(orders):
        # The second climb's own rungs are spread between the two that it shares with the first.
        first, last = heights[order[0]], heights[order[-1]]
        rows = [first + (last - first) * place / (len(order) - 1) for place in range(len(order))]
        found = list(steps(table, order))
        means = [100 * accuracy.mean for _, accuracy, _, _ in found]
        for row, (_, accuracy, _, trials) in zip(rows, found, strict=True):
            draw(accuracy, (float(trial.result["test/acc"]) for trial in trials), row, COLORS[number])
        if number:
            label = "in another order: " + ", ".join(rung.replace("_", " ") for rung in order)
            for rung, mean, row in [*zip(order, means, rows, strict=True)][1:-1]:
                axes.annotate(
                    rung.replace("_", " "), (mean, row), xytext=(4, -6), textcoords="offset points", va="top",
                    fontsize="x-small", color=COLORS[number],
                )  # fmt: skip
        else:
            label = "one step after the other"
            if (averaged := views(found[-1][3])) is not None:
                view, accuracy, values = averaged
                draw(accuracy, values, len(names), COLORS[number])
                names.append(f"test: {view}")
                means, rows = [*means, 100 * accuracy.mean], [*rows, float(len(rows))]
        axes.plot(means, rows, "-", color=COLORS[number], linewidth=1, label=label)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlabel="test accuracy (%): seeds, mean, 95% t-interval", ylim=(-0.5, len(names) - 0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(orders) > 1:
        figure.legend(loc="outside lower center", fontsize="small")
    return figure
