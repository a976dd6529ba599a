"""World of a run, read from the variables of torchrun and srun."""

import pytest

from alexnet_pl.distributed.environment import SINGLE_PROCESS, World, get_world, is_launched

TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "node[1-2]",
}  # fmt: skip
ADOPTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    """Restore the variables that SLURM's are translated to."""
    for name in (*TORCHRUN, *SRUN, *ADOPTED):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_single_process():
    assert get_world() == SINGLE_PROCESS == World(rank=0, size=1, local_size=1)
    assert not is_launched()


def test_torchrun(monkeypatch):
    set_all(monkeypatch, TORCHRUN)
    assert get_world() == World(rank=3, size=8, local_size=4)
    assert is_launched()


def test_torchrun_with_one_rank_is_launched(monkeypatch):
    set_all(monkeypatch, {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "1"})
    assert get_world() == SINGLE_PROCESS
    assert is_launched()


def test_srun(monkeypatch):
    set_all(monkeypatch, SRUN)
    assert get_world() == World(rank=3, size=4, local_size=2)
    assert get_world() == World(rank=3, size=4, local_size=2)  # the second time from the adopted variables


def test_batch_script_without_srun_is_a_single_process(monkeypatch):
    set_all(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"})
    assert get_world() == SINGLE_PROCESS
    assert not is_launched()
