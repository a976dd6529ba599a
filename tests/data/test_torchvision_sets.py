"""Datasets by torchvision: small archives of the published layouts from a local server, offline, corrupt."""

import functools
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, config
from torchvision.datasets import CIFAR100, KMNIST, MNIST, SVHN, FashionMNIST

from alexnet_pl.data import torchvision_sets
from alexnet_pl.data.downloads import SMALL_ARCHIVE, extract
from alexnet_pl.data.splits import stratified_split
from alexnet_pl.data.torchvision_internals import imagenette_archive
from alexnet_pl.inference.evaluation import evaluate
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.run import run

from .archives import MAKERS, TEST, TRAIN, images_of
from .modules import data_module

NAMES = tuple(MAKERS)
CLASSES = {name: 100 if name == "cifar100" else 10 for name in NAMES}

Publish = Callable[[str], list[str]]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publish]:
    """Return a function that serves a small copy of a dataset in place of the real one; it returns the requests."""
    served, requests = tmp_path / "served", []
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path.rpartition("/")[2])
            super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def start(name: str) -> list[str]:
        MAKERS[name](served, f"http://127.0.0.1:{server.server_port}/", monkeypatch)
        return requests

    yield start
    server.shutdown()
    server.server_close()


def load(name: str, root: Path, *overrides: str):
    return data_module(f"data={name}", f"data.root={root}", "data.val_fraction=0.25", *overrides)


@pytest.mark.parametrize("name", NAMES)
def test_every_set_is_downloaded_once_split_and_decoded(publish: Publish, tmp_path: Path, name: str) -> None:
    requests, root = publish(name), tmp_path / "data"
    module = load(name, root)
    classes = CLASSES[name]
    assert module.counts() == {"train": 3 * classes, "val": classes, "test": TEST * classes}
    assert len(module.class_names) == classes
    assert str(root) in module.description
    requests.clear()
    again = load(name, root)
    assert requests == []
    assert torch.equal(again.test_dataloader().images, module.test_dataloader().images)
    assert torch.equal(module.test_dataloader().labels, torch.arange(classes).repeat(TEST)) or name == "imagenette"
    assert not list(root.glob(".*"))


@pytest.mark.parametrize(("name", "side"), [("mnist", 28), ("cifar100", 32), ("svhn", 32), ("stl10", 96)])
def test_pixels_are_those_of_the_archive(publish: Publish, tmp_path: Path, name: str, side: int) -> None:
    publish(name)
    module = load(name, tmp_path / "data", f"data.image_size={side}")
    expected, labels = images_of(TEST, CLASSES[name], side)
    if name == "mnist":
        expected = np.repeat(expected[..., :1], 3, axis=3)
    test = module.test_dataloader()
    assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), expected)
    assert test.labels.tolist() == labels.tolist()


def test_photographs_are_cropped_in_the_middle(publish: Publish, tmp_path: Path) -> None:
    publish("imagenette")
    test = load("imagenette", tmp_path / "data", "data.image_size=64").test_dataloader()
    assert test.images.shape == (10 * TEST, 3, 64, 64)
    red = test.images[:, 0].float().mean((1, 2))
    assert torch.allclose(red, 20.0 * test.labels, atol=3)


def test_limits_on_photographs_measure_every_class(publish: Publish, tmp_path: Path) -> None:
    """The files are in the order of their classes. Only val and test take the classes in turn."""
    publish("imagenette")
    module = load("imagenette", tmp_path / "data", "data.val_fraction=0.5", "data.batch_size=10")
    for loader, count in ((module.val_dataloader(), 2), (module.test_dataloader(), TEST)):
        assert [labels.tolist() for _, labels in loader] == [list(range(10))] * count
        for images, labels in loader:  # the pixels move with the labels
            assert torch.allclose(images[:, 0].float().mean((1, 2)), 20.0 * labels, atol=3)
    labels = np.arange(10).repeat(TRAIN)
    train, val = stratified_split(labels, 0.5, module.split_seed)
    loaders = module.train_dataloader(), module.val_dataloader()
    assert loaders[0].labels.tolist() == labels.tolist()
    assert loaders[0].indices.tolist() == train.tolist()
    assert sorted(loaders[1].indices.tolist()) == val.tolist()
    assert module.load().test.labels.tolist() == list(range(10)) * TEST


def test_default_sizes() -> None:
    sizes = {name: config("model=alexnet_lrn", f"data={name}").data.image_size for name in NAMES}
    assert sizes == {**dict.fromkeys(NAMES, 50), "stl10": 96, "imagenette": 128}


def test_a_run_on_a_hundred_classes_evaluates_to_its_own_metrics(publish: Publish, tmp_path: Path) -> None:
    """``model.num_classes`` follows the data, and the data is found again."""
    publish("cifar100")
    run_dir = tmp_path / "run"
    overrides = (f"data.root={tmp_path / 'data'}", "data.val_fraction=0.25", "data.batch_size=50")
    run(config(*SHORT_RUN, "data=cifar100", *overrides, run_dir=run_dir))
    trained, result = load_run(run_dir), finished_result(run_dir)
    assert result is not None
    assert trained.name == "LeNet5 on cifar100"
    assert len(trained.logit_names) == 100
    figures = evaluate(trained).figures
    assert figures["test/loss"] == result["test/loss"]
    (tmp_path / "data").rename(tmp_path / "moved")
    assert evaluate(trained, "val", data_root=tmp_path / "moved").figures["val/loss"] == result["val/loss"]
    with pytest.raises(DataError, match="no copy of the run's training images"):
        evaluate(trained, "val", data_root=tmp_path)


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(name: str, root: Path) -> str:
    with pytest.raises(DataError) as error:
        load(name, root)
    text = str(error.value)
    assert "data.root=" in text
    assert "data=digits" in text
    assert text.count("\n") <= 1
    return text


@pytest.mark.parametrize("name", ["mnist", "cifar100", "svhn"])
def test_without_a_network_the_alternatives_are_named(publish: Publish, tmp_path: Path, monkeypatch, name) -> None:
    publish(name)
    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(torchvision_sets.MNIST, "mirrors", [nowhere])
    monkeypatch.setattr(CIFAR100, "url", nowhere)
    monkeypatch.setattr(SVHN, "split_list", {split: [nowhere, *rest] for split, (_, *rest) in SVHN.split_list.items()})
    root = tmp_path / "data"
    assert f"{root}, and the download failed" in refusal(name, root)
    assert not root.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_download_leaves_nothing_behind(publish: Publish, tmp_path: Path, name: str) -> None:
    publish(name)
    for path in (tmp_path / "served").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    refusal(name, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_data_one_level_away_is_named(publish: Publish, tmp_path: Path) -> None:
    publish("mnist")
    load("mnist", tmp_path / "data")
    with pytest.raises(DataError, match=r"does not hold MNIST\. Did you mean data\.root="):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_corrupt_file_is_named_with_a_way_out(publish: Publish, tmp_path: Path, name: str) -> None:
    publish(name)
    root = tmp_path / "data"
    load(name, root)
    (victim,) = [path for path in sorted(root.rglob("*")) if path.is_file() and "train" in str(path)][:1]
    victim.write_bytes(victim.read_bytes()[:-20])
    assert "incomplete or corrupt (train: " in refusal(name, root)


def test_labels_out_of_range_are_refused(publish: Publish, tmp_path: Path, monkeypatch) -> None:
    publish("fashion_mnist")
    monkeypatch.setattr(FashionMNIST, "targets", torch.full((40,), 12), raising=False)
    wrong = np.zeros((40, 28, 28), np.uint8), np.full(40, 12)
    monkeypatch.setattr(torchvision_sets.FashionMNISTDataModule, "read", lambda self, is_train: wrong)
    assert "expected 0 to 9" in refusal("fashion_mnist", tmp_path / "data")


def test_an_archive_on_disk_is_used_if_it_is_whole(publish: Publish, tmp_path: Path) -> None:
    requests, root = publish("cifar100"), tmp_path / "data"
    root.mkdir()
    archive = root / CIFAR100.filename
    whole = (tmp_path / "served" / archive.name).read_bytes()
    archive.write_bytes(whole[:-10])
    assert "truncated or corrupt (wrong MD5)" in refusal("cifar100", root)
    archive.write_bytes(whole)
    assert load("cifar100", root).counts()["test"] == 100 * TEST
    assert requests == []


def test_compressed_files_on_disk_are_used(publish: Publish, tmp_path: Path) -> None:
    requests, folder = publish("kmnist"), tmp_path / "data" / "KMNIST" / "raw"
    folder.mkdir(parents=True)
    for path in (tmp_path / "served").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert load("kmnist", tmp_path / "data").counts()["train"] == 10 * TRAIN * 3 // 4
    assert requests == []


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "svhn"])
def test_a_file_on_disk_with_another_md5_is_named(publish: Publish, tmp_path: Path, name: str) -> None:
    requests, root = publish(name), tmp_path / "data"
    kind = {"mnist": MNIST, "fashion_mnist": FashionMNIST, "kmnist": KMNIST}.get(name)
    file, md5 = SVHN.split_list["train"][1:] if kind is None else kind.resources[0]
    folder = root if kind is None else root / kind.__name__ / "raw"
    folder.mkdir(parents=True)
    mine = (tmp_path / "served" / file).read_bytes() + b"x"
    (folder / file).write_bytes(mine)
    text = refusal(name, root)
    found = hashlib.md5(mine).hexdigest()
    assert text.startswith(f"{folder / file} is truncated or corrupt (wrong MD5): {found}, expected {md5}. Delete it")
    assert "not found" not in text
    assert ("gunzip" in text) == (name != "svhn")
    assert (folder / file).read_bytes() == mine
    assert requests == []


def test_files_packed_anew_are_read_once_they_are_unpacked(publish: Publish, tmp_path: Path) -> None:
    requests, folder = publish("fashion_mnist"), tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for path in (tmp_path / "served").iterdir():
        (folder / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
    assert load("fashion_mnist", tmp_path / "data").counts()["train"] == 10 * TRAIN * 3 // 4
    assert requests == []


@pytest.mark.security
def test_an_archive_that_grows_out_of_proportion_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.tgz"
    with tarfile.open(bomb, "w:gz") as tar:
        entry = tarfile.TarInfo("zeros")
        entry.size = SMALL_ARCHIVE + 1
        tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="nothing was unpacked: it holds more than"):
        extract(bomb, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_private_listing_of_imagenette_exists() -> None:
    url, md5 = imagenette_archive("160px")
    assert url.endswith("/imagenette2-160.tgz")
    assert len(md5) == 32
