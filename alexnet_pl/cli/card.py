"""Model card command: ``alexnet card RUN``."""

from collections.abc import Sequence

from alexnet_pl.cli.parser import add_run, make_parser, output_file, write_output

DESCRIPTION = """\
Write a model card in Markdown with the usual sections (Mitchell et al. 2019): model, intended use, data, recipe,
results, limitations and license. Nothing is measured again: every number comes from the run's result.json."""

EPILOG = """\
examples:
  alexnet card runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000
  alexnet card RUN --out README.md"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("card", DESCRIPTION, EPILOG)
    add_run(parser, "run directory")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="default: standard output")
    args = parser.parse_args(arguments)
    from alexnet_pl.inference.model_card import card  # here for start-up time: --help needs no torch
    from alexnet_pl.inference.trained_run import load_run

    text = card(load_run(args.run, args.trust))
    if args.out is None:
        print(text, end="")
    else:
        write_output(args.out, text)
        print(args.out)
