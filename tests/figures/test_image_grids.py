"""Image grids: kernels, top-5 predictions, neighbors, captions."""

import numpy as np
import pytest
from helpers import pixels
from PIL import Image

from alexnet_pl.figures.image_grids import plot_captioned, plot_kernels, plot_nearest_images, plot_top5


def test_kernels_form_one_block_per_group_each_on_its_own_scale():
    kernels = np.zeros((96, 3, 11, 11), dtype=np.float32)
    kernels[:, 0], kernels[48:, 1] = 0.5, -2.0
    page = plot_kernels(kernels, groups=2).axes[0].images[0].get_array()
    first, second = (page == (255, 128, 128)).all(2), (page == (159, 0, 128)).all(2)
    assert first.sum() == second.sum() == 48 * 44 * 44
    rows = [np.flatnonzero(found.any(1)) for found in (first, second)]
    assert rows[1].min() - rows[0].max() > 3 * (np.diff(rows[0]).max() - 1)  # the gap between groups is wider
    with pytest.raises(ValueError, match="5 channels"):
        plot_kernels(np.zeros((4, 5, 3, 3)))
    pixels(plot_kernels(np.full((6, 1, 5, 5), np.nan)))


def test_the_true_class_and_neighbors_of_another_class_are_highlighted():
    image = Image.new("RGB", (8, 8))
    figure = plot_top5([(image, "cat", [("dog", 0.7), ("cat", 0.3)])], ["cat"])
    colors = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    assert colors[0] != colors[1]
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    neighbors = np.stack([images, images])
    figure = plot_nearest_images(
        images, ["cat", "dog"], neighbors, [["cat", "dog"], ["dog", "dog"]], np.eye(2), "fc7 features"
    )
    highlighted = [text.get_text() for text in figure.axes[0].texts if text.get_color() not in ("black",)]
    assert highlighted == ["dog 0.00"]


def test_names_are_labels_and_not_formulas():
    name = "$\\frac{1\x1b[31m\n"
    images = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    figures = (
        plot_top5([(Image.new("RGB", (8, 8)), name, [(name, 0.7)])], [name]),
        plot_nearest_images(images, [name], images[None], [[name]], np.eye(1), "fc7 features"),
        plot_captioned(images, [[name, name]]),
    )
    for figure in figures:
        shown = [text.get_text() for axes in figure.axes for text in (axes.title, *axes.texts)]
        assert any("$\\frac{1[31m" in text for text in shown)
        assert not any("\x1b" in text or "\n" in text for text in shown)
        assert pixels(figure).shape[2] == 3


def test_the_longest_captions_do_not_touch():
    images = np.zeros((16, 32, 32, 3), dtype=np.uint8)
    figure = plot_captioned(images, [["MWMWMWMWMWMWMWMWMWMWMW 1.000", "true: MWMWMWMWMWMWMW"]] * 16)
    shown = pixels(figure).min(2)
    captions = shown[150:165]  # the bold line of the first row
    gaps = (captions.min(0) > 200).astype(int)
    assert np.count_nonzero(np.diff(gaps) == 1) >= 7
