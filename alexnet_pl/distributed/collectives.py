"""distributed.collectives."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from alexnet_pl.distributed.environment import get_world
from alexnet_pl.runtime.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store


_MEETING_MINUTES = 5  # for processes of other machines to start


# --- what processes agree on ----------------------------------------------------------------------------------------

_store: "Store | None" = None


def broadcast_from_rank0(name: str, value: str) -> str:
    """The value that process 0 has. Before training: it needs no more than the address that all were given.

    Raises:
        ConfigError: process 0 does not answer.
    """
    global _store
    group = get_world()
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


def all_reduce_max(*values: int) -> list[int]:
    """Of each value the largest that any process has. Every process has to call it; alone it costs nothing."""
    from torch import distributed

    if not _together():
        return list(values)
    import torch

    together = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(together, distributed.ReduceOp.MAX, group=_on_the_cpu())
    return together.tolist()


def all_gather(value: Any) -> list[Any]:
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


class RankFailedError(UserError):
    """Another process has ended, or does not answer."""

    exit_code = 1


def lost_peer(error: BaseException) -> bool:
    """Whether an error is what communication says when another process has ended."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket Timeout",
             "Timed out waiting", "failed to recv", "remote process exited", "recvValue failed")  # fmt: skip
    return get_world().size > 1 and any(word.lower() in str(error).lower() for word in words)
