"""TensorBoard on runs: ``python -m alexnet_pl tensorboard [FOLDER…]``, which is what ``make dashboard`` starts."""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.runtime.errors import UserError

DEFAULT_FOLDERS = ("runs", "multirun")

DESCRIPTION = """\
Start TensorBoard on run folders, or on folders of runs, and print its address: 127.0.0.1, so that no other machine
reaches it. Without a folder it takes runs/ and multirun/, as far as they are there."""


def log_folders(given: Sequence[Path]) -> list[Path]:
    """The folders to show.

    Raises:
        UserError: one does not exist, or there is nothing in them to show.
    """
    folders = list(given) or [path for path in map(Path, DEFAULT_FOLDERS) if path.is_dir()]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist. Give a run folder or a folder of runs.")
        if "," in str(folder) or ":" in str(folder):  # TensorBoard's own separators
            raise UserError(f"{folder}: TensorBoard cannot read a folder with a comma or a colon in its path.")
    if not any(has_events(folder) for folder in folders):
        where = f" in {', '.join(map(str, folders))}" if given else ""
        raise UserError(f"there are no runs yet{where}. Try: make quickstart")
    return folders


def has_events(folder: Path) -> bool:
    """Whether TensorBoard has written anything in or below it."""
    return any(
        name.startswith("events.out.tfevents.") for _, _, names in os.walk(folder, followlinks=True) for name in names
    )


def check_port(port: int) -> None:
    """Find out whether a port is free on this machine.

    Raises:
        UserError: it is taken, no port at all, or not to be had by a plain user.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"{port} is no port: it is a number from 1 to 65535.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError as error:
            raise UserError(f"port {port} cannot be used: {error.strerror}. Try one above 1023: PORT=6006") from error
        except OSError as error:
            other = port + 1 if port < 65535 else 6006
            raise UserError(
                f"port {port} is taken, perhaps by another dashboard: http://127.0.0.1:{port}/\nTry PORT={other} "
                f"(--port {other})."
            ) from error


def start(folders: Sequence[Path], port: int) -> str:
    """Start TensorBoard in this process, in threads of its own.

    Returns:
        Its address.
    """
    from tensorboard import program

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    if len(folders) == 1:
        where = ["--logdir", str(folders[0])]
    else:
        where = ["--logdir_spec", ",".join(f"{folder.name}:{folder}" for folder in folders)]
    server = program.TensorBoard()
    # Its fast loader reads neither several folders nor the projector's data.
    server.configure(argv=["tensorboard", *where, "--port", str(port), "--host", "127.0.0.1", "--load_fast", "false"])
    return server.launch()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m alexnet_pl tensorboard", description=DESCRIPTION)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: runs/ and multirun/")
    parser.add_argument("--port", type=int, default=6006, help="default: 6006")
    given = parser.parse_args(arguments)
    folders = log_folders(given.folders)
    check_port(given.port)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    address = start(folders, given.port).replace("localhost", "127.0.0.1")
    print(f"{address}  shows {', '.join(map(str, folders))}  (Ctrl-C ends it)", flush=True)
    ended.wait()
    sys.stdout.flush()
    os._exit(0)  # TensorBoard's threads are not made to be waited for
