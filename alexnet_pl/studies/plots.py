"""Plots of studies and claims: numbers in, a matplotlib figure out."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from alexnet_pl.figures.charts import COLORS
from alexnet_pl.studies.statistics import CONFIRMED, NO_EFFECT, OPEN, REVERSED, Cell, Estimate, estimate
from alexnet_pl.studies.table import Table, curves_of, measured, target_of

LINE_STYLES = ("-", "--", ":", "-.")


def results_figure(table: Table) -> Figure:
    """Plot the test error of every configuration: one dot per seed, the mean, and its 95% t-interval as a bar."""
    cells = table.cells()
    figure = Figure(figsize=(7.5, 1.2 + 0.42 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for row, trials in enumerate(cells.values()):
        errors = [100 * error for trial in trials if (error := measured(trial, "test/error")) is not None]
        mean = estimate(errors)
        axes.plot(errors, [row] * len(errors), "o", color=COLORS[5], markersize=5, zorder=2)
        if mean.high is not None:
            half = mean.high - mean.mean
            axes.errorbar(mean.mean, row, xerr=half, color=COLORS[0], capsize=4, linewidth=1.6, zorder=1)
        axes.plot(mean.mean, row, "|", color=COLORS[0], markersize=14, markeredgewidth=2, zorder=3)
    axes.set_yticks(range(len(cells)), [f"{table.title(cell)} (n={len(trials)})" for cell, trials in cells.items()])
    axes.set(xlabel="test error (%): seeds, mean, 95% t-interval", ylim=(len(cells) - 0.5, -0.5))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)  # a $ in a level is not a formula
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves_figure(table: Table) -> Figure:
    """Plot training and validation error per epoch: the mean over seeds, in a band of one sample standard deviation.

    A mean extends to the last epoch that all its seeds have.
    """
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    cells, target = table.cells(), target_of(table)
    looks = _looks([*cells])
    curves = {cell: [curves_of(trial) for trial in trials] for cell, trials in cells.items()}
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "train/error", "training error (%)"),
        (right, "val/error", "validation error (%)"),
    ):
        for cell, (style, color) in looks.items():
            known = [columns[name] for columns in curves[cell] if name in columns]
            by_epoch = [estimate(100 * value for value in values) for values in zip(*known, strict=False)]
            epochs = [epoch for epoch, at in enumerate(by_epoch, start=1) if not math.isnan(at.mean)]  # with validation
            by_epoch = [by_epoch[epoch - 1] for epoch in epochs]
            marker = "o" if len(by_epoch) == 1 else None
            means = [at.mean for at in by_epoch]
            axes.plot(epochs, means, style, color=color, label=table.title(cell), marker=marker)
            if len(known) > 1:
                low, high = ([at.mean + sign * (at.std or 0) for at in by_epoch] for sign in (-1, 1))
                axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        if target is not None and axes is left:
            axes.axhline(100 * target, color="0.35", linewidth=1, linestyle=":", label=f"{target:.0%}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _looks(cells: Sequence[Cell]) -> dict[Cell, tuple[str, str]]:
    """Return line style and color of each configuration.

    A color for each, as long as there are enough. Then a style per level of the first factor and a color for the rest,
    so that both can be followed through the plot, if there are enough of these.
    """
    first, rest = ([*dict.fromkeys(part)] for part in ((cell[:1] for cell in cells), (cell[1:] for cell in cells)))
    if len(cells) > len(COLORS) and len(first) <= len(LINE_STYLES) and len(rest) <= len(COLORS):
        return {cell: (LINE_STYLES[first.index(cell[:1])], COLORS[rest.index(cell[1:])]) for cell in cells}
    return dict(zip(cells, itertools.cycle(itertools.product(LINE_STYLES, COLORS)), strict=False))


VERDICT_COLORS = {CONFIRMED: COLORS[0], REVERSED: COLORS[1], NO_EFFECT: COLORS[2], OPEN: "0.45"}


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot, in the unit of its panel.

    Attributes:
        label: name of the claim and its seeds.
        measured: mean and interval; None if nothing has been measured.
        published: published value; None if there is no number.
        verdict: in words, in the color of ``kind``.
        kind: a key of ``VERDICT_COLORS``.
        margin: ends of the range that counts as no effect; None without one.
        span: lowest and highest value that the published words allow; None for a plain number.
    """

    label: str
    measured: Estimate | None
    published: float | None
    verdict: str
    kind: str
    margin: tuple[float, float] | None
    span: tuple[float, float] | None = None


def forest_figure(panels: Mapping[str, Sequence[ForestRow]]) -> Figure:
    """Plot claims as intervals beside the published values, one panel per unit.

    A diamond is what was published, a line through it what its words allow.

    Args:
        panels: label of the axis → rows; a label that contains ``ratio`` has a logarithmic axis around 1.
    """
    panels = {label: rows for label, rows in panels.items() if rows}
    counts = [len(rows) for rows in panels.values()] or [1]
    figure = Figure(figsize=(10.5, 0.9 * len(counts) + 0.42 * sum(counts)), layout="constrained")
    grid = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[count + 1 for count in counts])
    for axes, (label, rows) in zip(grid[:, 0], panels.items(), strict=False):
        for place, row in enumerate(rows):
            _forest_row(axes, place, row)
        is_ratio = "ratio" in label
        if is_ratio:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # all nine would collide beside a power of ten
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
        if "%" not in label:
            axes.axvline(1 if is_ratio else 0, color="0.3", linewidth=0.8, zorder=0)
        axes.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def _forest_row(axes: Axes, place: int, row: ForestRow) -> None:
    """Draw one row: the margin as a gray band, the interval as a bar, the published value as a diamond, the verdict."""
    color = VERDICT_COLORS[row.kind]
    if row.margin is not None:
        low, high = row.margin
        axes.fill_betweenx([place - 0.4, place + 0.4], low, high, color="0.92", linewidth=0, zorder=0)
    if row.measured is not None:
        if row.measured.low is not None and row.measured.high is not None:
            axes.plot([row.measured.low, row.measured.high], [place, place], color=color, linewidth=2.4, zorder=2)
        axes.plot(row.measured.mean, place, "o", color=color, markersize=6, zorder=3)
    if row.span is not None:
        axes.plot(row.span, (place, place), color="black", linewidth=1, zorder=2)
    if row.published is not None:
        axes.plot(row.published, place, "D", color="black", fillstyle="none", markersize=7, zorder=4)
    axes.annotate(
        row.verdict, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=color,
        parse_math=False,
    )  # fmt: skip
