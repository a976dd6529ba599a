"""Timers: wall-clock and CPU seconds of a call, medians over interleaved repeats."""

import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch

Work = Callable[[], object]
Timer = Callable[[Work], float]
Name = TypeVar("Name", bound=Hashable)


_STARTED = time.monotonic()


def note(text: str) -> None:
    """Print a progress line with the seconds so far to stderr, which leaves stdout to the results."""
    print(f"{time.monotonic() - _STARTED:6.0f} s  {text}", file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for all kernels queued on a GPU. A CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(work: Work, device: torch.device) -> float:
    """Return the wall-clock seconds of ``work``, including all kernels that it queues on ``device``."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def cpu_seconds(work: Work) -> float:
    """Return the CPU seconds of ``work``, summed over the threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_timer(device: torch.device) -> Timer:
    """Return :func:`wall_seconds` for one device."""
    return partial(wall_seconds, device=device)


def median_seconds(works: Mapping[Name, Work], timer: Timer, repeats: int, warm_up: int = 2) -> dict[Name, float]:
    """Return the median seconds of each work over ``repeats`` rounds after ``warm_up`` untimed ones.

    Every round calls each work once, so that a drift in the machine's speed affects all of them alike.
    """
    times: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(warm_up + repeats):
        for name, work in works.items():
            times[name].append(timer(work))
    return {name: statistics.median(taken[warm_up:]) for name, taken in times.items()}
