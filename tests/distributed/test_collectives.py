"""Collectives of a single process and of two ranks; tests/faults has ranks that fail."""

import json
import os
import socket
import subprocess
import sys

import pytest

from alexnet_pl.distributed.collectives import all_gather, all_reduce_max, broadcast_from_rank0, lost_peer

RANK = """
import json, sys
from datetime import timedelta
from alexnet_pl.distributed.collectives import all_gather, all_reduce_max, broadcast_from_rank0, lost_peer
from alexnet_pl.distributed.environment import get_world

rank = get_world().rank
found = {"before": [broadcast_from_rank0(name, f"{name} of {rank}") for name in ("größe", "b")]}
assert "torch.distributed" in sys.modules
from torch import distributed
distributed.init_process_group("gloo", timeout=timedelta(minutes=30))
found["max"] = all_reduce_max(rank, -rank, 7)
found["gathered"] = all_gather({"rank": rank})
errors = RuntimeError("[...] Connection closed by peer [127.0.0.1]"), RuntimeError("out of memory")
found["lost"] = [*map(lost_peer, errors)]
distributed.destroy_process_group()
print(json.dumps(found))
"""


def test_single_process_needs_no_communication():
    assert broadcast_from_rank0("a", "mine") == "mine"
    assert all_reduce_max(1, -2) == [1, -2]
    assert all_gather({"a": 1}) == [{"a": 1}]
    assert not lost_peer(RuntimeError("Connection closed by peer"))


def environment(rank: int, port: int) -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_ranks(port):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env=environment(rank, port), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for each in found:
        assert each == {
            "before": ["größe of 0", "b of 0"],
            "max": [1, 0, 7],
            "gathered": [{"rank": 0}, {"rank": 1}],
            "lost": [True, False],
        }


def test_unreachable_rank_0_is_one_line(port):
    code = """
from alexnet_pl.distributed import collectives
collectives._RENDEZVOUS_MINUTES = 0.01
from alexnet_pl.runtime.errors import one_line_errors
with one_line_errors():
    collectives.broadcast_from_rank0("a", "mine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(1, port), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: rank 1 of 2 cannot reach rank 0 at 127.0.0.1:{port}: ")
    assert "Traceback" not in done.stderr
