"""Cores that other programs keep busy, and the number of torch's threads that suits it.

OpenMP's threads wait for the slowest of them at the end of every parallel loop, and oneDNN's spin meanwhile in barriers
that nothing configures. So two threads beside one busy program train several times more slowly than one thread, which
waits for nobody. ``threads=auto`` therefore leaves other programs the cores that they keep busy when the run starts.
``alexnet benchmark --load`` measures what a run keeps.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from alexnet_pl.runtime.system import usable_cores

SHORTEST, LONGEST = 0.25, 30.0
"""Seconds over which the load is averaged. CPU times are counted in hundredths of a second."""


@dataclass(frozen=True)
class CpuTimes:
    """A reading of the clocks.

    Attributes:
        when: monotonic time in seconds.
        busy: CPU seconds of all programs since the machine started, on the cores that this process may use.
        own: CPU seconds of this process and of its children that have ended.
    """

    when: float
    busy: float
    own: float


def read_cpu_times(stat: Path = Path("/proc/stat")) -> CpuTimes | None:
    """Return the CPU times so far; None where the kernel does not tell them (only Linux does).

    Programs of low priority (``nice``) give way to this process, unless it has a low priority itself: they are counted
    only then.
    """
    cores = {f"cpu{core}" for core in getattr(os, "sched_getaffinity", lambda _: set())(0)}
    try:
        words = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
        rows = [[*map(int, numbers)] for name, *numbers in filter(None, words) if name in cores]
    except (OSError, ValueError):
        return None
    if not rows or min(map(len, rows)) < 7:
        return None
    columns = (0, 2, 5, 6) if os.nice(0) <= 0 else (0, 1, 2, 5, 6)  # user, nice, system, interrupts twice
    ticks = sum(row[column] for row in rows for column in columns)
    return CpuTimes(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))


_since = read_cpu_times()


def cores_in_use_by_others() -> float:
    """Return how many of the usable cores other programs keep busy, on average since the start-up of the process or
    since the last call; over a quarter of a second if that was half a minute ago or longer. 0.0 where it is not known.
    """
    global _since
    before, now = _since, read_cpu_times()
    if before is None or now is None:
        return 0.0
    if not SHORTEST <= now.when - before.when <= LONGEST:
        time.sleep(SHORTEST)
        before, now = now, read_cpu_times() or now
    _since = now
    return max(0.0, (now.busy - before.busy) - (now.own - before.own)) / (now.when - before.when)


def free_cores(used_by_others: float, cores: int) -> int:
    """Return how many cores to use beside other programs, at least one.

    Args:
        used_by_others: see :func:`cores_in_use_by_others`. From half a core on, it counts as a core.
        cores: number of usable cores.
    """
    return max(1, cores - int(used_by_others + 0.5))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with ``count`` threads, at most one per usable core, and restore what was set.

    Args:
        count: None changes nothing.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(min(count, max(before, usable_cores())))
    try:
        yield
    finally:
        torch.set_num_threads(before)
