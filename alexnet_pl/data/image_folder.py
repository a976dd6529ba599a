"""Datasets in class folders with images of any size and format (ImageNet's layout), packed into shards once."""

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from alexnet_pl.data.class_folders import LAYOUT, find_classes, list_splits
from alexnet_pl.data.shards.datamodule import ShardedDataModule
from alexnet_pl.data.shards.reader import cache_errors
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.errors import ConfigError, invalid_value
from alexnet_pl.runtime.files import cache_dir, make_cache_dir
from alexnet_pl.runtime.system import usable_cores

log = logging.getLogger(__name__)


class ImageFolderDataModule(ShardedDataModule):
    """Images in class folders. Each is read, resized and checked once, into shards of their own.

    The first run writes the shards (see :mod:`alexnet_pl.data.shards.writer`), and later runs use them until the
    images change. See :func:`alexnet_pl.data.shards.datamodule.choose_splits` for which directory is the validation
    and which the test set.

    Args:
        root: holds ``train/`` and at least one of ``val/`` and ``test/``, each with one directory per class.
        shards: directory of the shards, by default in :func:`alexnet_pl.runtime.files.cache_dir`.
        skip_unreadable: name, count and skip corrupt images instead of refusing them.
        quality: JPEG quality in the shards, 1 to 100.
        **settings: see :class:`alexnet_pl.data.ShardedDataModule`.
    """

    name = "image_folder"
    is_written_by_runs = True

    def __init__(
        self,
        root: str | Path | None = None,
        shards: str | Path | None = None,
        skip_unreadable: bool = False,
        quality: int = 95,
        **settings: Any,
    ):
        if not 1 <= quality <= 100:
            raise invalid_value("data.quality", quality, "an integer from 1 to 100")
        self.side = settings.get("resize_size") or settings["image_size"]
        self.images_dir = None if root is None else Path(root).expanduser()
        self.skip_unreadable, self.quality, self.uses_cache = skip_unreadable, quality, shards is None
        if shards is None and self.images_dir is not None:
            key = f"{self.images_dir.absolute()}|{self.side}|{quality}".encode(errors="surrogateescape")
            with cache_errors("data.shards=DIR"):
                shards = cache_dir() / f"images-{hashlib.sha256(key).hexdigest()[:16]}"
        self._prepared = False
        super().__init__(root=shards, **settings)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the directories in ``train/``, sorted.

        Raises:
            ConfigError: ``data.root`` was not given.
            DataError: the class folders are not found.
        """
        return find_classes(self._required_root() / "train")

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        return (Path(root).expanduser() / "train").is_dir()

    def _required_root(self) -> Path:
        if self.images_dir is None:
            raise ConfigError(f"data.root not found. Give the dataset's directory with data.root=DIR. {LAYOUT}")
        return self.images_dir

    def prepare_data(self) -> None:
        """Write the shards, or those that are missing. Of several concurrent processes, one writes and others wait.

        Raises:
            DataError: the class folders are not found or differ, or images are corrupt.
        """
        if self._prepared:
            return
        listing = list_splits(self._required_root())
        if self.uses_cache:
            with cache_errors("data.shards=DIR"):
                make_cache_dir()
        if listing.ignored:
            log.info(f"        {listing.ignored:,} files are ignored, because they are not images by their names")
        make_shards(
            listing, Path(str(self.root)), self.side, self.quality, skip_unreadable=self.skip_unreadable,
            workers=self.workers or usable_cores(), wait=True, allow="data.skip_unreadable=true",
        )  # fmt: skip
        self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()
        super().setup(stage)

    def describe(self) -> str:
        return f"class folders in {self._required_root().resolve()}; {super().describe()}"
