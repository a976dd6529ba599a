"""Options of conf/augment beyond crops: against references, per image, combined in lists, and resumed exactly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SHORT_RUN, assert_same_run, config, metric_rows, run_until_stopped
from hydra.utils import instantiate
from lightning import Trainer
from torch import nn
from torchvision.transforms import v2

from alexnet_pl.data import AlternatingFlip, Compose, Cutout, RandAugment, RandomCropFlip
from alexnet_pl.data.augmentations import OPERATIONS, hash_bits
from alexnet_pl.data.datamodule import ImageDataModule
from alexnet_pl.data.draws import Draws, EpochDraws
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.lightning_internals import set_position
from alexnet_pl.training.run import run

TORCHVISION_NAMES = {
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY",
    "auto_contrast": "AutoContrast",
}  # fmt: skip


def images(count: int = 8, side: int = 32, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).to(dtype)


def draws(count: int, seed: int = 5, epoch: int = 0) -> Draws:
    return EpochDraws(count, seed, epoch).at(torch.arange(count))


def data_module(*overrides: str) -> ImageDataModule:
    return instantiate(config("model=lenet5", "data=digits", *overrides).data)


# --- random numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    ["crop_flip", "alternating_flip", "cutout", "randaugment", "crop_flip_color", "flip",
     "{_target_:torchvision.transforms.v2.RandAugment}"],
)  # fmt: skip
def test_an_image_is_augmented_by_seed_epoch_and_position_alone(option):
    """Not by the rest of its batch, the order, or what else draws from torch's generator, as dropout does."""
    augment = data_module(f"{'++' * (option[0] == '{')}augment={option}", "data.resize_size=32").augment
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    everything = images(90)

    def shown(size: int, seed: int = 3, epoch: int = 2) -> torch.Tensor:
        tables, found = EpochDraws(90, seed, epoch), {}
        for index in order.split(size):
            torch.rand(size)
            found |= dict(zip(index.tolist(), augment(everything[index], tables.at(index)), strict=True))
        return torch.stack([found[i] for i in range(90)])

    assert torch.equal(shown(9), shown(45))
    for other in ({"seed": 4}, {"epoch": 3}):
        assert not torch.equal(shown(9), shown(9, **other))


def test_a_run_without_augmentation_draws_nothing():
    """Otherwise dropout would have other masks than before."""
    state = torch.get_rng_state()
    assert torch.equal(data_module("augment=none").augment_images(images()), images())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_draws_are_uniform_and_independent():
    numbers = EpochDraws(40_000, seed=7, epoch=1).at(torch.arange(40_000))
    first, second = numbers.uniform(3), numbers.uniform(3)
    assert 0 <= float(first.min()) < 0.001
    assert 0.999 < float(first.max()) < 1
    together = torch.cat([first, second, numbers.normal(2)], 1).double()
    correlation = torch.corrcoef(together.T) - torch.eye(8)
    assert correlation.abs().max() < 0.02
    np.testing.assert_allclose(together[:, :6].mean(0), 0.5, atol=0.01)
    for values, end in zip(numbers.below(3, 17), (3, 17), strict=True):
        assert (torch.bincount(values[:, 0], minlength=end) / 40_000 * end - 1).abs().max() < 0.1
        assert int(values.max()) == end - 1
    assert len(set(numbers.seeds())) > 39_990
    largest = torch.tensor([1 - 2**-24])
    assert all(int((largest * end).long()) == end - 1 for end in range(1, 65_537))


# --- alternating flip -----------------------------------------------------------------------------------------------


def test_alternating_flip_shows_every_image_both_ways_in_two_epochs():
    batch, index = images(200, side=4), torch.arange(1000, 1200)
    shown = [AlternatingFlip()(batch, EpochDraws(1200, 3, epoch).at(index)) for epoch in range(4)]
    assert torch.equal(shown[0], shown[2])
    assert torch.equal(shown[1], shown[3])
    mirrored = (shown[0] != batch).flatten(1).any(1)
    assert 70 < int(mirrored.sum()) < 130
    assert torch.equal(shown[1], shown[0].flip(-1))
    assert torch.equal(shown[0][mirrored], batch[mirrored].flip(-1))
    assert not torch.equal(AlternatingFlip()(batch, EpochDraws(1200, 4, 0).at(index)), shown[0])


def test_the_hash_is_the_published_one_on_32_bits():
    def lowbias32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    index = torch.tensor([0, 1, 2, 49_999, 1_281_166])
    for seed in (0, 1, 2**32 - 1):
        expected = [lowbias32((i + seed * 0x9E3779B9) % 2**32) for i in index.tolist()]
        assert hash_bits(index, seed).tolist() == expected


def test_the_data_module_passes_index_and_epoch(tmp_path):
    module = data_module("augment=[crop,alternating_flip]", "augment.crop.padding=0")
    module.setup()
    loader = module.train_dataloader()
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path, accelerator="cpu")
    module.trainer, trainer.training = trainer, True
    seen: list[dict[int, torch.Tensor]] = []
    for epoch in range(2):
        set_position(trainer, epoch, 0, 0)
        assert trainer.current_epoch == epoch
        loader.sampler.set_epoch(epoch)
        seen.append({})
        for batch in loader:
            prepared, _ = module.on_after_batch_transfer(batch, 0)
            seen[-1] |= dict(zip(batch[2].tolist(), prepared, strict=True))
    both = seen[0].keys() & seen[1].keys()
    assert len(both) > 1000
    assert all(torch.equal(seen[0][i], seen[1][i].flip(-1)) for i in both)
    assert len(next(iter(module.val_dataloader()))) == 2


# --- cutout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cutout_covers_a_clipped_square_around_a_uniform_center(dtype):
    batch = images(64, side=8, dtype=dtype)
    covered = Cutout(size=4, fill=(0.5, 0.25, 1.0))(batch, draws(64))
    rows, columns = (center.flatten().tolist() for center in draws(64).below(8, 8))
    expected = batch.numpy().copy()
    for image, row, column in zip(expected, rows, columns, strict=True):
        for channel, value in enumerate((127.5, 63.75, 255)):
            top, left = max(0, row - 2), max(0, column - 2)
            image[channel, top : row + 2, left : column + 2] = round(value) if dtype == torch.uint8 else value
    np.testing.assert_array_equal(covered.numpy(), expected)
    assert set(rows) == set(columns) == set(range(8))


# --- RandAugment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_torchvisions(name, sign):
    """At strength 9 of 30, on each image of a batch by itself."""
    operation, is_signed = OPERATIONS[name]
    sign = sign if is_signed else 1
    theirs = v2.RandAugment()
    published = TORCHVISION_NAMES.get(name, name.capitalize())
    magnitudes, signed = theirs._AUGMENTATION_SPACE[published]
    assert signed is is_signed
    table = magnitudes(31, 32, 32)
    magnitude = 0.0 if table is None else sign * float(table[9])
    batch = images(3)
    ours = operation(batch, sign * 9 / 30)
    for image, result in zip(batch, ours, strict=True):
        expected = theirs._apply_image_or_video_transform(image, published, magnitude, v2.InterpolationMode.NEAREST, {})
        difference = (result.int() - expected.int()).abs()  # vectorized arithmetic may round differently
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


def test_randaugment_applies_operations_of_its_own_to_each_image(monkeypatch):
    """With two operations that leave a mark, the groups are those that were drawn."""
    marks = {"add": (lambda x, level: x + 1, False), "signed": (lambda x, level: x + int(30 * level), True)}
    monkeypatch.setattr("alexnet_pl.data.augmentations.OPERATIONS", marks)
    result = RandAugment(num_ops=2, magnitude=9)(torch.full((50, 3, 2, 2), 100, dtype=torch.uint8), draws(50))
    expected = torch.full((50,), 100)
    numbers = [each.flatten() for each in draws(50).below(2, 2, 2, 2)]
    for drawn, signs in (numbers[:2], numbers[2:]):
        expected += torch.where(drawn == 0, 1, torch.where(signs == 1, -9, 9))
    assert torch.equal(result[:, 0, 0, 0].long(), expected)


def test_randaugment_rounds_floating_point():
    for shift in (-0.4, 0.4):  # truncation would take the lower number for the first
        torch.manual_seed(0)
        rounded = RandAugment(num_ops=1, magnitude=0)(images(dtype=torch.float32).clamp(1, 254) + shift)
        torch.manual_seed(0)
        assert torch.equal(rounded, RandAugment(num_ops=1, magnitude=0)(images().clamp(1, 254)))
    assert rounded.dtype == torch.uint8


# --- mixing ---------------------------------------------------------------------------------------------------------


def mixed_batch(option: str, tmp_path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a batch and its labels before and after mixing."""
    module = data_module(f"augment={option}")
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path, accelerator="cpu")
    module.trainer = trainer
    labels = torch.arange(8) % 10
    trainer.validating = True
    plain, hard = module.on_after_batch_transfer((images(), labels), 0)
    assert torch.equal(hard, labels)
    trainer.training = True
    torch.manual_seed(0)
    mixed, soft = module.on_after_batch_transfer((images(), labels), 0)
    return plain, labels, mixed, soft


def test_mixup_blends_images_and_labels_by_the_same_weight(tmp_path):
    plain, labels, mixed, soft = mixed_batch("mixup", tmp_path)
    weight = float(soft[0, 0])
    assert 0 < weight < 1
    assert torch.allclose(mixed, weight * plain + (1 - weight) * plain.roll(1, 0), atol=1e-6)
    one_hot = F.one_hot(labels, 10).float()
    assert torch.allclose(soft, weight * one_hot + (1 - weight) * one_hot.roll(1, 0), atol=1e-6)


def test_cutmix_weights_the_labels_by_area(tmp_path):
    plain, labels, mixed, soft = mixed_batch("cutmix", tmp_path)
    pasted = (mixed == plain.roll(1, 0)).all(1) & ~(mixed == plain).all(1)
    assert torch.equal(mixed[~pasted.unsqueeze(1).expand_as(mixed)], plain[~pasted.unsqueeze(1).expand_as(mixed)])
    fraction = float(pasted.float().mean())
    assert 0 < fraction < 1
    one_hot = F.one_hot(labels, 10).float()
    assert torch.allclose(soft, (1 - fraction) * one_hot + fraction * one_hot.roll(1, 0), atol=1e-3)


def test_torchvisions_mixup_needs_no_list():
    module = data_module("augment._target_=torchvision.transforms.v2.MixUp", "+augment.num_classes=3")
    assert isinstance(module.mixing, v2.MixUp)
    assert isinstance(module.augment, nn.Identity)
    labels = F.one_hot(torch.arange(8), 10).float()
    assert module.mixing(images(dtype=torch.float32), labels)[1].shape == (8, 10)


# --- combinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "steps"),
    [
        ("[crop_flip,cutout]", [RandomCropFlip, Cutout]),
        ("[cutout,crop_flip]", [Cutout, RandomCropFlip]),
        ("[crop,alternating_flip,randaugment,cutmix]", [RandomCropFlip, AlternatingFlip, RandAugment]),
        ("flip", [RandomCropFlip]),
    ],
)
def test_options_of_a_list_run_in_its_order(option, steps):
    augment = data_module(f"augment={option}").augment
    assert [type(step) for step in augment.transforms.values()] == steps
    assert (augment.mixing is not None) == ("cutmix" in option)


def test_crop_and_flip_are_the_parts_of_crop_flip():
    torch.manual_seed(0)
    flip, crop = (data_module(f"augment={option}").augment for option in ("flip", "crop"))
    mirrored = flip(images(100, side=4))
    either = [
        torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, images(100, side=4), strict=True)
    ]
    assert all(either)
    assert 30 < sum(not torch.equal(a, b) for a, b in zip(mirrored, images(100, side=4), strict=True)) < 70
    ramp = torch.arange(100, 132).expand(400, 3, 32, 32).to(torch.uint8)
    cropped = crop(ramp)
    inside = cropped[:, 0, 6:-6, 6:-6].int()  # at most 6 columns of a side are the zeros around the image
    assert (inside.diff(dim=-1) == 1).all()  # never mirrored
    assert set((inside[:, 0, 0] - 106).tolist()) == {*range(-6, 7)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("augment=[mixup,crop_flip]", "augment=MixUp is invalid here: it mixes the images and labels"),
        ("augment=[mixup,cutmix]", "augment=MixUp is invalid here: it mixes the images and labels"),
        ("augment=[crop_flip,alternating_flip]", "augment.crop and augment.alternating_flip both mirror"),
        (
            "augment=[flip,alternating_flip]",
            "augment.flip and augment.alternating_flip both mirror images: expected one",
        ),
        ("augment=cutout augment.cutout.size=0", "augment.cutout.size=0 is invalid: expected 1 or more pixels"),
        ("augment=cutout augment.cutout.fill=[0,0,2]", "augment.cutout.fill=.* is invalid: expected three numbers"),
        ("augment=randaugment augment.policy.num_ops=0", "augment.policy.num_ops=0 is invalid: expected 1 or more"),
        ("augment=randaugment augment.policy.magnitude=31", "augment.policy.magnitude=31 is invalid: expected a whole"),
    ],
)
def test_invalid_augmentations_are_refused_before_data_is_read(overrides, message):
    cfg = config("model=lenet5", *overrides.split())
    with pytest.raises(Exception, match=message) as refusal:
        instantiate(cfg.data)
    cause = refusal.value
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__cause__
    assert cause is not None


def test_a_step_that_is_no_transform_is_refused():
    with pytest.raises(ConfigError, match="augment.crop=3 is invalid"):
        Compose(crop=3)


@pytest.mark.parametrize("option", ["[crop,alternating_flip,cutout,mixup]", "[crop_flip,randaugment,cutmix]"])
def test_an_augmented_run_resumes_bit_for_bit(option, tmp_path, monkeypatch):
    settings = (*SHORT_RUN, f"augment={option}", "trainer.fast_dev_run=3", "callbacks.resume.min_interval_seconds=0")
    run(config(*settings, run_dir=tmp_path / "whole"))
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, step=5)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    run(config(*SHORT_RUN, "trainer.fast_dev_run=3", run_dir=tmp_path / "plain"))
    assert metric_rows(tmp_path / "plain")[0]["train/loss"] != metric_rows(tmp_path / "run")[0]["train/loss"]
