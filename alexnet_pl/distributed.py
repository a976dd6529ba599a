"""Training by several processes: which of them this one is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one network together, and which of them this one is.

    Attributes:
        rank: of this process, from 0.
        size: number of processes on all machines.
    """

    rank: int = 0
    size: int = 1


ALONE = ProcessGroup()
