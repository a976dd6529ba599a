"""Cache of decoded images: files that cannot be read, a cache that cannot be written."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from alexnet_pl.data import array_cache, cifar10
from alexnet_pl.data.array_cache import cached_arrays
from alexnet_pl.runtime import files
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.files import InUseError, cache_dir, exclusive_lock


def make(cache: Path | None) -> dict[str, np.ndarray]:
    return {"a": np.arange(3)}


@pytest.mark.parametrize("target", ["nowhere", "0004.png"])
def test_link_that_leads_nowhere_is_named(class_folders, tmp_path, target):
    root = class_folders()
    victim = root / "train" / "dog" / "0004.png"
    victim.unlink()
    victim.symlink_to(target)
    with pytest.raises(DataError, match="dog/0004.png (not found|cannot be read: Too many levels)") as refusal:
        cifar10.load_class_folders(root)
    assert "data.root=" in str(refusal.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_lock_that_cannot_be_created_is_a_warning(monkeypatch, caplog, number):
    def full(path: Path, wait: bool = True) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(array_cache, "exclusive_lock", full)
    assert cached_arrays("locked.npz", "1", make)["a"].tolist() == [0, 1, 2]
    assert "decoded images are not cached, and every run decodes them: " in caplog.text
    assert os.strerror(number) in caplog.text
    assert not (cache_dir() / "locked.npz").exists()


def test_errors_while_decoding_are_not_taken_for_those_of_the_cache(caplog):
    def fail(cache: Path | None) -> dict[str, np.ndarray]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        cached_arrays("failed.npz", "1", fail)
    assert not caplog.messages
    assert not list(cache_dir().glob("failed*"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse the owner's process ID, as a disk does that has room for an empty file only."""

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "write", full)


def test_lock_holds_without_its_owners_process_id(full_disk, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with exclusive_lock(tmp_path / ".lock"):
        with pytest.raises(InUseError, match="in use by another process.$"):
            exclusive_lock(tmp_path / ".lock", wait=False).__enter__()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert not list(tmp_path.iterdir())


def test_interrupted_lock_closes_its_file(monkeypatch, tmp_path):
    """A signal between taking the lock and entering the block must not leave it locked for the process."""

    def interrupted(descriptor: int, content: bytes) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exclusive_lock(tmp_path / ".lock").__enter__()
    with exclusive_lock(tmp_path / ".lock", wait=False):
        pass
