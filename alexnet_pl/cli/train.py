"""Training command: ``alexnet train`` and ``python train.py``; one run or, with ``-m``, a study."""

import difflib
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from alexnet_pl.config.compose import CONF, add_or_set, find_own_options, refuse_lists, refuse_same_steps
from alexnet_pl.config.hydra_versions import MAIN, option_parser, register_resolver
from alexnet_pl.config.resolvers import register_resolvers
from alexnet_pl.distributed.environment import get_world
from alexnet_pl.runtime.deferred_imports import defer_imports
from alexnet_pl.runtime.errors import ConfigError, one_line_errors, printable
from alexnet_pl.runtime.logging import make_output_safe
from alexnet_pl.runtime.run_folder import removing
from alexnet_pl.runtime.signals import exit_on_signal
from alexnet_pl.studies.hydra_callback import StudyCallback
from alexnet_pl.studies.runner import is_sweep_trial, run_trial, study_dir, trial_dir
from alexnet_pl.studies.session import print_resume_hint

# Registered on import, because the workers of a parallel launcher import this module but never call main.
register_resolver("study_dir", study_dir)
register_resolver("trial_dir", trial_dir)
register_resolvers()


@hydra.main(config_path=str(CONF), config_name="train", **MAIN)
def train(cfg: DictConfig) -> float | None:
    """Run what the config describes: a ten-crop evaluation, a trial of a study, or a single run.

    Returns:
        The score that a sweeper maximizes: the best validation accuracy, in [0, 1]. None for a ten-crop evaluation.
    """
    # torch is imported only once Hydra knows that there is something to run.
    defer_imports()  # here and not in main, which the workers of a parallel launcher never call
    with one_line_errors(), removing(StudyCallback.leftovers):
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


_WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
               "--experimental-rerun")  # fmt: skip
"""Options of Hydra that are followed by a value."""


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the overrides behind the options: argparse refuses ``model=lenet5 -m seed=1,2``."""
    overrides = {
        place
        for place, (before, word) in enumerate(pairwise(["", *arguments]))
        if before not in _WITH_VALUE and (word.startswith("~") or ("=" in word and not word.startswith("-")))
    }
    # Only the next word can be the value of --info, which needs none: behind it, an override would be taken for one.
    bare = {place - 1 for place in {*overrides, len(arguments)}}
    options = [
        "--info=all" if word in ("-i", "--info") and place in bare else word
        for place, word in enumerate(arguments)
        if place not in overrides
    ]
    return [*options, *(arguments[place] for place in sorted(overrides))]


def check_options(arguments: Sequence[str]) -> None:
    """Check the options that start with a dash, which Hydra refuses with a page of its own options.

    Raises:
        ConfigError: names the option and the closest one, how an override is written, or options that exclude another.
    """
    parser = option_parser()
    parser.error = _raise_config_error  # type: ignore[method-assign]
    options, unknown = parser.parse_known_args([*arguments])
    _check_combination(options)
    if not unknown:
        return
    name = unknown[0].partition("=")[0]
    if not name.startswith("-"):
        raise ConfigError(f"{unknown[0]} is invalid: expected key=value.")
    known = sorted({*re.findall(r"--[\w-]+", parser.format_usage())})
    near = difflib.get_close_matches(name, known, n=1)
    key = name.lstrip("-") or "key"
    hint = f"Did you mean {near[0]}?" if near else f"Overrides have no dashes: {key}=VALUE."
    raise ConfigError(f"{printable(name)} is invalid: no such option. {hint} alexnet train --help lists what there is.")


def _check_combination(options: Namespace) -> None:
    """Check options of Hydra together, which it refuses with a traceback or with the name of an unknown key.

    Raises:
        ConfigError: says which options to leave out or to add.
    """
    if options.help or options.hydra_help:
        return
    given = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(options, name)]
    if len(given) > 1:
        shown = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{shown} are invalid together: expected one of them.")
    if options.resolve and options.cfg is None:
        raise ConfigError("--resolve is invalid without --cfg: expected --cfg job --resolve.")
    if options.resolve and options.cfg == "hydra":
        package = f" -p {options.package}" if options.package else ""
        raise ConfigError(
            "--resolve is invalid with --cfg hydra, which lacks the keys that Hydra's refer to: expected "
            f"--cfg all --resolve{package}."
        )
    if options.shell_completion and not any(re.fullmatch(_COMPLETION, word) for word in options.overrides):
        raise ConfigError("--shell-completion is invalid: expected install=SHELL or uninstall=SHELL with it, where "
                          "SHELL is bash, fish or zsh.")  # fmt: skip
    if options.experimental_rerun is not None and not Path(options.experimental_rerun).is_file():
        raise ConfigError(
            f"--experimental-rerun={options.experimental_rerun} not found: expected a job's config.pickle. To resume a "
            "run: resume=DIR"
        )


_COMPLETION = r"(install|uninstall|query)=(bash|fish|zsh)"
"""What ``--shell-completion`` takes."""


def _raise_config_error(message: str) -> NoReturn:
    raise ConfigError(f"{message}. alexnet train --help lists what there is.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line ``arguments``, by default this process's own."""
    make_output_safe()
    find_own_options()
    given = sys.argv[1:] if arguments is None else arguments
    sys.argv[1:] = map(add_or_set, overrides_last(given))  # Hydra reads them there
    with one_line_errors(), exit_on_signal(print_resume_hint):
        check_options(sys.argv[1:])
        refuse_lists(sys.argv[1:])
        refuse_same_steps(sys.argv[1:])
        if get_world().rank > 0:  # rank 0 writes the files and the log
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        train()
