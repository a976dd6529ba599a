"""Batch transforms, compared with the same operation on single images."""

import math

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.decomposition import PCA

from alexnet_pl.cli.color_pca import data_from
from alexnet_pl.cli.color_pca import main as color_pca_command
from alexnet_pl.data.color_pca import color_statistics
from alexnet_pl.data.digits import DigitsDataModule
from alexnet_pl.data.draws import EpochDraws
from alexnet_pl.data.transforms import (
    CENTER,
    Compose,
    PCAColor,
    RandomCropFlip,
    center_crop,
    crop_by_gather,
    crop_by_slicing,
    make_views,
    normalize,
    select_center_crop,
    ten_crop,
)
from alexnet_pl.runtime.errors import ConfigError, DataError

# Any orthogonal directions will do: a rotation about (1, 1, 1).
COMPONENTS = ((2 / 3, -1 / 3, 2 / 3), (2 / 3, 2 / 3, -1 / 3), (-1 / 3, 2 / 3, 2 / 3))


def test_normalize_is_the_textbook_formula():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 0.25)
    expected = (images.double().numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(normalize(images, mean, std).numpy(), expected, atol=1e-5)


def test_normalize_accepts_fractional_gray_levels_and_modifies_nothing():
    images = torch.rand(2, 3, 4, 4) * 255
    before = images.clone()
    expected = (images / 255 - 0.4) / 0.2
    torch.testing.assert_close(normalize(images, (0.4,) * 3, (0.2,) * 3), expected, atol=1e-5, rtol=0)
    assert torch.equal(images, before)
    whole = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(normalize(whole, (0.4,) * 3, (0.2,) * 3), normalize(whole.float(), (0.4,) * 3, (0.2,) * 3))


def test_crop_flip_gives_every_shift_and_mirror_and_nothing_else():
    """Check the 18 possible results of a 3×3 image padded by 1: nine offsets, mirrored or not."""
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
    assert torch.equal(batch, image.expand(2000, -1, -1, -1))  # the dataset is not modified


def test_crop_flip_keeps_dtype_and_shape_and_depends_on_the_seed():
    images = torch.randint(0, 256, (8, 3, 50, 50), dtype=torch.uint8)
    augment = RandomCropFlip(padding=6)
    torch.manual_seed(3)
    first = augment(images)
    torch.manual_seed(3)
    assert torch.equal(first, augment(images))
    assert (first.dtype, first.shape) == (torch.uint8, images.shape)
    with pytest.raises(ConfigError, match="augment.padding=-1 is invalid: expected 0 or more pixels"):
        RandomCropFlip(padding=-1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_of_larger_images_gives_every_window_and_mirror(dtype):
    """Crop 4×5 to 3×3: two first rows and three first columns, mirrored or not."""
    image = torch.arange(1, 61).view(3, 4, 5).to(dtype)
    windows = [image[:, y : y + 3, x : x + 3].numpy() for y in range(2) for x in range(3)]
    expected = {window.tobytes() for window in windows} | {window[:, :, ::-1].tobytes() for window in windows}
    torch.manual_seed(0)
    cropped = RandomCropFlip(size=3)(image.expand(2000, -1, -1, -1))
    assert (cropped.dtype, cropped.shape) == (dtype, (2000, 3, 3, 3))
    seen = [augmented.numpy().tobytes() for augmented in cropped]
    assert set(seen) == expected
    rates = [seen.count(result) / 2000 for result in expected]
    assert 0.055 < min(rates) <= max(rates) < 0.115  # each 1/12


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_are_the_same_on_cpu_and_gpu(dtype):
    images = torch.randint(256, (20, 3, 9, 11)).to(dtype)
    top, left, mirrored = torch.randint(4, (20, 1)), torch.randint(5, (20, 1)), torch.rand(20, 1) < 0.5
    sliced, gathered = (crop(images, top, left, mirrored, (6, 7)) for crop in (crop_by_slicing, crop_by_gather))
    assert sliced.dtype == dtype
    assert torch.equal(sliced, gathered)


def test_impossible_crops_are_refused():
    with pytest.raises(ConfigError, match="augment.size=0 is invalid: expected 1 or more pixels, or null"):
        RandomCropFlip(size=0)
    with pytest.raises(ConfigError, match="size=9 is invalid: expected at most 8×8.*data.resize_size=9"):
        RandomCropFlip(size=9)(torch.zeros(1, 3, 8, 8))


def test_center_crop_is_one_of_the_ten_crops():
    images = torch.randn(2, 3, 256, 256)
    for size in (224, 227, 256):
        assert torch.equal(center_crop(images, size), ten_crop(images, size)[CENTER])
    assert torch.equal(center_crop(images, 224), images[..., 16:240, 16:240])


def test_six_views_are_the_shifted_mirror_views_of_airbench():
    images = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6).to(torch.uint8)
    views = make_views(images, 6, 6)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    crops = [images.numpy(), padded[..., :6, :6], padded[..., 2:, 2:]]
    expected = [view for crop in crops for view in (crop, crop[..., ::-1])]
    assert views.dtype == torch.uint8
    for ours, theirs in zip(views.numpy(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert torch.equal(select_center_crop(views), images)


@pytest.mark.parametrize("count", [2, 6, 10])
def test_the_center_crop_of_any_views_is_found(count):
    images = torch.randn(2, 3, 11, 11)
    views = make_views(images, 8, count)
    assert views.shape == (count, 2, 3, 8, 8)
    assert torch.equal(select_center_crop(views), center_crop(images, 8))
    assert torch.equal(views[1] if count < 10 else views[7], center_crop(images, 8).flip(-1))


# --- PCA color ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pca_color_is_the_papers_formula_image_by_image(dtype):
    """Compute I + [p1 p2 p3] [a1 s1, a2 s2, a3 s3]^T for every pixel in NumPy float64, from the same draws."""
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8).to(dtype)
    before, std = images.clone(), (0.4, 0.1, 0.05)
    epoch = EpochDraws(5, seed=7, epoch=0)
    noisy = PCAColor(COMPONENTS, std, alpha_std=0.1)(images, epoch.at(torch.arange(5)))
    draws = epoch.at(torch.arange(5)).normal(3).numpy().astype(np.float64) * 0.1
    columns = np.array(COMPONENTS).T  # p1, p2 and p3 side by side, as in the paper
    expected = images.numpy().astype(np.float64)
    for image, alphas in zip(expected, draws, strict=True):
        color = columns @ (alphas * np.array(std) * 255)
        for y in range(4):
            for x in range(6):
                image[:, y, x] += color
    assert noisy.dtype == torch.float32
    np.testing.assert_allclose(noisy.numpy(), expected, atol=1e-4)
    assert torch.equal(images, before)  # the dataset is not modified


def test_pca_color_has_the_documented_covariance():
    """Check alpha_std² times the sum of p p^T s² over many images, and one color for all pixels of an image."""
    std = np.array([0.4, 0.1, 0.05])
    torch.manual_seed(0)
    added = PCAColor(COMPONENTS, std.tolist(), alpha_std=0.1)(torch.full((20_000, 3, 2, 2), 128, dtype=torch.uint8))
    added = (added.double() - 128) / 255
    assert added.std(dim=(2, 3)).max() < 1e-7
    rows = np.array(COMPONENTS)
    expected = 0.01 * rows.T @ np.diag(std**2) @ rows
    np.testing.assert_allclose(np.cov(added[:, :, 0, 0].numpy().T), expected, atol=0.05 * expected.max())
    assert added.mean(dim=(0, 2, 3)).abs().max() < 0.001


def test_pca_color_is_not_clamped_and_depends_on_the_seed():
    images = torch.full((64, 3, 1, 1), 255, dtype=torch.uint8)
    color = PCAColor(COMPONENTS, (0.4, 0.1, 0.05))
    torch.manual_seed(1)
    first = color(images)
    torch.manual_seed(1)
    assert torch.equal(first, color(images))
    assert first.max() > 255
    assert torch.equal(PCAColor(COMPONENTS, (0.4, 0.1, 0.05), alpha_std=0)(images), images.float())
    assert color(images[:0]).shape == (0, 3, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": [[1, 0, 0], [0, 1, 0]]}, "three rows of three numbers"),
        ({"std": [1, 2]}, "three numbers in std"),
        ({"std": [0.1, -0.1, 0]}, "std=0.1, -0.1, 0 is invalid: expected finite numbers, 0 or more"),
        ({"std": [0.1, math.nan, 0]}, "std="),
        ({"alpha_std": -1}, "alpha_std=-1"),
        ({"components": [[1, 0, 0], [0, 1, 0], [0, 0.5, 1]]}, "not orthogonal"),
        ({"components": [[2, 0, 0], [0, 2, 0], [0, 0, 2]]}, "not orthogonal"),
    ],
)
def test_pca_color_refuses_invalid_arguments(settings, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        PCAColor(**{"components": COMPONENTS, "std": (0.4, 0.1, 0.05), **settings})
    assert "\n" not in str(refusal.value)


def test_steps_run_in_order_and_can_be_skipped_by_name():
    augment = instantiate(config("augment=crop_flip_color", "augment.color.alpha_std=0.2").augment)
    assert list(augment.transforms) == ["crop", "color"]
    assert augment.transforms["color"].alpha_std == 0.2
    images = torch.randint(0, 256, (4, 3, 50, 50), dtype=torch.uint8)
    epoch = EpochDraws(4, seed=5, epoch=0)
    both = augment(images, epoch.at(torch.arange(4)))
    draws = epoch.at(torch.arange(4))
    assert torch.equal(both, augment.transforms["color"](augment.transforms["crop"](images, draws), draws))
    assert list(instantiate(config("augment=crop_flip_color", "augment.color=null").augment).transforms) == ["crop"]
    with pytest.raises(ConfigError, match="augment.crop=3 is invalid: expected a transform"):
        Compose(crop=3)


def test_color_statistics_are_scikit_learns_principal_components():
    random = np.random.default_rng(0)
    colors = random.normal(size=(6 * 35, 3)) * (40, 15, 5) @ np.array(COMPONENTS) + 120
    images = torch.from_numpy(colors.clip(0, 255).astype(np.uint8).reshape(6, 5, 7, 3)).permute(0, 3, 1, 2)
    found = color_statistics([images[:4], images[4:]])
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy() / 255
    expected = PCA().fit(pixels)
    count = len(pixels)  # scikit-learn divides by one less
    np.testing.assert_allclose(found.std, np.sqrt(expected.explained_variance_ * (count - 1) / count), rtol=1e-9)
    np.testing.assert_allclose(np.abs(found.components @ expected.components_.T), np.eye(3), atol=1e-9)
    assert (np.take_along_axis(found.components, np.abs(found.components).argmax(1)[:, None], 1) > 0).all()
    np.testing.assert_allclose(found.mean, pixels.mean(0))
    assert (found.images, found.pixels) == (6, 6 * 35)
    with pytest.raises(DataError, match="no training images"):
        color_statistics([])


def test_color_pca_sees_each_training_image_once_and_no_others(monkeypatch):
    data = data_from(["model=lenet5", "data.batch_size=100"])  # 1,293 images, so the last batch is not full
    data.setup()
    train = data.train_dataloader()
    assert torch.equal(torch.cat([*data.training_images()]), train.images[train.indices])

    real = DigitsDataModule.load

    def inverted_outside_of_training(self):
        source = real(self)
        unseen = data.val_dataloader().indices.numpy()
        source.train.images[unseen] = 255 - source.train.images[unseen]
        source.test.images[:] = 255 - source.test.images
        return source

    monkeypatch.setattr(DigitsDataModule, "load", inverted_outside_of_training)
    other = data_from(["model=lenet5"])
    other.setup()
    first, second = color_statistics(data.training_images()), color_statistics(other.training_images())
    np.testing.assert_array_equal(first.std, second.std)
    np.testing.assert_array_equal(first.mean, second.mean)


def test_command_writes_a_valid_config_option(tmp_path, capsys):
    command = ["data=digits", "model=lenet5"]
    color_pca_command(command)
    printed = capsys.readouterr().out
    assert "1,293 training images (split_seed 0), 1,324,032 pixels" in printed.splitlines()[0]
    color_pca_command([*command, "--output", str(tmp_path / "digits.yaml")])
    assert (tmp_path / "digits.yaml").read_text() == printed
    color = instantiate(OmegaConf.create(printed))
    np.testing.assert_allclose(np.abs(color.components[0]), np.full(3, 3**-0.5), atol=1e-6)  # gray digits
    assert color.std[0] > 0.5
    assert color.std[1:] == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["digits.yaml"]
    for wrong, message in [
        ([*command, "--output", str(tmp_path / "digits.yaml")], "digits.yaml already exists"),
        ([*command, "--output", str(tmp_path / "nowhere" / "x.yaml")], "not found"),
        (["cifar10"], "cifar10 is invalid: expected KEY=VALUE"),
    ]:
        with pytest.raises(ConfigError, match=message):
            color_pca_command(wrong)


def test_published_constants_are_variances_of_the_pixels():
    """Compare with CIFAR-10's deviations: the roots of the constants are close to them, the constants are not."""
    named = {name: config("augment=crop_flip_color", f"augment/color={name}").augment.color for name in
             ("cifar10", "imagenet", "imagenet_lighting")}  # fmt: skip
    published = [0.2175, 0.0188, 0.0045]
    assert list(named["imagenet_lighting"].std) == published
    np.testing.assert_allclose(np.square(named["imagenet"].std), published, rtol=1e-5)
    np.testing.assert_allclose(named["imagenet"].std, named["cifar10"].std, rtol=0.35)
    assert named["imagenet"].components == named["imagenet_lighting"].components
