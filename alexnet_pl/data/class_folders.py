"""Class folders (torchvision's ImageFolder layout): ``train/<class>/*``, ``val/<class>/*``, ``test/<class>/*``."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule

from alexnet_pl.data.image_io import Preprocess, has_image_suffix, read_image
from alexnet_pl.data.loaders import TensorLoader
from alexnet_pl.data.transforms import normalize
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.errors import DataError, printable

SPLITS = ("train", "val", "test")

LAYOUT = "Expected train/<class>/* and at least one of val/<class>/* and test/<class>/*."

_ALIASES = {
    "train": ("training", "trn"),
    "val": ("valid", "validation", "validate", "dev"),
    "test": ("testing", "tst"),
}
"""Names that people and other datasets give the splits, in any case."""


# --- listing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """Image files of a dataset in class folders.

    Attributes:
        files: for each split, ``(path relative to root, label)``, ordered by class and path.
        ignored: files that are not images by their suffix, or not regular files.
    """

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    ignored: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.files.values()))


def list_splits(root: Path) -> Listing:
    """List the image files of ``train/``, ``val/`` and ``test/`` with their labels. No file is opened.

    Raises:
        DataError: no ``train/``, neither ``val/`` nor ``test/``, a misspelled split, an empty class folder, or splits
            with different classes.
    """
    class_names = find_classes(root / "train")
    _refuse_aliases(root)
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if len(splits) == 1:
        raise DataError(f"{root} has neither val/ nor test/. {LAYOUT}")
    files: dict[str, list[tuple[str, int]]] = {}
    ignored = 0
    for split in splits:
        check_classes(root / split, class_names, "train/")
        listed, others = list_images(root / split, class_names)
        files[split] = [(os.path.join(split, path), label) for path, label in listed]
        ignored += others
    return Listing(root, class_names, files, ignored)


def list_images(directory: Path, class_names: Sequence[str]) -> tuple[list[tuple[str, int]], int]:
    """List the image files of each class folder, at any depth, and count the other files.

    Image files have the suffix of a supported format, in upper or lower case. Links are followed; hidden files and
    directories are skipped. FIFOs, sockets and devices count as other files, because opening them could block.

    Returns:
        ``(path relative to directory, label)``, ordered by class and path; the number of other files.

    Raises:
        DataError: a class folder is not readable or holds no image.
    """
    files: list[tuple[str, int]] = []
    ignored = 0
    for label, name in enumerate(class_names):
        found = sorted(_walk(directory / name, name))
        images = [path for path, is_regular in found if is_regular and has_image_suffix(path)]
        if not images:
            raise DataError(f"{printable(str(directory / name))} holds no images. Add some, or remove the class.")
        ignored += len(found) - len(images)
        files += [(path, label) for path in images]
    return files, ignored


def interleave(files: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Reorder the result of :func:`list_images` to take the classes in turn.

    Every prefix is then balanced, as in CIFAR-10's official files, so that ``trainer.limit_val_batches`` does not
    select a single class.
    """
    ranks: dict[int, int] = {}
    keyed = []
    for path, label in files:
        ranks[label] = ranks.get(label, -1) + 1
        keyed.append((ranks[label], label, path))
    return [(path, label) for _, label, path in sorted(keyed)]


def find_classes(directory: Path) -> tuple[str, ...]:
    """Return the names of the class folders in ``directory``, sorted as torchvision's ``ImageFolder`` sorts them.

    Raises:
        DataError: the directory is not found, not readable, or holds no class folders.
    """
    root = directory.parent
    if not root.exists():
        raise DataError(f"{root} not found. Give the dataset's directory with data.root=DIR. {LAYOUT}")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a directory. {LAYOUT}")
    if not directory.is_dir():
        _refuse_aliases(root)
        hint = nearby_root(root, lambda other: (other / directory.name).is_dir())
        raise DataError(f"{directory} not found. {hint or LAYOUT}")
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error.strerror}.") from error
    names = tuple(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        images = sum(has_image_suffix(entry) for entry in entries)
        hint = (
            f" It holds {images:,} images without a class. ILSVRC's validation images come like that: sort them into "
            "one folder per class with the list of labels that comes with them."
        )
        raise DataError(f"{directory} has no class folders. {LAYOUT}{hint * (images > 0)}")
    return names


def check_classes(directory: Path, class_names: Sequence[str], reference: str) -> None:
    """Check that the class folders in ``directory`` are exactly ``class_names``.

    Args:
        reference: where the classes come from, for the message.

    Raises:
        DataError: classes are missing or unexpected, with their names.
    """
    found = find_classes(directory)
    missing = [name for name in class_names if name not in found]
    unexpected = [name for name in found if name not in class_names]
    differences = [
        f"{word} {_named(names)}" for word, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if differences:
        raise DataError(
            f"{directory} does not have the {len(class_names)} classes of {reference}: {'; '.join(differences)}."
        )


def nearby_root(root: Path, has_data: Callable[[Path], bool]) -> str:
    """Return advice if the data is one level above or below ``root``, or "". Unreadable directories are skipped.

    Args:
        has_data: returns True for a directory that holds the data.
    """
    try:
        below = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    except OSError:
        below = []
    for candidate in (*below[:100], root.absolute().parent):
        try:
            is_found = has_data(candidate)
        except OSError:  # lost+found, or another user's directory
            continue
        if is_found:
            return f"Did you mean {hydra_override('data.root', candidate)}?"
    return ""


def _refuse_aliases(root: Path) -> None:
    """Refuse splits under another name, such as ``valid/`` or ``Train/``, which would be ignored.

    Raises:
        DataError: names the directory and the split that it seems to be.
    """
    try:
        present = {entry.name for entry in root.iterdir() if entry.is_dir()}
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror}.") from error
    for split, aliases in _ALIASES.items():
        if split not in present:
            for name in sorted(present):
                if name.lower() in (split, *aliases):
                    raise DataError(f"{root / name} is not a split. Did you mean {split}/? Rename it. {LAYOUT}")


def _walk(directory: Path, prefix: str) -> Iterator[tuple[str, bool]]:
    """Yield ``(path below prefix, is a regular file)`` at any depth, without hidden entries and without link loops."""
    seen: set[str] = set()
    pending = [(os.fspath(directory), prefix)]
    while pending:
        path, name = pending.pop()
        if (real := os.path.realpath(path)) in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    below = os.path.join(name, entry.name)
                    if entry.is_dir():
                        pending.append((entry.path, below))
                    else:  # a broken link counts as a file, so that reading it names it
                        yield below, entry.is_file() or not os.path.exists(entry.path)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _named(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- data module ----------------------------------------------------------------------------------------------------


class ClassFolders(LightningDataModule):
    """Images of any size in ``<folder>/<class>/*`` as test data, with the classes in turn.

    Args:
        folder: holds one directory per class.
        class_names: in the order of the labels.
        preprocess: resizes each image separately.
        batch_size: at least 1.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], preprocess: Preprocess, batch_size: int):
        super().__init__()
        self.folder, self.class_names, self.preprocess = folder, class_names, preprocess
        self.batch_size = batch_size
        self.description = f"class folders in {folder}"

    def setup(self, stage: str | None = None) -> None:
        """Read all images. Further calls have no effect.

        Raises:
            DataError: the class folders differ from the classes, one is empty, or an image is corrupt.
        """
        if hasattr(self, "loader"):
            return
        if not self.folder.is_dir():
            raise DataError(f"{self.folder} not found. Give a directory that holds test/<class>/* or <class>/*.")
        check_classes(self.folder, self.class_names, "the run")
        files = interleave(list_images(self.folder, self.class_names)[0])
        images = torch.stack([self.preprocess.pixels(read_image(self.folder / path)) for path, _ in files])
        labels = torch.tensor([label for _, label in files])
        self.loader = TensorLoader(images, labels, torch.arange(len(labels)), self.batch_size)

    def test_dataloader(self) -> TensorLoader:
        return self.loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return normalize(images, self.preprocess.mean, self.preprocess.std), labels
