"""Collectives: broadcast before training, all-reduce and all-gather of small values, detection of failed ranks."""

import atexit
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from alexnet_pl.distributed.environment import get_world
from alexnet_pl.runtime.errors import ConfigError, UserError, one_line

# torch is imported where it is used, for start-up time: a single process needs none of it.
if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, though not re-exported by name

_RENDEZVOUS_MINUTES = 5  # for the ranks of other nodes to start

_LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket Timeout",
    "Timed out waiting", "failed to recv", "remote process exited", "recvValue failed",
)  # fmt: skip
"""Phrases of gloo, NCCL and the TCP store when another rank has ended."""


class RankFailedError(UserError):
    """Another rank has ended or does not answer."""

    exit_code = 1


_store: "Store | None" = None


def broadcast_from_rank0(name: str, value: str) -> str:
    """Return rank 0's value on all ranks. Needs no process group, only the rendezvous address in the environment.

    Args:
        name: key of the value, the same on all ranks.

    Raises:
        ConfigError: rank 0 does not answer.
    """
    global _store
    world = get_world()
    if world.size == 1:
        return value
    from torch.distributed.rendezvous import rendezvous

    try:
        if _store is None:  # kept open, because Lightning's own rendezvous joins it
            timeout = timedelta(minutes=_RENDEZVOUS_MINUTES)
            _store, _, _ = next(rendezvous("env://", timeout=timeout))
        key = f"alexnet_pl/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        if world.rank == 0:
            _store.set(key, value)
        return _store.get(key).decode()
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"rank {world.rank} of {world.size} cannot reach rank 0 at {address}: {one_line(error)[:200]}"
        ) from error


def all_reduce_max(*values: int) -> list[int]:
    """Return the maximum of each value across ranks. Every rank must call it; a single process returns its own."""
    from torch import distributed

    if not _is_initialized():
        return list(values)
    import torch

    reduced = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(reduced, distributed.ReduceOp.MAX, group=_cpu_group())
    return [int(value) for value in reduced]


def all_gather(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks. Every rank must call it. ``value`` is anything picklable."""
    from torch import distributed

    if not _is_initialized():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value, group=_cpu_group())
    return gathered


def _is_initialized() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


_control: Any = None  # Any: torch's handle of a group is a ProcessGroup, a constant or None


def _cpu_group() -> Any:
    """Return a gloo group, whose messages do not wait for queued GPU work; all ranks create it at the same time."""
    global _control
    from torch import distributed

    if _control is None:
        is_gloo = distributed.get_backend() == "gloo"
        _control = distributed.group.WORLD if is_gloo else distributed.new_group(backend="gloo")
    return _control


@atexit.register
def _release() -> None:
    """Drop the store and the group before the interpreter is torn down, which their threads would abort (SIGABRT)."""
    global _store, _control
    _store = _control = None


def lost_peer(error: BaseException) -> bool:
    """Return True if ``error`` is what communication raises when another rank has ended."""
    text = str(error).lower()
    return get_world().size > 1 and any(phrase.lower() in text for phrase in _LOST_PEER)
