"""Hydra callback of studies: registers the trials before the first one runs and writes the report after the last."""

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.runtime.commands import train_command
from alexnet_pl.runtime.errors import ConfigError, UserError, one_line_errors, printable
from alexnet_pl.runtime.run_folder import Leftovers, read_config, read_trial
from alexnet_pl.runtime.system import usable_cores
from alexnet_pl.studies.disk import disk_estimate
from alexnet_pl.studies.forecast import trial_costs
from alexnet_pl.studies.internals import compose_sweeps_fast, expand_sweep
from alexnet_pl.studies.session import RESUME_HINT, Session, current_session, print_line, print_resume_hint
from alexnet_pl.studies.store import Study, hash_of, numeric_settings, trial_entry

TRIAL_DIRECTORIES = {"hydra.sweep.subdir": "${trial_dir:}", "run_dir": "${hydra:runtime.output_dir}"}
"""Settings that make a trial run where its study looks for it, as ``conf/train.yaml`` has them."""

DATASETS_BY_ROOT = ("alexnet_pl.data.ImageFolderDataModule", "alexnet_pl.data.ShardedDataModule")
"""Data modules of any images: another directory is another dataset, not a copy."""


class StudyCallback(Callback):
    """Hook of Hydra's sweeps into :func:`register_trials` and :func:`summarize`.

    Attributes:
        leftovers: what a single run of this process has created if it is refused; None before it starts, or in a sweep.
    """

    leftovers: ClassVar[Leftovers | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _exit_on_error(note_directories, config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _exit_on_error(register_trials, config)

    # Hydra keeps what every job returns until the sweep ends, with all of its config: 1,300 objects per trial.
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _exit_on_error(summarize)


def _exit_on_error(function: Callable[..., None], *arguments: object) -> None:
    """Call a function and exit with its error: Hydra would turn an exception in a callback into a warning."""
    try:
        with one_line_errors():
            function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def note_directories(config: DictConfig) -> None:
    """Note which directories of a single run exist before Hydra creates them."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)  # ${hydra:…} in hydra.run.dir refers to it
    try:
        StudyCallback.leftovers = Leftovers(Path(config.hydra.run.dir))
    finally:
        HydraConfig.instance().cfg = before


def register_trials(config: DictConfig) -> None:
    """Compose every trial of the sweep, record it in ``study.json``, and open the session.

    Raises:
        ConfigError: two trials compute the same numbers, finished ones have other data, an override makes no sense in a
            sweep, trials would run elsewhere than the study looks for them, or a trial has several ranks.
        UserError: ``study.json`` is corrupt.
    """
    refuse_resume(config)
    if "ten_crop_of" in config:
        raise ConfigError("experiment=ten_crop evaluates the runs of one study and is not a sweep. Leave -m out.")
    check_directories(config)
    check_launcher(config.hydra.launcher)
    check_slurm(config.hydra.launcher)
    study = Study(Path(config.hydra.sweep.dir))
    configs = compose_trials(config)
    trials = {
        digits: trial_entry(cfg.hydra.overrides.task, cfg.hydra.runtime.choices) for digits, cfg in configs.items()
    }
    refuse_other_data(study, configs)
    if any(study.state(digits) != "finished" for digits in trials):
        from alexnet_pl.config.validate import refuse_in_sweep  # here for start-up time: it loads torch

        for cfg in configs.values():
            refuse_in_sweep(cfg.trainer)
        for digits, cost in trial_costs(configs).items():
            trials[digits]["cost"] = cost
    columns = [trial["overrides"] for trial in trials.values()]
    axes = [key for key in (columns[0] if columns else ()) if len({column.get(key) for column in columns}) > 1]
    launcher = str(config.hydra.runtime.choices.get("hydra/launcher"))
    try:
        study.add(train_command(*sys.argv[1:]), launcher, axes, trials)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or study.root} cannot be written ({error.strerror}). Choose another hydra.sweep.dir."
        ) from error
    hint = RESUME_HINT
    if config.get("study") is None and "hydra.sweep.dir" not in str(config.hydra.overrides.hydra):
        # A sweep without a name gets a directory with the time in its name.
        hint += f"\nTo resume: {train_command(*sys.argv[1:], **{'hydra.sweep.dir': study.root})}"
    session = Session(study, [*trials], launcher, hint)
    session.print_progress()
    left = {digits: cfg for digits, cfg in configs.items() if study.state(digits) != "finished"}
    if left:
        line, warning = disk_estimate(study.root, left, parallel_trials(config.hydra.launcher))
        if line:
            print_line(line)
        if warning:
            print(warning, file=sys.stderr)


def refuse_resume(config: DictConfig) -> None:
    """Refuse ``resume`` in a sweep or one of its trials.

    Raises:
        ConfigError: it is given.
    """
    if config.get("resume") is not None:
        raise ConfigError(
            "resume is for a single run and cannot be swept. Resume each run with its own command, without -m. To "
            "resume a study, re-run its command."
        )


def check_directories(config: DictConfig) -> None:
    """Check that every trial will run in the directory where the study looks for it.

    Raises:
        ConfigError: an override moves the trials' directories or changes the current one.
    """
    given: dict[str, Any] = {
        "run_dir": OmegaConf.to_container(OmegaConf.masked_copy(config, "run_dir")),
        "hydra.sweep.subdir": OmegaConf.to_container(OmegaConf.masked_copy(config.hydra.sweep, "subdir")),
    }
    for key, section in given.items():
        (value,) = section.values()
        if value != TRIAL_DIRECTORIES[key]:
            raise ConfigError(
                f"{key}={value} is invalid in a sweep: expected no override, because the study names its trials' "
                "directories. Set where they are with hydra.sweep.dir=DIR."
            )
    if config.hydra.job.chdir:
        raise ConfigError(
            "hydra.job.chdir=true is invalid in a sweep: expected false, because hydra.sweep.dir and data_dir may be "
            "relative to the current directory."
        )


def check_launcher(launcher: DictConfig) -> None:
    """Check that the launcher's package is installed, before anything of the study is written.

    Raises:
        ConfigError: names the extra that installs it.
    """
    package = ".".join(launcher._target_.split(".")[:2])
    try:
        import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"hydra.launcher needs the package {package.rpartition('.')[2]}: pip install 'alexnet_pl[launchers]'."
        ) from error


def check_slurm(launcher: DictConfig) -> None:
    """Check that SLURM's commands are here if the launcher needs them, before anything of the study is written.

    Raises:
        ConfigError: they are not.
    """
    if launcher._target_.endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise ConfigError(
            "hydra.launcher needs SLURM's srun, which is not found. Run the command on a login node of the cluster, or "
            "with hydra/launcher=workers in parallel on this machine."
        )


def parallel_trials(launcher: DictConfig) -> int:
    """Return how many trials a launcher runs at the same time: joblib's and submitit's options, 1 for the basic one."""
    count = int(launcher.get("n_jobs") or launcher.get("array_parallelism") or 1)
    return count if count > 0 else usable_cores()  # joblib: n_jobs=-1


def compose_trials(config: DictConfig) -> dict[str, DictConfig]:
    """Return the config of every trial of the sweep by its hash.

    Raises:
        ConfigError: two trials compute the same numbers, have different sweep directories, or are those of experiments
            that sweep other keys; or one is to resume another run.
    """
    if config.hydra.launcher._target_.endswith(".BasicLauncher"):
        compose_sweeps_fast()  # other launchers send the loader to their workers
    loader = GlobalHydra.instance().config_loader()
    configs: dict[str, DictConfig] = {}
    spelled: dict[str, str] = {}
    before = HydraConfig.instance().cfg
    try:
        for overrides in expand_sweep(config):
            cfg = loader.load_sweep_config(config, list(overrides))
            HydraConfig.instance().set_config(cfg)  # ${hydra:…} in the config refers to the trial
            refuse_resume(cfg)
            if cfg.hydra.sweep.dir != config.hydra.sweep.dir:
                raise ConfigError(
                    f"hydra.sweep.dir={cfg.hydra.sweep.dir} is invalid: expected one directory for all trials. Name "
                    "the study with study=NAME, or set hydra.sweep.dir to a directory that no trial changes."
                )
            if cfg.hydra.sweeper != config.hydra.sweeper:
                raise ConfigError(
                    f"{' '.join(overrides)} is invalid in this sweep: what it sweeps by itself would be ignored. Run "
                    "each experiment with a command of its own, with the same study=NAME if they belong together."
                )
            settings = numeric_settings(cfg)
            digits, numbers = hash_of(settings), _without_spelling(settings)
            if numbers in spelled:
                same = " ".join(configs[spelled[numbers]].hydra.overrides.task)
                raise ConfigError(
                    f"{same}\nand {' '.join(overrides)}\nare the same trial: they compute the same numbers. "
                    "(data.root, of which a study has one, does not tell trials apart.)"
                )
            spelled[numbers] = digits
            configs[digits] = cfg
    finally:
        HydraConfig.instance().cfg = before
    return configs


def _without_spelling(value: Any) -> str:
    """Return settings as text in which 0 and 0.0 are the same."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_without_spelling(below)}' for key, below in sorted(value.items()))}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_without_spelling, value))}]"
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)


def refuse_other_data(study: Study, configs: Mapping[str, DictConfig]) -> None:
    """Refuse trials that were trained on another dataset, for data modules whose dataset is the directory itself.

    Raises:
        ConfigError: a trial has another ``data.root``, which still exists: the images have not moved.
    """
    for digits, cfg in configs.items():
        if cfg.data.get("_target_") not in DATASETS_BY_ROOT or study.state(digits) not in ("finished", "stopped"):
            continue
        try:
            before = (read_config(study.run_dir(digits)).get("data") or {}).get("root")
        except UserError:  # resuming or reading it says why
            continue
        now = cfg.data.get("root")
        if before is None or now is None or os.path.realpath(before) == os.path.realpath(now):
            continue
        if "://" in str(before) or Path(before).exists():
            raise ConfigError(
                f"data.root={now} is invalid: expected {before}, the data of {study.run_dir(digits)}. Name another "
                "study with study=NAME."
            )


def summarize() -> None:
    """Print how the study stands, write its report, and exit with 1 if a trial of this command has not finished."""
    session = current_session()
    if session is None:
        return
    session.close()
    if session.received is not None:
        print_resume_hint()
        sys.exit(128 + session.received)
    study, states = session.study, {digits: session.study.state(digits) for digits in session.trials}
    print_line("")
    for digits, state in states.items():
        run_dir = study.run_dir(digits)
        if state == "failed":
            reason = str(read_trial(run_dir)["error"])
            print(f"error: {run_dir}: " + "\n".join(map(printable, reason.split("\n"))), file=sys.stderr)
        if state == "running":
            print_line(f"{run_dir.name} is still running in another process")
        if state in ("stopped", "missing"):
            print(f"error: {run_dir} has not finished. {session.resume_hint}", file=sys.stderr)
    try:
        # Here for start-up time: pandas, scipy and matplotlib are needed only after all trials.
        from alexnet_pl.studies.report import write_report

        write_report([study.root], study.root)
        print_line(f"report {study.root / 'report.md'}")
    except UserError as error:  # nothing has finished, or the disk is full
        print_line(f"no report: {error}")
    print_line(f"study directory {study.root}")
    if any(state in ("failed", "stopped", "missing") for state in states.values()):
        sys.exit(1)
