"""Training command: ``alexnet train`` and ``python train.py``; one run or, with ``-m``, a study."""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.config.resolvers import register_resolvers
from alexnet_pl.distributed.collectives import broadcast_from_rank0
from alexnet_pl.distributed.environment import get_world
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.errors import ConfigError, one_line_errors
from alexnet_pl.runtime.logging import make_output_safe
from alexnet_pl.runtime.run_folder import refuse_links
from alexnet_pl.runtime.signals import exit_on_signal
from alexnet_pl.studies.runner import is_sweep_trial, run_trial, study_dir, trial_dir
from alexnet_pl.studies.session import print_resume_hint

CONF = Path(__file__).resolve().parents[2] / "conf"


def run_folder(resume: str | None, new: str) -> str:
    """Return the directory that Hydra creates and logs into: the run to resume, or a new one, the same on all ranks.

    Raises:
        ConfigError: ``resume`` is not a directory; refused here, before Hydra creates one of that name.
    """
    if resume is None:
        return broadcast_from_rank0("run folder", new)
    try:
        if Path(resume).is_dir():
            refuse_links(Path(resume))
            return resume
        is_file = Path(resume).is_file()
    except OSError:  # a name that is too long
        is_file = False
    if is_file:
        run_dir = Path(resume).parent.parent if Path(resume).parent.name == "checkpoints" else Path(resume).parent
        fix = hydra_override("resume", run_dir)
        raise ConfigError(f"resume={resume} is invalid: expected a run directory. Use {fix}")
    raise ConfigError(f"resume={resume} not found. Give the directory of a run, which its last log line names.")


# Registered on import, because the workers of a parallel launcher import this module but never call main.
OmegaConf.register_new_resolver("run_folder", run_folder)
OmegaConf.register_new_resolver("study_dir", study_dir)
OmegaConf.register_new_resolver("trial_dir", trial_dir)
register_resolvers()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def train(cfg: DictConfig) -> float | None:
    """Run what the config describes: a ten-crop evaluation, a trial of a study, or a single run.

    Returns:
        The score that a sweeper maximizes: the best validation accuracy, in [0, 1]. None for a ten-crop evaluation.
    """
    # torch is imported only once Hydra knows that there is something to run.
    with one_line_errors():
        if "ten_crop_of" in cfg:
            from alexnet_pl.studies import ten_crop

            ten_crop.run(cfg, HydraConfig.get().overrides.task)
            return None
        if is_sweep_trial():
            from alexnet_pl.config.validate import refuse_in_sweep

            refuse_in_sweep(cfg.trainer)
            return run_trial(cfg)
        if cfg.study is not None:
            raise ConfigError(f"study={cfg.study} is invalid: expected a sweep. Put -m before the overrides.")
        from alexnet_pl.training.run import run

        return run(cfg)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line ``arguments``, by default this process's own."""
    make_output_safe()
    if arguments is not None:
        sys.argv[1:] = arguments  # Hydra reads them there
    with one_line_errors(), exit_on_signal(print_resume_hint):
        if get_world().rank > 0:  # rank 0 writes the files and the log
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        train()
