"""Batches straight from tensors: no workers, no per-sample Python."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def epoch_seed(seed: int, epoch: int) -> int:
    """A 64-bit seed for one epoch of one run, well apart from those of neighbouring seeds and epochs."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])


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


IGNORED = -100
"""The label of an image that only fills a batch up: ``F.cross_entropy`` leaves it out by default."""


class TensorLoader:
    """Iterates over ``(images, labels)`` batches gathered from tensors on whatever device they are.

    Every batch has ``batch_size`` images, so that kernels can be compiled and recorded for one shape: with a sampler
    the last incomplete batch is dropped, without one it is filled up with images labelled ``IGNORED``. Only where the
    split is smaller than one batch is the batch as large as the split.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        labels: ``(N,)`` int64 on the same device.
        indices: ``(M,)`` int64, the images of this split.
        batch_size: at least 1.
        sampler: order of the training images; None for evaluation, in order.

    Attributes:
        start: batch that the next iteration, and only that one, begins with: where a resumed run goes on.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, indices: Tensor, batch_size: int, sampler: EpochShuffle | None = None
    ):
        self.images, self.labels, self.indices = images, labels, indices
        self.batch_size, self.sampler = batch_size, sampler
        self.batch_sampler = None  # Lightning reads it where there is a sampler
        self.start = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        if self.sampler is not None:
            return max(full, 1)
        return full + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.start = self.start, 0
        size = min(self.batch_size, len(self.indices))
        order = self._order().to(self.images.device)  # once: a copy in every step would hold the device up
        for batch in order.split(size)[start : len(self)]:
            missing = size - len(batch)
            chosen = torch.cat([batch, batch[-1:].expand(missing)]) if missing else batch
            # Several times faster on a CPU than images[chosen].
            images, labels = self.images.index_select(0, chosen), self.labels.index_select(0, chosen)
            if missing:
                labels[-missing:] = IGNORED
            yield images, labels

    def batches(self) -> list[Tensor]:
        """The indices of the images of each batch of this epoch's iteration, on the CPU."""
        return list(self._order().split(self.batch_size)[: len(self)])

    def _order(self) -> Tensor:
        return self.indices if self.sampler is None else self.indices[self.sampler.order()]
