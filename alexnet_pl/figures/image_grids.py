"""Image grids: conv1 kernels, nearest neighbors, top-5 predictions. Pure functions from arrays to a Figure or an array.

Images are uint8 ``(N, H, W, 3)`` arrays throughout. Figures with many images compose them into one array first, because
one axes per image takes matplotlib ten times as long.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from alexnet_pl.figures.charts import COLORS, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_COLOR, OTHER_COLOR = COLORS[1], COLORS[5]

PIXELS_PER_INCH = 100
"""Resolution of figures whose size follows from their images."""

Prediction = tuple[Image.Image, str, Sequence[tuple[str, float]]]
"""Image, title, and ``(class name, probability)`` pairs, the most probable first."""


def plot_kernels(kernels: np.ndarray, groups: int = 1) -> Figure:
    """Show the first layer's kernels as color images, one block of rows per group, as in figure 3 of the paper.

    Each kernel is scaled by its own largest magnitude; mid-gray is a weight of 0.

    Args:
        kernels: ``(C, 3, k, k)`` floating point, or ``(C, 1, k, k)`` for grayscale.
        groups: groups of the layer that reads the feature maps; the first ``C / groups`` kernels form the first block.

    Raises:
        ValueError: there are neither 1 nor 3 input channels, or C is not a multiple of ``groups``.
    """
    count, channels, side, _ = kernels.shape
    if channels not in (1, 3) or count % groups:
        raise ValueError(f"{count} kernels with {channels} channels in {groups} groups cannot be shown as images")
    kernels = np.nan_to_num(np.asarray(kernels, dtype=np.float64))
    largest = np.maximum(np.abs(kernels).max((1, 2, 3), keepdims=True), np.finfo(np.float64).tiny)
    images = np.rint(127.5 + 127.5 * kernels / largest).astype(np.uint8).transpose(0, 2, 3, 1)
    if channels == 1:
        images = images.repeat(3, axis=3)
    each = count // groups
    columns = min(each, 16)  # the paper's figure has three rows of 16 kernels per group
    while columns > 8 and each % columns:
        columns -= 1
    if each % columns:
        columns = min(each, 16)
    zoom = max(1, 44 // side)
    blocks = [tile(_zoom(block, zoom), columns, gap=zoom + 1) for block in images.reshape(groups, each, side, side, 3)]
    gap = np.full((4 * (zoom + 1), blocks[0].shape[1], 3), 255, dtype=np.uint8)
    stacked = blocks[0]
    for block in blocks[1:]:
        stacked = np.concatenate([stacked, gap, block])
    title = f"{count} kernels of {side}×{side}×{channels}" + (f", {groups} groups" if groups > 1 else "")
    return _titled_image(stacked, f"{title}; gray is 0, each on its own scale")


def plot_captioned(images: np.ndarray, captions: Sequence[Sequence[str]], columns: int = 8) -> Figure:
    """Show images in a grid, each with its caption below.

    Args:
        images: ``(N, H, W, 3)`` uint8.
        captions: lines per image, cut to 17 characters; the first line is bold.
        columns: images per row, at most.
    """
    columns = min(columns, len(images))
    lines = max(map(len, captions), default=0)
    images = _resize(images, 100)
    height, width = images.shape[1:3]
    step_y, step_x = height + 16 * lines + 10, width + 36
    rows = math.ceil(len(images) / columns)
    page = np.full((rows * step_y, columns * step_x - 36, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        page[row * step_y : row * step_y + height, column * step_x : column * step_x + width] = image
    figure, axes = _page_figure(page)
    for index, caption in enumerate(captions):
        row, column = divmod(index, columns)
        for place, text in enumerate(caption):
            axes.text(
                column * step_x + width / 2, row * step_y + height + 4 + 16 * place, shorten(text, 17), ha="center",
                va="top", fontsize=8.5, fontweight="bold" if place == 0 else None, parse_math=False,
            )  # fmt: skip
    return figure


def plot_nearest_images(
    queries: np.ndarray,
    query_names: Sequence[str],
    neighbors: np.ndarray,
    neighbor_names: Sequence[Sequence[str]],
    distances: np.ndarray,
    space: str,
) -> Figure:
    """Show queries in the first column and their nearest images beside them, as in figure 4 of the paper (right).

    Args:
        queries: ``(Q, H, W, 3)`` uint8.
        query_names: Q class names.
        neighbors: ``(Q, K, H, W, 3)`` uint8, the nearest first.
        neighbor_names: Q times K class names; those that differ from the query's are highlighted.
        distances: ``(Q, K)`` Euclidean distances.
        space: features that were compared, for the title.
    """
    count, nearest = neighbors.shape[:2]
    queries = _resize(queries, 100)
    side = queries.shape[1]
    step_y, step_x, gap, top = side + 24, side + 14, 40, 26
    # Compose all images on one page.
    page = np.full((top + count * step_y, side + gap + nearest * step_x, 3), 255, dtype=np.uint8)
    for row in range(count):
        y = top + row * step_y
        page[y : y + side, :side] = queries[row]
        for column, image in enumerate(_resize(neighbors[row], 100)):
            x = side + gap + column * step_x
            page[y : y + side, x : x + side] = image
    # Label them.
    figure, axes = _page_figure(page)
    style: dict[str, Any] = {"va": "top", "fontsize": 8.5, "parse_math": False}
    axes.text(side / 2, 0, "test image", ha="center", **style)
    title = f"nearest training images by Euclidean distance between {space}; orange: another class"
    axes.text(side + gap, 0, title, ha="left", **style)
    for row, query in enumerate(query_names):
        y = top + row * step_y + side + 4
        axes.text(side / 2, y, shorten(query, 16), fontweight="bold", ha="center", **style)
        for column, (name, distance) in enumerate(zip(neighbor_names[row], distances[row], strict=True)):
            x = side + gap + column * step_x + side / 2
            color = "black" if name == query else TRUE_COLOR
            number = f"{distance:.2f}" if distance < 100 else f"{distance:.4g}"
            axes.text(x, y, f"{shorten(name, 10)} {number}", color=color, ha="center", **style)
    return figure


def plot_top5(predictions: Sequence[Prediction], truths: Sequence[str] | None = None) -> Figure:
    """Show images with their top-5 predictions as bars below, as in figure 4 of the paper (left).

    Args:
        predictions: one per image, with any number of classes.
        truths: true class of each image, whose bar gets another color.
    """
    from matplotlib.patches import Rectangle  # here for start-up time

    columns = min(5 if truths is None else 4, len(predictions))
    rows = math.ceil(len(predictions) / columns)
    bars = max(len(top) for _, _, top in predictions)
    side, title_height, bar_height = 200, 24, 20
    header = 0 if truths is None else 26
    step_x, step_y = side + 20, title_height + side + 8 + bar_height * bars + 14
    page = np.full((header + rows * step_y, columns * step_x - 20, 3), 255, dtype=np.uint8)
    corners = [
        (column * step_x, header + row * step_y + title_height) for row in range(rows) for column in range(columns)
    ]
    for (image, _, _), (x, y) in zip(predictions, corners, strict=False):
        fitted = _fit(image, side)
        left, top_edge = x + (side - fitted.shape[1]) // 2, y + (side - fitted.shape[0]) // 2
        page[top_edge : top_edge + fitted.shape[0], left : left + fitted.shape[1]] = fitted
    figure, axes = _page_figure(page)
    if truths is not None:
        axes.text(
            page.shape[1] / 2, 0, "orange: the true class, named above the image", ha="center", va="top", fontsize=9
        )
    for index, ((_, title, top), (x, y)) in enumerate(zip(predictions, corners, strict=False)):
        text = shorten(title, 24, keep_end=True)
        axes.text(x + side / 2, y - 6, text, ha="center", va="baseline", fontsize=8, parse_math=False)
        for place, (name, value) in enumerate(top):
            color = TRUE_COLOR if truths and name == truths[index] else OTHER_COLOR
            middle = y + side + 8 + bar_height * (place + 0.5)
            corner, width = (x, middle - 0.4 * bar_height), side * value
            axes.add_patch(Rectangle(corner, width, 0.8 * bar_height, color=color, alpha=0.75, linewidth=0))
            label = f"{shorten(name, 28)} {value:.3f}"
            axes.text(x + 4, middle, label, va="center_baseline", fontsize=7, parse_math=False)
    return figure


def response_grid(maps: np.ndarray) -> np.ndarray:
    """Return feature maps tiled into a near-square grid, each scaled to its own range.

    Args:
        maps: ``(C, H, W)`` floating point.

    Returns:
        uint8 ``(rows · (H + 1) + 1, columns · (W + 1) + 1)``, with one-pixel lines between the feature maps.
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


def tile(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Return images of one size tiled in rows, with white lines of ``gap`` pixels between them: ``(H', W', 3)``."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        page[top : top + height, left : left + width] = image
    return page


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as a PNG file on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here for start-up time

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # class names may use a script without a font
        canvas.draw()
    file = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(
        file, format="PNG", compress_level=3
    )  # level 6 takes twice as long
    return file.getvalue()


def _zoom(images: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge by an integer factor without smoothing."""
    return images.repeat(factor, 1).repeat(factor, 2)


def _resize(images: np.ndarray, side: int) -> np.ndarray:
    """Resize square images to about ``side`` pixels: enlarged by an integer factor without smoothing, or reduced."""
    if images.shape[1] <= 1.5 * side:
        return _zoom(images, max(1, round(side / images.shape[1])))
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in images])


def _fit(image: Image.Image, side: int) -> np.ndarray:
    """Return an image scaled to fit a square of ``side`` pixels; small ones are enlarged without smoothing."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    how = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS
    return np.asarray(image.convert("RGB").resize(size, how))


def _page_figure(page: np.ndarray, margin: float = 0.12) -> tuple[Figure, Axes]:
    """Return a figure of exactly the image's size plus a margin in inches, with axes in pixel coordinates."""
    height, width = page.shape[0] / PIXELS_PER_INCH, page.shape[1] / PIXELS_PER_INCH
    figure = new_figure(figsize=(width + 2 * margin, height + 2 * margin))
    left, bottom = margin / (width + 2 * margin), margin / (height + 2 * margin)
    axes = figure.add_axes((left, bottom, 1 - 2 * left, 1 - 2 * bottom))
    axes.imshow(page, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure, axes


def _titled_image(image: np.ndarray, title: str) -> Figure:
    header = np.full((26, max(image.shape[1], 8 * len(title)), 3), 255, dtype=np.uint8)
    body = np.full((image.shape[0], header.shape[1], 3), 255, dtype=np.uint8)
    body[:, : image.shape[1]] = image
    figure, axes = _page_figure(np.concatenate([header, body]))
    axes.text(0, 0, title, va="top", fontsize=9)
    return figure
