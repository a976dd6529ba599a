"""Sharing command: ``alexnet push RUN hf://USER/NAME``."""

from collections.abc import Sequence

from alexnet_pl.cli.parser import add_run, make_parser

DESCRIPTION = """\
Upload a trained run to the Hugging Face Hub: the weights as safetensors, the part of the config that rebuilds the
network, and a model card. Paths and settings of this machine stay here. Needs the extra hub and: hf auth login"""

EPILOG = """\
examples:
  alexnet push runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000 hf://user/alexnet-cifar10
  alexnet evaluate hf://user/alexnet-cifar10 --data-root DIR"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("push", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument("address", metavar="hf://USER/NAME", help="repository, created if it does not exist")
    args = parser.parse_args(arguments)
    from alexnet_pl.inference.hub import parse_address, push  # here for start-up time: --help needs no torch
    from alexnet_pl.inference.model_card import card
    from alexnet_pl.inference.trained_run import load_run

    parse_address(args.address)  # before the run is loaded
    run = load_run(args.run, args.trust)
    about = {"epoch": run.epoch, "result": run.result}
    print(push(args.address, run.net, run.config, about, card(run, args.address)))
