"""Building blocks of all commands: argument parser, shared arguments, output files, waiting for Ctrl-C."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

from alexnet_pl.runtime.errors import UserError, printable
from alexnet_pl.runtime.files import write_atomic

RUN_HELP = "run directory (its best checkpoint is used), a checkpoint file, or hf://USER/NAME"


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, as all others of this project."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage and exit with status 2."""
        found = re.match(r"argument (\S+): expected .*arguments?$", message)
        if found and (
            usage := re.search(rf"(?:\[| ){re.escape(found[1].split('/')[0])} ([^\]]+)", self.format_usage())
        ):
            message = f"{found[1]} is invalid: expected {' '.join(usage[1].split())}"
        print(f"error: {printable(message).rstrip('.')}. {self.prog} --help describes the arguments.", file=sys.stderr)
        sys.exit(2)


def make_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser for ``alexnet COMMAND`` whose description and epilog keep their line breaks."""
    return Parser(
        prog=f"alexnet {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run(parser: argparse.ArgumentParser, text: str = RUN_HELP) -> None:
    """Add RUN and ``--trust``, the arguments of every command that loads a trained run."""
    parser.add_argument("run", metavar="RUN", help=text)
    parser.add_argument(
        "--trust",
        type=_module,
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module of your own that the run may import, for a network from your own file (repeatable)",
    )


def _module(name: str) -> str:
    """Return ``name``, importable from the current directory as well, which the ``alexnet`` script does not search."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there can shadow an installed package
    return name


def add_data_root(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--data-root``; a URL stays a string, because a path would collapse its slashes."""
    parser.add_argument("--data-root", type=_path_or_url, metavar="DIR", help=text)


def _path_or_url(text: str) -> str | Path:
    return text if "://" in text else Path(text)


def positive_int(text: str) -> int:
    """Return ``text`` as an integer of at least 1; a type for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected an integer of at least 1")
    return value


def tcp_port(text: str) -> int:
    """Return ``text`` as the number of a TCP port, from 1 to 65535; a type for argparse."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value <= 65_535:
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected a number from 1 to 65535")
    return value


def output_file(text: str) -> Path:
    """Return the path of a file to write, which no directory is in the place of; a type for argparse."""
    path = Path(text)
    if not path.name or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected a file, and it is a directory")
    return path


def write_output(path: Path, text: str) -> None:
    """Write the file that the user asked for, atomically and as UTF-8.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def wait_for_stop() -> Callable[[], None]:
    """Return a function that waits for Ctrl-C, SIGTERM or SIGHUP, for commands that serve until they are stopped.

    Signals are noticed from the call of this function on. A SimpleQueue is safe to use in a signal handler; an Event
    is not: its lock may be held by the wait that the handler interrupts.
    """
    received: SimpleQueue[int] = SimpleQueue()

    def stop(number: int, frame: FrameType | None) -> None:
        received.put(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)

    def wait() -> None:
        received.get()

    return wait
