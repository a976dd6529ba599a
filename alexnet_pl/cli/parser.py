"""The argument parser that all commands share."""

import argparse

RUN_HELP = "run directory (its best checkpoint is used) or a checkpoint file"


def make_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser for ``alexnet COMMAND`` whose description and epilog keep their line breaks."""
    return argparse.ArgumentParser(
        prog=f"alexnet {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
