"""Color PCA command: ``alexnet color_pca data=NAME`` computes the RGB principal components of a training split."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_pl.cli.parser import make_parser, output_file, write_output
from alexnet_pl.config.compose import CONF, compose
from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.runtime.commands import shell_join
from alexnet_pl.runtime.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from alexnet_pl.data.color_pca import ColorStatistics
    from alexnet_pl.data.datamodule import ImageDataModule

DESCRIPTION = """\
Compute the principal components of the RGB pixels of a training split, for the augmentation of the paper's section 4.1.

Takes the overrides of train.py that select data and prints a file for conf/augment/color/. Only training images are
read, at their stored size (data.image_size); validation and test images are not touched."""

EPILOG = """\
examples:
  alexnet color_pca data=cifar10 data.image_size=32
  alexnet color_pca data=digits --output conf/augment/color/digits.yaml
  alexnet train data=digits augment=crop_flip_color augment/color=digits"""


def as_yaml(found: ColorStatistics, data: ImageDataModule, command: str) -> str:
    """Return a file for ``conf/augment/color/`` whose first lines say what it was computed from."""

    def listed(values: np.ndarray, digits: int = 6) -> str:
        return "[" + ", ".join(f"{value + 0.0:.{digits}f}" for value in values) + "]"

    rows = "\n".join(f"  - {listed(row)}" for row in found.components)
    return (
        f"# Colors of {data.name}: {found.images:,} training images (split_seed {data.split_seed}), "
        f"{found.pixels:,} pixels, mean {listed(found.mean, 4)}.\n"
        f"# {command}\n"
        "_target_: alexnet_pl.data.PCAColor\n"
        "alpha_std: 0.1  # the paper's value\n"
        f"std: {listed(found.std)}  # along each component, on the [0, 1] pixel scale\n"
        f"components:  # red, green, blue\n{rows}\n"
    )


def data_from(overrides: Sequence[str]) -> ImageDataModule:
    """Return the data module that ``train.py`` would train on with these overrides.

    Raises:
        ConfigError: an override without ``=``, or one that the data module refuses.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override} is invalid: expected KEY=VALUE, such as data=cifar10.")
    cfg = compose([*overrides, "run_dir=."])
    cfg.data.augment = None
    data: ImageDataModule = instantiate(cfg.data)
    return data


def check_new(path: Path) -> None:
    """Check that a file can be created, before minutes are spent on its content.

    Raises:
        ConfigError: it exists, or its directory does not.
    """
    if path.exists():
        raise ConfigError(f"{path} already exists. Choose another name, or remove it first.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path.parent} not found. Color options are stored in {CONF / 'augment/color'}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("color_pca", DESCRIPTION, EPILOG)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as for train.py: data=…, data.root=…")
    parser.add_argument(
        "--output", type=output_file, metavar="FILE", help="file to write, such as conf/augment/color/NAME.yaml"
    )
    args = parser.parse_args(arguments)
    if args.output:
        check_new(args.output)
    from alexnet_pl.data.color_pca import color_statistics  # here for start-up time: --help needs no torch

    data = data_from(args.overrides)
    data.prepare_data()
    data.setup()
    shown = [override for override in args.overrides if not override.startswith("data.root=")]
    text = as_yaml(color_statistics(data.training_images()), data, shell_join(["alexnet", "color_pca", *shown]))
    if args.output:
        check_new(args.output)  # it may have appeared meanwhile
        write_output(args.output, text)
        print(f"wrote {args.output}", file=sys.stderr)
    else:
        print(text, end="")
