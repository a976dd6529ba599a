"""Pictures of runs: pure functions, numbers in, a matplotlib figure out.

``python -m alexnet_pl.figures RUN… --out learning-curves.png`` draws the learning curves of finished or running runs.
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
