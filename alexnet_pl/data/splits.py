"""The train/validation split: a pure function of the labels and a seed of its own."""

from collections import Counter

import numpy as np
from sklearn.model_selection import train_test_split

from alexnet_pl.runtime.errors import ConfigError, DataError


def stratified_split(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the same fraction of every class (scikit-learn's ``train_test_split`` with ``stratify``).

    Args:
        labels: ``(N,)`` integer class labels.
        held_out: fraction to hold out, in (0, 1); 0.1 of CIFAR-10's 50,000 is 500 images a class.
        seed: of the split alone. A study varies the training seed and keeps this one, so that every run of it sees
            the same validation images.

    Returns:
        Indices kept and indices held out, each ascending, disjoint, together all of ``range(N)``.

    Raises:
        ConfigError: ``held_out`` not in (0, 1).
        DataError: too few images for one of each class on both sides.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"val_fraction={held_out} is not possible: it is above 0 and below 1.")
    smallest_class = min(Counter(labels.tolist()).values())
    try:
        kept, out = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=seed)
    except ValueError as error:
        raise DataError(
            f"{len(labels)} images (the smallest class has {smallest_class}) are too few to hold out "
            f"val_fraction={held_out} of every class: {error}"
        ) from error
    return np.sort(kept), np.sort(out)
