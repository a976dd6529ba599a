"""Data of a trained run: where it is now, or other data with the same classes."""

from pathlib import Path
from typing import Any

from lightning import LightningDataModule

from alexnet_pl.data.cifar10 import official_dir
from alexnet_pl.data.class_folders import ClassFolders
from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.data.shards.reader import is_url
from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.commands import shell_join
from alexnet_pl.runtime.errors import DataError

_NOT_REUSED = ("_target_", "augment", "test_crops", "shards", "cache")
"""Keys of the data section that evaluation sets itself. ``shards`` and ``cache`` name directories that are written to,
which an untrusted checkpoint must not choose."""

OWN_IMAGES = "Figures, neighbors and --split val come from the run's own images"


def find_data(run: TrainedRun, split: str, data_root: str | Path | None, preprocess: Preprocess) -> LightningDataModule:
    """Return the data module to evaluate on, with the image sizes of ``preprocess``. Nothing is read or downloaded yet.

    Args:
        split: ``val`` or ``test``.
        data_root: current location of the run's data, or an ImageFolder layout with the run's classes.

    Raises:
        DataError: the data is not at its recorded location, or ``data_root`` cannot provide the split.
    """
    settings = {name: value for name, value in run.config["data"].items() if name not in _NOT_REUSED}
    settings |= {"image_size": preprocess.image_size, "resize_size": preprocess.resize_size}
    kind = run.data_class
    has_root = "root" in settings
    if data_root is None:
        root = settings.get("root")
        if has_root and is_url(str(root)):
            option = shell_join(["--data-root", str(root)])
            raise DataError(f"the run's data is at {root}. If you trust that address: {option}")
        if has_root and not kind.is_in(str(root)):
            raise DataError(f"the run's data was not found in {root}. Give its current location: --data-root DIR.")
        return kind(**settings)
    if kind.classes_from_files and kind.is_in(data_root):
        return kind(**{**settings, "root": str(data_root)})
    data_root = Path(data_root)
    if has_root and (official_dir(data_root).is_dir() or split == "val"):
        has_copy = official_dir(data_root).is_dir() or (data_root / "train").is_dir()
        if kind.classes_from_files or not has_copy:  # of those, kind.is_in was False above
            raise DataError(f"{data_root} has no copy of the run's training images. {OWN_IMAGES}.")
        return kind(**{**settings, "root": data_root})
    if split == "val":
        raise DataError(f"{data_root} is not where the run's data comes from. {OWN_IMAGES}. Omit --data-root.")
    folder = data_root / "test" if (data_root / "test").is_dir() else data_root
    return ClassFolders(folder, run.class_names, preprocess, settings["batch_size"])


def check_classes(run: TrainedRun, data: Any) -> None:
    """Check that data has the run's classes: else other names would stand under its predictions.

    Args:
        data: data module, set up.

    Raises:
        DataError: it has other classes, or in another order.
    """
    if tuple(data.class_names) != run.class_names:
        raise DataError(f"the data has other classes than the run: {', '.join(data.class_names)}.")
