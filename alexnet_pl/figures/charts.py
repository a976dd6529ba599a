"""Charts of runs: pure functions, numbers in, a matplotlib figure out. Those made of images: image_figures.py.

``python -m alexnet_pl figures RUN… --out learning-curves.png`` draws the learning curves of finished or running runs.
"""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alexnet_pl.runtime.errors import UserError

log = logging.getLogger(__name__)


# Okabe and Ito's palette, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Curves = dict[str, list[float]]


def learning_curves(runs: dict[str, Curves], published: dict[str, float] | None = None) -> Figure:
    """Loss and accuracy by epoch, training dashed and validation solid, one colour a run.

    Args:
        runs: name of a run (empty where there is only one) → the columns ``train/loss``, ``val/loss``, ``train/acc``
            and ``val/acc`` (one number an epoch, from the first; losses in nats, accuracies in [0, 1]).
        published: validation accuracies to compare with, drawn as labelled horizontal lines.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, quantity, label in zip(
        figure.subplots(1, 2), ("loss", "acc"), ("cross-entropy loss (nats)", "accuracy"), strict=True
    ):
        for colour, (name, curves) in zip(COLOURS * len(runs), runs.items(), strict=False):
            for split, style in (("train", "--"), ("val", "-")):
                values = curves.get(f"{split}/{quantity}", [])
                what = ", ".join(filter(None, (name, "training" if split == "train" else "validation")))
                axes.plot(range(1, len(values) + 1), values, style, color=colour, label=what, linewidth=1.6)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity == "acc":
            for name, value in (published or {}).items():
                axes.axhline(value, color="0.35", linewidth=1, linestyle=":", label=f"{name}, {value}")
        else:
            axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def training_curves(curves: Curves) -> Figure:
    """Learning rate, norms and speed by epoch, one chart each; a column that is not there is left out.

    Args:
        curves: as for :func:`learning_curves`, with any of ``lr``, ``grad_norm``, ``weight_norm``,
            ``images_per_second`` and ``epoch_seconds``.
    """
    labels = {
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "weight_norm": "weight norm",
        "images_per_second": "images/s in training",
        "epoch_seconds": "seconds an epoch",
    }
    drawn = {name: label for name, label in labels.items() if any(map(math.isfinite, curves.get(name, [])))}
    figure = Figure(figsize=(10, 2.2 * math.ceil(len(drawn) / 3) or 1), layout="constrained")
    for place, (name, label) in enumerate(drawn.items(), start=1):
        axes = figure.add_subplot(math.ceil(len(drawn) / 3), 3, place)
        values = curves[name]
        axes.plot(range(1, len(values) + 1), values, color=COLOURS[0], linewidth=1.6, marker="." * (len(values) < 4))
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "lr" and min(values) > 0:
            axes.set_yscale("log")
        elif name != "weight_norm":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


MATRIX_CLASSES = 30
"""Most classes whose confusion matrix has its names and numbers beside it."""


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Share of each true class that was predicted as each class, in percent.

    With more than ``MATRIX_CLASSES`` classes nobody could read the names: then the pairs confused most often, and the
    matrix small beside them.

    Args:
        counts: ``(C, C)`` images; row: true class, column: predicted class. Rows may be empty.
        names: of the C classes.
    """
    totals = counts.sum(1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    if len(names) > MATRIX_CLASSES:
        return _confused_pairs(counts, shares, names)
    side = 2.2 + 0.42 * max(len(names), 4)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            colour = "white" if share > 55 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    places = range(len(names))
    axes.set_xticks(places, [_short(name) for name in names], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, [_short(name) for name in names])
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(shown, ax=axes, label="images of the true class (%)", shrink=0.8)
    return figure


def _confused_pairs(counts: np.ndarray, shares: np.ndarray, names: Sequence[str], most: int = 20) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    matrix, bars = figure.subplots(1, 2, width_ratios=(1, 1.1))
    blocks = math.ceil(len(names) / 250)  # pixels would vanish: the mean of a block of classes shows instead
    edge = math.ceil(len(names) / blocks) * blocks - len(names)
    padded = np.pad(shares, ((0, edge), (0, edge)))
    side = len(padded) // blocks
    coarse = padded.reshape(side, blocks, side, blocks).mean((1, 3)) * blocks
    shown = matrix.imshow(coarse, cmap="Blues", vmin=0, vmax=100, extent=(0, len(names), len(names), 0))
    matrix.set(xlabel="predicted class (number)", ylabel="true class (number)")
    figure.colorbar(shown, ax=matrix, label="images of the true class (%)", shrink=0.7)
    off = counts * (1 - np.eye(len(names), dtype=counts.dtype))
    order = np.argsort(off, axis=None, kind="stable")[::-1][:most]
    pairs = [divmod(int(place), len(names)) for place in order if off.flat[place] > 0]
    bars.barh(range(len(pairs)), [off[pair] for pair in pairs], color=COLOURS[5])
    for place, (true, predicted) in enumerate(pairs):
        text = f" {_short(names[true])} taken for {_short(names[predicted])}"
        bars.text(0, place, text, va="center", fontsize=8, parse_math=False)
    bars.set(xlabel="test images", ylim=(max(len(pairs), 1) - 0.4, -0.6), yticks=[])
    bars.set_title("most often confused", fontsize=10)
    bars.xaxis.set_major_locator(MaxNLocator(integer=True))
    bars.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _short(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def read_curves(run_dir: Path) -> Curves:
    """The columns of a run's metrics.csv, one number an epoch; a column's empty cells are left out.

    Raises:
        UserError: no metrics.csv, or a damaged one.
    """
    path = run_dir / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder, or its first epoch has not ended: it has no metrics.csv.")
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows if row[name]] for name in (rows[0] if rows else ())}
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
