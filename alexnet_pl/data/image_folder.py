"""Pictures of any kind in ``train/<class>/…``, ``val/<class>/…`` and ``test/<class>/…``."""

import hashlib
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from alexnet_pl.data.class_folders import LAYOUT, find_classes, list_splits
from alexnet_pl.data.shards.datamodule import ShardedDataModule
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.system import usable_cores

log = logging.getLogger(__name__)


class ImageFolderDataModule(ShardedDataModule):
    """Any tree of class folders. Every picture is read, brought to size and checked once, into shards of its own.

    The first run makes the shards (see :mod:`alexnet_pl.shards`), later runs use them until the tree changes. Which
    folder is the validation and which the test set: see :func:`alexnet_pl.data.shards.datamodule.choose_splits`.

    Args:
        root: holds ``train/`` and beside it ``val/``, ``test/`` or both; each a folder for every class, named like it.
        shards: where the shards go; by default a folder under ``$XDG_CACHE_HOME/alexnet_pl`` (``~/.cache/alexnet_pl``).
        skip_unreadable: leave out pictures that cannot be read, after naming and counting them, instead of refusing.
        quality: of the JPEG files in the shards, 1 to 100.
        **settings: :class:`alexnet_pl.data.ShardedDataModule`'s.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str | Path | None = None,
        shards: str | Path | None = None,
        skip_unreadable: bool = False,
        quality: int = 95,
        **settings: Any,
    ):
        if not 1 <= quality <= 100:
            raise ConfigError(f"data.quality={quality} is not possible: it is from 1 to 100.")
        side = settings.get("resize_size") or settings["image_size"]
        self.tree = None if root is None else Path(root).expanduser()
        self.skip_unreadable, self.quality, self.side = skip_unreadable, quality, side
        if shards is None and self.tree is not None:
            key = f"{self.tree.absolute()}|{side}|{quality}"
            shards = cache_folder() / f"images-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._prepared = False
        super().__init__(root=shards, **settings)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the folders in ``train/``, sorted.

        Raises:
            ConfigError: ``data.root`` was not given.
            DataError: no such tree.
        """
        return find_classes(self._given() / "train")

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        return (Path(root).expanduser() / "train").is_dir()

    def _given(self) -> Path:
        if self.tree is None:
            raise ConfigError(f"data.root is missing: data.root=FOLDER. {LAYOUT}")
        return self.tree

    def prepare_data(self) -> None:
        """Make the shards, or what is missing of them. Of several processes at once one does it, the others wait.

        Raises:
            DataError: no tree of class folders, or pictures that cannot be read.
        """
        if self._prepared:
            return
        listing = list_splits(self._given())
        if listing.ignored:
            log.info(f"        {listing.ignored:,} files are left out: no pictures by their names")
        make_shards(
            listing, self.root, self.side, self.quality, skip_unreadable=self.skip_unreadable,
            workers=self.workers or usable_cores(), wait=True, allow="data.skip_unreadable=true",
        )  # fmt: skip
        self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()
        super().setup(stage)

    def describe(self) -> str:
        return f"class folders in {self._given().resolve()}; {super().describe()}"


def cache_folder() -> Path:
    """Where what was made of images is kept, outside the repository and the data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_pl"
