"""Faults of data, downloads and caches."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from helpers import NO_FIGURES, ClassFolderMaker, OfficialArchive, make_image_folder, train, train_many
from torchvision.datasets import CIFAR10

from alexnet_pl.data import cifar10
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.files import cache_dir

AT_ONCE = """
import json, os, sys
from pathlib import Path
from torchvision.datasets import CIFAR10
from alexnet_pl.data import cifar10  # imported before the fork, so that all start within milliseconds

for name, value in json.loads(sys.argv[2]).items():
    setattr(CIFAR10, name, value)
started = []
for _ in range(int(sys.argv[3])):
    if (pid := os.fork()) == 0:
        getattr(cifar10, sys.argv[4])(Path(sys.argv[1]))
        sys.exit()
    started.append(pid)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]))
"""


def call_at_once(function: str, root: Path, processes: int) -> subprocess.Popen[str]:
    """Call a function of ``alexnet_pl.data.cifar10`` with ``root`` in several concurrent processes."""
    settings = {name: getattr(CIFAR10, name) for name in ("url", "tgz_md5", "train_list", "test_list", "meta")}
    command = [sys.executable, "-uc", AT_ONCE, str(root), json.dumps(settings), str(processes), function]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """Run ``train.py data=cifar10`` on a batch that is a malicious pickle, and on a truncated archive."""
    folder = tmp_path_factory.mktemp("corrupt")
    batches = folder / "batch" / CIFAR10.base_folder
    batches.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], None)):
        (batches / name).write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "payload-ran").encode() + b"'\ntR.")
    (folder / "archive").mkdir()
    (folder / "archive" / CIFAR10.filename).write_bytes(b"\x1f\x8b\x08 truncated")
    settings = ("model=lenet5", "data=cifar10", "trainer=smoke")
    done = train_many([[*settings, f"data.root={folder / name}"] for name in ("batch", "archive")], folder)
    return dict(zip(("batch", "archive"), ((folder, each) for each in done), strict=True))


@pytest.mark.fault("corrupt CIFAR-10 batch", "named and not unpickled, exit 2")
def test_corrupt_batch_is_named_and_not_unpickled(corrupt):
    folder, done = corrupt["batch"]
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert f"{folder}/batch/{CIFAR10.base_folder}/data_batch_1 is corrupt (wrong MD5)" in done.stderr
    assert done.stderr.count("\n") <= 3
    assert not (folder / "payload-ran").exists()


@pytest.mark.fault("truncated archive", "in place: named and kept, exit 2; downloaded: nothing left behind")
def test_truncated_archive_in_place_is_named_and_kept(corrupt):
    folder, done = corrupt["archive"]
    assert done.returncode == 2
    assert f"error: {folder}/archive/{CIFAR10.filename} is truncated or corrupt (wrong MD5)" in done.stderr
    assert [path.name for path in (folder / "archive").iterdir()] == [CIFAR10.filename]


@pytest.mark.fault("truncated archive", "in place: named and kept, exit 2; downloaded: nothing left behind")
@pytest.mark.parametrize("accepted", [False, True], ids=["wrong MD5", "right MD5"])
def test_truncated_download_leaves_nothing_behind(official: OfficialArchive, tmp_path, monkeypatch, accepted):
    official.path.write_bytes(official.path.read_bytes()[:-500])
    if accepted:  # so that unpacking fails
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(official.path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="CIFAR-10 not found in") as refusal:
        cifar10.fetch_official(tmp_path / "data")
    assert str(refusal.value).count("\n") <= 2
    assert not (tmp_path / "data").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    found.size = 4 if kind == tarfile.REGTYPE else 0
    return found


@pytest.mark.fault("archive with paths outside of it", "refused with the member named, nothing written")
@pytest.mark.parametrize("with_filter", [True, False], ids=["data filter", "Python 3.11.0"])
@pytest.mark.parametrize(
    "members",
    [
        [member("../evil")],
        [member(f"{CIFAR10.base_folder}/../../evil")],
        [member("ABSOLUTE/evil")],
        [member("link", tarfile.SYMTYPE, ".."), member("link/evil")],
        [member("link", tarfile.SYMTYPE, "good"), member("good")],
        [member("hard", tarfile.LNKTYPE, "../../victim")],
        [member("pipe", tarfile.FIFOTYPE)],
    ],
    ids=["parent", "inside out", "absolute", "through a link", "link", "hard link", "pipe"],
)
def test_archive_that_would_write_elsewhere_is_refused(
    official: OfficialArchive, tmp_path, monkeypatch, members, with_filter
):
    with tarfile.open(official.path, "w:gz") as tar:
        for each in members:
            each.name = each.name.replace("ABSOLUTE", str(tmp_path))
            tar.addfile(each, io.BytesIO(b"evil"))
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(official.path.read_bytes()).hexdigest())
    if not with_filter:
        monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(DataError, match="is refused and nothing was unpacked: '.*' is not a regular file") as refusal:
        cifar10.fetch_official(tmp_path / "data")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.rglob("evil"))
    assert not (tmp_path / "data").exists()


@pytest.mark.fault("two processes prepare the data", "one download, which both use")
def test_concurrent_processes_download_once(official: OfficialArchive, tmp_path):
    cifar10.fetch_official(tmp_path / "alone")
    requests_of_one = len(official.requests)
    root = tmp_path / "data"
    together = call_at_once("fetch_official", root, processes=3)
    output, _ = together.communicate(timeout=1800)
    assert json.loads(output.splitlines()[-1]) == [0, 0, 0]
    assert output.count("downloading CIFAR-10") == 1
    assert len(official.requests) == 2 * requests_of_one
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]
    assert len(cifar10.load_official(root).train.images) == 100


@pytest.mark.fault("download killed (SIGKILL)", "the lock ends with its owner, the partial download is removed")
def test_killed_download_does_not_block_the_next(official: OfficialArchive, tmp_path):
    root = tmp_path / "data"
    killed = call_at_once("fetch_official", root, processes=1)
    deadline = time.monotonic() + 120
    while not official.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)  # while the server delays its answer
    killed.wait()
    assert [path.name for path in root.iterdir() if path.is_dir()], "killed too late to leave anything"
    cifar10.fetch_official(root)
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]


@pytest.mark.fault("half-written cache", "rebuilt by one of the processes that need it")
def test_half_written_cache_is_rebuilt_once(class_folders: ClassFolderMaker, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = class_folders(train_per_class=100)
    whole = cifar10.load_class_folders(root)
    (cache,) = cache_dir().iterdir()
    content = cache.read_bytes()
    cache.write_bytes(content[: len(content) // 2])
    (cache.parent / f".{cache.stem}-abandoned").mkdir()  # left by a killed process

    together = call_at_once("load_class_folders", root, processes=3)
    output, _ = together.communicate(timeout=1800)
    assert json.loads(output.splitlines()[-1]) == [0, 0, 0]
    assert output.count("decoding 1,020 images once") == 1
    assert list(cache.parent.iterdir()) == [cache]
    assert np.array_equal(cifar10.load_class_folders(root).train.images, whole.train.images)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.fault("full cache disk", "a warning; every run decodes the images")
@pytest.mark.parametrize("room", [0, 8192])
def test_full_cache_disk_is_a_warning(class_folders: ClassFolderMaker, small_disk, monkeypatch, caplog, room):
    """Without room for a byte, and with room for the lock but not for the images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    with (small_disk / "full").open("wb", buffering=0) as file:
        file.write(bytes(65_536 - room))
    root = class_folders()
    for _ in range(2):
        assert len(cifar10.load_class_folders(root).train.images) == 100
    assert caplog.text.count("warning: decoded images were not cached: [Errno 28] No space left on device") == 2
    assert not list(cache_dir().iterdir())


@pytest.mark.fault("cache of another version", "rebuilt")
def test_cache_of_another_version_is_rebuilt(class_folders: ClassFolderMaker, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = class_folders()
    cifar10.load_class_folders(root)
    cifar10.load_class_folders(root)
    assert capsys.readouterr().out.count("decoding") == 1
    monkeypatch.setattr(cifar10, "CACHE_VERSION", cifar10.CACHE_VERSION + 1)
    cifar10.load_class_folders(root)
    assert capsys.readouterr().out.count("decoding") == 1


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run ``train.py`` once for each fault below, one after another."""
    folder = tmp_path_factory.mktemp("faults")
    cifar = folder / "data" / CIFAR10.base_folder
    cifar.mkdir(parents=True)
    images = make_image_folder(folder / "valid split")
    (images / "val").rename(images / "valid")
    pipes = make_image_folder(folder / "pipes", train=40, val=8)
    os.mkfifo(pipes / "train" / "ant" / "pipe.png")
    short = ("model=lenet5", "trainer=smoke", "trainer.accelerator=cpu", "trainer.precision=32-true")
    commands = {
        "inside": [*short, "data=cifar10", f"data.root={cifar}"],
        "above": [*short, "data=cifar10", f"data.root={folder}"],
        "valid": [*short, "data=image_folder", f"data.root='{images}'"],
        "pipes": [*short, "data=image_folder", f"data.root={pipes}", NO_FIGURES],
        "small": [*short, "data.val_fraction=0.001"],
        "augment": [*short, "augment._target_=torchvision.transforms.v2.RandAugment", NO_FIGURES],
        "mixup": [*short, "augment=[mixup,crop_flip]"],
    }
    return dict(zip(commands, train_many(list(commands.values()), folder), strict=True))


@pytest.mark.fault("data.root one level off", "the right data.root is named instead of a download, exit 2")
@pytest.mark.parametrize("name", ["inside", "above"])
def test_data_root_one_level_off(outcomes, name):
    done = outcomes[name]
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* does not hold CIFAR-10. Did you mean data.root=.*/data\?\n", done.stderr)


@pytest.mark.fault("valid/ instead of val/", "named with the right name, exit 2")
def test_misspelled_split(outcomes):
    assert outcomes["valid"].returncode == 2
    assert re.fullmatch(r"error: .*/valid is not a split. Did you mean val/\? .*\n", outcomes["valid"].stderr)


@pytest.mark.fault("FIFO in a class folder", "ignored instead of waited for")
def test_fifo_in_a_class_folder(outcomes):
    assert outcomes["pipes"].returncode == 0, outcomes["pipes"].stderr
    assert "1 files are ignored" in outcomes["pipes"].stdout


@pytest.mark.fault("val_fraction below one image per class", "a range that works, exit 2")
def test_small_val_fraction(outcomes):
    assert outcomes["small"].returncode == 2
    assert outcomes["small"].stderr.startswith(
        "error: data.val_fraction=0.001 is invalid for 1,437 images in 10 classes"
    )
    assert "Use a value from 0.007 to 0.993." in outcomes["small"].stderr


@pytest.mark.fault("augmentation from elsewhere", "applied per image; mixing before other steps is refused, exit 2")
def test_augmentation_from_elsewhere(outcomes):
    assert outcomes["augment"].returncode == 0, outcomes["augment"].stderr
    assert outcomes["mixup"].returncode == 2
    assert "augment=MixUp is invalid here: it mixes the images and labels of a batch" in outcomes["mixup"].stderr


@pytest.mark.fault("no home directory", "class folders are read without a cache; else a way out, exit 2")
@pytest.mark.parametrize("data", ["cifar10", "image_folder"])
def test_no_home_directory(class_folders: ClassFolderMaker, tmp_path, monkeypatch, data):
    """The home directory is below a file, where nobody can create a cache, not even root."""
    root = class_folders()
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME")
    settings = ("model=lenet5", f"data={data}", f"data.root={root}", "trainer=smoke", "data.batch_size=8")
    done = train(*settings, cwd=tmp_path, HOME=str(tmp_path / "file"))
    if data == "cifar10":
        assert done.returncode == 0, done.stderr
        assert "warning: decoded images are not cached" in done.stdout + done.stderr
    else:
        assert done.returncode == 2
        assert "is not writable" in done.stderr
        assert "XDG_CACHE_HOME=DIR" in done.stderr
        assert "data.shards=DIR" in done.stderr
        assert done.stderr.count("\n") == 1
