"""distributed.launcher."""

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
from pathlib import Path
from typing import IO

from alexnet_pl.distributed.collectives import RankFailedError
from alexnet_pl.runtime.errors import user_environment

log = logging.getLogger(__name__)


GRACE_SECONDS = 20
"""How long the other processes may take to end after one has ended, before they are killed."""

_PARENT = "ALEXNET_PL_PARENT"  # process id of launch(), whose end its processes notice


# --- starting the processes of this machine -------------------------------------------------------------------------


def launch(count: int, run_dir: Path) -> None:
    """Start ``count`` processes of the command that this process is, and wait until they have ended.

    Signals are passed on. When one process ends with an error the others are stopped; when this one is killed, they
    stop by themselves.

    Raises:
        UserError: with the first error's own words, or naming the process that was killed.
        SystemExit: with the exit status of the processes, where they have said themselves what was wrong.
    """
    log.info(f"        {count} processes")
    with tempfile.TemporaryDirectory() as folder:
        errors = [open(Path(folder) / f"{rank}.err", "w+") for rank in range(1, count)]  # noqa: SIM115
        processes = _start(count, run_dir, errors)
        before = {number: signal.signal(number, lambda got, frame: _signal(processes, got)) for number in _PASSED_ON}
        try:
            failed = _wait(processes)
        finally:
            _stop(processes)
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed is None:
            return
        said = []
        for file in errors:
            file.seek(0)
            said.append(file.read())
            file.close()
    _report(failed, processes[failed].returncode, ["", *said], run_dir)


_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _start(count: int, run_dir: Path, errors: Sequence[IO[str]]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(run_dir).replace("\\", "\\\\").replace("'", "\\'")
    script = os.path.abspath(sys.argv[0])
    command = [sys.executable, script] if script.endswith("train.py") else [sys.executable, "-m", "alexnet_pl", "train"]
    command += [argument for argument in sys.argv[1:] if not argument.startswith("hydra.run.dir=")]
    command.append(f"hydra.run.dir='{folder}'")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores // count)), **user_environment(os.environ), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "alexnet_pl", _PARENT: str(os.getpid()),
    }  # fmt: skip
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else errors[rank - 1],
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )
        for rank in range(count)
    ]


def _signal(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _wait(processes: Sequence[subprocess.Popen]) -> int | None:
    """The rank that failed first; None when all have ended well."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # A kill comes before what the others then say of it.
            return min(failed, key=lambda rank: (codes[rank] >= 0, rank))
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Let the others end by themselves for a moment (they notice), then ask, then kill."""
    for seconds, number in ((GRACE_SECONDS / 4, signal.SIGTERM), (GRACE_SECONDS, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        _signal(processes, number)
    for process in processes:
        process.wait()


def _report(rank: int, code: int, said: Sequence[str], run_dir: Path) -> None:
    again = f"python train.py resume={run_dir}"
    if code < 0:
        raise RankFailedError(
            f"process {rank} of {len(said)} was killed by {signal.Signals(-code).name}; the others were stopped.\n"
            f"Go on with: {again}"
        )
    lines = said[rank].strip().splitlines()
    if rank > 0 and code < 128:  # process 0 speaks for itself
        message = [line for line in lines if line.startswith("error: ")] or lines[-20:]
        print("\n".join(message), file=sys.stderr)
    sys.exit(code)


def end_with_parent() -> None:
    """In a process of :func:`launch`: stop, as at a SIGTERM, when the process that started it is no longer there."""
    if (parent := os.environ.get(_PARENT)) is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
