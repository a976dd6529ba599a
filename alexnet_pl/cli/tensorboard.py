"""TensorBoard command: ``alexnet tensorboard [DIR…]``, which ``make dashboard`` runs."""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.cli.parser import make_parser, tcp_port, wait_for_stop
from alexnet_pl.runtime.errors import UserError

DEFAULT_FOLDERS = ("runs", "multirun")

DESCRIPTION = """\
Start TensorBoard on run directories, or on directories of runs, and print its address: 127.0.0.1, which no other
machine can reach. The default is runs/ and multirun/, if they exist."""


def log_folders(given: Sequence[Path]) -> list[Path]:
    """Return the directories to show.

    Raises:
        UserError: one of them does not exist, or there is nothing to show.
    """
    folders = list(given) or [path for path in map(Path, DEFAULT_FOLDERS) if path.is_dir()]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} not found. Give a run directory or a directory of runs.")
        if "," in str(folder) or ":" in str(folder):  # TensorBoard's own separators
            raise UserError(f"{folder} is invalid: TensorBoard cannot read a path with a comma or a colon.")
    if not any(has_events(folder) for folder in folders):
        where = f" in {', '.join(map(str, folders))}" if given else ""
        raise UserError(f"there are no runs yet{where}. Try: make quickstart")
    return folders


def has_events(folder: Path) -> bool:
    """Return True if TensorBoard has written an event file in or below the directory."""
    return any(
        name.startswith("events.out.tfevents.") for _, _, names in os.walk(folder, followlinks=True) for name in names
    )


def check_port(port: int) -> None:
    """Check that a port is free on this machine.

    Raises:
        UserError: it is in use, out of range, or reserved for root.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port={port} is invalid: expected an integer from 1 to 65535.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like the server: a port just released is free
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError as error:
            raise UserError(f"port {port} cannot be used: {error.strerror}. Try one above 1023: PORT=6006") from error
        except OSError as error:
            other = port + 1 if port < 65535 else 6006
            raise UserError(
                f"port {port} is in use, perhaps by another dashboard: http://127.0.0.1:{port}/\nTry PORT={other} "
                f"(--port {other})."
            ) from error


def start(folders: Sequence[Path], port: int) -> str:
    """Start TensorBoard in threads of this process and return its address."""
    from tensorboard import program  # takes seconds, which an error in the arguments need not wait for

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    if len(folders) == 1:
        where = ["--logdir", str(folders[0])]
    else:
        where = ["--logdir_spec", ",".join(f"{folder.name}:{folder}" for folder in folders)]
    server = program.TensorBoard()
    # The fast loader reads neither several directories nor the projector's data.
    server.configure(argv=["tensorboard", *where, "--port", str(port), "--host", "127.0.0.1", "--load_fast", "false"])
    return str(server.launch())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("tensorboard", DESCRIPTION)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="default: runs/ and multirun/")
    parser.add_argument("--port", type=tcp_port, default=6006, help="default: 6006")
    args = parser.parse_args(arguments)
    folders = log_folders(args.folders)
    check_port(args.port)
    wait = wait_for_stop()
    address = start(folders, args.port).replace("localhost", "127.0.0.1")
    print(f"{address}  shows {', '.join(map(str, folders))}  (Ctrl-C ends it)", flush=True)
    wait()
    sys.stdout.flush()
    os._exit(0)  # TensorBoard's threads cannot be joined
