"""Figures show the numbers they are given."""

import pytest
from matplotlib.colors import to_hex

from alexnet_pl.figures.charts import COLORS, plot_learning_curves, read_curves
from alexnet_pl.runtime.errors import UserError

CURVES = {
    "train/loss": [2.0, 1.0, 0.5],
    "val/loss": [2.1, 1.5, 1.4],
    "train/acc": [0.2, 0.6, 0.9],
    "val/acc": [0.2, 0.5, 0.55],
}


def test_learning_curves_draw_every_run_against_its_epochs():
    short = {name: values[:2] for name, values in CURVES.items()}  # a run that is still going on
    figure = plot_learning_curves({"a": CURVES, "b": short}, published={"paper": 0.734})
    loss, accuracy = figure.axes
    for axes, quantity in ((loss, "loss"), (accuracy, "acc")):
        drawn = {line.get_label(): line for line in axes.lines}
        for name, curves, colour in (("a", CURVES, COLORS[0]), ("b", short, COLORS[1])):
            for split, what in (("train", "training"), ("val", "validation")):
                line = drawn[f"{name}, {what}"]
                assert list(line.get_xdata()) == list(range(1, len(curves["val/acc"]) + 1))
                assert list(line.get_ydata()) == curves[f"{split}/{quantity}"]
                assert to_hex(line.get_color()).lower() == colour.lower()
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "paper, 0.734"


def test_more_runs_than_colours_are_all_drawn():
    assert len(plot_learning_curves({str(i): CURVES for i in range(9)}).axes[0].lines) == 18


def test_curves_are_read_from_a_run_folder(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,val/acc,test/acc\n1,0.25,\n2,0.5,0.4\n")
    assert read_curves(tmp_path) == {"epoch": [1, 2], "val/acc": [0.25, 0.5], "test/acc": [0.4]}
    with pytest.raises(UserError, match="no run folder"):
        read_curves(tmp_path / "absent")
