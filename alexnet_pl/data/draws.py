"""Random numbers of augmentations, one set for each image of a dataset and each epoch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Draw = Callable[[int, int, torch.Generator], Tensor]
"""Function from a number of images, a number of values for each, and a generator to ``(images, values)``."""


def _uniform(images: int, values: int, generator: torch.Generator) -> Tensor:
    return torch.rand(images, values, generator=generator)


def _normal(images: int, values: int, generator: torch.Generator) -> Tensor:
    return torch.randn(images, values, generator=generator)


def _seeds(images: int, values: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2**32, (images, values), generator=generator)


class EpochDraws:
    """Random numbers for all images of a dataset in one epoch, drawn when they are first needed.

    What an image gets is a function of the seed, the epoch and its position in the dataset. The other images of a
    batch, their number, the rank, the device and what else draws, such as dropout, do not change it. The numbers are
    drawn on the CPU for the whole epoch and copied to the device once, so that a step only selects its rows.

    Args:
        total: images of the dataset.
        seed: 0 or more.
        epoch: counted from 0.
    """

    def __init__(self, total: int, seed: int, epoch: int):
        self.total, self.seed, self.epoch = total, seed, epoch
        self._tables: dict[tuple[int, Draw, int, torch.device], Tensor] = {}

    def at(self, index: Tensor) -> "Draws":
        """Return the numbers of the images at positions ``(N,)`` of the dataset."""
        return Draws(self, index)

    def table(self, number: int, draw: Draw, values: int, device: torch.device) -> Tensor:
        """Return the ``number``-th table of the epoch, ``(total, values)``."""
        key = number, draw, values, device
        if key not in self._tables:
            sequence = np.random.SeedSequence([self.seed, self.epoch], spawn_key=(number,))
            generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
            self._tables[key] = draw(self.total, values, generator).to(device)
        return self._tables[key]


class Draws:
    """Random numbers for the images of a batch. Every call returns new ones.

    Attributes:
        index: ``(N,)`` int64, positions of the images in the dataset, on their device.
        seed, epoch: see :class:`EpochDraws`.
    """

    def __init__(self, epoch: EpochDraws, index: Tensor):
        self.index, self.seed, self.epoch = index, epoch.seed, epoch.epoch
        self._epoch, self._number = epoch, 0

    def _next(self, draw: Draw, values: int) -> Tensor:
        table = self._epoch.table(self._number, draw, values, self.index.device)
        self._number += 1
        return table.index_select(0, self.index)

    def uniform(self, values: int) -> Tensor:
        """Return ``(N, values)`` float32 from 0 to below 1."""
        return self._next(_uniform, values)

    def normal(self, values: int) -> Tensor:
        """Return ``(N, values)`` float32 from the standard normal distribution."""
        return self._next(_normal, values)

    def below(self, *ends: int) -> list[Tensor]:
        """Return for each end ``(N, 1)`` int64, uniform from 0 to below it; an end is at most 65,536."""
        numbers = self.uniform(len(ends))
        return [(numbers[:, place, None] * end).long() for place, end in enumerate(ends)]

    def seeds(self) -> list[int]:
        """Return a seed of 32 bits for each image; waits for a GPU."""
        return [int(seed) for seed in self._next(_seeds, 1)[:, 0].tolist()]


def draws_for(images: Tensor) -> Draws:
    """Return random numbers for a batch that is part of no epoch; they follow from torch's generator of the CPU."""
    count, seed = len(images), int(torch.randint(2**32, ()))
    return EpochDraws(count, seed, epoch=0).at(torch.arange(count, device=images.device))
