"""Principal components of a data set's colours, for PCA colour: ``python -m alexnet_pl.color_pca``; see ``--help``."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from alexnet_pl.data.module import ImageDataModule
from alexnet_pl.errors import ConfigError, DataError, one_line_errors
from alexnet_pl.resolvers import register_resolvers

CONF = Path(__file__).resolve().parent.parent / "conf"

DESCRIPTION = """\
Compute the principal components of the RGB pixels of a training split, for the augmentation of the paper's section 4.1.

Takes the settings of train.py that choose data, and prints a file for conf/augment/color/. Only training images are
looked at, never validation or test images, at the size they are stored in (data.image_size)."""

EPILOG = """\
examples:
  python -m alexnet_pl.color_pca data=cifar10 data.image_size=32
  python -m alexnet_pl.color_pca data=digits --output conf/augment/color/digits.yaml
  python train.py data=digits augment=crop_flip_color augment/color=digits"""


@dataclass(frozen=True)
class ColorStatistics:
    """What the RGB pixels of a data set are like, on the [0, 1] pixel scale.

    Attributes:
        mean: ``(3,)`` float64, of each channel.
        components: ``(3, 3)`` float64, a unit row for each principal component, the strongest first; the largest entry
            of a row is positive, since the sign of an eigenvector says nothing.
        std: ``(3,)`` float64, standard deviation along each: the roots of the covariance's eigenvalues.
        images: how many there were.
        pixels: how many there were.
    """

    mean: np.ndarray
    components: np.ndarray
    std: np.ndarray
    images: int
    pixels: int


def color_statistics(batches: Iterable[Tensor]) -> ColorStatistics:
    """Principal components of all pixels of uint8 ``(B, 3, H, W)`` batches, read once.

    The sums are of whole numbers, so in float64 they are exact up to 2**53: over 130 thousand million pixels.

    Raises:
        DataError: no pixel at all.
    """
    total, products, images, pixels = np.zeros(3), np.zeros((3, 3)), 0, 0
    for batch in batches:
        values = batch.cpu().numpy().transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        total += values.sum(1)
        products += values @ values.T
        images, pixels = images + len(batch), pixels + values.shape[1]
    if not pixels:
        raise DataError("There are no training images to take colours from.")
    mean = total / pixels
    variances, vectors = np.linalg.eigh(products / pixels - np.outer(mean, mean))
    components = vectors.T[::-1]
    largest = np.take_along_axis(components, np.abs(components).argmax(1, keepdims=True), axis=1)
    # Grey images have one component; rounding can leave the variance of the others a little below 0.
    std = np.sqrt(np.clip(variances[::-1], 0, None))
    return ColorStatistics(mean / 255, components * np.sign(largest), std / 255, images, pixels)


def as_yaml(found: ColorStatistics, data: ImageDataModule, command: str) -> str:
    """An option of ``conf/augment/color/``, with what it was computed from in its first lines."""

    def listed(values: np.ndarray, digits: int = 6) -> str:
        return "[" + ", ".join(f"{value + 0.0:.{digits}f}" for value in values) + "]"

    rows = "\n".join(f"  - {listed(row)}" for row in found.components)
    return (
        f"# Colours of {data.name}: {found.images:,} training images (split_seed {data.split_seed}), "
        f"{found.pixels:,} pixels, mean {listed(found.mean, 4)}.\n"
        f"# {command}\n"
        "_target_: alexnet_pl.augment.PCAColor\n"
        "alpha_std: 0.1  # the paper's\n"
        f"std: {listed(found.std)}  # along each component, on the [0, 1] pixel scale\n"
        f"components:  # red, green, blue\n{rows}\n"
    )


def data_from(overrides: Sequence[str]) -> ImageDataModule:
    """The data module that ``train.py`` with these settings would train on.

    Raises:
        ConfigError: a setting without ``=``, and whatever the data module refuses.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override} is no setting. Choose data with data=NAME, as for train.py.")
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, "run_dir=."])
    cfg.data.augment = None
    return instantiate(cfg.data)


def write_new(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        ConfigError: it exists, or its folder does not.
    """
    if path.exists():
        raise ConfigError(f"{path} exists. Choose another name, or remove it first.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder. Options of the command line are in {CONF / 'augment/color'}.")
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}-") as folder:
        scratch = Path(folder) / path.name
        scratch.write_text(text)
        os.replace(scratch, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl.color_pca", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="as for train.py: data=…, data.root=…")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, such as conf/augment/color/NAME.yaml")
    given = parser.parse_args(arguments)
    if given.output and given.output.exists():
        raise ConfigError(f"{given.output} exists. Choose another name, or remove it first.")
    data = data_from(given.settings)
    data.prepare_data()
    data.setup()
    shown = [setting for setting in given.settings if not setting.startswith("data.root=")]
    text = as_yaml(color_statistics(data.training_images()), data, " ".join(["python -m alexnet_pl.color_pca", *shown]))
    if given.output:
        write_new(given.output, text)
        print(f"wrote {given.output}", file=sys.stderr)
    else:
        print(text, end="")


if __name__ == "__main__":
    with one_line_errors():
        main()
