"""Robustness in a report: error by severity of the trials that ``alexnet evaluate --corruptions`` has measured."""

import statistics
from collections.abc import Mapping

from matplotlib.figure import Figure

from alexnet_pl.figures.charts import COLORS
from alexnet_pl.runtime.run_folder import read_corruptions
from alexnet_pl.studies.statistics import Estimate, estimate
from alexnet_pl.studies.table import Table, Trial

SEVERITIES = range(6)
"""0 is the test set without corruption."""

Curves = Mapping[tuple[str, ...], list[Estimate]]
"""Configuration → mean error over corruptions at each severity, over seeds."""


def robustness(table: Table) -> Curves:
    """Return the curves of the configurations that have been measured; empty if none has."""
    found = {}
    for cell, trials in table.cells().items():
        curves = [curve for trial in trials if (curve := _curve(trial)) is not None]
        if curves:
            found[cell] = [estimate(errors) for errors in zip(*curves, strict=True)]
    return found


def _curve(trial: Trial) -> list[float] | None:
    """Return a trial's mean error over corruptions at each severity; None if not all were measured."""
    by_severity: dict[int, list[float]] = {}
    for row in read_corruptions(trial.run_dir):
        by_severity.setdefault(row["severity"], []).append(row["test/error"])
    if not all(by_severity.get(severity) for severity in SEVERITIES):
        return None
    return [statistics.mean(by_severity[severity]) for severity in SEVERITIES]


def robustness_figure(table: Table, curves: Curves) -> Figure:
    """Plot the mean error over corruptions by severity: mean over seeds, 95% t-interval as a bar."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (cell, points) in enumerate(curves.items()):
        means = [100 * point.mean for point in points]
        halves = [0.0 if point.high is None else 100 * (point.high - point.mean) for point in points]
        label = f"{table.title(cell)} (n={points[0].n})"
        places = [severity + 0.04 * (index - (len(curves) - 1) / 2) for severity in SEVERITIES]
        axes.errorbar(places, means, yerr=halves, color=COLORS[index % len(COLORS)], marker="o", capsize=3, label=label)
    axes.set(xlabel="severity (0: no corruption)", ylabel="test error (%), mean over corruptions")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    return figure
