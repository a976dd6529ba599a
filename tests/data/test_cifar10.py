"""CIFAR-10 from class folders and from the official archive, served by a local server."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from PIL import Image
from torchvision.datasets import CIFAR10

from alexnet_pl.data import cifar10
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.files import cache_dir

from .modules import data_module

# --- class folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_class_folders_have_the_official_labels(class_folders, suffix):
    root = class_folders(train_per_class=20, test_per_class=3, suffix=suffix)
    module = data_module("data=cifar10", f"data.root={root}")
    assert module.counts() == {"train": 180, "val": 20, "test": 30}
    assert "class folders" in module.description
    assert "200 + 30 images, not the full" in module.description
    test = module.test_dataloader()
    assert test.labels.tolist() == list(range(10)) * 3  # the classes in turn
    with Image.open(root / "test" / "truck" / f"0002.{suffix}") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(test.images[-1].permute(1, 2, 0).numpy(), expected)


def test_images_are_decoded_once_and_again_after_a_change(class_folders, monkeypatch):
    root = class_folders(suffix="jpg")
    decoded = []
    real = cifar10._decode
    monkeypatch.setattr(cifar10, "_decode", lambda path: decoded.append(path) or real(path))

    first = cifar10.load_class_folders(root)
    assert len(decoded) == 120
    second = cifar10.load_class_folders(root)
    assert len(decoded) == 120
    assert np.array_equal(first.train.images, second.train.images)

    Image.new("RGB", (32, 32), "white").save(root / "test" / "cat" / "0000.jpg")
    third = cifar10.load_class_folders(root)
    assert len(decoded) == 240
    assert third.test.images[3].min() > 250  # cat is class 3
    assert not list(cache_dir().glob(".*"))  # no scratch directory left, and no lock


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", pickle.dumps({"train": 1})])
def test_corrupt_cache_is_rebuilt(class_folders, content):
    root = class_folders()
    whole = cifar10.load_class_folders(root)
    for cache in cache_dir().glob("*.npz"):
        cache.write_bytes(content)
    again = cifar10.load_class_folders(root)
    assert np.array_equal(again.train.images, whole.train.images)


@pytest.mark.parametrize("content", [b"", b"this is not an image", "half"])
def test_corrupt_image_is_named_and_not_cached(class_folders, content):
    root = class_folders(suffix="jpg")
    victim = root / "train" / "dog" / "0003.jpg"
    victim.write_bytes(victim.read_bytes()[:300] if content == "half" else content)
    reason = "is corrupt: " if content == "half" else "is not an image or has an unsupported format"
    with pytest.raises(DataError, match=f"dog/0003.jpg {reason}") as refusal:
        cifar10.load_class_folders(root)
    assert "data.root=" in str(refusal.value)
    assert "data=digits" in str(refusal.value)
    Image.new("RGB", (32, 32)).save(victim)
    assert len(cifar10.load_class_folders(root).train.images) == 100


def test_incomplete_and_foreign_class_folders_are_refused(class_folders):
    root = class_folders()
    Image.new("RGB", (40, 31)).save(root / "test" / "ship" / "0001.png")
    with pytest.raises(DataError, match=r"ship/0001.png is 40×31 pixels"):
        cifar10.load_class_folders(root)
    (root / "train" / "zebra").mkdir()
    with pytest.raises(DataError, match=r"train does not have the 10 classes of CIFAR-10: unexpected zebra\."):
        cifar10.load_class_folders(root)
    for path in (root / "test" / "frog").iterdir():
        path.unlink()
    (root / "train" / "zebra").rmdir()
    with pytest.raises(DataError, match="test/frog holds no images"):
        cifar10.load_class_folders(root)
    shutil.rmtree(root / "train" / "horse")
    with pytest.raises(DataError, match=r"train does not have the 10 classes of CIFAR-10: missing horse\."):
        cifar10.load_class_folders(root)
    shutil.rmtree(root / "test")
    (root / "train" / "horse").mkdir()
    with pytest.raises(DataError, match="horse holds no images|test not found"):
        cifar10.load_class_folders(root)


@pytest.mark.parametrize("home", ["none", "not writable"])
def test_class_folders_are_read_without_a_home_directory(class_folders, monkeypatch, tmp_path, caplog, home):
    """A container started with --user has no home directory, or one that it cannot write to, such as /."""
    root = class_folders()
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home == "none":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    else:
        (tmp_path / "file").touch()  # also root, who runs some tests, cannot create a directory below a file
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    source = cifar10.load_class_folders(root)
    assert len(source.train.images) == 100
    assert "warning: decoded images are not cached, and every run decodes them" in caplog.text
    assert "XDG_CACHE_HOME=DIR" in caplog.text


# --- data.root next to the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["official", "class folders"])
@pytest.mark.parametrize("given", ["parent", "child"])
def test_data_one_level_away_is_named_instead_of_downloaded(official, class_folders, kind, given, tmp_path):
    if kind == "official":
        root = tmp_path / "some where"
        cifar10.fetch_official(root)
        child = root / CIFAR10.base_folder
    else:
        root = class_folders()
        child = root / "train"
    official.requests.clear()
    module = instantiate(config("model=lenet5", "data=cifar10").data)
    module.root = root.parent if given == "parent" else child
    with pytest.raises(DataError, match="does not hold CIFAR-10. Did you mean data.root=") as refusal:
        module.prepare_data()
    assert str(root) in str(refusal.value).rpartition("data.root=")[2]
    if kind == "official":
        assert f"data.root='{root}'" in str(refusal.value)  # quoted for Hydra
    assert not official.requests
    assert not (child / CIFAR10.base_folder).exists()


# --- the official archive -------------------------------------------------------------------------------------------


def test_official_archive_is_downloaded_and_reused(official, tmp_path):
    root = tmp_path / "new" / "data"
    module = data_module("data=cifar10", f"data.root={root}")
    assert module.counts() == {"train": 90, "val": 10, "test": 20}
    assert module.description.startswith("official cifar-10-batches-py")
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]

    official.path.unlink()  # the second time, nothing needs to be downloaded
    again = data_module("data=cifar10", f"data.root={root}")
    assert torch.equal(again.test_dataloader().images, module.test_dataloader().images)


def test_archive_in_place_is_unpacked_without_a_download(official, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    official.path.rename(root / official.path.name)
    assert data_module("data=cifar10", f"data.root={root}").counts()["test"] == 20


def test_official_files_take_precedence_over_class_folders(official, class_folders):
    root = class_folders()
    cifar10.fetch_official(root)
    assert data_module("data=cifar10", f"data.root={root}").description.startswith("official")


def assert_refused(root: Path, *fragments: str) -> None:
    with pytest.raises(DataError) as refusal:
        data_module("data=cifar10", f"data.root={root}")
    for fragment in (*fragments, "data.root=", "data=digits"):
        assert fragment in str(refusal.value)
    assert str(refusal.value).count("\n") <= 1


def test_truncated_download_leaves_nothing_behind(official, tmp_path):
    official.path.write_bytes(official.path.read_bytes()[:-50])
    root = tmp_path / "data"
    assert_refused(root, str(root))
    assert not root.exists()


def test_truncated_archive_in_place_is_named_and_kept(official, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / official.path.name).write_bytes(official.path.read_bytes()[:-50])
    assert_refused(root, str(root / official.path.name), "truncated or corrupt")
    assert [path.name for path in root.iterdir()] == [official.path.name]


def test_without_a_network_the_alternatives_are_named(official, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing.tar.gz")
    root = tmp_path / "data"
    assert_refused(root, "download failed")
    assert not root.exists()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_corrupt_official_file_is_named_before_it_is_unpickled(official, tmp_path, damage):
    root = tmp_path / "data"
    cifar10.fetch_official(root)
    victim = root / CIFAR10.base_folder / "data_batch_3"
    if damage == "missing":
        victim.unlink()
    else:
        marker = tmp_path / "payload-ran"
        victim.write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    assert_refused(root, str(victim))
    assert not (tmp_path / "payload-ran").exists()
