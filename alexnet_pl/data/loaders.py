"""Batches straight from tensors: no workers, no per-sample Python."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from alexnet_pl.distributed.environment import SINGLE_PROCESS, World
from alexnet_pl.runtime.errors import DataError


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """A 64-bit seed for one epoch of one process of a run, well apart from those of neighbouring seeds and epochs."""
    numbers = [seed, epoch, rank] if rank else [seed, epoch]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class EpochShuffle(Sampler[int]):
    """A permutation of ``range(length)`` that is a function of ``(seed, epoch)`` and of nothing else.

    Lightning calls :meth:`set_epoch` before each epoch. Torch's ``RandomSampler`` draws from the global generator
    instead, so its order depends on all that was drawn before, and a resumed run starts with epoch 0's order again.
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
        """``(length,)`` int64 positions, in this epoch's order."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator)


IGNORE_INDEX = -100
"""The label of an image that only fills a batch up: ``F.cross_entropy`` leaves it out by default."""


class BatchLoader(ABC):
    """Which images make up which ``(images, labels)`` batch; how they come about is for who derives from it.

    Every batch has ``batch_size`` images, so that kernels can be compiled and recorded for one shape: with a sampler
    the last incomplete batch is dropped, without one it is filled up with images labelled ``IGNORE_INDEX``. Only
    where the
    split is smaller than one batch is the batch as large as the split.

    Of several processes each gets its part of every batch, in the order of ranks: together they see exactly the
    batches that one process sees. Evaluation batches are filled up to equal parts; a training batch that is the only
    one is cut to equal parts.

    Args:
        labels: ``(N,)`` int64.
        indices: ``(M,)`` int64, the images of this split.
        batch_size: of all processes together, a multiple of their number.
        sampler: order of the training images; None for evaluation, in order.
        group: the processes.

    Attributes:
        start: batch that the next iteration, and only that one, begins with: where a resumed run goes on.

    Raises:
        DataError: fewer training images than processes.
    """

    def __init__(
        self,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        sampler: EpochShuffle | None = None,
        group: World = SINGLE_PROCESS,
    ):
        self.labels, self.indices, self.batch_size, self.sampler, self.group = (
            labels,
            indices,
            batch_size,
            sampler,
            group,
        )
        self.batch_sampler = None  # Lightning reads it where there is a sampler
        self.start = 0
        smallest = min(batch_size, len(indices))
        self.share = smallest // group.size if sampler is not None else -(-smallest // group.size)
        """Images of a batch that this process gets."""
        if self.share == 0:
            raise DataError(f"{len(indices)} training images are too few for {group.size} processes.")

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        if self.sampler is not None:
            return max(full, 1)
        return full + (rest > 0)

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of each batch from ``start`` on: uint8 ``(share, 3, H, W)`` and int64 ``(share,)``."""

    @abstractmethod
    def gather(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images at positions ``(B,)``, uint8 ``(B, 3, H, W)``, and their labels, int64 ``(B,)``."""

    def batches(self) -> list[Tensor]:
        """The indices of the images of each batch of this epoch's iteration, on the CPU; of all processes together."""
        return list(self._order().split(self.batch_size)[: len(self)])

    def _order(self) -> Tensor:
        return self.indices if self.sampler is None else self.indices[self.sampler.order()]

    def _parts(self, order: Tensor) -> Iterator[tuple[Tensor, int]]:
        """For each batch from ``start`` on ``(share,)`` indices, and how many at their end only fill it up."""
        start, self.start = self.start, 0
        for batch in order.split(self.batch_size)[start : len(self)]:
            part = batch[self.group.rank * self.share : (self.group.rank + 1) * self.share]
            missing = self.share - len(part)
            yield torch.cat([part, batch[-1:].expand(missing)]) if missing else part, missing

    def _batch(self, images: Tensor, missing: int) -> tuple[Tensor, Tensor]:
        """:meth:`gather`, the last ``missing`` images labelled ``IGNORE_INDEX``."""
        pixels, labels = self.gather(images)
        if missing:
            labels[-missing:] = IGNORE_INDEX
        return pixels, labels


class TensorLoader(BatchLoader):
    """Batches gathered from tensors on whatever device they are.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        labels: ``(N,)`` int64 on the same device.
        indices, batch_size, sampler, group: as in :class:`BatchLoader`.
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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order().to(self.images.device)  # once: a copy in every step would hold the device up
        for part, missing in self._parts(order):
            yield self._batch(part, missing)

    def gather(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.images.device)
        return self.images.index_select(0, images), self.labels.index_select(0, images)  # on a CPU faster than [images]
