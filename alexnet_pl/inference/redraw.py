"""Redrawing the figures of a run from its best checkpoint, by one pass over its test set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.config.trust import check_targets
from alexnet_pl.data.transforms import is_mixing, per_image
from alexnet_pl.figures.html_report import FIGURES
from alexnet_pl.figures.run_figures import DRAWN_BY, NUM_AUGMENTED, FigureInputs, draw, save
from alexnet_pl.inference.evaluation import make_trainer
from alexnet_pl.inference.run_data import check_classes, find_data
from alexnet_pl.inference.trained_run import TrainedRun, load_run
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.training.callbacks.dashboard import Dashboard
from alexnet_pl.training.classifier import ImageClassifier


def redraw(run_dir: Path, data_root: str | Path | None = None, trust: Sequence[str] = ()) -> dict[str, str]:
    """Draw the figures of a run's best checkpoint into its ``figures/``.

    Returns:
        Figure name → why it could not be drawn.
    """
    try:
        run = load_run(run_dir, trust)
    except UserError as error:
        return dict.fromkeys(DRAWN_BY, str(error))
    try:
        return _redraw_with_data(run, run_dir, data_root)
    except UserError as error:
        missing = {"test": str(error), "augmented": str(error)}
        drawn, unavailable = draw(FigureInputs(run.net, run.logit_names, missing=missing))
        save(drawn, run_dir / FIGURES)
        return unavailable


def _redraw_with_data(run: TrainedRun, run_dir: Path, data_root: str | Path | None) -> dict[str, str]:
    data: Any = find_data(run, "val", data_root, run.preprocess)
    data.setup()
    check_classes(run, data)
    settings = (run.config.get("callbacks") or {}).get("dashboard") or {}
    count = settings.get("num_neighbor_images", 10_000)
    dashboard = Dashboard(run_dir / FIGURES, histogram_every_n_epochs=0, num_neighbor_images=count)
    if not (run_dir / FIGURES / "augmented_batch.png").exists():
        dashboard.augmented = augmented_batch(run, data)
    trainer, _ = make_trainer(run, [dashboard])
    model = ImageClassifier(
        run.net, run.config["model"]["num_classes"], torch.optim.SGD,
        hyperparameters={"class_names": list(run.class_names)},
    )  # fmt: skip
    trainer.test(model, datamodule=data, verbose=False)
    return dashboard.unavailable


def augmented_batch(run: TrainedRun, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return augmented, normalized training images ``(N, 3, S, S)`` and their labels, by the run's seed.

    Raises:
        UserError: the run's augmentation is refused.
    """
    augment = run.config.get("augment")
    check_targets({"augment": augment}, run.trust)
    images, labels = next(iter(data.train_dataloader()))
    with torch.random.fork_rng():
        torch.manual_seed(run.config["seed"])
        transform = instantiate(augment)
        data.augment = per_image(None if is_mixing(transform) else transform)
        images = data.augment_images(images[:NUM_AUGMENTED])
    batch: tuple[torch.Tensor, torch.Tensor] = data.on_after_batch_transfer((images, labels[:NUM_AUGMENTED]), 0)
    return batch
