"""Batch transforms against the same thing done image by image."""

import numpy as np
import pytest
import torch

from alexnet_pl.augment import RandomCropFlip, normalize
from alexnet_pl.errors import ConfigError


def test_normalize_is_the_textbook_formula():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 0.25)
    expected = (images.double().numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(normalize(images, mean, std).numpy(), expected, atol=1e-5)


def test_crop_flip_gives_every_shift_and_mirror_and_nothing_else():
    """A 3×3 image padded by 1: nine places, mirrored or not, and the 18 results are known."""
    image = torch.arange(1, 28, dtype=torch.uint8).view(3, 3, 3)
    padded = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)))
    windows = [padded[:, y : y + 3, x : x + 3] for y in range(3) for x in range(3)]
    expected = {window.tobytes() for window in windows} | {window[:, :, ::-1].tobytes() for window in windows}
    torch.manual_seed(0)
    batch = image.expand(2000, -1, -1, -1).clone()
    seen = [augmented.numpy().tobytes() for augmented in RandomCropFlip(padding=1)(batch)]
    assert set(seen) == expected
    rates = [seen.count(result) / 2000 for result in expected]
    assert 0.03 < min(rates) <= max(rates) < 0.085  # each 1/18
    assert torch.equal(batch, image.expand(2000, -1, -1, -1))  # the data set itself is not touched


def test_crop_flip_keeps_type_and_shape_and_follows_the_seed():
    images = torch.randint(0, 256, (8, 3, 50, 50), dtype=torch.uint8)
    augment = RandomCropFlip(padding=6)
    torch.manual_seed(3)
    first = augment(images)
    torch.manual_seed(3)
    assert torch.equal(first, augment(images))
    assert (first.dtype, first.shape) == (torch.uint8, images.shape)
    with pytest.raises(ConfigError, match="padding=-1"):
        RandomCropFlip(padding=-1)
