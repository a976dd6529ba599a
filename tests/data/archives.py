"""Small datasets in the layouts of torchvision's archives, and torchvision redirected to a local copy of them."""

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, STL10, SVHN, Imagenette
from torchvision.datasets.mnist import MNIST

from alexnet_pl import data

TRAIN, TEST = 4, 2
"""Images per class of each split."""


def images_of(count: int, classes: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random images ``(N, side, side, 3)`` uint8 and labels 0, 1, …, 0, 1, …, ``count`` of each class."""
    labels = np.tile(np.arange(classes), count)
    return np.random.default_rng(count).integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8), labels


def _sum(path: Path) -> str:
    return md5(path.read_bytes()).hexdigest()


def _pack(archive: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return _sum(archive)


def _idx(served: Path, url: str, patch: pytest.MonkeyPatch, kind: type[MNIST]) -> None:
    resources = []
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        images, labels = images_of(count, 10, 28)
        for name, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels.astype(np.uint8))):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            path = served / f"{split}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
            resources.append((path.name, _sum(path)))
    patch.setattr(kind, "mirrors", [url])
    patch.setattr(kind, "resources", resources)


def _cifar100(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    names = data.CIFAR100DataModule.class_names
    files = {"meta": pickle.dumps({"fine_label_names": list(names)})}
    for split, count in (("train", TRAIN), ("test", TEST)):
        images, labels = images_of(count, 100, 32)
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        files[split] = pickle.dumps({"data": flat, "fine_labels": labels.tolist()})
    sums = {name: md5(content).hexdigest() for name, content in files.items()}
    packed = _pack(served / CIFAR100.filename, {f"cifar-100-python/{name}": text for name, text in files.items()})
    for name, value in (
        ("url", url + CIFAR100.filename), ("tgz_md5", packed), ("train_list", [["train", sums["train"]]]),
        ("test_list", [["test", sums["test"]]]), ("meta", {**CIFAR100.meta, "md5": sums["meta"]}),
    ):  # fmt: skip
        patch.setattr(CIFAR100, name, value)


def _svhn(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    listed = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        images, labels = images_of(count, 10, 32)
        name = SVHN.split_list[split][1]
        savemat(served / name, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        listed[split] = [url + name, name, _sum(served / name)]
    patch.setattr(SVHN, "split_list", listed)


def _stl10(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    files = {"unlabeled_X.bin": bytes(3 * 96 * 96)}
    for split, count in (("train", TRAIN), ("test", TEST)):
        images, labels = images_of(count, 10, 96)
        files[f"{split}_X.bin"] = images.transpose(0, 3, 2, 1).tobytes()  # columns first
        files[f"{split}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
    packed = _pack(served / STL10.filename, {f"stl10_binary/{name}": content for name, content in files.items()})
    for listing in ("train_list", "test_list"):
        names = [name for name, _ in getattr(STL10, listing)]
        patch.setattr(STL10, listing, [[name, md5(files[name]).hexdigest()] for name in names])
    patch.setattr(STL10, "url", url + STL10.filename)
    patch.setattr(STL10, "tgz_md5", packed)


def _imagenette(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    files = {}
    for split, count in (("train", TRAIN), ("val", TEST)):
        for label, wnid in enumerate(sorted(Imagenette._WNID_TO_CLASS)):
            for index in range(count):
                content = io.BytesIO()
                Image.new("RGB", (213, 160), (20 * label, 0, 0)).save(content, "JPEG", quality=95)
                files[f"imagenette2-160/{split}/{wnid}/{index}.JPEG"] = content.getvalue()
    packed = _pack(served / "imagenette2-160.tgz", files)
    patch.setattr(Imagenette, "_ARCHIVES", {**Imagenette._ARCHIVES, "160px": (url + "imagenette2-160.tgz", packed)})


Maker = Callable[[Path, str, pytest.MonkeyPatch], None]

MAKERS: dict[str, Maker] = {
    **{
        kind.name: lambda served, url, patch, kind=kind: _idx(served, url, patch, kind.source)
        for kind in (data.MNISTDataModule, data.FashionMNISTDataModule, data.KMNISTDataModule)
    },
    "cifar100": _cifar100,
    "svhn": _svhn,
    "stl10": _stl10,
    "imagenette": _imagenette,
}
"""Name of a dataset → function that writes its archives into a directory served under a URL, and redirects to it."""
