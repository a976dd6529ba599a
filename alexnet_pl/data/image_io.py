"""Image files: decoding any supported format in bounded memory, conversion to RGB, the network's preprocessing."""

import math
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from alexnet_pl.data.transforms import center_crop, normalize
from alexnet_pl.runtime.errors import DataError, one_line

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's readers of raster images. Others start external programs (EPS) or hide an image's true size (ICO)."""

MAX_PIXELS = 120_000_000
"""Largest image that is decoded, in pixels (about 10,950×10,950): 480 MB in Pillow's memory layout."""

_DECODER_COST = {"AVIF": 3, "JPEG2000": 4, "WEBP": 3}
"""Decoders that hold a multiple of Pillow's 4 bytes per pixel. The pixel limit is divided by it."""

REDUCE_ABOVE = 16_000_000
"""Images of more pixels are reduced by an integer factor while they are decoded, before any other conversion."""

_STRIP = 64  # rows of the reduced image that are converted at a time

_ORIENTATION = 0x0112  # EXIF tag

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the image upright."""

_ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Keys of ``Image.info`` in which Pillow looks for the orientation."""


@dataclass(frozen=True)
class Preprocess:
    """The data module's steps for single images: resize, center crop, ``(x / 255 - mean) / std``.

    Args:
        image_size: side of the network's input in pixels.
        mean, std: one number per channel on the [0, 1] pixel scale.
        resize_size: side in pixels that images are resized to before the center crop; None: ``image_size``.
        keep_ratio: scale the shorter side to ``resize_size`` and crop the central square, instead of stretching.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_size: int | None = None
    keep_ratio: bool = False

    def pixels(self, image: Image.Image) -> Tensor:
        """Return ``(3, image_size, image_size)`` uint8, resized bilinearly with antialiasing.

        Raises:
            DataError: the scale of the pixel values is unknown (see :func:`to_rgb`).
        """
        side = self.resize_size or self.image_size
        if self.keep_ratio:
            square = central_square(to_rgb(image), side)
            return center_crop(torch.from_numpy(np.array(square)).permute(2, 0, 1), self.image_size)
        # A view in PIL's memory format, as in the data module, because torchvision's kernels round by memory format.
        pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        return center_crop(resize(pixels[None], [side, side], antialias=True)[0], self.image_size)

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Return N images as normalized float32 ``(N, 3, image_size, image_size)``; a single image is a batch of 1."""
        if isinstance(images, Image.Image):
            images = [images]
        return normalize(torch.stack([self.pixels(image) for image in images]), self.mean, self.std)


# --- decoding -------------------------------------------------------------------------------------------------------


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as upright RGB; of an animation, read the first frame.

    Memory is bounded: the file's stated size is checked before decoding, and images above ``REDUCE_ABOVE`` pixels are
    reduced by an integer factor (JPEG by its DCT scaling, others strip by strip after decoding).

    Raises:
        DataError: the file is not found, is not an image, is corrupt, or has more than ``max_pixels`` pixels.
    """
    with open_image(path, max_pixels) as image:
        return _reduced_rgb(image)


@contextmanager
def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file without decoding it, and raise errors of the block's decoding as :class:`DataError`.

    Raises:
        DataError: as for :func:`read_image`, on one line.
    """
    try:
        if not Path(path).is_file() and Path(path).exists():  # opening a FIFO or a device would block
            raise DataError(f"{path} is not a regular file.")
        with ignored_warnings(), Image.open(path, formats=_formats()) as image:
            limit = max_pixels // _DECODER_COST.get(image.format or "", 1)
            if image.width * image.height > limit:
                raise _too_large(path, f"{image.width}×{image.height}", limit)
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise _too_large(path, f"{int(count[0]):,}" if count else "too many", max_pixels) from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image or has an unsupported format.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} not found.") from error
    except Exception as error:  # Pillow's readers raise almost any exception on a corrupt file
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        raise DataError(f"{path} is corrupt: {one_line(error)}") from error


@contextmanager
def ignored_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings about large images and odd metadata, in all threads, if this is the main one.

    Python's filters belong to the whole process. Blocks of several threads that overlap would restore each other's
    filters, which could leave all warnings off for good. In other threads the block therefore has no effect, and
    whoever starts them enters it around them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _too_large(path: str | Path, size: str, limit: int) -> DataError:
    return DataError(f"{path} has {size} pixels, above the limit of {limit:,}. Downscale it first.")


@lru_cache
def _formats() -> list[str]:
    """Return those of FORMATS that the installed Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def has_image_suffix(path: str | Path) -> bool:
    """Return True if a file's name has the suffix of a supported format and is not hidden."""
    Image.init()
    path = Path(path)
    return Image.EXTENSION.get(path.suffix.lower()) in FORMATS and not path.name.startswith(".")


def _reduced_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert as :func:`to_rgb` does, reduced by an integer factor if larger than ``REDUCE_ABOVE``."""
    if (factor := _reduction(image)) > 1:
        scale = 1 << (factor - 1).bit_length()
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))  # has an effect on JPEG alone
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    if deep and image.mode in ("RGB", "RGBA", "LA"):
        _check_depth(image)
    if (factor := _reduction(image)) == 1:
        return to_rgb(image)
    orientation, divisor = exif_orientation(image), _gray_divisor(image)
    reduced = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
    for top in range(0, reduced.height, _STRIP):
        bottom = min((top + _STRIP) * factor, image.height)
        strip = _rgb(image.crop((0, top * factor, image.width, bottom)), divisor)
        reduced.paste(strip.reduce(factor), (0, top))
    return _upright(reduced, orientation)


def _reduction(image: Image.Image) -> int:
    return math.ceil(math.sqrt(image.width * image.height / REDUCE_ABOVE))


# --- conversion -----------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB, rotated by EXIF orientation, with transparency over white and CMYK converted.

    Gray levels of more than 8 bits are scaled by their range: values up to 4095 count as 12 bits (sensors and scanners
    store them in 16-bit files), values up to 255 as 8 bits, others as 16 bits.

    Raises:
        DataError: integer pixels outside of 16 bits, or floating-point pixels outside of [0, 1].
    """
    image.load()  # some formats have their metadata after the pixels
    image = _upright(image, exif_orientation(image))
    return _rgb(image, _gray_divisor(image))


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation as it is in the file, usually 1 to 8; 1 if there is none or it cannot be read."""
    try:
        orientation: int = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the metadata of an intact photograph may be odd in any way, and Pillow raises almost anything
        return 1
    return orientation


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image upright, without the metadata that would turn it once more.

    ``ImageOps.exif_transpose`` does the same, but keeps the other metadata, and fails on tags that it cannot write.
    """
    method = _TO_UPRIGHT.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    for key in _ORIENTATION_SOURCES:
        turned.info.pop(key, None)
    return turned


def _rgb(image: Image.Image, divisor: int) -> Image.Image:
    if _is_deep_gray(image):
        values = np.asarray(image)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DataError("pixels are not finite.")
        levels = np.rint(values * 255) if image.mode == "F" else values // divisor
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _is_deep_gray(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _gray_divisor(image: Image.Image) -> int:
    """Return what gray levels are divided by to fit 8 bits; 1 for other modes and for floats on the [0, 1] scale."""
    if not _is_deep_gray(image):
        return 1
    plain = image if image.mode in ("I", "I;16", "F") else image.convert("I")
    low, high = cast("tuple[float, float]", plain.getextrema())
    if image.mode == "F" and low >= 0 and high <= 1:
        return 1
    if image.mode != "F" and low >= 0 and high <= 65535:
        return 1 if high <= 255 else 16 if high <= 4095 else 256
    raise DataError(f"pixels from {low:g} to {high:g}, an unknown scale. Save it with 8 or 16 bits.")


def _check_depth(image: Image.Image) -> None:
    """Refuse 16-bit color of at most 12 significant bits: Pillow keeps the high byte alone, which would be black."""
    bands = cast("tuple[tuple[int, int], ...]", image.getextrema())
    if max(high for _, high in bands[: -1 if image.mode.endswith("A") else None]) <= 15:
        raise DataError("16-bit color with at most 12 bits used would turn black. Save it with 8 bits per channel.")


def central_square(image: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side to ``side`` pixels and crop the central square (paper, section 2), bilinearly."""
    shorter = min(image.size)
    left, top = ((length - shorter) / 2 for length in image.size)
    box = (left, top, left + shorter, top + shorter)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files named, and for a directory every regular file below it, sorted, without hidden ones.

    Raises:
        DataError: a directory holds no files.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        found = sorted(path / file for file in inside if not any(part.startswith(".") for part in file.parts))
        if not found:
            raise DataError(f"{path} holds no files.")
        files += found
    return files
