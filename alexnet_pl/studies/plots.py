"""Plots of a study: numbers in, a matplotlib figure out."""

import itertools
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alexnet_pl.figures.charts import COLOURS, read_curves
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.studies.statistics import estimate

if TYPE_CHECKING:
    from alexnet_pl.studies.table import Table


STYLES = ("-", "--", ":", "-.")


def results_figure(table: "Table") -> Figure:
    """Test error of every configuration: a dot a seed, the mean, and its 95 % t-interval as a bar."""
    from alexnet_pl.studies.table import measured

    cells = table.cells()
    figure = Figure(figsize=(7.5, 1.2 + 0.42 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for row, points in enumerate(cells.values()):
        errors = [100 * measured(point, "test/error") for point in points]
        mean = estimate(errors)
        axes.plot(errors, [row] * len(errors), "o", color=COLOURS[5], markersize=5, zorder=2)
        if mean.low is not None:
            axes.errorbar(
                mean.mean, row, xerr=mean.high - mean.mean, color=COLOURS[0], capsize=4, linewidth=1.6, zorder=1
            )
        axes.plot(mean.mean, row, "|", color=COLOURS[0], markersize=14, markeredgewidth=2, zorder=3)
    axes.set_yticks(range(len(cells)), [f"{table.title(cell)} (n={len(points)})" for cell, points in cells.items()])
    axes.set(xlabel="test error (%): seeds, mean, 95% t-interval", ylim=(len(cells) - 0.5, -0.5))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves_figure(table: "Table") -> Figure:
    """Training and validation error by epoch: the mean over seeds, in a band of one sample standard deviation.

    A mean goes as far as all its seeds do.
    """
    from alexnet_pl.studies.table import target_of

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    cells, target = table.cells(), target_of(table)
    looks = itertools.cycle(itertools.product(STYLES, COLOURS))
    looks = {cell: look for cell, look in zip(cells, looks, strict=False)}
    for axes, (name, title) in zip(
        figure.subplots(1, 2),
        (("train/error", "training error (%)"), ("val/error", "validation error (%)")),
        strict=True,
    ):
        for cell, points in cells.items():
            style, colour = looks[cell]
            curves = []
            for point in points:
                try:
                    curves.append(read_curves(point.folder)[name])
                except (UserError, KeyError, ValueError, IndexError):
                    continue  # the report's tables do not need it
            by_epoch = [estimate([100 * value for value in values]) for values in zip(*curves, strict=False)]
            epochs = range(1, len(by_epoch) + 1)
            marker = "o" if len(by_epoch) == 1 else None
            axes.plot(epochs, [m.mean for m in by_epoch], style, color=colour, label=table.title(cell), marker=marker)
            if len(curves) > 1:
                low, high = ([m.mean + sign * m.std for m in by_epoch] for sign in (-1, 1))
                axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        if target is not None and name == "train/error":
            axes.axhline(100 * target, color="0.35", linewidth=1, linestyle=":", label=f"{target:.0%}")
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "train/error":
            handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
