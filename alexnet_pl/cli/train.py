"""Train a network, or run a study with ``-m``: ``alexnet train model=alexnet_lrn data=cifar10``; see ``--help``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.config.resolvers import register_resolvers
from alexnet_pl.distributed.collectives import broadcast_from_rank0
from alexnet_pl.distributed.environment import get_world
from alexnet_pl.runtime.errors import ConfigError, one_line_errors
from alexnet_pl.runtime.signals import exit_on_signal
from alexnet_pl.studies.runner import in_sweep, point_folder, run_trial, study_folder
from alexnet_pl.studies.session import say_how_to_go_on

CONF = Path(__file__).resolve().parents[2] / "conf"


def run_folder(resume: str | None, new: str) -> str:
    """The folder that Hydra makes and writes its log into: the run to go on with, or a new one, the same for all ranks.

    Raises:
        ConfigError: ``resume`` is no folder. Said here, before Hydra makes one of that name.
    """
    if resume is not None and not Path(resume).is_dir():
        raise ConfigError(f"resume={resume} does not exist. Give the folder of a run, as it is named in its last line.")
    return broadcast_from_rank0("run folder", new) if resume is None else resume


OmegaConf.register_new_resolver("run_folder", run_folder)
OmegaConf.register_new_resolver("study_folder", study_folder)
OmegaConf.register_new_resolver("point_folder", point_folder)
register_resolvers()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def train(cfg: DictConfig) -> float | None:
    with one_line_errors():
        if "ten_crop_of" in cfg:
            from alexnet_pl.studies.ten_crop import run as evaluate_views

            return evaluate_views(cfg, HydraConfig.get().overrides.task)
        if in_sweep():
            from alexnet_pl.config.validate import refuse_in_sweep

            refuse_in_sweep(cfg.trainer)
            return run_trial(cfg)
        if cfg.study is not None:
            raise ConfigError(f"study={cfg.study} names a sweep. Put -m before the settings.")
        from alexnet_pl.training.run import run  # torch is loaded only once Hydra knows that there is something to run

        return run(cfg)


def main(arguments: Sequence[str] | None = None) -> None:
    if arguments is not None:
        sys.argv[1:] = arguments
    with one_line_errors(), exit_on_signal(say_how_to_go_on):
        if get_world().rank > 0:  # process 0 writes the files and the log
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        train()
