"""Single-node launcher: start the ranks as torchrun would, pass signals on, stop all when one fails."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO

from alexnet_pl.distributed.collectives import RankFailedError
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.errors import user_environment
from alexnet_pl.runtime.signals import stop_signals
from alexnet_pl.runtime.system import usable_cores

log = logging.getLogger(__name__)

GRACE_SECONDS = 20
"""Time for the other ranks to end after one has ended, before they are killed."""

PARENT = "ALEXNET_PL_PARENT"
"""Environment variable with the process ID of a launcher, whose end the runs that it started notice."""

_Rank = subprocess.Popen[bytes]


def launch(count: int, run_dir: Path, resume_command: str) -> None:
    """Run this process's command as ``count`` ranks on this node and wait until they have ended.

    Signals are passed on. If a rank fails, the others are stopped. If the launcher is killed, the ranks stop by
    themselves (:func:`end_with_parent`).

    Args:
        resume_command: command that resumes the run, for the message.

    Raises:
        RankFailedError: a rank was killed.
        SystemExit: a rank failed; with its exit status, and its message printed.
    """
    log.info(f"        {count} ranks")
    with tempfile.TemporaryDirectory() as scratch:
        errors = [Path(scratch) / f"{rank}.err" for rank in range(1, count)]
        with ExitStack() as files:  # the ranks keep them open
            ranks = _start(count, run_dir, [files.enter_context(path.open("wb")) for path in errors])

        def pass_on(number: int, frame: FrameType | None) -> None:
            for rank in ranks:
                rank.send_signal(number)  # does nothing to one that has ended

        before = {number: signal.signal(number, pass_on) for number in stop_signals()}
        try:
            failed = _wait(ranks)
        finally:
            _stop(ranks)
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed is not None:
            messages = ["", *(path.read_text(encoding="utf-8", errors="replace") for path in errors)]
            _report(failed, ranks[failed].returncode, messages, resume_command)


def _start(count: int, run_dir: Path, errors: Sequence[IO[bytes]]) -> list[_Rank]:
    """Start the ranks with this process's command line and torchrun's environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // count)), **user_environment(os.environ),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "alexnet_pl",
        PARENT: str(os.getpid()),
    }  # fmt: skip
    return [
        subprocess.Popen(
            _command(run_dir),
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else errors[rank - 1],
            start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on once
        )
        for rank in range(count)
    ]


def _command(run_dir: Path) -> list[str]:
    """Return this process's command line with its run directory."""
    script = os.path.abspath(sys.argv[0])
    program = [script] if script.endswith("train.py") else ["-m", "alexnet_pl", "train"]
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.run.dir=")]
    return [sys.executable, *program, *arguments, hydra_override("hydra.run.dir", run_dir)]


def _wait(ranks: Sequence[_Rank]) -> int | None:
    """Wait until a rank fails or all have ended. Return the rank that failed first, or None."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            # A killed rank comes first: the others only report its loss.
            return min(failed, key=lambda each: (each[1] >= 0, each[0]))[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _stop(ranks: Sequence[_Rank]) -> None:
    """Let the other ranks end by themselves for a moment, then ask them to stop, then kill them."""
    for seconds, end in ((GRACE_SECONDS / 4, _Rank.terminate), (GRACE_SECONDS, _Rank.kill)):
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        for rank in ranks:
            end(rank)  # does nothing to one that has ended
    for rank in ranks:
        rank.wait()


def _report(rank: int, code: int, messages: Sequence[str], resume_command: str) -> None:
    """Raise or exit as the failed rank did; print its message unless it is rank 0, which printed its own."""
    if code < 0:
        raise RankFailedError(
            f"rank {rank} of {len(messages)} was killed by {signal.Signals(-code).name}; the others were stopped.\n"
            f"To resume: {resume_command}"
        )
    lines = messages[rank].strip().splitlines()
    if rank > 0 and code < 128:  # above, a signal that the user knows of
        message = [line for line in lines if line.startswith("error: ")] or lines[-20:]
        print("\n".join(message), file=sys.stderr)
    sys.exit(code)


def end_with_parent() -> None:
    """Stop as at SIGTERM when the launcher that :data:`PARENT` names has ended; do nothing without one."""
    if (parent := os.environ.get(PARENT)) is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
