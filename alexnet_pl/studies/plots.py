"""Plots of a study: a table in, a matplotlib figure out."""

import itertools
import math

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alexnet_pl.figures.charts import COLORS
from alexnet_pl.studies.statistics import estimate
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
    looks = dict(zip(cells, itertools.cycle(itertools.product(LINE_STYLES, COLORS)), strict=False))
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
