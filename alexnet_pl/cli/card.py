"""cli.card."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.inference.model_card import card
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import UserError

DESCRIPTION = """\
A model card in Markdown, with the usual sections (Mitchell et al. 2019): the model, its use, data, recipe, results,
limits and licence, filled from the run. Nothing is measured anew: every figure is from the run's result.json."""

EPILOG = """\
examples:
  python -m alexnet_pl card runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000
  python -m alexnet_pl card RUN --out README.md"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl card", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    given = parser.parse_args(arguments)
    text = card(load_run(given.run))
    if given.out is None:
        print(text, end="")
        return
    try:
        given.out.write_text(text)
    except OSError as error:
        raise UserError(f"{given.out} cannot be written: {error}") from error
    print(given.out)
