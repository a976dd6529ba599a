"""Atomic writes, the cache directory and locks between processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.files import (
    InUseError,
    cache_dir,
    exclusive_lock,
    make_cache_dir,
    replacing,
    sha256_of,
    write_atomic,
)

HOLD = """
import sys, time
from pathlib import Path
from alexnet_pl.runtime.files import exclusive_lock
print("waiting", flush=True)
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock ``tmp_path / ".lock"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(2)] == ["waiting\n", "held\n"]
    yield process
    process.kill()
    process.wait()


# --- writing --------------------------------------------------------------------------------------------------------


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("one", "zwölf", b"\x00\xff"):
        write_atomic(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert [*tmp_path.iterdir()] == [path]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left on device"):
            write_atomic(path, "new")
    with pytest.raises(FileNotFoundError), replacing(path) as scratch:
        (scratch.parent / "forgotten").write_text("new")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_write_does_not_follow_planted_links(tmp_path):
    precious, path = tmp_path / "precious", tmp_path / "run" / "a.txt"
    path.parent.mkdir()
    precious.write_text("mine")
    for name in ("a.txt", f".a.txt.{os.getpid()}.part"):
        (path.parent / name).symlink_to(precious)
    write_atomic(path, "new")
    assert precious.read_text() == "mine"
    assert path.read_text() == "new"
    assert [*path.parent.iterdir()] == [path]
    assert not path.is_symlink()


def test_replacing_renames_on_success(tmp_path):
    path = tmp_path / "a.npz"
    with replacing(path) as scratch:
        assert scratch.name == path.name  # np.savez appends .npz to other names
        scratch.write_text("new")
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- the cache directory --------------------------------------------------------------------------------------------


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache" / "alexnet_pl"
    assert not cache_dir().exists()
    assert make_cache_dir().is_dir()
    assert not [*make_cache_dir().iterdir()]
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "alexnet_pl"


def test_no_home_directory_is_one_line_with_a_way_out(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(
        UserError, match="^cache directory not found: .* Set XDG_CACHE_HOME=DIR to a writable directory."
    ):
        cache_dir()


def test_unwritable_cache_dir_is_one_line_with_a_way_out(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"is not writable: Not a directory\. Set XDG_CACHE_HOME=DIR"):
        make_cache_dir()


# --- locks ----------------------------------------------------------------------------------------------------------


def test_lock_is_exclusive_and_leaves_no_file(tmp_path):
    path = tmp_path / ".lock"
    with exclusive_lock(path):
        assert path.read_text() == str(os.getpid())
        with pytest.raises(InUseError, match=f"pid {os.getpid()}") as raised, exclusive_lock(path, wait=False):
            pass
        assert raised.value.pid == os.getpid()
    assert not path.exists()
    with exclusive_lock(path, wait=False):
        pass


def test_lock_names_its_owner_and_ends_with_it(holder, tmp_path):
    with pytest.raises(InUseError, match=f"pid {holder.pid}"), exclusive_lock(tmp_path / ".lock", wait=False):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").read_text() == str(holder.pid)  # a leftover of a killed process
    with exclusive_lock(tmp_path / ".lock", wait=False):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_lock_is_passed_on_to_a_waiting_process(tmp_path):
    """The owner removes the file while another process waits for it: the waiting one must not hold a removed file."""
    with exclusive_lock(tmp_path / ".lock"):
        waiting = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
        assert waiting.stdout.readline() == "waiting\n"
        time.sleep(0.2)  # into the lock; the assertions hold whether it got there or not
    try:
        assert waiting.stdout.readline() == "held\n"
        assert (tmp_path / ".lock").read_text() == str(waiting.pid)
        with pytest.raises(InUseError), exclusive_lock(tmp_path / ".lock", wait=False):
            pass
    finally:
        waiting.kill()
        waiting.wait()


def test_forked_child_does_not_hold_the_lock(tmp_path):
    """A data-loading worker may outlive a killed run for seconds."""
    read, write = os.pipe()
    child = 0
    with exclusive_lock(tmp_path / ".lock"):
        if (child := os.fork()) == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with exclusive_lock(tmp_path / ".lock", wait=False):
            pass
    finally:
        os.close(read)
        os.close(write)
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "content", "directory", "fifo"])
def test_planted_lock_file_is_refused_and_nothing_is_truncated(kind, tmp_path):
    precious, path = tmp_path / "precious", tmp_path / ".lock"
    precious.write_text("the only copy of a long thesis")
    if kind == "symlink":
        path.symlink_to(precious)
    elif kind == "hard link":
        path.hardlink_to(precious)
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_text(precious.read_text())
    with pytest.raises(UserError, match="expected a lock file. Remove it."), exclusive_lock(path, wait=False):
        pass
    assert precious.read_text() == "the only copy of a long thesis"
    if kind == "content":
        assert path.read_text() == precious.read_text()


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with exclusive_lock(tmp_path / ".lock", wait=False):
        pass
    assert caplog.messages == [
        f"warning: {tmp_path / '.lock'} cannot be locked: Operation not supported. Continuing without a lock."
    ]
