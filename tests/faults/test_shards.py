"""Faults while shards are written or read: kills, signals, a second process, a full disk, a hostile index."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import make_image_folder, shard_contents, train

from alexnet_pl.cli.shards import verify
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards.reader import INDEX, UNFINISHED
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.errors import DataError

from .processes import CONTEXT, wait_for


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("dataset") / "images", train=400, val=20)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    make_shards(list_splits(images), out, 64, per_shard=50)
    return shard_contents(out)


def _write(images: Path, out: Path) -> None:
    make_shards(list_splits(images), out, 64, per_shard=50, workers=2)


@pytest.mark.fault("SIGKILL while shards are written", "the same command resumes: same files, finished ones untouched")
@pytest.mark.parametrize("finished", [1, 9])
def test_kill_keeps_finished_shards(finished, images, whole, tmp_path):
    out = tmp_path / "out"
    process = CONTEXT.Process(target=_write, args=(images, out))
    process.start()
    wait_for(lambda: len(list(out.glob("*.tar"))) >= finished)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert finished <= len(kept) < 26
    assert not (out / INDEX).exists()
    _write(images, out)
    assert shard_contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not list((out / UNFINISHED).glob("*"))
    verify(str(out))


@pytest.mark.fault("two processes write the same shards", "the second is refused, exit 2; a run waits for the first")
def test_concurrent_writers(images, whole, tmp_path):
    out = tmp_path / "out"
    first = CONTEXT.Process(target=_write, args=(images, out))
    first.start()
    wait_for(lambda: list(out.glob("*.tar")))
    with pytest.raises(DataError, match="is in use by another process"):
        _write(images, out)
    make_shards(list_splits(images), out, 64, per_shard=50, wait=True)
    first.join()
    assert first.exitcode == 0
    assert shard_contents(out) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.fault("full disk while shards are written", "one line, finished shards stay, resumes with more space")
def test_full_disk_keeps_finished_shards(small_disk, images, whole):
    out = small_disk / "out"
    with pytest.raises(DataError, match="No space left on device. Finished shards are kept") as error:
        _write(images, out)
    assert "\n" not in str(error.value)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert kept
    assert not list(out.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    _write(images, out)
    assert shard_contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.fault("SIGINT while shards are written", "says that the same command resumes, exit 130")
def test_interrupt_names_the_way_on(images, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "alexnet_pl", "shards", str(images), str(out), "--size", "64", "--per-shard", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(out.glob("*.tar")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (130, "")
    assert output.splitlines()[-1] == "interrupted; finished shards are kept, and the same command resumes"


INTERRUPTED_WAIT = """
import signal, sys
from concurrent.futures import Future, ThreadPoolExecutor
from alexnet_pl.__main__ import main

calls = []
result = Future.result

def interrupted(self):
    calls.append(self)
    if len(calls) == 3:
        self._condition.acquire()  # as Condition.__enter__ does
        signal.raise_signal(signal.SIGINT)  # no with statement releases it yet
        self._condition.release()
    return result(self)

Future.result = interrupted
main(sys.argv[1:])
"""


@pytest.mark.fault("SIGINT inside a wait for a thread", "no deadlock: handled after the wait, exit 130")
def test_interrupted_wait_does_not_hang(images, tmp_path):
    """Raise SIGINT at the moment that left the lock of a Future held, so that its thread waited for ever."""
    command = [sys.executable, "-c", INTERRUPTED_WAIT, "shards", str(images), str(tmp_path / "out"), "--size", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.splitlines()[-1] == "interrupted; finished shards are kept, and the same command resumes"


@pytest.mark.security
@pytest.mark.fault("shards.json that names files elsewhere", "refused before anything is written, exit 2")
def test_hostile_index_is_refused(tmp_path):
    """Train on a directory whose shard names leave it, as if it came from a stranger."""
    out = tmp_path / "out"
    make_shards(list_splits(make_image_folder(tmp_path / "images")), out, 16)
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))
    index["splits"]["train"]["shards"][0]["name"] = "./../../newdir/x"
    (out / INDEX).write_text(json.dumps(index), encoding="utf-8")
    done = train("data=shards", f"data.root={out}", "model=lenet5", "data.image_size=16", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out}/{INDEX} is corrupt: './../../newdir/x' is not a shard name")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path.parent / "newdir").exists()
