"""World of a distributed run: rank and world size, read from the environment of torchrun, srun or our launcher."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The ranks that train one network together.

    Attributes:
        rank: of this process, in [0, size); rank 0 writes the run's files.
        size: number of ranks on all nodes.
        local_size: number of ranks on this node.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1


SINGLE_PROCESS = World()


def get_world() -> World:
    """Return the world this process was launched in, read from the environment; else :data:`SINGLE_PROCESS`."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment and "SLURM_STEP_ID" in environment:
        _adopt_slurm()
    if "TORCHELASTIC_RUN_ID" not in environment:
        return SINGLE_PROCESS
    size = int(environment["WORLD_SIZE"])
    return World(int(environment["RANK"]), size, int(environment.get("LOCAL_WORLD_SIZE", size)))


def is_launched() -> bool:
    """Return True if a launcher started this process as a rank, even as the only one."""
    return get_world() != SINGLE_PROCESS or "TORCHELASTIC_RUN_ID" in os.environ


def _adopt_slurm() -> None:
    """Set torchrun's variables from those of an ``srun`` step. A batch script itself, without ``srun``, is no step."""
    slurm = os.environ
    tasks = int(slurm.get("SLURM_STEP_NUM_TASKS") or slurm.get("SLURM_NTASKS") or 1)
    if tasks == 1:
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # start-up time: SLURM only

    per_node = slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm.get("SLURM_TASKS_PER_NODE") or str(tasks)
    cluster = SLURMEnvironment(auto_requeue=False)
    os.environ.update(
        RANK=slurm["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_RANK=slurm["SLURM_LOCALID"],
        GROUP_RANK=slurm.get("SLURM_NODEID", "0"), LOCAL_WORLD_SIZE=per_node.partition("(")[0].partition(",")[0],
        MASTER_ADDR=cluster.main_address, MASTER_PORT=str(cluster.main_port),
        TORCHELASTIC_RUN_ID=f"slurm-{slurm.get('SLURM_JOB_ID', '')}",
    )  # fmt: skip
