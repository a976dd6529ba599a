"""Batches decoded as they are needed, by threads that work ahead; the order is a function of seed and epoch."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize

from alexnet_pl.data.loader import EpochShuffle, epoch_seed
from alexnet_pl.data.module import ImageDataModule, ImageSource
from alexnet_pl.data.shards import Shards, is_url, usable_cores
from alexnet_pl.data.split import stratified_split
from alexnet_pl.errors import ConfigError, DataError

IGNORED = -100

WINDOW = 16
"""Shards whose pictures are shuffled together in training: 65,536 pictures where each holds 4,096."""

FETCHED_AHEAD = 4
"""Shards of an object store that are fetched at a time."""


class StreamLoader:
    """Iterates over ``(images, labels)`` batches read from shards: uint8 ``(B, 3, side, side)`` and int64 ``(B,)``.

    Threads decode the next batches while this one trains: they need no copies between processes, and end with the
    iteration. Evaluation batches are filled up with images labelled ``IGNORED``, as :class:`TensorLoader`'s are.

    Args:
        shards: what is read.
        split: of the shards, not necessarily what it is used for.
        indices: ``(M,)`` int64, the images of it that are used.
        batch_size: at least 1.
        side: in pixels; images are resized where the shards have another one.
        workers: threads.
        sampler: order of the training images; None for evaluation, in order.

    Attributes:
        start: batch that the next iteration, and only that one, begins with: where a resumed run goes on.
    """

    def __init__(
        self,
        shards: Shards,
        split: str,
        indices: Tensor,
        batch_size: int,
        side: int,
        workers: int,
        sampler: EpochShuffle | None = None,
    ):
        self.shards, self.split, self.indices = shards, split, indices
        self.batch_size, self.side, self.workers, self.sampler = batch_size, side, workers, sampler
        self.labels = torch.from_numpy(shards.splits[split].label.astype(np.int64))
        self.batch_sampler = None  # Lightning reads it where there is a sampler
        self.start = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        return max(full, 1) if self.sampler is not None else full + (rest > 0)

    def batches(self) -> list[Tensor]:
        """The indices of the images of each batch of this epoch's iteration, in the split of the shards."""
        order = self.indices if self.sampler is None else self.indices[self.sampler.order()]
        return list(order.split(self.batch_size)[: len(self)])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.start = self.start, 0
        batches = self.batches()[start:]
        decoders = ThreadPoolExecutor(self.workers, "decode")
        fetchers = ThreadPoolExecutor(FETCHED_AHEAD, "fetch")
        try:
            if self.shards.remote:
                order = torch.cat(batches).numpy() if batches else np.empty(0, np.int64)
                for shard in dict.fromkeys(self.shards.splits[self.split].shard[order].tolist()):
                    fetchers.submit(self.shards.fetch, self.split, shard)  # what fails is raised by who needs it
            ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
            for batch in batches:
                ahead.append(decoders.submit(self._read, batch))
                if len(ahead) > self.workers + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also where the iteration is left early: the limit on batches, a signal, an error
            for pool in (fetchers, decoders):
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        size = min(self.batch_size, len(self.indices))
        images = torch.zeros(size, 3, self.side, self.side, dtype=torch.uint8)
        labels = torch.full((size,), IGNORED)
        labels[: len(batch)] = self.labels[batch]
        for place, content in enumerate(self.shards.read(self.split, batch.tolist())):
            images[place] = self._decode(content)
        return images, labels

    def _decode(self, content: bytearray) -> Tensor:
        try:
            image = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError as error:
            raise DataError(f"a picture in {self.shards.root} cannot be decoded: {error}") from error
        if image.shape[1:] != (self.side, self.side):
            image = resize(image, [self.side, self.side], antialias=True)
        return image


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

    A function of ``(seed, epoch)`` alone, as :class:`~alexnet_pl.data.loader.EpochShuffle` is, but a disk or an object
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
    """Batches from a folder of shards that ``python -m alexnet_pl.shards`` has made.

    JPEGs are decoded on the CPU as they are needed; crops, mirrors and colours are made on the device.

    Args:
        root: the folder, or a URL that fsspec reads, such as ``s3://bucket/imagenet``.
        resize_size: side in pixels of the pictures that crops are cut from; by default the side in the shards.
        workers: threads that decode; by default one a core.
        cache: folder for shards fetched from a URL.
        **settings: :class:`alexnet_pl.data.module.ImageDataModule`'s.
    """

    name = "shards"
    classes_from_files = True

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

    def stored_side(self, side: int) -> int:
        """Side in pixels of what the loaders give, of shards with ``side``."""
        return getattr(self, "resize_size", self.image_size)

    def load(self) -> ImageSource:
        raise NotImplementedError("pictures of shards are never in memory all at once")

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
        side, workers = self.stored_side(shards.side), self.workers or usable_cores()
        for split, folder in roles.items():
            indices = torch.from_numpy(everything[split])
            self._loaders[split] = StreamLoader(
                shards, folder, indices, self.batch_size, side, workers, shuffle if split == "train" else None
            )
        self.description = self.describe()

    def describe(self) -> str:
        """The data, for people and result.json."""
        roles = choose_splits(self.shards.splits)
        held_out = f"{self.val_fraction:g} of train/" if roles["val"] == "train" else "val/"
        skipped = len(self.shards.index["skipped"])
        return (
            f"shards of {self.shards.side}×{self.shards.side} in {self.root}; validation is {held_out}, "
            f"test is {roles['test']}/" + f"; {skipped:,} unreadable pictures left out" * (skipped > 0)
        )
