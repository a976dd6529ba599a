"""scikit-learn's handwritten digits: real images that come with the installation."""

import numpy as np
from sklearn.datasets import load_digits

from alexnet_pl.data.in_memory import ImageSource, LabelledImages, TensorDataModule
from alexnet_pl.data.splits import stratified_split

TEST_FRACTION = 0.2
"""The digits have no official test set. This part is held out the same way in every run, whatever the seeds."""


class DigitsDataModule(TensorDataModule):
    """1,797 digits of 8×8 pixels (Alpaydin and Kaynak 1998), three equal channels, 360 of them the test set."""

    name = "digits"
    class_names = tuple("0123456789")

    def load(self) -> ImageSource:
        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        images = np.repeat(grey[..., np.newaxis], 3, axis=3)
        labels = digits.target.astype(np.int64)
        train, test = stratified_split(labels, TEST_FRACTION, seed=0)
        return ImageSource(
            train=LabelledImages(images[train], labels[train]),
            test=LabelledImages(images[test], labels[test]),
            description="scikit-learn's handwritten digits (8×8, embedded)",
        )
