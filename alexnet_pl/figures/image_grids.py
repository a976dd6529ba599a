"""Figures made of images: pure functions, arrays in, a matplotlib figure or an array out. Charts: figures.py.

Images are uint8 ``(N, H, W, 3)`` arrays throughout. Where a figure holds many of them they are put into one array
first: an axes for each image takes matplotlib ten times as long.
"""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from alexnet_pl.figures.charts import COLOURS

TRUE_COLOUR, OTHER_COLOUR = COLOURS[1], COLOURS[5]

INCH = 100
"""Pixels an inch, where a figure's size follows from its images."""

Answer = tuple[Image.Image, str, Sequence[tuple[str, float]]]


def conv1_kernels(kernels: np.ndarray, groups: int = 1) -> Figure:
    """The first layer's kernels as colour images, as in figure 3 of the paper: one block of rows a group.

    Each kernel is scaled by its own largest magnitude; middle grey is a weight of 0.

    Args:
        kernels: ``(C, 3, k, k)`` floating, or ``(C, 1, k, k)`` for grey.
        groups: of the layer that reads the maps; the first ``C / groups`` kernels are the first group's.

    Raises:
        ValueError: neither 1 nor 3 input channels, or C is no multiple of ``groups``.
    """
    count, channels, side, _ = kernels.shape
    if channels not in (1, 3) or count % groups:
        raise ValueError(f"{count} kernels of {channels} channels in {groups} groups cannot be shown as images")
    kernels = np.nan_to_num(np.asarray(kernels, dtype=np.float64))
    largest = np.maximum(np.abs(kernels).max((1, 2, 3), keepdims=True), np.finfo(np.float64).tiny)
    images = np.rint(127.5 + 127.5 * kernels / largest).astype(np.uint8).transpose(0, 2, 3, 1)
    if channels == 1:
        images = images.repeat(3, axis=3)
    each = count // groups
    columns = min(each, 16)  # the paper's figure has 48 kernels a group in three rows of 16
    while columns > 8 and each % columns:
        columns -= 1
    if each % columns:
        columns = min(each, 16)
    zoom = max(1, 44 // side)
    blocks = [
        wall(_zoomed(block, zoom), columns, gap=zoom + 1) for block in images.reshape(groups, each, side, side, 3)
    ]
    between = np.full((4 * (zoom + 1), blocks[0].shape[1], 3), 255, dtype=np.uint8)
    stacked = np.concatenate([part for block in blocks for part in (between, block)][1:])
    said = f"{count} kernels of {side}×{side}×{channels}" + (f", {groups} groups" if groups > 1 else "")
    return _one_image(stacked, f"{said}; grey is 0, each on its own scale")


def image_wall(images: np.ndarray, captions: Sequence[Sequence[str]], columns: int = 8) -> Figure:
    """Images side by side, each with its caption below.

    Args:
        captions: for each image its lines, of about 16 characters; the first one in bold.
    """
    columns = min(columns, len(images))
    lines = max(map(len, captions), default=0)
    images = _fitted(images, 100)
    height, width = images.shape[1:3]
    step_y, step_x = height + 16 * lines + 10, width + 36
    rows = math.ceil(len(images) / columns)
    page = np.full((rows * step_y, columns * step_x - 36, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        page[row * step_y : row * step_y + height, column * step_x : column * step_x + width] = image
    figure, axes = _page(page)
    for index, caption in enumerate(captions):
        row, column = divmod(index, columns)
        for place, text in enumerate(caption):
            axes.text(
                column * step_x + width / 2, row * step_y + height + 4 + 16 * place, _cut(text, 17), ha="center",
                va="top", fontsize=8.5, fontweight="bold" if place == 0 else None, parse_math=False,
            )  # fmt: skip
    return figure


def nearest_images(
    queries: np.ndarray,
    query_names: Sequence[str],
    found: np.ndarray,
    found_names: Sequence[Sequence[str]],
    distances: np.ndarray,
    space: str,
) -> Figure:
    """Queries in the first column, their nearest images beside them, as in figure 4 of the paper (right).

    Args:
        queries: ``(Q, H, W, 3)`` uint8.
        found: ``(Q, K, H, W, 3)`` uint8, the nearest first.
        found_names: Q times K class names; those that are not the query's are marked.
        distances: ``(Q, K)`` Euclidean.
        space: what they were compared in, such as ``fc7 features (4,096)``.
    """
    count, nearest = found.shape[:2]
    queries = _fitted(queries, 100)
    side = queries.shape[1]
    step_y, step_x, apart, top = side + 24, side + 14, 40, 26
    page = np.full((top + count * step_y, side + apart + nearest * step_x, 3), 255, dtype=np.uint8)
    for row in range(count):
        y = top + row * step_y
        page[y : y + side, :side] = queries[row]
        for column, image in enumerate(_fitted(found[row], 100)):
            x = side + apart + column * step_x
            page[y : y + side, x : x + side] = image
    figure, axes = _page(page)
    settings = {"ha": "center", "va": "top", "fontsize": 8.5, "parse_math": False}
    axes.text(side / 2, 0, "test image", **settings)
    title = f"nearest training images by Euclidean distance in {space}; orange: another class"
    axes.text(side + apart, 0, title, **{**settings, "ha": "left"})
    for row, query in enumerate(query_names):
        y = top + row * step_y + side + 4
        axes.text(side / 2, y, _cut(query, 16), fontweight="bold", **settings)
        for column, (name, distance) in enumerate(zip(found_names[row], distances[row], strict=True)):
            x = side + apart + column * step_x + side / 2
            colour = "black" if name == query else TRUE_COLOUR
            far = f"{distance:.2f}" if distance < 100 else f"{distance:.4g}"
            axes.text(x, y, f"{_cut(name, 10)} {far}", color=colour, **settings)
    return figure


def picture_bars(answers: Sequence[Answer], truths: Sequence[str] | None = None) -> Figure:
    """Pictures with the likeliest classes below as bars, as in figure 4 of the paper (left).

    Args:
        answers: picture, title, and ``(name, probability)`` pairs, the likeliest first.
        truths: the true class of each picture; its bar is drawn in another colour.
    """
    columns = min(5 if truths is None else 4, len(answers))
    rows = math.ceil(len(answers) / columns)
    bars = max(len(top) for _, _, top in answers)
    heights = [2.0, 0.3 + 0.2 * bars]
    figure = Figure(figsize=(2.2 * columns, sum(heights) * rows), layout="constrained")
    if truths is not None:
        figure.suptitle("orange: the true class, above the image", fontsize=9)
    grid = figure.subplots(2 * rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights * rows})
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (picture, title, top) in enumerate(answers):
        row, column = divmod(index, columns)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        above.imshow(picture)
        above.set_title(title if len(title) <= 24 else f"…{title[-23:]}", fontsize=8, parse_math=False)
        colours = [TRUE_COLOUR if truths and name == truths[index] else OTHER_COLOUR for name, _ in top]
        below.barh(range(len(top)), [value for _, value in top], color=colours, height=0.8, alpha=0.75)
        for place, (name, value) in enumerate(top):
            below.text(0.02, place, f"{_cut(name, 28)} {value:.3f}", va="center", fontsize=7, parse_math=False)
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


def wall(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Images of one size side by side in rows, white lines of ``gap`` pixels between them: ``(H', W', 3)`` uint8."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        page[top : top + height, left : left + width] = image
    return page


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file, on white."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script that no font here has
        canvas.draw()
    file = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(file, format="PNG")
    return file.getvalue()


def _zoomed(images: np.ndarray, factor: int) -> np.ndarray:
    """Blown up in whole steps without smoothing."""
    return images.repeat(factor, 1).repeat(factor, 2)


def _fitted(images: np.ndarray, side: int) -> np.ndarray:
    """Square images at about ``side`` pixels: blown up in whole steps without smoothing, or scaled down."""
    if images.shape[1] <= 1.5 * side:
        return _zoomed(images, max(1, round(side / images.shape[1])))
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in images])


def _page(page: np.ndarray, margin: float = 0.12) -> tuple[Figure, Axes]:
    """A figure of just this image's size with a margin in inches, to write on in pixel coordinates."""
    height, width = page.shape[0] / INCH, page.shape[1] / INCH
    figure = Figure(figsize=(width + 2 * margin, height + 2 * margin))
    place = (margin / (width + 2 * margin), margin / (height + 2 * margin))
    axes = figure.add_axes((*place, 1 - 2 * place[0], 1 - 2 * place[1]))
    axes.imshow(page, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure, axes


def _one_image(image: np.ndarray, title: str) -> Figure:
    room = np.full((26, max(image.shape[1], 8 * len(title)), 3), 255, dtype=np.uint8)
    below = np.full((image.shape[0], room.shape[1], 3), 255, dtype=np.uint8)
    below[:, : image.shape[1]] = image
    figure, axes = _page(np.concatenate([room, below]))
    axes.text(0, 0, title, va="top", fontsize=9)
    return figure


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
