"""OmegaConf resolvers for conf/; imports no torch, which train.py loads only when there is something to run."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import ListConfig

from alexnet_pl.config.hydra_versions import register_resolver
from alexnet_pl.distributed.collectives import broadcast_from_rank0
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.run_folder import check_entries

PAPER_BATCH = 128


def scale_lr(lr: float, batch_size: int) -> float:
    """Scale a learning rate for batches of 128 images linearly to ``batch_size`` (Goyal et al. 2017, section 2.1).

    In YAML, ``lr: ${scale_lr:0.01,${data.batch_size}}`` is 0.01 at 128 images per batch and 0.08 at 1,024.
    """
    return lr * (batch_size / PAPER_BATCH)


def scaled(factor: float, widths: int | Sequence[int]) -> int | ListConfig:
    """Return ``factor`` times a layer's width, or a list of widths, rounded to whole numbers of at least 1.

    In YAML, ``channels: ${scaled:${scale.convolutions},[96, 256]}`` is ``[48, 128]`` with ``scale=lab``. It is
    a node, because OmegaConf takes no plain list when a whole config is resolved, as ``--resolve`` does.

    Raises:
        ConfigError: ``factor`` is no number above 0.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise ConfigError(f"a factor of {factor} in the section scale is invalid: expected a number above 0.")
    if isinstance(widths, int):
        return max(round(factor * widths), 1)
    return ListConfig([max(round(factor * width), 1) for width in widths])


def run_folder(resume: str | None, new: str) -> str:
    """Return the directory that Hydra creates and logs into: the run to resume, or a new one, the same on all ranks.

    Raises:
        ConfigError: ``resume`` is not a directory; refused here, before Hydra creates one of that name.
    """
    if resume is None:
        return broadcast_from_rank0("run folder", new)
    try:
        if Path(resume).is_dir():
            check_entries(Path(resume))
            return resume
        is_file = Path(resume).is_file()
    except OSError:  # a name that is too long
        is_file = False
    if is_file:
        run_dir = Path(resume).parent.parent if Path(resume).parent.name == "checkpoints" else Path(resume).parent
        fix = hydra_override("resume", run_dir)
        raise ConfigError(f"resume={resume} is invalid: expected a run directory. Use {fix}")
    raise ConfigError(f"resume={resume} not found. Give the directory of a run, which its last log line names.")


def register_resolvers() -> None:
    """Register the resolvers with OmegaConf; a second call changes nothing."""
    register_resolver("scale_lr", scale_lr)
    register_resolver("scaled", scaled)
    register_resolver("run_folder", run_folder)
