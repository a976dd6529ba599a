"""Principal components of a data set's colours, for PCA colour: ``python -m alexnet_pl color_pca``; see ``--help``."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from alexnet_pl.config.resolvers import register_resolvers
from alexnet_pl.data.color_pca import ColorStatistics, color_statistics
from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.runtime.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"

DESCRIPTION = """\
Compute the principal components of the RGB pixels of a training split, for the augmentation of the paper's section 4.1.

Takes the settings of train.py that choose data, and prints a file for conf/augment/color/. Only training images are
looked at, never validation or test images, at the size they are stored in (data.image_size)."""

EPILOG = """\
examples:
  python -m alexnet_pl color_pca data=cifar10 data.image_size=32
  python -m alexnet_pl color_pca data=digits --output conf/augment/color/digits.yaml
  python train.py data=digits augment=crop_flip_color augment/color=digits"""


def as_yaml(found: ColorStatistics, data: ImageDataModule, command: str) -> str:
    """An option of ``conf/augment/color/``, with what it was computed from in its first lines."""

    def listed(values: np.ndarray, digits: int = 6) -> str:
        return "[" + ", ".join(f"{value + 0.0:.{digits}f}" for value in values) + "]"

    rows = "\n".join(f"  - {listed(row)}" for row in found.components)
    return (
        f"# Colours of {data.name}: {found.images:,} training images (split_seed {data.split_seed}), "
        f"{found.pixels:,} pixels, mean {listed(found.mean, 4)}.\n"
        f"# {command}\n"
        "_target_: alexnet_pl.data.PCAColor\n"
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
        prog="python -m alexnet_pl color_pca", description=DESCRIPTION, epilog=EPILOG,
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
    text = as_yaml(color_statistics(data.training_images()), data, " ".join(["python -m alexnet_pl color_pca", *shown]))
    if given.output:
        write_new(given.output, text)
        print(f"wrote {given.output}", file=sys.stderr)
    else:
        print(text, end="")
