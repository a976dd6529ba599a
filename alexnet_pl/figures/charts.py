"""Charts of runs: learning curves, training curves, confusion matrix. Pure functions from numbers to a Figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alexnet_pl.runtime.errors import UserError, printable
from alexnet_pl.runtime.run_folder import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinguishable with any kind of color vision."""

Curves = dict[str, list[float]]
"""Columns of metrics.csv, one value per row. NaN marks an empty cell."""


def read_curves(run_dir: Path) -> Curves:
    """Return the columns of a run's metrics.csv, with NaN for a value that an epoch lacks.

    Raises:
        UserError: metrics.csv is not found or corrupt.
    """
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{METRICS} not found in {run_dir}: not a run directory, or its first epoch has not ended.")
    rows = read_metrics(run_dir)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def new_figure(**settings: Any) -> Figure:
    """Return an empty figure with settings of ``matplotlib.figure.Figure``, such as ``figsize`` in inches."""
    from matplotlib.figure import Figure  # here for start-up time: training draws nothing before its end

    return Figure(**settings)


def use_whole_numbers(axis: Axis) -> None:
    """Place the ticks of an axis at whole numbers only, such as epochs or images."""
    from matplotlib.ticker import MaxNLocator  # here for start-up time

    axis.set_major_locator(MaxNLocator(integer=True))


def plot_learning_curves(runs: dict[str, Curves], published: dict[str, float] | None = None) -> Figure:
    """Plot loss and accuracy per epoch: training dashed, validation solid, one color per run.

    Args:
        runs: curves by run name (may be empty for a single run). Drawn are ``train/loss``, ``val/loss`` (nats),
            ``train/acc`` and ``val/acc`` (in [0, 1]) against ``epoch``, by default 1, 2, …
        published: validation accuracies to compare with, drawn as labeled horizontal lines.
    """
    figure = new_figure(figsize=(10, 4.4), layout="constrained")
    for axes, quantity, label in zip(
        figure.subplots(1, 2), ("loss", "acc"), ("cross-entropy loss (nats)", "accuracy"), strict=True
    ):
        lines = []
        for color, (name, curves) in zip(COLORS * len(runs), runs.items(), strict=False):
            for split, style in (("train", "--"), ("val", "-")):
                split_name = "training" if split == "train" else "validation"
                title = ", ".join(filter(None, (printable(name), split_name)))
                lines.append((_plot(axes, curves, f"{split}/{quantity}", color, style), title))
        if quantity == "acc":
            for name, value in (published or {}).items():
                line = axes.axhline(value, color="0.35", linewidth=1, linestyle=":")
                lines.append((line, f"{printable(name)}, {value}"))
        else:
            _start_at_zero(axes)
        axes.set(xlabel="epoch", ylabel=label)
        _style_axes(axes)
        for line, title in lines:
            line.set_label(title)
    # Explicit handles: matplotlib leaves out a label that begins with an underscore.
    handles, titles = zip(*lines, strict=True) if lines else ((), ())
    legend = figure.legend(
        handles, titles, loc="outside lower center", ncols=min(4, len(titles) or 1), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def plot_training_curves(curves: Curves) -> Figure:
    """Plot learning rate, norms and speed per epoch, one chart each; a column without finite values has no chart.

    Args:
        curves: as for :func:`plot_learning_curves`, with any of ``lr``, ``grad_norm``, ``weight_norm``,
            ``images_per_second`` and ``epoch_seconds``.
    """
    labels = {
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "weight_norm": "weight norm",
        "images_per_second": "training images/s",
        "epoch_seconds": "s/epoch",
    }
    charts = {name: label for name, label in labels.items() if any(map(math.isfinite, curves.get(name, [])))}
    rows = math.ceil(len(charts) / 3)
    figure = new_figure(figsize=(10, 2.2 * rows or 1))
    if rows:  # fixed margins in inches, because a computed layout takes longer than the drawing
        height = 2.2 * rows
        figure.subplots_adjust(0.09, 0.5 / height, 0.99, 1 - 0.25 / height, wspace=0.38, hspace=0.5)
    for place, (name, label) in enumerate(charts.items(), start=1):
        axes = figure.add_subplot(rows, 3, place)
        _plot(axes, curves, name, COLORS[0], "-")
        axes.set(xlabel="epoch", ylabel=label)
        if name == "lr" and min(value for value in curves[name] if math.isfinite(value)) > 0:
            axes.set_yscale("log")
        elif name != "weight_norm":
            _start_at_zero(axes)
        _style_axes(axes)
    return figure


def _plot(axes: Axes, curves: Curves, name: str, color: str, style: str) -> Line2D:
    """Draw one column against its epochs.

    Up to three points get markers, since a single one makes no line: hollow ones on a dashed line, filled ones on a
    solid line.
    """
    values = curves.get(name, [])
    epochs = curves.get("epoch") or list(range(1, len(values) + 1))
    known = [(epoch, value) for epoch, value in zip(epochs, values, strict=False) if not math.isnan(value)]
    (line,) = axes.plot(
        [epoch for epoch, _ in known],
        [value for _, value in known],
        style,
        color=color,
        linewidth=1.6,
        marker="o" if len(known) <= 3 else None,
        markersize=6,
        markerfacecolor="none" if style == "--" else color,
    )
    return line


def _start_at_zero(axes: Axes) -> None:
    """Let the values' axis start at 0, with the room above the highest one that matplotlib leaves by default."""
    top = axes.get_ylim()[1]
    axes.set_ylim(0, 1.05 * top if top > 0 else None)


def _style_axes(axes: Axes) -> None:
    left, right = axes.get_xlim()
    if right - left < 1:  # a single epoch: matplotlib's ticks would be fractions of it
        middle = round((left + right) / 2)
        axes.set_xlim(middle - 1, middle + 1)
        axes.set_xticks([middle])
    else:
        use_whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


MAX_MATRIX_CLASSES = 30
"""Above this number of classes, names and percentages in a confusion matrix are illegible."""


def plot_confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Plot the percentage of each true class that was predicted as each class.

    Above ``MAX_MATRIX_CLASSES`` classes, plot a small matrix beside the most frequent confusions instead.

    Args:
        counts: ``(C, C)`` images; rows are true classes, columns predicted ones. Rows may be empty.
        names: the C class names.
    """
    if len(names) > MAX_MATRIX_CLASSES:
        true, predicted = counts.nonzero()
        return plot_confused_pairs(true, predicted, counts[true, predicted], names)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.2 + 0.42 * max(len(names), 4)
    figure = new_figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    matrix = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.5:
            color = "white" if value > 55 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    ticks, labels = range(len(names)), [shorten(name, 18) for name in names]
    axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(matrix, ax=axes, label="images of the true class (%)", shrink=0.8)
    return figure


def plot_confused_pairs(
    true: np.ndarray, predicted: np.ndarray, counts: np.ndarray, names: Sequence[str], most: int = 20
) -> Figure:
    """Plot a small matrix of many classes beside the most frequent confusions.

    Time and memory grow with the pairs of classes that occur, not with all C² of them.

    Args:
        true, predicted, counts: ``(P,)`` integers, a pair of classes and its images each.
        names: the C class names.
    """
    figure = new_figure(figsize=(10, 5.6), layout="constrained")
    matrix, bars = figure.subplots(1, 2, width_ratios=(1, 1.1))
    # Left: the matrix. Single cells of 1,000 classes would vanish, so blocks of classes are averaged.
    block = math.ceil(len(names) / 250)
    side = math.ceil(len(names) / block)
    percent = 100 * counts / np.bincount(true, counts, len(names))[true]
    coarse = np.bincount(true // block * side + predicted // block, percent, side * side).reshape(side, side) / block
    image = matrix.imshow(coarse, cmap="Blues", vmin=0, vmax=100, extent=(0, len(names), len(names), 0))
    matrix.set(xlabel="predicted class (index)", ylabel="true class (index)")
    figure.colorbar(image, ax=matrix, label="images of the true class (%)", shrink=0.7)
    # Right: the most frequent confusions.
    wrong = true != predicted
    true, predicted, counts = true[wrong], predicted[wrong], counts[wrong]
    order = np.argsort(-counts, kind="stable")[:most]
    pairs = [*zip(true[order].tolist(), predicted[order].tolist(), strict=True)]
    bars.barh(range(len(pairs)), counts[order], color=COLORS[5])
    for place, (label, other) in enumerate(pairs):
        text = f" {shorten(names[label], 18)} classified as {shorten(names[other], 18)}"
        bars.text(0, place, text, va="center", fontsize=8, parse_math=False)
    bars.set(xlabel="test images", ylim=(max(len(pairs), 1) - 0.4, -0.6), yticks=[])
    bars.set_title("most frequent confusions", fontsize=10)
    use_whole_numbers(bars.xaxis)
    bars.spines[["top", "right", "left"]].set_visible(False)
    return figure


def shorten(text: str, length: int, keep_end: bool = False) -> str:
    """Return ``text`` as a label: printable characters only, cut with an ellipsis to ``length`` characters.

    Class and file names come from strangers, so every label made from one goes through here. Draw it with
    ``parse_math=False``, because matplotlib takes ``$`` for a formula.
    """
    text = printable(text)
    if len(text) <= length:
        return text
    return f"…{text[1 - length :]}" if keep_end else f"{text[: length - 1]}…"
