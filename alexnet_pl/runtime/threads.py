"""CPU threads beside other programs: how torch's OpenMP threads wait for each other.

At the end of every parallel loop the threads wait for the slowest one. By default they spin for milliseconds, in case
the next loop follows at once, which saves a wake-up on a quiet machine. Beside other programs, the thread that all wait
for often lacks the very core that a waiting one spins on. Sleeping at once (``OMP_WAIT_POLICY=PASSIVE``) costs a small
network a third of its speed on a quiet machine, spinning for some microseconds nothing that could be measured.
``alexnet benchmark --load`` measures the difference. How many threads a run has is decided in ``cpu_load``.
"""

import os
import sys

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables that say how OpenMP threads wait: the standard's, GNU's, and two of LLVM's and Intel's."""

SPIN_COUNT = 10_000
"""Iterations of the waiting loop of GNU's OpenMP, which torch's Linux wheels bring. Its default is 300,000."""


def wait_briefly() -> None:
    """Let torch's OpenMP threads sleep after a short wait, here and in all processes that this one starts.

    OpenMP reads its variables once, when torch is loaded. Do nothing after that, or if the user has set one of
    :data:`WAIT_VARIABLES`.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
