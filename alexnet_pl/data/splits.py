"""Stratified train/validation split: a pure function of the labels and of its own seed."""

import math
from collections import Counter

import numpy as np

from alexnet_pl.runtime.errors import DataError, invalid_value


def stratified_split(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the same fraction of every class: the split of scikit-learn's ``train_test_split(stratify=…)``.

    The same arithmetic and random draws as there, because importing scikit-learn takes as long as importing torch.

    Args:
        labels: ``(N,)`` integer class labels.
        held_out: fraction to hold out, in (0, 1); 0.1 of CIFAR-10's 50,000 is 500 images per class.
        seed: seed of the split alone. A study varies the training seed and keeps this one, so that all its runs share
            the validation images.

    Returns:
        Indices kept and indices held out, each ascending, disjoint, together all of ``range(N)``.

    Raises:
        ConfigError: ``held_out`` is not in (0, 1).
        DataError: a part would have fewer images than there are classes, or a class has a single image.
    """
    if not 0 < held_out < 1:
        raise invalid_value("data.val_fraction", held_out, "a number above 0 and below 1")
    total, counts = len(labels), Counter(labels.tolist())
    smallest, held = min(counts.values()), math.ceil(held_out * total)
    if smallest < 2 or not len(counts) <= held <= total - len(counts):
        least = math.ceil(1000 * len(counts) / total) / 1000
        fix = f"Use a value from {least:g} to {1 - least:g}" if smallest > 1 and least <= 0.5 else "Add images"
        raise DataError(
            f"data.val_fraction={held_out} is invalid for {total:,} images in {len(counts):,} classes, the smallest of "
            f"{smallest}: expected an image per class or more on both sides, and the sides would have {total - held:,} "
            f"and {held:,} images. {fix}."
        )
    _, class_of, class_counts = np.unique(labels, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(class_of, kind="stable"), np.cumsum(class_counts)[:-1])
    generator = np.random.RandomState(seed)
    kept_counts = _apportion(class_counts, total - held, generator)
    held_counts = _apportion(class_counts - kept_counts, held, generator)
    shuffled = [indices[generator.permutation(len(indices))] for indices in members]
    kept = [indices[:n] for indices, n in zip(shuffled, kept_counts, strict=True)]
    out = [indices[n : n + m] for indices, n, m in zip(shuffled, kept_counts, held_counts, strict=True)]
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(out))


def take_turns(labels: np.ndarray) -> np.ndarray:
    """Return the positions of ``labels`` in an order that takes the classes in turn and keeps the order within each.

    Every prefix is then balanced: see :func:`alexnet_pl.data.class_folders.interleave`.
    """
    order = np.argsort(labels, kind="stable")
    _, starts, class_of = np.unique(labels[order], return_index=True, return_inverse=True)
    ranks = np.arange(len(labels)) - starts[class_of]  # of each image within its class
    turns: np.ndarray = order[np.lexsort((class_of, ranks))]
    return turns


def _apportion(counts: np.ndarray, total: int, generator: np.random.RandomState) -> np.ndarray:
    """Return ``total`` split in proportion to ``counts``, by largest remainder; equal remainders are drawn by lot."""
    exact = counts / counts.sum() * total
    parts = np.floor(exact)
    remainders, missing = exact - parts, int(total - parts.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        (tied,) = np.nonzero(remainders == remainder)
        chosen = generator.choice(tied, size=min(len(tied), missing), replace=False)
        parts[chosen] += 1
        missing -= len(chosen)
    whole: np.ndarray = parts.astype(int)
    return whole
