"""Pictures of runs: pure functions, numbers in, a matplotlib figure out.

``python -m alexnet_pl.figures RUN… --out learning-curves.png`` draws the learning curves of finished or running runs.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from alexnet_pl.errors import UserError, one_line_errors

# Okabe and Ito's palette, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Curves = dict[str, list[float]]


def learning_curves(runs: dict[str, Curves], published: dict[str, float] | None = None) -> Figure:
    """Loss and accuracy by epoch, training dashed and validation solid, one colour a run.

    Args:
        runs: name of a run → the columns ``train/loss``, ``val/loss``, ``train/acc`` and ``val/acc`` (one number an
            epoch, from the first; losses in nats, accuracies in [0, 1]).
        published: validation accuracies to compare with, drawn as labelled horizontal lines.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, quantity, label in zip(
        figure.subplots(1, 2), ("loss", "acc"), ("cross-entropy loss (nats)", "accuracy"), strict=True
    ):
        for colour, (name, curves) in zip(COLOURS * len(runs), runs.items(), strict=False):
            for split, style in (("train", "--"), ("val", "-")):
                values = curves[f"{split}/{quantity}"]
                what = f"{name}, {'training' if split == 'train' else 'validation'}"
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


def picture_bars(answers: Sequence[tuple[Image.Image, str, Sequence[tuple[str, float]]]]) -> Figure:
    """Pictures with the likeliest classes below as bars, as in figure 4 of the paper.

    Args:
        answers: picture, title, and ``(name, probability)`` pairs, the likeliest first.
    """
    columns = min(5, len(answers))
    rows = math.ceil(len(answers) / columns)
    bars = max(len(top) for _, _, top in answers)
    heights = [2.0, 0.3 + 0.2 * bars]
    figure = Figure(figsize=(2.2 * columns, sum(heights) * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights * rows})
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (picture, title, top) in enumerate(answers):
        row, column = divmod(index, columns)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        above.imshow(picture)
        above.set_title(title if len(title) <= 24 else f"…{title[-23:]}", fontsize=8, parse_math=False)
        below.barh(range(len(top)), [value for _, value in top], color=COLOURS[5], height=0.8)
        for place, (name, value) in enumerate(top):
            below.text(0.02, place, f"{name} {value:.3f}", va="center", fontsize=7, parse_math=False)
        below.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    return figure


def response_grid(maps: np.ndarray) -> np.ndarray:
    """Feature maps side by side, near a square, each scaled from its own least to its own largest value.

    Args:
        maps: ``(C, H, W)`` floating.

    Returns:
        uint8 ``(rows · (H + 1) + 1, columns · (W + 1) + 1)``, with lines of one pixel between the maps.
    """
    count, height, width = maps.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    scaled = np.rint(255 * (maps - low) / np.maximum(high - low, np.finfo(maps.dtype).tiny)).astype(np.uint8)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), 64, dtype=np.uint8)
    for index, image in enumerate(scaled):
        row, column = divmod(index, columns)
        top, left = 1 + row * (height + 1), 1 + column * (width + 1)
        grid[top : top + height, left : left + width] = image
    return grid


def read_curves(run_dir: Path) -> Curves:
    """The columns of a run's metrics.csv, one number an epoch; a column's empty cells are left out.

    Raises:
        UserError: no metrics.csv with at least one epoch.
    """
    path = run_dir / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder, or its first epoch has not ended: it has no metrics.csv.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl.figures", description="Draw the learning curves of runs."
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run folder, with the name to show for it")
    parser.add_argument(
        "--out", type=Path, default=Path("learning-curves.png"), help="picture to write: png, svg or pdf"
    )
    parser.add_argument(
        "--published", nargs="*", default=[], metavar="NAME=ACCURACY", help="accuracies to compare with"
    )
    arguments = parser.parse_args()
    runs = {}
    for run in arguments.runs:
        name, _, folder = run.rpartition("=")
        runs[name or Path(folder).name] = read_curves(Path(folder))
    published = {name: float(value) for name, _, value in (line.rpartition("=") for line in arguments.published)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    learning_curves(runs, published).savefig(arguments.out, dpi=130)
    print(arguments.out)


if __name__ == "__main__":
    with one_line_errors():
        main()
