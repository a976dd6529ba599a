"""Ten-crop study: center crop against ten-crop testing on the trained runs of another study, without any training.

``python train.py experiment=ten_crop ten_crop_of=multirun/norm_x_pool`` evaluates the best checkpoint of each finished
trial twice, on validation and test images, and writes ``multirun/norm_x_pool_ten_crop`` with its report. Evaluations
that have been done are skipped. Published (section 6 of the paper, ILSVRC-2010): −1.5 / −1.3 points of top-1 / top-5
error for ten-crop instead of the center crop.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from omegaconf import DictConfig

from alexnet_pl.inference.evaluation import evaluate
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.commands import train_command
from alexnet_pl.runtime.errors import ConfigError, UserError
from alexnet_pl.runtime.run_folder import RESULT, read_trial, write_result
from alexnet_pl.runtime.system import package_versions
from alexnet_pl.studies.report import write_report
from alexnet_pl.studies.session import Session, print_line
from alexnet_pl.studies.store import Study
from alexnet_pl.studies.table import Trial, factors_of, read_study

CROPS = (1, 10)

CROPS_FACTOR = "data.test_crops"

RESUME_HINT = "Re-running the command skips finished evaluations and continues with the rest."

KEPT = ("best_epoch", "epochs", "seconds", "images_per_second", "model", "parameters", "device", "seed", "split_seed",
        "git_commit")  # fmt: skip
"""Entries of a run's result that describe its training and are copied."""


def ten_crop_study(source: Path, out: Path, data_root: Path | None = None) -> Study:
    """Evaluate every finished trial of ``source`` by the center crop and by ten-crop, as trials of a study in ``out``.

    Args:
        data_root: current location of the data; by default that of the runs.

    Raises:
        UserError: no study, no finished trial, or missing data.
    """
    trained, trials = read_study(source)
    finished = [trial for trial in trials if not trial.excluded]
    if not finished:
        raise UserError(f"{source} has no finished trial to evaluate.")
    factors, _ = factors_of(finished, trained.axes)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}). The evaluations are written next to the study."
        ) from error
    keys = [key for factor in factors for key in factor.key.split(" + ")]
    wanted: dict[str, tuple[Trial, int]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for trial in finished:
        for crops in CROPS:
            digits = hashlib.sha256(f"{trial.config_hash} {crops} test crops".encode()).hexdigest()[:10]
            wanted[digits] = trial, crops
            settings = {key: trial.settings[key] for key in keys}
            overrides = {**settings, CROPS_FACTOR: str(crops), "seed": str(trial.seed)}
            entries[digits] = {"overrides": overrides, "choices": {}}
    study = Study(out)
    study.add(train_command(*sys.argv[1:]), "basic", [*keys, CROPS_FACTOR, "seed"], entries, renews=True)
    session = Session(study, [*wanted], resume_hint=RESUME_HINT)
    for digits, (trial, crops) in wanted.items():
        run_dir = study.run_dir(digits)
        if read_trial(run_dir).get("status") == "finished":
            continue
        try:
            with study.lock(digits).acquire(timeout=2, poll_interval=0.02):
                run_dir.mkdir(exist_ok=True)
                write_result(run_dir / RESULT, evaluate_trial(trial, crops, data_root))
        except Timeout:
            print_line(f"{run_dir.name} is in use: another process is evaluating it")
            continue
        session.print_progress()
    return study


def evaluate_trial(trial: Trial, crops: int, data_root: Path | None = None) -> dict[str, Any]:
    """Return the result.json of a trial's best checkpoint with ``crops`` test crops; entries on training are copied."""
    run = load_run(trial.run_dir)
    found = {split: evaluate(run, split, crops, data_root) for split in ("val", "test")}
    counts = {split: len(evaluation.labels) for split, evaluation in found.items()}
    return {
        "status": "finished",
        **{key: value for evaluation in found.values() for key, value in evaluation.figures.items()},
        **{key: trial.result.get(key) for key in KEPT},
        "test_crops": crops,
        "run": str(trial.run_dir.resolve()),
        "data": {**(trial.result.get("data") or {}), "source": found["test"].description, **counts},
        "precision": found["test"].precision,
        "versions": package_versions(),
    }


def run(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Run ``experiment=ten_crop``: evaluate the trained runs of the study ``cfg.ten_crop_of`` and write the report.

    Args:
        overrides: of the command line.

    Raises:
        ConfigError: an override that has no effect here, since nothing is trained.
        UserError: as for :func:`ten_crop_study`.
    """
    if cfg.ten_crop_of is None:
        raise ConfigError(
            "ten_crop_of=null is invalid: expected the directory of a study, such as "
            "ten_crop_of=multirun/norm_x_pool, whose runs experiment=ten_crop evaluates."
        )
    given = {override.lstrip("+").partition("=")[0]: override for override in overrides}
    for key, override in given.items():
        if key not in ("experiment", "ten_crop_of", "data.root"):
            raise ConfigError(f"{override} has no effect with experiment=ten_crop, which trains nothing. Leave it out.")
    source = Path(cfg.ten_crop_of)
    out = source.resolve().with_name(f"{source.resolve().name}_ten_crop")
    study = ten_crop_study(source, out, Path(cfg.data.root) if "data.root" in given else None)
    write_report([study.root], study.root)
    print_line(f"report {study.root / 'report.md'}")
