"""One against ten test views on the trained runs of a study: a study of its own, without any training.

``python train.py experiment=ten_crop ten_crop_of=multirun/norm_x_pool`` evaluates the best checkpoint of each
finished point
twice, on validation and test images, and writes ``multirun/norm_x_pool_views`` with its report. Points that are there
already are skipped. Published (views: section 4.1 of the paper, figures: section 6, ILSVRC-2010): 10 views
instead of the centre, −1.5 / −1.3 points.
"""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from omegaconf import DictConfig

from alexnet_pl.inference.evaluation import evaluate
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import ConfigError, UserError
from alexnet_pl.runtime.run_folder import read_trial, write_result
from alexnet_pl.runtime.system import package_versions
from alexnet_pl.studies.report import write_report
from alexnet_pl.studies.store import Study, progress
from alexnet_pl.studies.table import Point, factors_of, read_study

VIEWS = (1, 10)


def views_study(source: Path, out: Path, data_root: Path | None = None) -> Study:
    """Evaluate every finished point of the study ``source`` with one and with ten views, as points of a study ``out``.

    Args:
        data_root: where the data is now; by default where it was.

    Raises:
        UserError: no study, no finished point, or data that is not there.
    """
    trained, points = read_study(source)
    finished = [point for point in points if not point.excluded]
    if not finished:
        raise UserError(f"{source} has no finished point to evaluate.")
    factors, _ = factors_of(finished, trained.axes)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}). Views are written beside the study.") from error
    study = Study(out)
    wanted: dict[str, tuple[Point, int]] = {}
    noted: dict[str, dict[str, Any]] = {}
    for point in finished:
        settings = {key: point.settings[key] for factor in factors for key in factor.key.split(" + ")}
        for views in VIEWS:
            name = hashlib.sha256(f"{point.identity} {views} views".encode()).hexdigest()[:10]
            wanted[name] = point, views
            overrides = {**settings, "views": str(views), "seed": str(point.seed)}
            noted[name] = {"overrides": overrides, "choices": {}}
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    study.add(
        command, "basic", [*(key for factor in factors for key in factor.key.split(" + ")), "views", "seed"], noted
    )
    for name, (point, views) in wanted.items():
        folder = study.folder(name)
        if read_trial(folder).get("status") == "finished":
            continue
        lock = study.lock(name)
        try:
            with lock.acquire(timeout=2, poll_interval=0.02):
                folder.mkdir(exist_ok=True)
                write_result(folder / "result.json", evaluated(point, views, data_root))
        except Timeout:
            print(f"{folder.name} is left to another process, which is evaluating it", flush=True)
            continue
        print(progress(study, [*wanted]), flush=True)
    return study


def evaluated(point: Point, views: int, data_root: Path | None = None) -> dict[str, Any]:
    """A result.json of the point's best checkpoint seen with ``views`` views; what is of training stays as it was."""
    run = load_run(point.folder)
    found = {split: evaluate(run, split, views, data_root) for split in ("val", "test")}
    kept = ("best_epoch", "epochs", "seconds", "images_per_second", "model", "parameters", "device", "seed",
            "split_seed", "git_commit")  # fmt: skip
    counts = {split: len(evaluation.labels) for split, evaluation in found.items()}
    data = {**point.result.get("data", {}), "source": found["test"].description, **counts}
    return {
        "status": "finished",
        **{key: value for split in found for key, value in found[split].figures.items()},
        **{key: point.result.get(key) for key in kept},
        "views": views,
        "run": str(point.folder.resolve()),
        "data": data,
        "precision": found["test"].precision,
        "versions": package_versions(),
    }


def run(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """``experiment=ten_crop``: evaluate the trained runs of the study ``cfg.ten_crop_of`` and write the report.

    Args:
        overrides: what the command line has set.

    Raises:
        ConfigError: a setting that has no meaning here, since nothing is trained.
        UserError: as for :func:`views_study`.
    """
    if cfg.ten_crop_of is None:
        raise ConfigError(
            "experiment=ten_crop needs the study whose runs it evaluates: ten_crop_of=multirun/norm_x_pool"
        )
    keys = {override.lstrip("+").partition("=")[0]: override for override in overrides}
    for key, override in keys.items():
        if key not in ("experiment", "ten_crop_of", "data.root"):
            raise ConfigError(
                f"{override} has no meaning with experiment=ten_crop, which trains nothing. Leave it out."
            )
    source = Path(cfg.ten_crop_of)
    out = source.resolve().with_name(f"{source.resolve().name}_views")
    study = views_study(source, out, Path(cfg.data.root) if "data.root" in keys else None)
    write_report([study.root], study.root)
    print(f"report {study.root / 'report.md'}")
