"""Augmentation as the authors ran it, against what their convdata.py does."""

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate

from alexnet_pl.config.validate import validate
from alexnet_pl.data import PCAColor, SharedCropFlip, ShrinkingPCAColor
from alexnet_pl.data.draws import Draws, EpochDraws
from alexnet_pl.runtime.errors import ConfigError

COLORS = {
    "components": [[0.5573, 0.5767, 0.5973], [-0.7031, -0.0549, 0.7090], [-0.4417, 0.8151, -0.3749]],
    "std": [0.4, 0.1, 0.05],
}
MEAN = [0.5, 0.4, 0.3]


def draws(epoch: int) -> Draws:
    return EpochDraws(6, seed=1, epoch=epoch).at(torch.arange(6))


def numbered(count: int, side: int) -> torch.Tensor:
    """Return images whose pixels tell their row and column, the same in every image of the batch."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, columns, rows]).to(torch.uint8).expand(count, -1, -1, -1).clone()


def test_consecutive_images_share_a_crop():
    torch.manual_seed(0)
    crops = SharedCropFlip(size=8, shared_by=32)(numbered(200, 24))
    assert crops.shape == (200, 3, 8, 8)
    groups = crops.split(32)
    assert all((group == group[0]).all() for group in groups)
    assert len({group[0].numpy().tobytes() for group in groups}) == len(groups) == 7


def test_shared_crops_cover_every_position_and_both_directions():
    torch.manual_seed(0)
    crops = SharedCropFlip(size=8, shared_by=1)(numbered(2000, 10))
    corners = {(int(c[0].min()), int(c[1].min()), bool(c[1, 0, 0] > c[1, 0, -1])) for c in crops}
    assert corners == {(top, left, mirrored) for top in range(3) for left in range(3) for mirrored in (False, True)}


def test_color_noise_shrinks_the_distance_to_the_mean():
    """convdata.py: subtract the mean, add the noise, divide by 1 + its coefficient."""
    images = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    ours = ShrinkingPCAColor(**COLORS, mean=MEAN)(images, draws(0))
    noisy = PCAColor(**COLORS)(images, draws(0)).double().numpy()
    mean = 255 * np.array(MEAN)[:, None, None]
    np.testing.assert_allclose(ours, (noisy - mean) / 1.1 + mean, atol=1e-4)


def test_color_noise_and_division_end_together():
    images = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    transform = ShrinkingPCAColor(**COLORS, mean=MEAN, epochs=67)
    assert not torch.equal(transform(images, draws(66)), images)
    for epoch in (67, 90):
        assert transform(images, draws(epoch)) is images


def test_an_empty_batch_stays_empty():
    assert SharedCropFlip(size=8)(numbered(0, 24)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SharedCropFlip(size=0), "^augment.size=0 is invalid"),
        (lambda: SharedCropFlip(size=8, shared_by=0), "^augment.shared_by=0 is invalid"),
        (lambda: SharedCropFlip(size=8)(numbered(2, 7)), "augment size=8 is invalid: expected at most 7×7"),
        (lambda: ShrinkingPCAColor(**COLORS, mean=[0.5]), "^augment.color.mean=.* is invalid: expected three numbers"),
        (lambda: ShrinkingPCAColor(**COLORS, mean=MEAN, epochs=-1), "^augment.color.epochs=-1 is invalid"),
    ],
)
def test_invalid_values_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_recipe_of_2012_uses_both_on_its_own_mean():
    cfg = config("experiment=imagenet_2012", "data=image_folder", "data.root=unused")
    steps = instantiate(cfg.augment).transforms
    assert (steps["crop"].size, steps["crop"].shared_by) == (224, 32)
    assert (steps["color"].epochs, list(steps["color"].mean)) == (67, list(cfg.data.mean))
    validate(config("experiment=imagenet_2012", "data=digits", "augment/color=cifar10_2012", "data.image_size=64",
                    "data.resize_size=73", "model.num_classes=10"))  # fmt: skip
