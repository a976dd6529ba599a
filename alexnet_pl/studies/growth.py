"""Growth of a study's own cost with its trials: planning, locks, progress line and report of finished trials."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from alexnet_pl.benchmark.growth import Row
from alexnet_pl.config.compose import CONF
from alexnet_pl.config.hydra_versions import VERSION_BASE
from alexnet_pl.config.resolvers import register_resolvers
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.run_folder import CONFIG, METRICS, RESULT, write_metrics, write_result
from alexnet_pl.studies.forecast import progress, trial_costs
from alexnet_pl.studies.hydra_callback import compose_trials
from alexnet_pl.studies.report import write_report
from alexnet_pl.studies.store import Study, trial_entry
from alexnet_pl.studies.table import METRIC_KEYS

TRIALS = (10, 100, 1_000)

EPOCHS = 30
"""Rows of each trial's metrics.csv."""


def grow_trials(count: int, scratch: Path) -> Row:
    """Plan a study of ``count`` trials, fill in results, and measure what every trial and the end of the study cost.

    The trials are two networks at two poolings, each with ``count / 4`` seeds.
    """
    row, study = Row("trials", count), Study(scratch / f"trials-{count}")
    configs: dict[str, DictConfig] = {}
    row.time("compose and hash", lambda: configs.update(plan(count, study.root)))
    trials = {d: trial_entry(cfg.hydra.overrides.task, cfg.hydra.runtime.choices) for d, cfg in configs.items()}
    row.time("estimate costs", lambda: trial_costs(configs))
    row.time("write study.json", lambda: study.add("synthetic", "basic", ["model/norm", "model/pool", "seed"], trials))
    row.time("read study.json", lambda: Study(study.root))
    for number, (digits, cfg) in enumerate(configs.items()):
        finish(study, digits, cfg, number)
    row.time("take and release every lock", lambda: take_locks(study))
    row.time("first progress line", lambda: progress(study, [*trials]))
    row.time("each further progress line", lambda: progress(study, [*trials]))
    row.time("report", lambda: write_report([study.root], study.root))
    row.megabytes["study.json"] = (study.root / "study.json").stat().st_size / 1e6
    row.megabytes["report.md"] = (study.root / "report.md").stat().st_size / 1e6
    return row.end()


def take_locks(study: Study) -> None:
    """Take and release the lock of every trial."""
    for digits in study.trials:
        with study.lock(digits):
            pass


def plan(count: int, root: Path) -> dict[str, DictConfig]:
    """Return the configs of the trials by hash, as a sweep on the command line plans them."""
    register_resolvers()
    given = ["model=alexnet_plain", "data=digits", f"hydra.sweep.dir={root}"]
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        config = compose("train", overrides=[*given, "hydra.mode=MULTIRUN"], return_hydra_config=True)
        with open_dict(config):
            config.hydra.overrides.task += [
                "model/norm=none,lrn",
                "model/pool=overlapping,non_overlapping",
                f"seed=range(1,{max(count // 4, 1) + 1})",
            ]
        return compose_trials(config)


def finish(study: Study, digits: str, cfg: DictConfig, number: int) -> None:
    """Write the files of a finished trial, with metrics that differ from trial to trial."""
    run_dir, error = study.run_dir(digits), 0.2 + 0.001 * (number * 37 % 23)
    run_dir.mkdir(parents=True)
    config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    write_atomic(run_dir / CONFIG, OmegaConf.to_yaml(config))
    rows = [{"epoch": e, "train/loss": 2 / e, "val/loss": 2.1 / e, "train/acc": 1 - error, "val/acc": 1 - error}
            for e in range(1, EPOCHS + 1)]  # fmt: skip
    write_metrics(run_dir / METRICS, list(rows[0]), rows)
    result: dict[str, Any] = {key: 0.5 if "loss" in key else 1 - error for key in METRIC_KEYS}
    result |= {"best_epoch": 3, "epochs": EPOCHS, "seconds": 60.0, "images_per_second": 1e3, "parameters": 10**6}
    result |= {"device": "cpu", "precision": "32-true", "seed": int(cfg.seed), "split_seed": 0, "git_commit": "0" * 40}
    data = {"name": "digits", "source": "synthetic", "train": 1293, "val": 144, "test": 360}
    write_result(run_dir / RESULT, {"status": "finished", **result, "data": data, "versions": {"torch": "0"}})
