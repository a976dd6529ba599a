"""From a picture file of any kind to the pixels that a network was trained on."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from alexnet_pl.data.transforms import center_crop, normalize
from alexnet_pl.runtime.errors import DataError

# Of Pillow's readers those for pictures. Others, such as EPS, start programs of their own.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")

MAX_PIXELS = 178_956_970
"""Largest picture read, in pixels: Pillow's own limit against decompression bombs, about 13,400×13,400."""


@dataclass(frozen=True)
class Preprocess:
    """The data module's own steps for single pictures: resize, cut the centre, ``(x / 255 - mean) / std``.

    Args:
        image_size: side in pixels of what the network takes.
        mean, std: one number a channel on the [0, 1] pixel scale.
        resize_size: side in pixels that pictures are resized to before the centre is cut; None: ``image_size``.
        keep_ratio: whether that is the shorter side, and the central square of it is cut; else both sides.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_size: int | None = None
    keep_ratio: bool = False

    def pixels(self, picture: Image.Image) -> Tensor:
        """``(3, image_size, image_size)`` uint8: bilinear with antialiasing.

        Raises:
            DataError: pixel values whose scale is unknown (see :func:`to_rgb`).
        """
        side = self.resize_size or self.image_size
        if self.keep_ratio:
            square = central_square(to_rgb(picture), side)
            return center_crop(torch.from_numpy(np.array(square)).permute(2, 0, 1), self.image_size)
        # A view with PIL's memory order, as the data module has it: torchvision's kernels round by memory order.
        image = torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1)
        return center_crop(resize(image[None], [side, side], antialias=True)[0], self.image_size)

    def __call__(self, pictures: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Normalised float32 ``(N, 3, image_size, image_size)`` of N pictures; one picture is a batch of one."""
        if isinstance(pictures, Image.Image):
            pictures = [pictures]
        return normalize(torch.stack([self.pixels(picture) for picture in pictures]), self.mean, self.std)


def read_picture(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file as RGB, upright; of an animation its first frame.

    Raises:
        DataError: no such file, no picture, damaged, or more than ``max_pixels`` pixels. One line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata
            with Image.open(path, formats=_formats()) as picture:
                size = f"{picture.width}×{picture.height} pixels"
                if picture.width * picture.height <= max_pixels:
                    return to_rgb(picture)
    except Image.DecompressionBombError:
        size = "a size"
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is no picture, or of a kind that is not read here.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except Exception as error:  # Pillow's readers raise almost anything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as a picture: {reason}") from error
    raise DataError(f"{path} has {size}, above the {max_pixels:,} pixels that are read. Scale it down first.")


@lru_cache
def _formats() -> list[str]:
    """Those of FORMATS that the installed Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def has_picture_suffix(path: Path) -> bool:
    """Whether a file is named like a picture of a kind that is read, and not hidden."""
    Image.init()
    return Image.EXTENSION.get(path.suffix.lower()) in FORMATS and not path.name.startswith(".")


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, turned as EXIF says; transparency over white, 16-bit grey by its high byte, CMYK converted.

    Raises:
        DataError: 32-bit or floating-point pixels outside of the 16-bit or the [0, 1] scale.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(picture), picture.mode)).convert("RGB")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def central_square(picture: Image.Image, side: int) -> Image.Image:
    """The central square of a picture whose shorter side is scaled to ``side`` pixels (paper, section 2), bilinear."""
    shorter = min(picture.size)
    left, top = ((length - shorter) / 2 for length in picture.size)
    box = (left, top, left + shorter, top + shorter)
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=box)


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey levels as uint8. Pillow would clip what is above 255 instead of scaling it."""
    low, high = float(values.min()), float(values.max())
    if mode == "F" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if mode != "F" and low >= 0 and high <= 65535:
        return (values.astype(np.int64) >> 8).astype(np.uint8)
    raise DataError(f"pixels from {low:g} to {high:g}, a scale that is not known. Save it with 8 or 16 bits.")


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """The files named, and for a folder every file in it and below it by name, hidden ones left out.

    Raises:
        DataError: a folder without files.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        found = sorted(path / file for file in inside if not any(part.startswith(".") for part in file.parts))
        if not found:
            raise DataError(f"{path} is a folder without files.")
        files += found
    return files
