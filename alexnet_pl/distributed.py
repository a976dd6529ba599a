"""Training by several processes: which of them this one is, what they agree on, and how one machine's are started.

Processes are told what they are by the environment: by ``torchrun``, by ``srun``, or by :func:`launch`, which starts
those of one machine as ``torchrun`` would and stops them all when one ends.
"""

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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from alexnet_pl.errors import ConfigError, UserError, as_the_user_has_it

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

GRACE_SECONDS = 20
"""How long the other processes may take to end after one has ended, before they are killed."""

_PARENT = "ALEXNET_PL_PARENT"  # process id of launch(), whose end its processes notice
_MEETING_MINUTES = 5  # for processes of other machines to start


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one network together, and which of them this one is.

    Attributes:
        rank: of this process, from 0; 0 writes the run's files.
        size: number of processes on all machines.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1


ALONE = ProcessGroup()


def current() -> ProcessGroup:
    """The group that this process was started in, by the environment; :data:`ALONE` where nothing says otherwise."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment and "SLURM_STEP_ID" in environment:
        _adopt_slurm()
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ALONE
    size = int(environment["WORLD_SIZE"])
    return ProcessGroup(int(environment["RANK"]), size, int(environment.get("LOCAL_WORLD_SIZE", size)))


def started() -> bool:
    """Whether this process was started as one of a group, be it of one."""
    return current() != ALONE or "TORCHELASTIC_RUN_ID" in os.environ


def _adopt_slurm() -> None:
    """Say in torchrun's words what ``srun`` says in SLURM's. A batch script itself, without ``srun``, is no step."""
    slurm = os.environ
    tasks = int(slurm.get("SLURM_STEP_NUM_TASKS") or slurm.get("SLURM_NTASKS") or 1)
    if tasks == 1:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    per_node = slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm.get("SLURM_TASKS_PER_NODE") or str(tasks)
    cluster = SLURMEnvironment(auto_requeue=False)
    os.environ.update(
        RANK=slurm["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_RANK=slurm["SLURM_LOCALID"],
        GROUP_RANK=slurm.get("SLURM_NODEID", "0"), LOCAL_WORLD_SIZE=per_node.partition("(")[0].partition(",")[0],
        MASTER_ADDR=cluster.main_address, MASTER_PORT=str(cluster.main_port),
        TORCHELASTIC_RUN_ID=f"slurm-{slurm.get('SLURM_JOB_ID', '')}",
    )  # fmt: skip


# --- what processes agree on ----------------------------------------------------------------------------------------

_store: "Store | None" = None


def agreed(name: str, value: str) -> str:
    """The value that process 0 has. Before training: it needs no more than the address that all were given.

    Raises:
        ConfigError: process 0 does not answer.
    """
    global _store
    group = current()
    if group.size == 1:
        return value
    from torch import distributed

    try:
        if _store is None:  # kept: Lightning's own joins it
            _store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(minutes=_MEETING_MINUTES)))
        key = f"alexnet_pl/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        if group.rank == 0:
            _store.set(key, value)
        return _store.get(key).decode()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {group.rank} of {group.size} does not reach process 0 at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}: {' '.join(str(error).split())[:200]}"
        ) from error


def highest(*values: int) -> list[int]:
    """Of each value the largest that any process has. Every process has to call it; alone it costs nothing."""
    from torch import distributed

    if not _together():
        return list(values)
    import torch

    together = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(together, distributed.ReduceOp.MAX, group=_on_the_cpu())
    return together.tolist()


def of_all(value: Any) -> list[Any]:
    """What each process has, by rank. Every process has to call it."""
    from torch import distributed

    if not _together():
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value, group=_on_the_cpu())
    return found


def _together() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


_control: Any = None


def _on_the_cpu() -> Any:
    """A group whose messages do not wait for what the GPUs are doing; all processes make it at the same time."""
    global _control
    from torch import distributed

    if _control is None:
        _control = (
            distributed.group.WORLD if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
        )
    return _control


class PeerLost(UserError):
    """Another process has ended, or does not answer."""

    exit_code = 1


def lost_peer(error: BaseException) -> bool:
    """Whether an error is what communication says when another process has ended."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket Timeout",
             "Timed out waiting", "failed to recv", "remote process exited", "recvValue failed")  # fmt: skip
    return current().size > 1 and any(word.lower() in str(error).lower() for word in words)


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
    command = [sys.executable, os.path.abspath(sys.argv[0])]
    command += [argument for argument in sys.argv[1:] if not argument.startswith("hydra.run.dir=")]
    command.append(f"hydra.run.dir='{folder}'")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores // count)), **as_the_user_has_it(os.environ), "MASTER_ADDR": "127.0.0.1",
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
        raise PeerLost(
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
