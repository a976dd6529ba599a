"""What there is in a tree of class folders: ``train/<class>/…``, ``val/<class>/…``, ``test/<class>/…``."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule

from alexnet_pl.data.image_io import Preprocess, has_picture_suffix, read_picture
from alexnet_pl.data.loaders import TensorLoader
from alexnet_pl.data.transforms import normalize
from alexnet_pl.runtime.errors import DataError

SPLITS = ("train", "val", "test")

LAYOUT = "It holds train/<class>/*, and val/<class>/* or test/<class>/* or both."


@dataclass(frozen=True)
class Listing:
    """Picture files of a tree: for each split ``(path relative to root, label)``, and how many others were left out."""

    root: Path
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    ignored: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.files.values()))


def list_tree(root: Path) -> Listing:
    """The picture files of a tree with their labels. No file is opened.

    A picture file is one with a suffix of a kind that is read, in upper or lower case, in a class folder or at any
    depth below it; links are followed, hidden files and folders left out.

    Raises:
        DataError: no ``train/``, neither ``val/`` nor ``test/``, an empty class folder, or folders that do not have the
            same classes.
    """
    class_names = find_classes(root / "train")
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if len(splits) == 1:
        raise DataError(f"{root} has neither val/ nor test/. {LAYOUT}")
    files: dict[str, list[tuple[str, int]]] = {}
    ignored = 0
    for split in splits:
        found = find_classes(root / split)
        if unknown := [name for name in found if name not in class_names]:
            raise DataError(f"{root / split} has {_named(unknown)}, which train/ does not have.")
        if missing := [name for name in class_names if name not in found]:
            raise DataError(f"{root / split} lacks {_named(missing)}, which train/ has.")
        files[split] = []
        for label, name in enumerate(class_names):
            everything = sorted(_walk(root / split / name))
            pictures = [path for path in everything if has_picture_suffix(Path(path))]
            if not pictures:
                raise DataError(f"{root / split / name} holds no picture. Fill it, or remove the class everywhere.")
            ignored += len(everything) - len(pictures)
            files[split] += [(os.path.join(split, name, path), label) for path in pictures]
    return Listing(root, class_names, files, ignored)


def find_classes(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in ``folder``, sorted as torchvision's ``ImageFolder`` has them.

    Raises:
        DataError: no such folder, or it holds none.
    """
    root = folder.parent
    if not root.exists():
        raise DataError(f"{root} does not exist. Give a folder with data.root=FOLDER. {LAYOUT}")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder. {LAYOUT}")
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. {LAYOUT}")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.") from error
    names = tuple(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        pictures = sum(has_picture_suffix(entry) for entry in entries)
        hint = (
            f" It holds {pictures:,} pictures that no folder names the class of. ILSVRC's validation images come like "
            "that: sort them into a folder for each class by the list of labels that comes with them."
        )
        raise DataError(f"{folder} has no class folders. {LAYOUT}{hint * (pictures > 0)}")
    return names


def _walk(folder: Path) -> Iterator[str]:
    """Files in ``folder`` and below it, relative to it, hidden ones left out. A link back up is not followed again."""
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable_folder):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(path, name), folder) for name in names if not name.startswith("."))


def _unreadable_folder(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"the class folder(s) {shown}"


# --- data -----------------------------------------------------------------------------------------------------------


class ClassFolders(LightningDataModule):
    """Pictures of any size in ``<folder>/<class>/*`` as test data, in the order of the CIFAR-10 class folders.

    Args:
        folder: holds a folder for each class.
        class_names: in the order of the labels.
        preprocess: resizes each picture on its own.
        batch_size: at least 1.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], preprocess: Preprocess, batch_size: int):
        super().__init__()
        self.folder, self.class_names, self.preprocess = folder, class_names, preprocess
        self.batch_size = batch_size
        self.description = f"class folders in {folder}"

    def setup(self, stage: str | None = None) -> None:
        """Read everything; the second call does nothing.

        Raises:
            DataError: missing or other class folders, an empty one, a picture that cannot be read.
        """
        if hasattr(self, "loader"):
            return
        files = list_class_folders(self.folder, self.class_names)
        images = torch.stack([self.preprocess.pixels(read_picture(path)) for path, _ in files])
        labels = torch.tensor([label for _, label in files])
        self.loader = TensorLoader(images, labels, torch.arange(len(labels)), self.batch_size)

    def test_dataloader(self) -> TensorLoader:
        return self.loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return normalize(images, self.preprocess.mean, self.preprocess.std), labels


def list_class_folders(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """Picture files with their labels, taken from the classes in turn.

    Raises:
        DataError: the folders in ``folder`` are not exactly the classes, or one of them holds no picture.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Give a folder that holds test/<class>/* or <class>/*.")
    present = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    missing, unknown = [name for name in class_names if name not in present], sorted(present.difference(class_names))
    differences = [("lacks", missing), ("has besides", unknown)]
    if said := "; it ".join(f"{verb} {', '.join(names)}" for verb, names in differences if names):
        raise DataError(f"The class folders in {folder} are not the run's {len(class_names)} classes: it {said}.")
    found = []
    for label, name in enumerate(class_names):
        files = sorted(path for path in (folder / name).iterdir() if has_picture_suffix(path))
        if not files:
            raise DataError(f"{folder / name} holds no picture.")
        found += [(rank, label, path) for rank, path in enumerate(files)]
    return [(path, label) for _, label, path in sorted(found)]
