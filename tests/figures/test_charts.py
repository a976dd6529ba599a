"""Charts show the numbers they are given, with any names and any gaps."""

import math

import numpy as np
import pytest
from helpers import pixels
from matplotlib.colors import to_hex
from sklearn.metrics import confusion_matrix as sklearn_confusion

from alexnet_pl.figures.charts import (
    COLORS,
    plot_confusion_matrix,
    plot_learning_curves,
    plot_training_curves,
    read_curves,
    shorten,
)
from alexnet_pl.runtime.errors import UserError

CURVES = {
    "train/loss": [2.0, 1.0, 0.5],
    "val/loss": [2.1, 1.5, 1.4],
    "train/acc": [0.2, 0.6, 0.9],
    "val/acc": [0.2, 0.5, 0.55],
}


def test_learning_curves_draw_every_run_against_its_epochs():
    short = {name: values[:2] for name, values in CURVES.items()}  # a run that is still going
    figure = plot_learning_curves({"a": CURVES, "b": short}, published={"paper": 0.734})
    loss, accuracy = figure.axes
    for axes, quantity in ((loss, "loss"), (accuracy, "acc")):
        drawn = {line.get_label(): line for line in axes.lines}
        for name, curves, color in (("a", CURVES, COLORS[0]), ("b", short, COLORS[1])):
            for split, what in (("train", "training"), ("val", "validation")):
                line = drawn[f"{name}, {what}"]
                assert list(line.get_xdata()) == list(range(1, len(curves["val/acc"]) + 1))
                assert list(line.get_ydata()) == curves[f"{split}/{quantity}"]
                assert to_hex(line.get_color()).lower() == color.lower()
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "paper, 0.734"


def test_more_runs_than_colors_are_all_drawn():
    assert len(plot_learning_curves({str(i): CURVES for i in range(9)}).axes[0].lines) == 18


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_a_curve_is_visible_from_its_first_epoch(epochs):
    """A line of one point has no length: without a marker, the chart of a one-epoch run was empty."""
    curves = {"epoch": [*range(1, epochs + 1)], **{name: [0.5] * epochs for name in CURVES}, "lr": [0.1] * epochs}
    for axes in (*plot_learning_curves({"": curves}).axes, *plot_training_curves(curves).axes):
        assert axes.lines
        assert all((line.get_marker() == "o") == (epochs <= 3) for line in axes.lines)


def test_one_epoch_has_one_tick_and_two_kinds_of_points():
    """Training and validation were the same filled circle, above ticks such as 0.945 and 1.035."""
    curves = {name: values[:1] for name, values in CURVES.items()}
    for axes in (*plot_learning_curves({"": curves}).axes, *plot_training_curves({"lr": [0.1]}).axes):
        assert list(axes.get_xticks()) == [1]
        assert axes.get_xlim() == (0, 2)
    for axes in plot_learning_curves({"": curves}).axes:
        training, validation = axes.lines
        assert training.get_markerfacecolor() == "none"
        assert validation.get_markerfacecolor() == COLORS[0]
        top = axes.get_ylim()[1]
        assert max(*training.get_ydata(), *validation.get_ydata()) < top - 0.03 * (top - axes.get_ylim()[0])
    assert list(plot_learning_curves({"": CURVES}).axes[0].get_xticks()) != [1]


def test_an_epoch_without_validation_leaves_a_gap_not_a_shift(tmp_path):
    """``trainer.check_val_every_n_epoch=2`` leaves every other cell empty."""
    (tmp_path / "metrics.csv").write_text("epoch,train/loss,val/loss\n1,3,\n2,2,2.5\n3,1,\n4,0.5,1.5\n")
    loss = plot_learning_curves({"": read_curves(tmp_path)}).axes[0]
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines}
    assert drawn == {"training": ([1, 2, 3, 4], [3, 2, 1, 0.5]), "validation": ([2, 4], [2.5, 1.5])}


def test_names_are_shown_as_they_are_except_for_control_characters():
    """Neither a formula nor an escape sequence, and no name is dropped from the legend for its underscore."""
    names = ["$\\frac{1", "_hidden", "a\x1b[31mred\x1b[0m\n\u202e"]
    figure = plot_learning_curves(dict.fromkeys(names, CURVES), published={"$x$": 0.5})
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [
        "$\\frac{1, training", "$\\frac{1, validation", "_hidden, training", "_hidden, validation",
        "a[31mred[0m, training", "a[31mred[0m, validation", "$x$, 0.5",
    ]  # fmt: skip
    assert pixels(figure).shape[2] == 3
    for classes in (3, 40):
        labels = [names[index % 3] for index in range(classes)]
        assert pixels(plot_confusion_matrix(np.ones((classes, classes), dtype=np.int64), labels)).shape[2] == 3
    assert shorten("a\x1b]0;title\x07b" * 9, 10) == "a]0;title…"
    assert shorten("directory/name.png", 9, keep_end=True) == "…name.png"


def test_curves_are_read_from_a_run_directory(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,val/acc,test/acc\n1,0.25,\n2,0.5,0.4\n")
    curves = read_curves(tmp_path)
    assert list(curves) == ["epoch", "val/acc", "test/acc"]
    assert (curves["epoch"], curves["val/acc"]) == ([1, 2], [0.25, 0.5])
    assert math.isnan(curves["test/acc"][0])
    assert curves["test/acc"][1] == 0.4
    with pytest.raises(UserError, match="metrics.csv not found in .*absent: not a run directory"):
        read_curves(tmp_path / "absent")


def test_curves_with_gaps_and_infinities_are_drawn():
    odd = {
        "epoch": [1.0, 2.0],
        "train/loss": [float("nan"), float("inf")],
        "val/acc": [0.1, float("nan")],
        "lr": [0.0, 1],
    }
    assert pixels(plot_learning_curves({"": odd})).shape[2] == 3
    assert len(plot_training_curves(odd).axes) == 1
    assert pixels(plot_training_curves(odd)).shape[2] == 3
    assert plot_training_curves({}).axes == []


def test_the_confusion_matrix_matches_scikit_learn():
    random = np.random.default_rng(0)
    true, predicted = random.integers(0, 4, 200), random.integers(0, 4, 200)
    counts = sklearn_confusion(true, predicted)
    axes = plot_confusion_matrix(counts, ["cat", "dog", "$x_1$", "a name that is much too long for it"]).axes[0]
    expected = 100 * counts / counts.sum(1, keepdims=True)
    assert np.allclose(axes.images[0].get_array(), expected)
    assert [text.get_text() for text in axes.texts] == [f"{percent:.0f}" for percent in expected.flat]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["cat", "dog", "$x_1$"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize("classes", [1, 2, 31, 1000])
def test_a_confusion_matrix_of_any_size_is_legible(classes):
    counts = np.eye(classes, dtype=np.int64) * 10
    counts[0, -1] += 7 * (classes > 1)
    counts[classes // 2] = 0  # a class without images
    figure = plot_confusion_matrix(counts, [f"class {index}" for index in range(classes)])
    assert max(pixels(figure).shape) < 2000
    if classes > 30:
        assert figure.axes[1].texts[0].get_text() == f" class 0 classified as class {classes - 1}"
        assert [bar.get_width() for bar in figure.axes[1].patches] == [7]
