"""Faults in data, downloads and caches."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from helpers import ClassFolderMaker, OfficialArchive, train_many
from torchvision.datasets import CIFAR10

from alexnet_pl.data import cifar10
from alexnet_pl.runtime.errors import DataError

AT_ONCE = """
import json, os, sys
from pathlib import Path
from torchvision.datasets import CIFAR10
from alexnet_pl.data import cifar10  # loaded once for all: they then start within milliseconds of each other

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
    """Call a function of ``alexnet_pl.data.cifar10`` with ``root`` in several processes that start together."""
    told = {name: getattr(CIFAR10, name) for name in ("url", "tgz_md5", "train_list", "test_list", "meta")}
    command = [sys.executable, "-uc", AT_ONCE, str(root), json.dumps(told), str(processes), function]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """What ``train.py data=cifar10`` says to a batch that is a malicious pickle, and to a cut off archive."""
    folder = tmp_path_factory.mktemp("damaged")
    batches = folder / "batch" / CIFAR10.base_folder
    batches.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], None)):
        (batches / name).write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "payload-ran").encode() + b"'\ntR.")
    (folder / "archive").mkdir()
    (folder / "archive" / CIFAR10.filename).write_bytes(b"\x1f\x8b\x08 cut off")
    settings = ("model=lenet5", "data=cifar10", "trainer=smoke")
    done = train_many([[*settings, f"data.root={folder / name}"] for name in ("batch", "archive")], folder)
    return dict(zip(("batch", "archive"), ((folder, each) for each in done), strict=True))


@pytest.mark.fault("corrupted CIFAR batch", "the file named, not unpickled, exit 2")
def test_a_corrupted_batch_is_named_and_not_unpickled(damaged):
    folder, done = damaged["batch"]
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert f"{folder}/batch/{CIFAR10.base_folder}/data_batch_1 is damaged (wrong MD5)" in done.stderr
    assert done.stderr.count("\n") <= 3
    assert not (folder / "payload-ran").exists()


@pytest.mark.fault("truncated tarball", "in place: named and kept, exit 2; from the network: nothing left behind")
def test_a_truncated_archive_in_place_is_named_and_kept(damaged):
    folder, done = damaged["archive"]
    assert done.returncode == 2
    assert f"error: {folder}/archive/{CIFAR10.filename} is truncated or damaged (wrong MD5)" in done.stderr
    assert [path.name for path in (folder / "archive").iterdir()] == [CIFAR10.filename]


@pytest.mark.fault("truncated tarball", "in place: named and kept, exit 2; from the network: nothing left behind")
@pytest.mark.parametrize("accepted", [False, True], ids=["wrong MD5", "right MD5"])
def test_a_truncated_download_leaves_nothing_behind(official: OfficialArchive, tmp_path, monkeypatch, accepted):
    official.path.write_bytes(official.path.read_bytes()[:-500])
    if accepted:  # so that unpacking meets the damage
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(official.path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="No CIFAR-10 in") as refusal:
        cifar10.fetch_official(tmp_path / "data")
    assert str(refusal.value).count("\n") <= 2
    assert not (tmp_path / "data").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    found.size = 4 if kind == tarfile.REGTYPE else 0
    return found


@pytest.mark.fault("path-traversing archive", "refused with the member named, nothing written")
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
def test_an_archive_that_would_write_elsewhere_is_refused(
    official: OfficialArchive, tmp_path, monkeypatch, members, with_filter
):
    with tarfile.open(official.path, "w:gz") as tar:
        for each in members:
            each.name = each.name.replace("ABSOLUTE", str(tmp_path))
            tar.addfile(each, io.BytesIO(b"evil"))
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(official.path.read_bytes()).hexdigest())
    if not with_filter:
        monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(DataError, match="is refused, nothing was unpacked: '.*' is no file inside it") as refusal:
        cifar10.fetch_official(tmp_path / "data")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.rglob("evil"))
    assert not (tmp_path / "data").exists()


@pytest.mark.fault("two processes preparing", "one download, both go on with it")
def test_processes_that_prepare_at_once_download_once(official: OfficialArchive, tmp_path):
    cifar10.fetch_official(tmp_path / "alone")
    for_one = len(official.requests)
    root = tmp_path / "data"
    together = call_at_once("fetch_official", root, processes=3)
    shown, _ = together.communicate(timeout=1800)
    assert json.loads(shown.splitlines()[-1]) == [0, 0, 0]
    assert shown.count("downloading CIFAR-10") == 1
    assert len(official.requests) == 2 * for_one
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]
    assert len(cifar10.load_official(root).train.images) == 100


@pytest.mark.fault("download killed (SIGKILL)", "the lock ends with its owner, the partial download is removed")
def test_a_killed_download_stands_in_nobodys_way(official: OfficialArchive, tmp_path):
    root = tmp_path / "data"
    killed = call_at_once("fetch_official", root, processes=1)
    deadline = time.monotonic() + 120
    while not official.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)  # while the server has it wait
    killed.wait()
    assert [path.name for path in root.iterdir() if path.is_dir()], "killed too late to leave anything"
    cifar10.fetch_official(root)
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]


@pytest.mark.fault("half-written cache", "made anew, by one of the processes that need it")
def test_a_half_written_cache_is_made_anew_once(class_folders: ClassFolderMaker, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = class_folders(train_per_class=100)
    whole = cifar10.load_class_folders(root)
    (cache,) = cifar10.cache_dir().iterdir()
    content = cache.read_bytes()
    cache.write_bytes(content[: len(content) // 2])
    (cache.parent / f".{cache.stem}-abandoned").mkdir()  # by a process that was killed

    together = call_at_once("load_class_folders", root, processes=3)
    shown, _ = together.communicate(timeout=1800)
    assert json.loads(shown.splitlines()[-1]) == [0, 0, 0]
    assert shown.count("decoding 1,020 images once") == 1
    assert list(cache.parent.iterdir()) == [cache]
    assert np.array_equal(cifar10.load_class_folders(root).train.images, whole.train.images)


@pytest.mark.fault("cache of another version", "made anew")
def test_a_cache_of_another_version_is_made_anew(class_folders: ClassFolderMaker, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = class_folders()
    cifar10.load_class_folders(root)
    cifar10.load_class_folders(root)
    assert capsys.readouterr().out.count("decoding") == 1
    monkeypatch.setattr(cifar10, "CACHE_VERSION", cifar10.CACHE_VERSION + 1)
    cifar10.load_class_folders(root)
    assert capsys.readouterr().out.count("decoding") == 1
