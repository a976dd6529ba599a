"""Batches decoded as they are needed, by threads that work ahead; the order is a function of seed and epoch."""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.data.loaders import BatchLoader, EpochShuffle, epoch_seed
from alexnet_pl.data.shards.reader import INDEX, Shards, is_url
from alexnet_pl.data.splits import stratified_split
from alexnet_pl.distributed.environment import SINGLE_PROCESS, World, get_world
from alexnet_pl.runtime.errors import ConfigError, DataError
from alexnet_pl.runtime.system import usable_cores

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

WINDOW = 16
"""Shards whose pictures are shuffled together in training: 65,536 pictures where each holds 4,096."""

FETCHED_AHEAD = 4
"""Shards of an object store that are fetched at a time."""


def decode_into(pixels: np.ndarray, content: bytearray) -> None:
    """Decode a JPEG file into ``(H, W, 3)`` uint8, in a thread that leaves Python's lock to others.

    By simplejpeg (the extra ``imagenet``), which takes half of Pillow's time; without it by Pillow, whose pixels are
    the same: both are libjpeg-turbo.

    Raises:
        ValueError, OSError: it is no JPEG file of that size.
    """
    if simplejpeg is None:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
            decoded = np.asarray(picture.convert("RGB"))
    else:
        decoded = simplejpeg.decode_jpeg(content, buffer=pixels)
    if decoded.shape != pixels.shape:
        raise ValueError(f"{decoded.shape[1]}×{decoded.shape[0]} pixels")
    if simplejpeg is None:
        pixels[:] = decoded


class StreamLoader(BatchLoader):
    """Batches decoded from shards: uint8 ``(B, 3, side, side)`` and int64 ``(B,)``, on the CPU.

    Threads decode the next batches while this one trains: they need no copies between processes, leave signals to the
    main thread, and end with the iteration.

    Args:
        shards: what is read.
        split: of the shards, not necessarily what it is used for.
        indices: ``(M,)`` int64, the images of it that are used.
        side: in pixels; images are resized where the shards have another one.
        workers: threads, at least 1.
        batch_size, sampler, group: as in :class:`~alexnet_pl.data.loaders.BatchLoader`.
    """

    def __init__(
        self,
        shards: Shards,
        split: str,
        indices: Tensor,
        side: int,
        workers: int,
        batch_size: int,
        sampler: EpochShuffle | None = None,
        group: World = SINGLE_PROCESS,
    ):
        labels = torch.from_numpy(shards.splits[split].label.astype(np.int64))
        super().__init__(labels, indices, batch_size, sampler, group)
        self.shards, self.split, self.side, self.workers = shards, split, side, workers
        self.fetched_by: torch.device | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = list(self._parts(self._order()))
        decoders = ThreadPoolExecutor(self.workers, "decode")
        fetchers = ThreadPoolExecutor(FETCHED_AHEAD, "fetch")
        try:
            if self.shards.remote and parts:
                needed = torch.cat([part for part, _ in parts]).numpy()
                for shard in dict.fromkeys(self.shards.splits[self.split].shard[needed].tolist()):
                    fetchers.submit(self.shards.fetch, self.split, shard)  # what fails is raised by who needs it
            ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
            for part, missing in parts:
                ahead.append(decoders.submit(self._batch, part, missing))
                if len(ahead) > self.workers + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also where the iteration is left early: a limit on batches, a signal, an error
            for pool in (fetchers, decoders):
                pool.shutdown(wait=False, cancel_futures=True)

    def gather(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images at positions ``(B,)`` of the split, and their labels.

        Raises:
            DataError: a shard that is missing or damaged, by name.
        """
        stored = self.shards.side
        pixels = np.empty((len(images), stored, stored, 3), np.uint8)
        for place, content in enumerate(self.shards.read(self.split, images.tolist())):
            try:
                decode_into(pixels[place], content)
            except (ValueError, OSError) as error:
                raise DataError(f"a picture in {self.shards.root} cannot be decoded: {error}") from error
        decoded = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if stored != self.side:
            decoded = resize(decoded, [self.side, self.side], antialias=True)
        return decoded, self.labels[images]

    def _batch(self, images: Tensor, missing: int) -> tuple[Tensor, Tensor]:
        pixels, labels = super()._batch(images, missing)
        if self.fetched_by is not None:
            with torch.cuda.device(self.fetched_by):  # else every process would take memory of the first GPU
                pixels = pixels.pin_memory()
        return pixels, labels


def choose_splits(present: Iterable[str]) -> dict[str, str]:
    """Which folder of a tree is which set: ``{"train": "train", "val": …, "test": …}``; ``"train"`` for val: a part.

    The last labelled folder is the test set, read once: ``test/`` where there is one, else ``val/``, which is how
    ILSVRC's validation images are used, the labels of its test images being secret. Validation, which chooses the epoch
    and the learning rate, is ``val/`` only beside a ``test/``; else it is held out from ``train/``.
    """
    if "test" in present:
        return {"train": "train", "val": "val" if "val" in present else "train", "test": "test"}
    return {"train": "train", "val": "train", "test": "val"}


class ShardShuffle(EpochShuffle):
    """Shards in a shuffled order, and pictures shuffled within every ``window`` of them.

    A function of ``(seed, epoch)`` alone, as :class:`~alexnet_pl.data.loaders.EpochShuffle` is, but a disk or an object
    store is read a few shards at a time. Up to ``window`` shards it is a shuffle of all pictures; beyond, pictures are
    in the shards at random to begin with.

    Args:
        shards: ``(N,)`` the shard of each picture.
        seed: of the run.
        window: shards whose pictures are shuffled together.
    """

    def __init__(self, shards: np.ndarray, seed: int, window: int = WINDOW):
        super().__init__(len(shards), seed)
        self.window = window
        counts = np.bincount(shards)
        self._pictures = np.split(np.argsort(shards, kind="stable"), np.cumsum(counts)[:-1])

    def order(self) -> torch.Tensor:
        """``(length,)`` int64 positions, in this epoch's order."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        shards = torch.randperm(len(self._pictures), generator=generator)
        parts = []
        for window in shards.split(self.window):
            pictures = torch.from_numpy(np.concatenate([self._pictures[shard] for shard in window.tolist()]))
            parts.append(pictures[torch.randperm(len(pictures), generator=generator)])
        return torch.cat(parts)


class ShardedDataModule(ImageDataModule):
    """Batches from a folder of shards that ``python -m alexnet_pl shards`` has made.

    JPEGs are decoded on the CPU as they are needed; crops, mirrors and colours are made on the device.

    Args:
        root: the folder, or a URL that fsspec reads, such as ``s3://bucket/imagenet``.
        workers: threads that decode; by default one a core.
        cache: folder for shards fetched from a URL.
        **settings: :class:`alexnet_pl.data.datamodule.ImageDataModule`'s.
    """

    name = "shards"
    classes_from_files = True
    keep_ratio = True

    def __init__(
        self,
        root: str | Path | None = None,
        workers: int | None = None,
        cache: str | Path | None = None,
        **settings: Any,
    ):
        super().__init__(**settings)
        if workers is not None and workers < 1:
            raise ConfigError(f"data.workers={workers} is not possible: it is a number of threads, or null.")
        self.root = root if root is None or is_url(str(root)) else Path(root).expanduser()
        self.workers, self.cache = workers, None if cache is None else Path(cache).expanduser()

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        return is_url(str(root)) or (Path(root).expanduser() / INDEX).is_file()

    @cached_property
    def shards(self) -> Shards:
        """The shards; read when they are first asked for.

        Raises:
            ConfigError: ``data.root`` was not given.
            DataError: no finished shards there.
        """
        if self.root is None:
            raise ConfigError("data.root is missing: data.root=FOLDER or a URL, as alexnet_pl.shards has made it.")
        return Shards(self.root, self.cache)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return self.shards.class_names

    def setup(self, stage: str | None = None) -> None:
        """Read the index and split; the second call does nothing."""
        if self._loaders:
            return
        shards = self.shards
        roles = choose_splits(shards.splits)
        if missing := {roles["train"], roles["test"]}.difference(shards.splits):
            raise DataError(f"{self.root} has no {' and no '.join(sorted(missing))} shards.")
        everything = {split: np.arange(len(shards.splits[folder].label)) for split, folder in roles.items()}
        if roles["val"] == "train":
            labels = shards.splits["train"].label
            everything["train"], everything["val"] = stratified_split(labels, self.val_fraction, self.split_seed)
        shuffle = ShardShuffle(shards.splits["train"].shard[everything["train"]], self.seed)
        group = get_world()
        workers = self.workers or max(1, usable_cores() // group.local_size)
        for split, folder in roles.items():
            indices = torch.from_numpy(everything[split])
            self._loaders[split] = StreamLoader(
                shards, folder, indices, self.resize_size, workers, self.batch_size,
                shuffle if split == "train" else None, group,
            )  # fmt: skip
        self.description = self.describe()

    def move_to(self, device: torch.device) -> None:
        """Pictures stay where they are; batches for a CUDA GPU are decoded into memory that it fetches them from."""
        for loader in self._loaders.values():
            loader.fetched_by = device if device.type == "cuda" else None

    def describe(self) -> str:
        """The data, for people and result.json."""
        roles = choose_splits(self.shards.splits)
        held_out = f"{self.val_fraction:g} of train/" if roles["val"] == "train" else "val/"
        skipped = len(self.shards.index["skipped"])
        return (
            f"shards of {self.shards.side}×{self.shards.side} in {self.root}; validation is {held_out}, "
            f"test is {roles['test']}/" + f"; {skipped:,} unreadable pictures left out" * (skipped > 0)
        )
