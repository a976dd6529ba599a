"""cli.report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from alexnet_pl.figures.html_report import FIGURES, write_report
from alexnet_pl.figures.run_figures import AUGMENTED, DRAWN_BY, TITLES, FigureInputs, draw, one_line, save
from alexnet_pl.runtime.errors import UserError

DESCRIPTION = """\
Draw the figures of a run into RUN/figures/ and put them into RUN/report.html with its results, curves, configuration
and versions: one file that opens without a server or a network. A run that is going on or was killed has what there is
so far, and a page whose data is gone keeps the figures it had."""

EPILOG = """\
A run that ends writes both by itself. Its test set is read again here, by the best checkpoint, as alexnet_pl.evaluate
does.

examples:
  python -m alexnet_pl report runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000
  python -m alexnet_pl report RUN --data-root /data/cifar10"""


# --- drawing anew ---------------------------------------------------------------------------------------------------


def redraw(run_dir: Path, data_root: Path | None = None) -> dict[str, str]:
    """Draw the figures of a run's best checkpoint into its ``figures/``.

    Returns:
        What could not be drawn → why.
    """
    from alexnet_pl.inference.trained_run import load_run

    try:
        run = load_run(run_dir)
    except UserError as error:
        return dict.fromkeys(DRAWN_BY, str(error))
    try:
        return _redraw_with_data(run, run_dir, data_root)
    except UserError as error:
        drawn, left_out = draw(
            FigureInputs(run.net, run.logit_names, missing={"test": str(error), "augmented": str(error)})
        )
        save(drawn, run_dir / FIGURES)
        return left_out


def _redraw_with_data(run: Any, run_dir: Path, data_root: Path | None) -> dict[str, str]:
    from alexnet_pl.config.trust import check_targets
    from alexnet_pl.inference.evaluation import find_data, make_trainer
    from alexnet_pl.training.callbacks.dashboard import Dashboard
    from alexnet_pl.training.classifier import ImageClassifier

    data = find_data(run, "val", data_root, run.preprocess)
    data.setup()
    settings = (run.config.get("callbacks") or {}).get("dashboard") or {}
    among = {"training_images": settings["training_images"]} if "training_images" in settings else {}
    dashboard = Dashboard(run_dir / FIGURES, histogram_every_n_epochs=0, **among)
    if not (run_dir / FIGURES / "augmented_batch.png").exists():
        augment = run.config.get("augment")
        check_targets({"augment": augment})
        images, labels = next(iter(data.train_dataloader()))
        with torch.random.fork_rng():
            torch.manual_seed(run.config["seed"])
            images = (instantiate(augment) or torch.nn.Identity())(images[:AUGMENTED])
        dashboard.augmented = data.on_after_batch_transfer((images, labels[:AUGMENTED]), 0)
    trainer, _ = make_trainer(run, [dashboard])
    count = run.config["model"]["num_classes"]
    model = ImageClassifier(run.net, count, torch.optim.SGD, hyperparameters={"class_names": list(run.class_names)})
    trainer.test(model, datamodule=data, verbose=False)
    return dashboard.left_out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl report", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--data-root", type=Path, metavar="FOLDER", help="where the data is now")
    given = parser.parse_args(arguments)
    run_dir: Path = given.run
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.csv", "result.json", "checkpoints")):
        what = "does not exist" if not run_dir.exists() else "is no run folder"
        raise UserError(f"{run_dir} {what}. Give the folder of a run, as it is named in its last line.")
    left_out = redraw(run_dir, given.data_root)
    try:
        path = write_report(run_dir, left_out)
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error.strerror}.") from error
    for name, reason in left_out.items():
        kept = ", the one of before is kept" if (run_dir / FIGURES / f"{name}.png").exists() else ""
        print(f"left out: {TITLES.get(name, name)}{kept}: {one_line(reason)}")
    print(path)
