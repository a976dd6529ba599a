"""Augmentations draw for each image: copies of one image in a batch come out different."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from alexnet_pl.data import BatchTransform, Compose, DigitsDataModule, PCAColor, PerImage, RandomCropFlip
from alexnet_pl.data.augmentations import Cutout, RandAugment
from alexnet_pl.data.draws import draws_for
from alexnet_pl.data.transforms import per_image
from alexnet_pl.runtime.errors import ConfigError

TARGETS = {
    "RandAugment": "augment._target_=torchvision.transforms.v2.RandAugment",
    "TrivialAugmentWide": "augment._target_=torchvision.transforms.v2.TrivialAugmentWide",
    "AugMix": "augment._target_=torchvision.transforms.v2.AugMix",
    "RandomErasing": "augment._target_=torchvision.transforms.v2.RandomErasing +augment.p=0.9",
    "RandomResizedCrop": "augment._target_=torchvision.transforms.v2.RandomResizedCrop +augment.size=32",
    "v1 RandAugment": "augment._target_=torchvision.transforms.RandAugment",
    "v1 RandomHorizontalFlip": "augment._target_=torchvision.transforms.RandomHorizontalFlip",
    "Compose step": "augment=crop_flip_color +augment.policy={_target_:torchvision.transforms.v2.RandAugment}"
    " augment.crop=null augment.color=null",
}

JITTER = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}

TRANSFORMS = {
    "v2.Compose": v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(**JITTER)]),
    "nested v2.Compose": v2.Compose([v2.Compose([v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.8)])]),
    "v2.RandomApply": v2.RandomApply([v2.RandomRotation(90)], p=0.9),
    "v2.RandomChoice": v2.RandomChoice([v2.RandomRotation(90), v2.RandomErasing(p=1)]),
    "v1.ColorJitter": v1.ColorJitter(**JITTER),
    "v1.Compose": v1.Compose([v1.RandomRotation(90)]),
    "v1.RandomChoice": v1.RandomChoice([v1.RandomHorizontalFlip(p=1), v1.RandomVerticalFlip(p=1), nn.Identity()]),
    "a function": lambda image: image.roll(random.randrange(30), -1).roll(int(np.random.randint(30)), -2),
    "ours: crop": RandomCropFlip(padding=6),
    "ours: cutout": Cutout(size=12),
    "ours: RandAugment": RandAugment(),
    "ours: color": PCAColor(torch.eye(3).tolist(), (0.4, 0.1, 0.05)),
    "ours: Compose of both": Compose(erase=v2.RandomErasing(p=0.9), crop=RandomCropFlip(padding=6)),
}


def copies(count: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8).repeat(count, 1, 1, 1)


def assert_acts_per_image(augment: nn.Module) -> None:
    torch.manual_seed(1)
    first = augment(copies())
    counts = Counter(image.numpy().tobytes() for image in first)
    assert max(counts.values()) <= 0.9 * len(first)  # half of them alike if all it does is mirror
    random.seed(5)  # only torch's generator counts
    np.random.seed(5)
    torch.manual_seed(1)
    assert torch.equal(first, augment(copies()))
    assert not torch.equal(first, augment(copies()))


@pytest.mark.parametrize("name", TARGETS)
def test_transforms_from_the_config_act_per_image(name):
    module = instantiate(config("model=lenet5", *TARGETS[name].split()).data)
    assert_acts_per_image(module.augment)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_act_per_image(name):
    assert_acts_per_image(per_image(TRANSFORMS[name]))


def test_bare_torchvision_transform_treats_a_batch_alike():
    """The fault that the wrapper exists for. If torchvision changes it, the wrapper is no longer needed."""
    augmented = v2.RandomErasing(p=1)(copies())
    assert len({image.numpy().tobytes() for image in augmented}) == 1


def test_per_image_leaves_other_generators_and_the_input_alone():
    images = copies()
    draws = draws_for(images)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for name in ("a function", "v2.RandomApply"):
        PerImage(TRANSFORMS[name])(images, draws)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert torch.equal(images, copies())
    assert PerImage(v2.RandAugment())(images[:0]).shape == (0, 3, 32, 32)


def test_declared_batch_transforms_are_not_wrapped():
    class OfTheUser(BatchTransform):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    transform = OfTheUser()
    assert per_image(transform) is transform
    assert isinstance(per_image(None), nn.Identity)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (v2.Compose([v2.MixUp(num_classes=10)]), "augment=Compose failed on a tensor of 3×32×32"),
        (v2.TenCrop(32), "augment=TenCrop is invalid: expected one color image"),
        (v2.Grayscale(1), "augment=Grayscale is invalid: expected one color image"),
        (v2.ToDtype(torch.float32, scale=True), "expected pixels on the 0–255 scale, and it returns them normalized"),
        (v1.ToTensor(), "augment=ToTensor failed on a tensor of 3×32×32: pic should be PIL Image or ndarray"),
        (v2.CenterCrop(20), "expected images of at least data.image_size=32 pixels a side, and it leaves 20"),
        (v2.Compose([RandomCropFlip(padding=2)]), "augment=Compose failed on a tensor of 3×32×32"),
    ],
)
def test_transforms_that_cannot_work_are_refused_before_data_is_read(augment, message):
    settings = {"image_size": 32, "batch_size": 8, "val_fraction": 0.1, "seed": 0, "split_seed": 0}
    with pytest.raises(ConfigError, match=message) as refusal:
        DigitsDataModule(**settings, augment=augment)
    assert "\n" not in str(refusal.value)
