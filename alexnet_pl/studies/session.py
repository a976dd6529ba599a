"""studies.session."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from alexnet_pl.runtime.signals import GracefulShutdown, RunInterrupted
from alexnet_pl.studies.store import LOCKS, Study, progress

# --- one point ------------------------------------------------------------------------------------------------------


@dataclass
class _Command:
    """The command that this process carries out."""

    study: Study
    points: list[str]
    again: str  # how to go on with it
    stop: GracefulShutdown | None = None  # while workers run the points, who are to save before it ends


_command: _Command | None = None  # a worker of a parallel launcher does not know it


def current_command() -> _Command | None:
    return _command


def set_command(command: _Command) -> None:
    global _command
    _command = command


def say_how_to_go_on() -> None:
    """The last words of a command that carries out a study; nothing of any other."""
    if _command is not None:
        print_line(f"\n{progress(_command.study, _command.points)}\n{_command.again}")


# --- workers of a parallel launcher -----------------------------------------------------------------------------------

OWNER = "ALEXNET_PL_STUDY"
"""Environment variable that names the process whose workers run the points."""

WAITS = ("joblib", "submitit_local")
"""Launchers whose workers end with the command, and are given the time to save."""


@contextmanager
def as_worker(study: Study) -> Iterator[bool]:
    """Stop when :func:`stop_workers` asks for it, and end with what was asked for, not with an error.

    Yields:
        Whether it has asked already. This worker is noted first: either it is found, or it finds the request.
    """
    owner = os.environ.get(OWNER, "")
    record = study.root / LOCKS / f"{socket.gethostname()}-{os.getpid()}.worker"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes; the owner passes it on
    stop = GracefulShutdown()
    stop.install()
    try:
        record.write_text(owner)
        yield (study.root / LOCKS / f"{owner}.stop").exists()
    except (RunInterrupted, SystemExit):
        print_line(f"{study.root.name}: a worker has stopped")
    finally:
        stop.restore()
        record.unlink(missing_ok=True)


def stop_workers() -> None:
    """Ask the workers of this command to save and stop, and to begin no other point."""
    locks, owner, here = _command.study.root / LOCKS, os.environ[OWNER], socket.gethostname()
    (locks / f"{owner}.stop").touch()
    for record in locks.glob(f"{here}-*.worker"):
        with suppress(OSError):  # it has just ended
            if record.read_text() == owner:
                os.kill(int(record.stem.rpartition("-")[2]), signal.SIGTERM)


def print_line(text: str) -> None:
    """To the terminal alone: it is about the study, not for the log of a point."""
    print(text, flush=True)
