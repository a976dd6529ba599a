"""Robustness sets: published files, corrupt ones included, and corruptions made on the spot."""

from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.data.robustness import (
    SEVERITIES,
    STRENGTHS,
    ArrayDataModule,
    add_noise,
    blur,
    corrupted,
    read_published,
)
from alexnet_pl.runtime.errors import DataError


def images_of(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return a directory with CIFAR-10.1 of 20 images, and CIFAR-10-C of 10 images under two corruptions."""
    np.save(tmp_path / "cifar10.1_v6_data.npy", images_of(20))
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.tile(np.arange(10), 2).astype(np.int32))
    for seed, name in enumerate(("fog", "snow")):
        np.save(tmp_path / f"{name}.npy", images_of(50) // (seed + 1))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(10), 5).astype(np.uint8))
    return tmp_path


def test_cifar10_1(published: Path) -> None:
    (part,) = read_published("cifar10_1", published, 10)
    assert (part.corruption, part.severity) == ("", 0)
    assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), images_of(20))
    assert part.labels.tolist() == [*range(10)] * 2


def test_cifar10_c_in_five_severities(published: Path) -> None:
    for path in published.glob("cifar10.1*"):
        path.unlink()
    parts = list(read_published("cifar10_c", published, 10))
    assert [(p.corruption, p.severity) for p in parts] == [(n, s) for n in ("fog", "snow") for s in SEVERITIES]
    assert all(part.labels.tolist() == list(range(10)) for part in parts)
    assert np.array_equal(parts[7].images.permute(0, 2, 3, 1).numpy(), images_of(50)[20:30] // 2)


def npy_header(shape: str) -> bytes:
    """Return the start of a ``.npy`` file of a shape that its content need not have."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0"


@pytest.mark.security
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fog.npy", np.array([{"a": 1}], dtype=object), "fog.npy is corrupt"),
        ("fog.npy", images_of(49), "fog.npy is corrupt|labels"),
        ("fog.npy", images_of(50).astype(np.float32), "fog.npy is corrupt: float32"),
        ("fog.npy", images_of(50)[..., 0], "fog.npy is corrupt: uint8"),
        ("fog.npy", b"\x93NUMPY", "fog.npy is corrupt"),
        ("fog.npy", b"", "fog.npy is corrupt"),
        ("fog.npy", npy_header("(-1, 8, 8, 3)"), "fog.npy is corrupt: memory mapped length"),
        ("fog.npy", npy_header("()"), "fog.npy is corrupt: uint8"),
        ("fog.npy", npy_header("(50, 0, 0, 3)"), "fog.npy is corrupt"),
        ("fog.npy", npy_header("(10000000000, 8, 8, 3)"), "fog.npy is corrupt"),
        ("fog.npy", b"PK\x03\x04", "fog.npy is corrupt"),  # an .npz archive
        ("labels.npy", np.full(50, 10), "labels.npy is corrupt: expected 50 labels from 0 to 9"),
        ("labels.npy", np.full(50, -1), "labels.npy is corrupt"),
        ("labels.npy", np.zeros(40, int), "labels.npy is corrupt"),
        ("labels.npy", None, "labels.npy not found"),
    ],
)
def test_corrupt_files_are_named_before_anything_is_evaluated(published: Path, name, content, message) -> None:
    for path in published.glob("cifar10.1*"):
        path.unlink()
    if content is None:
        (published / name).unlink()
    elif isinstance(content, bytes):
        (published / name).write_bytes(content)
    else:
        np.save(published / name, content, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        next(read_published("cifar10_c", published, 10))


def test_missing_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no CIFAR-10-C"):
        next(read_published("cifar10_c", tmp_path, 10))
    with pytest.raises(DataError, match=r"cifar10\.1_v6_data\.npy not found"):
        next(read_published("cifar10_1", tmp_path, 10))


# --- corruptions ----------------------------------------------------------------------------------------------------


def smooth(side: int, count: int = 8) -> torch.Tensor:
    """Return images of gratings, whose frequency differs."""
    x = torch.linspace(0, 1, side)
    waves = torch.stack([0.5 + 0.4 * torch.sin(6.3 * (index + 2) * x) for index in range(count)])
    return (255 * waves[:, None, None, :].expand(count, 3, side, side)).to(torch.uint8)


@pytest.mark.parametrize("side", [32, 96])
def test_damage_grows_with_severity_and_repeats(side: int) -> None:
    images, labels = smooth(side), torch.arange(8)
    damage: dict[str, list[float]] = {}
    first, second = list(corrupted(images, labels)), list(corrupted(images, labels))
    for part, again in zip(first, second, strict=True):
        assert part.images.shape == images.shape
        assert part.images.dtype == torch.uint8
        assert torch.equal(part.images, again.images)
        damage.setdefault(part.corruption, []).append(float((part.images.float() - images.float()).abs().mean()))
    assert damage.keys() == STRENGTHS.keys()
    for name, values in damage.items():
        assert values == sorted(values), name
        assert values[0] > 0
        assert values[-1] > values[0]


def test_noise_has_the_stated_deviation() -> None:
    gray = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    noisy = add_noise(gray, 0.1, torch.Generator().manual_seed(0))
    assert float(noisy.float().std() / 255) == pytest.approx(0.1, rel=0.02)


def test_contrast_keeps_the_mean_and_scales_the_deviation() -> None:
    images = smooth(32)
    (part,) = [p for p in corrupted(images, torch.arange(8)) if (p.corruption, p.severity) == ("contrast", 2)]
    assert torch.allclose(part.images.float().mean((2, 3)), images.float().mean((2, 3)), atol=1)
    assert torch.allclose(part.images.float().std((2, 3)), 0.5 * images.float().std((2, 3)), atol=1)


def test_blur_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    images = torch.from_numpy(images_of(2)).permute(0, 3, 1, 2)
    expected = gaussian_filter(images.numpy() / 255, sigma=(0, 0, 1.0, 1.0), mode="mirror", truncate=4) * 255
    assert np.abs(blur(images, 1.0, torch.Generator()).numpy() - expected).max() <= 1.01


def test_images_are_prepared_as_a_runs_own() -> None:
    preprocess = Preprocess(28, (0.5,) * 3, (0.25,) * 3, resize_size=32)
    module = ArrayDataModule(torch.full((3, 3, 40, 40), 255, dtype=torch.uint8), torch.arange(3), "abc", preprocess, 2)
    batches = [module.on_after_batch_transfer(batch, 0) for batch in module.test_dataloader()]
    assert batches[0][0].shape == (2, 3, 28, 28)
    assert torch.all(batches[0][0] == 2)
