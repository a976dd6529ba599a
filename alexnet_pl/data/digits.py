"""scikit-learn's bundled handwritten digits: a real dataset that needs no download."""

import numpy as np
from sklearn.datasets import load_digits

from alexnet_pl.data.in_memory import ImageSource, LabeledImages, TensorDataModule
from alexnet_pl.data.splits import stratified_split

TEST_FRACTION = 0.2
"""Fraction held out as the test set, which the digits lack. The split is the same in every run, whatever the seeds."""


class DigitsDataModule(TensorDataModule):
    """1,797 digits of 8×8 pixels (Alpaydin and Kaynak 1998) in three equal channels; 360 form the test set."""

    name = "digits"
    class_names = tuple("0123456789")

    def load(self) -> ImageSource:
        digits = load_digits()
        gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        images = np.repeat(gray[..., np.newaxis], 3, axis=3)
        labels = digits.target.astype(np.int64)
        train, test = stratified_split(labels, TEST_FRACTION, seed=0)
        return ImageSource(
            train=LabeledImages(images[train], labels[train]),
            test=LabeledImages(images[test], labels[test]),
            description="scikit-learn's handwritten digits (8×8, bundled)",
        )
