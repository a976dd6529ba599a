"""Data loaders that gather whole batches from tensors, without worker processes or per-sample Python."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from alexnet_pl.distributed.environment import SINGLE_PROCESS, World
from alexnet_pl.runtime.errors import DataError


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Return a 64-bit seed for one epoch on one rank, statistically independent of neighboring seeds and epochs."""
    numbers = [seed, epoch, rank] if rank else [seed, epoch]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class EpochShuffle(Sampler[int]):
    """Sampler whose permutation of ``range(length)`` depends on ``(seed, epoch)`` alone.

    Lightning calls :meth:`set_epoch` before each epoch. Torch's ``RandomSampler`` draws from the global generator
    instead, so its order depends on every earlier draw, and a resumed run would repeat the order of epoch 0.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> Tensor:
        """Return this epoch's order: ``(length,)`` int64 positions."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator)


IGNORE_INDEX = -100
"""Label of padding images. ``F.cross_entropy`` ignores it by default."""


class BatchLoader(ABC):
    """Loader base class that decides which images form each ``(images, labels)`` batch. Subclasses produce the pixels.

    Every batch has ``batch_size`` images, so that kernels can be compiled and captured for one shape. In training, the
    incomplete last batch is dropped. In evaluation, it is padded with images labeled ``IGNORE_INDEX``. A split smaller
    than ``batch_size`` forms a single batch of its own size.

    In distributed training, each rank receives its slice of every batch, so that all ranks together see the batches
    that a single process would see. Evaluation batches are padded to equal slices. A training split that forms a
    single batch is truncated to equal slices.

    Args:
        labels: ``(N,)`` int64.
        indices: ``(M,)`` int64, images of this split.
        batch_size: images per batch across all ranks; a multiple of the world size.
        sampler: order of the training images; None in evaluation, which keeps the order of ``indices``.
        group: rank and world size.

    Attributes:
        start_image: images of the epoch's order that the next iteration skips. A resumed run sets it. The value
            applies to one iteration and may come from a run with another batch size. At least one batch is always left.
        per_rank_batch_size: images per batch on this rank.
        with_index: batches are ``(images, labels, index)``, with the position of each image in the dataset.

    Raises:
        DataError: the split has fewer training images than there are ranks.
    """

    def __init__(
        self,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        sampler: EpochShuffle | None = None,
        group: World = SINGLE_PROCESS,
    ):
        self.labels, self.indices, self.batch_size = labels, indices, batch_size
        self.sampler, self.group = sampler, group
        self.batch_sampler = None  # Lightning reads this attribute of every loader that has a sampler
        self.start_image = self._first_image = 0
        self.with_index = False
        smallest = min(batch_size, len(indices))
        self.per_rank_batch_size = smallest // group.size if sampler is not None else -(-smallest // group.size)
        if self.per_rank_batch_size == 0:
            raise DataError(f"{len(indices)} training images are too few for {group.size} ranks.")

    def __len__(self) -> int:
        return self._num_batches(0)

    def _num_batches(self, first_image: int) -> int:
        full, rest = divmod(len(self.indices) - first_image, self.batch_size)
        return full + (rest > 0) if self.sampler is None else max(full, 1)

    @property
    def start_batch(self) -> int:
        """Return the index of the next iteration's first batch, counted so that the epoch ends at ``len(self)``."""
        return len(self) - self._num_batches(self._clamped(self.start_image))

    def images_before(self, batch: int) -> int:
        """Return how many images of the current epoch's order precede batch ``batch``: the value to resume from."""
        return self._first_image + (batch - len(self) + self._num_batches(self._first_image)) * self.batch_size

    def _clamped(self, first_image: int) -> int:
        return max(0, min(first_image, len(self.indices) - self.batch_size))

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield this rank's slice of each batch: uint8 ``(B, 3, H, W)`` and int64 ``(B,)``."""

    @abstractmethod
    def gather(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at positions ``(B,)`` as uint8 ``(B, 3, H, W)``, and their labels as int64 ``(B,)``."""

    def batches(self) -> list[Tensor]:
        """Return the image indices of each batch of a whole epoch, across all ranks, on the CPU."""
        return list(self._order().split(self.batch_size)[: len(self)])

    def _order(self) -> Tensor:
        return self.indices if self.sampler is None else self.indices[self.sampler.order()]

    def _parts(self, order: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield ``(per_rank_batch_size,)`` indices for each batch, and how many of the last ones are padding."""
        self._first_image, self.start_image = self._clamped(self.start_image), 0
        batches = order[self._first_image :].split(self.batch_size)
        for batch in batches[: self._num_batches(self._first_image)]:
            part = batch[self.group.rank * self.per_rank_batch_size : (self.group.rank + 1) * self.per_rank_batch_size]
            missing = self.per_rank_batch_size - len(part)
            yield torch.cat([part, batch[-1:].expand(missing)]) if missing else part, missing

    def _batch(self, images: Tensor, missing: int) -> tuple[Tensor, ...]:
        """Return :meth:`gather`'s result with the last ``missing`` images labeled ``IGNORE_INDEX``."""
        pixels, labels = self.gather(images)
        if missing:
            labels[-missing:] = IGNORE_INDEX
        return (pixels, labels, images) if self.with_index else (pixels, labels)


class TensorLoader(BatchLoader):
    """Loader that gathers batches from tensors on their device.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        labels: ``(N,)`` int64 on the same device.
        indices, batch_size, sampler, group: see :class:`BatchLoader`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        sampler: EpochShuffle | None = None,
        group: World = SINGLE_PROCESS,
    ):
        super().__init__(labels, indices, batch_size, sampler, group)
        self.images = images

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = self._order().to(self.images.device)  # one copy per epoch, because a copy per step would stall a GPU
        for part, missing in self._parts(order):
            yield self._batch(part, missing)

    def gather(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.images.device)
        return self.images.index_select(0, images), self.labels.index_select(0, images)  # faster on a CPU than [images]
