"""scikit-learn's bundled handwritten digits: a real dataset that needs no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from alexnet_pl.data.in_memory import ImageSource, LabeledImages, TensorDataModule
from alexnet_pl.data.splits import stratified_split

TEST_FRACTION = 0.2
"""Fraction held out as the test set, which the digits lack. The split is the same in every run, whatever the seeds."""


class DigitsDataModule(TensorDataModule):
    """1,797 digits of 8×8 pixels (Alpaydin and Kaynak 1998) in three equal channels; 360 form the test set."""

    name = "digits"
    class_names = tuple("0123456789")

    def load(self) -> ImageSource:
        pixels, labels = read_digits()
        gray = np.rint(pixels * (255 / 16)).astype(np.uint8)
        images = np.repeat(gray[..., np.newaxis], 3, axis=3)
        train, test = stratified_split(labels, TEST_FRACTION, seed=0)
        return ImageSource(
            train=LabeledImages(images[train], labels[train]),
            test=LabeledImages(images[test], labels[test]),
            description="scikit-learn's handwritten digits (8×8, bundled)",
        )


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: ``(1797, 8, 8)`` gray levels in [0, 16] and ``(1797,)`` int64 labels.

    The file is read without importing scikit-learn, which takes as long as importing torch.
    """
    spec = find_spec("sklearn")
    file = Path(spec.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if spec else None
    if file is None or not file.is_file():  # a version that keeps it elsewhere
        from sklearn.datasets import load_digits  # here for start-up time

        digits = load_digits()
        return digits.images, digits.target.astype(np.int64)
    rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
