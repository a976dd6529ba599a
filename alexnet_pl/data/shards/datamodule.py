"""Data module that decodes batches from shards in threads, in an order that depends on seed and epoch alone."""

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
from alexnet_pl.runtime.errors import ConfigError, DataError, invalid_value, one_line
from alexnet_pl.runtime.signals import deferred_signals
from alexnet_pl.runtime.system import usable_cores

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

WINDOW = 16
"""Shards whose images are shuffled together in training: 65,536 images at 4,096 per shard."""

FETCHED_AHEAD = 4
"""Shards of an object store that are downloaded at the same time."""


def decode_into(pixels: np.ndarray, content: bytearray) -> None:
    """Decode a JPEG file into ``(H, W, 3)`` uint8, without the GIL.

    simplejpeg (extra ``imagenet``) takes half of Pillow's time. Both use libjpeg-turbo and give the same pixels.

    Raises:
        ValueError, OSError: the content is not a JPEG file of that size. The size is checked before decoding.
    """
    if simplejpeg is None or not _decode_fast(pixels, content):
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            _check_size(image.height, image.width, pixels)
            pixels[:] = np.asarray(image.convert("RGB"))


def _decode_fast(pixels: np.ndarray, content: bytearray) -> bool:
    """Decode as :func:`decode_into` does. Return False for a file that is left to Pillow.

    A JPEG that Pillow read is stored unchanged, so recoverable errors, which Pillow ignores, must not end a run.
    simplejpeg reports those of the header in spite of ``strict=False``.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content, strict=False)
        _check_size(height, width, pixels)
        simplejpeg.decode_jpeg(content, buffer=pixels, strict=False)
    except ValueError:
        return False
    return True


def _check_size(height: int, width: int, pixels: np.ndarray) -> None:
    if (height, width) != pixels.shape[:2]:
        raise ValueError(f"{width}×{height} pixels")


class StreamLoader(BatchLoader):
    """Loader that decodes batches from shards: uint8 ``(B, 3, side, side)`` and int64 ``(B,)``, on the CPU.

    Threads decode the next batches while the current one trains. Unlike worker processes, they copy nothing, leave
    signals to the main thread, and end with the iteration.

    Args:
        shards: source of the images.
        split: split of the shards, which may serve another purpose in the run.
        indices: ``(M,)`` int64, images of the split in use.
        side: in pixels; images stored at another size are resized.
        workers: threads, at least 1.
        batch_size, sampler, group: see :class:`~alexnet_pl.data.loaders.BatchLoader`.
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
        self.pin_for: torch.device | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        parts = list(self._parts(self._order()))
        decoders = ThreadPoolExecutor(self.workers, "decode")
        fetchers = ThreadPoolExecutor(FETCHED_AHEAD, "fetch")
        try:
            if self.shards.remote and parts:
                needed = torch.cat([part for part, _ in parts]).numpy()
                for shard in dict.fromkeys(self.shards.splits[self.split].shard[needed].tolist()):
                    fetchers.submit(self.shards.fetch, self.split, shard)  # read() raises what failed
            ahead: deque[Future[tuple[Tensor, ...]]] = deque()
            for part, missing in parts:
                with deferred_signals():
                    ahead.append(decoders.submit(self._batch, part, missing))
                    batch = ahead.popleft().result() if len(ahead) > self.workers + 1 else None
                if batch is not None:
                    yield batch
            while ahead:
                with deferred_signals():
                    batch = ahead.popleft().result()
                yield batch
        finally:  # also after an early exit: a limit on batches, a signal, an error
            for pool in (fetchers, decoders):
                pool.shutdown(wait=False, cancel_futures=True)

    def gather(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at positions ``(B,)`` of the split, and their labels.

        Raises:
            DataError: a shard is not found or corrupt.
        """
        stored = self.shards.side
        pixels = np.empty((len(images), stored, stored, 3), np.uint8)
        for position, content in enumerate(self.shards.read(self.split, images.tolist())):
            try:
                decode_into(pixels[position], content)
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                raise DataError(f"an image in {self.shards.root} is corrupt: {one_line(error)}") from error
        decoded = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if stored != self.side:
            decoded = resize(decoded, [self.side, self.side], antialias=True)
        return decoded, self.labels[images]

    def _batch(self, images: Tensor, missing: int) -> tuple[Tensor, ...]:
        pixels, *rest = super()._batch(images, missing)
        if self.pin_for is not None:
            with torch.cuda.device(self.pin_for):  # else every rank would allocate on the first GPU
                pixels = pixels.pin_memory()
        return pixels, *rest


def choose_splits(present: Iterable[str]) -> dict[str, str]:
    """Map the sets of a run to directories: ``{"train": "train", "val": …, "test": …}``.

    The last labeled directory is the test set: ``test/`` if it exists, else ``val/``. ILSVRC's validation images are
    used that way, because the labels of its test images are secret. Validation, which selects the epoch and the
    learning rate, is ``val/`` only if there is also a ``test/``. Otherwise it is held out from ``train/``.
    """
    if "test" in present:
        return {"train": "train", "val": "val" if "val" in present else "train", "test": "test"}
    return {"train": "train", "val": "train", "test": "val"}


class ShardShuffle(EpochShuffle):
    """Sampler that shuffles the order of the shards, and the images within every ``window`` of them.

    The order depends on ``(seed, epoch)`` alone, as in :class:`~alexnet_pl.data.loaders.EpochShuffle`, but reads touch
    a few shards at a time. Up to ``window`` shards, it is a shuffle of all images. Beyond, the random assignment of
    images to shards adds to it.

    Args:
        shards: ``(N,)``, the shard of each image.
        seed: seed of the run.
        window: shards whose images are shuffled together.
    """

    def __init__(self, shards: np.ndarray, seed: int, window: int = WINDOW):
        super().__init__(len(shards), seed)
        self.window = window
        counts = np.bincount(shards)
        self._images = np.split(np.argsort(shards, kind="stable"), np.cumsum(counts)[:-1])

    def order(self) -> torch.Tensor:
        """Return this epoch's order: ``(length,)`` int64 positions."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        shards = torch.randperm(len(self._images), generator=generator)
        parts = []
        for window in shards.split(self.window):
            images = torch.from_numpy(np.concatenate([self._images[shard] for shard in window.tolist()]))
            parts.append(images[torch.randperm(len(images), generator=generator)])
        return torch.cat(parts)


class ShardedDataModule(ImageDataModule):
    """Batches from shards that ``alexnet shards`` created.

    JPEGs are decoded on the CPU as needed. Crops, mirroring and color noise run on the device.

    Args:
        root: directory, or a URL that fsspec reads, such as ``s3://bucket/imagenet``.
        workers: decoding threads, by default one per core.
        cache: directory for shards downloaded from a URL.
        **settings: see :class:`alexnet_pl.data.datamodule.ImageDataModule`.
    """

    name = "shards"
    _loaders: dict[str, StreamLoader]
    classes_from_files = True
    keep_ratio = True
    is_written_by_runs = False
    """True if runs write the shards themselves, and write missing ones again."""

    def __init__(
        self,
        root: str | Path | None = None,
        workers: int | None = None,
        cache: str | Path | None = None,
        **settings: Any,
    ):
        super().__init__(**settings)
        if workers is not None and workers < 1:
            raise invalid_value("data.workers", workers, "a number of threads, 1 or more, or null")
        self.root = root if root is None or is_url(str(root)) else Path(root).expanduser()
        self.workers, self.cache = workers, None if cache is None else Path(cache).expanduser()

    @classmethod
    def is_in(cls, root: str | Path) -> bool:
        return is_url(str(root)) or (Path(root).expanduser() / INDEX).is_file()

    @cached_property
    def shards(self) -> Shards:
        """The shards, read on first access.

        Raises:
            ConfigError: ``data.root`` was not given.
            DataError: there are no finished shards.
        """
        if self.root is None:
            raise ConfigError("data.root not found. Give the directory or URL of the shards with data.root=DIR.")
        return Shards(self.root, self.cache, self.is_written_by_runs)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return self.shards.class_names

    def setup(self, stage: str | None = None) -> None:
        """Read the index and split. Further calls have no effect."""
        if self._loaders:
            return
        shards = self.shards
        roles = choose_splits(shards.splits)
        if missing := {roles["train"], roles["test"]}.difference(shards.splits):
            raise DataError(f"{self.root} has no shards of {' and '.join(sorted(missing))}.")
        chosen = {split: np.arange(len(shards.splits[folder].label)) for split, folder in roles.items()}
        if roles["val"] == "train":
            labels = shards.splits["train"].label
            chosen["train"], chosen["val"] = stratified_split(labels, self.val_fraction, self.split_seed)
        shuffle = ShardShuffle(shards.splits["train"].shard[chosen["train"]], self.seed)
        group = get_world()
        workers = self.workers or max(1, usable_cores() // group.local_size)
        self._loaders = {
            split: StreamLoader(
                shards, folder, torch.from_numpy(chosen[split]), self.resize_size, workers, self.batch_size,
                shuffle if split == "train" else None, group,
            )
            for split, folder in roles.items()
        }  # fmt: skip
        self.description = self.describe()

    def move_to(self, device: torch.device) -> None:
        """Decode batches for a CUDA GPU into pinned memory. The images stay on disk."""
        for loader in self._loaders.values():
            loader.pin_for = device if device.type == "cuda" else None

    def describe(self) -> str:
        """Return a description for the log and result.json."""
        roles = choose_splits(self.shards.splits)
        held_out = f"{self.val_fraction:g} of train/" if roles["val"] == "train" else "val/"
        skipped = len(self.shards.index["skipped"])
        return (
            f"shards of {self.shards.side}×{self.shards.side} in {self.root}; validation is {held_out}, "
            f"test is {roles['test']}/" + f"; {skipped:,} unreadable images skipped" * (skipped > 0)
        )
