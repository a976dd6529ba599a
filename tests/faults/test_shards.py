"""What becomes of shards whose making is broken off: kills, signals, a second process, a full disk."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import make_image_folder, shard_contents

from alexnet_pl.cli.shards import verify
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards.reader import INDEX, UNFINISHED
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.errors import DataError

from .processes import CONTEXT, wait_for


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("pictures") / "tree", train=400, val=20)


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    make_shards(list_splits(tree), out, 64, per_shard=50)
    return shard_contents(out)


def _make(tree: Path, out: Path) -> None:
    make_shards(list_splits(tree), out, 64, per_shard=50, workers=2)


@pytest.mark.fault("SIGKILL while shards are made", "called again it goes on: the same files, finished ones untouched")
@pytest.mark.parametrize("finished", [1, 9])
def test_killed(finished, tree, whole, tmp_path):
    out = tmp_path / "out"
    process = CONTEXT.Process(target=_make, args=(tree, out))
    process.start()
    wait_for(lambda: len(list(out.glob("*.tar"))) >= finished)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert finished <= len(kept) < 26
    assert not (out / INDEX).exists()
    _make(tree, out)
    assert shard_contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not list((out / UNFINISHED).glob("*"))
    verify(str(out))


@pytest.mark.fault("two processes make the same shards", "the second is refused, exit 2; a run waits for the first")
def test_two_at_once(tree, whole, tmp_path):
    out = tmp_path / "out"
    first = CONTEXT.Process(target=_make, args=(tree, out))
    first.start()
    wait_for(lambda: list(out.glob("*.tar")))
    with pytest.raises(DataError, match="is being written by another process"):
        _make(tree, out)
    make_shards(list_splits(tree), out, 64, per_shard=50, wait=True)
    first.join()
    assert first.exitcode == 0
    assert shard_contents(out) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.fault("full disk while shards are made", "one line, finished shards stay, with more space it goes on")
def test_a_full_disk(small_disk, tree, whole):
    out = small_disk / "out"
    with pytest.raises(DataError, match="No space left on device. What is finished is kept") as error:
        _make(tree, out)
    assert "\n" not in str(error.value)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert kept
    assert not list(out.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    _make(tree, out)
    assert shard_contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.fault("SIGINT while shards are made", "says that it goes on when called again, exit 130")
def test_interrupted(tree, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "alexnet_pl", "shards", str(tree), str(out), "--size", "64", "--per-shard", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(out.glob("*.tar")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=1800)
    assert (process.returncode, errors) == (130, "")
    assert said.splitlines()[-1] == "interrupted; what is finished is kept: the same command goes on"
