"""Reading shards: object stores, and indexes that must not be trusted."""

import io
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_image, shard_contents
from PIL import Image

from alexnet_pl.cli.shards import main
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards import datamodule, reader
from alexnet_pl.data.shards.datamodule import decode_into
from alexnet_pl.data.shards.reader import ARRAYS, INDEX, MAX_SIDE, UNFINISHED, Shards
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.errors import DataError

from .corruption import flip, make_loader, wait_for_threads

# --- object stores --------------------------------------------------------------------------------------------------


def test_shards_are_fetched_once_from_a_url(store, out, tmp_path):
    url, requests = store
    local = list(make_loader(Shards(out), batch_size=7))
    for _ in range(2):
        for ours, theirs in zip(make_loader(Shards(url, tmp_path / "cache"), batch_size=7), local, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    assert sorted(name for name in requests if name.endswith(".tar")) == [f"train-{i:05}.tar" for i in range(4)]


def test_shards_that_were_created_again_are_fetched_again(store, images, out, tmp_path):
    """Cached files of the same names used to fail their checks, one per run."""
    old = Shards(store[0], tmp_path / "cache")
    list(make_loader(old))
    for path in (images / "train" / "ant").iterdir():
        make_image(2, 0).save(path)
    make_shards(list_splits(images), out, 16, per_shard=9)
    new = Shards(store[0], tmp_path / "cache")
    for ours, theirs in zip(make_loader(new), make_loader(Shards(out)), strict=True):
        assert torch.equal(ours[0], theirs[0])
    assert len(list(make_loader(old))) == 5  # a run that is not finished keeps its own


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_cache_of_an_earlier_version_is_used(store, out, tmp_path, monkeypatch, is_writable):
    """Shards lay beside the directories that are named after their index now."""
    shards = Shards(store[0], tmp_path / "cache")
    shards.folder.mkdir(parents=True, exist_ok=True)
    for path in out.glob("*.tar"):
        shutil.copy(path, shards.folder.parent)
    if not is_writable:
        monkeypatch.setattr("alexnet_pl.data.shards.reader.os.replace", refuse)
    monkeypatch.setattr(Shards, "_download", refuse)
    for ours, theirs in zip(make_loader(shards), make_loader(Shards(out)), strict=True):
        assert torch.equal(ours[0], theirs[0])
    assert bool([*shards.folder.glob("*.tar")]) is is_writable


def refuse(*_) -> None:
    raise PermissionError("refused")


@pytest.mark.parametrize(("damage", "message"), [(flip, "is corrupt: its SHA-256"), (Path.unlink, "not found")])
def test_faults_of_the_store_are_named(store, out, tmp_path, damage, message):
    url, _ = store
    damage(out / "train-00001.tar")
    with pytest.raises(DataError, match=f"{url}/train-00001.tar {message}"):
        list(make_loader(Shards(url, tmp_path / "cache")))
    wait_for_threads()
    assert not list((tmp_path / "cache").rglob("*train-00001.tar"))
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_stores_that_do_not_respond_are_refused(tmp_path):
    for url, message in [
        ("http://127.0.0.1:9/shards", "shards.json cannot be read"),
        ("nosuch://bucket/shards", "nosuch://bucket/shards cannot be opened"),
        ("memory://empty", "shards.json not found"),
        ("reference://http://x/shards.json", "is refused: expected the URL of a plain store"),
        ("simplecache::http://127.0.0.1:9/shards", "is refused"),
    ]:
        with pytest.raises(DataError, match=message) as refusal:
            Shards(url, tmp_path)
        assert "\n" not in str(refusal.value)


def test_url_without_a_home_directory_names_the_option(store, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    with pytest.raises(DataError, match="no home directory.*data.cache=DIR") as refusal:
        Shards(store[0])
    assert "\n" not in str(refusal.value)
    assert len(list(make_loader(Shards(store[0], tmp_path / "cache")))) == 5


def test_oversized_shard_of_a_store_does_not_fill_the_disk(store, out, tmp_path, monkeypatch):
    """The index says how large a shard is; the download stops one byte beyond."""
    size = (out / "train-00001.tar").stat().st_size
    with (out / "train-00001.tar").open("ab") as file:
        file.truncate(100 * 2**20)
    written = []
    monkeypatch.setattr(reader, "sha256_of", lambda path: written.append(path.stat().st_size) or "")
    with pytest.raises(DataError, match="train-00001.tar is corrupt: its SHA-256"):
        Shards(store[0], tmp_path / "cache").fetch("train", 1)
    assert written == [size + 1]


# --- repair ---------------------------------------------------------------------------------------------------------


def read_all(shards: Shards) -> str:
    """Return the message of the error that reading all training images ends in."""
    with pytest.raises(DataError) as error:
        shards.read("train", range(len(shards.splits["train"].label)))
    return str(error.value)


def test_printed_command_writes_the_corrupt_shard_again(images, tmp_path):
    """With the size, the quality and the number of images per shard, without which it would write others."""
    out = tmp_path / "with space"
    (images / "train" / "ant" / "000.png").write_bytes(b"")
    make_shards(list_splits(images), out, 24, 80, per_shard=9, skip_unreadable=True)
    whole = shard_contents(out)
    flip(out / "train-00002.tar")
    message = read_all(Shards(out))
    before, _, command = message.removesuffix(" creates train-00002.tar again.").partition(" is corrupt. ")
    assert before == str(out / "train-00002.tar")
    assert command.startswith(f'alexnet shards IMAGES "{out}" --size 24 --quality 80 --per-shard 9 --skip-unreadable')
    main(shlex.split(command.replace("IMAGES", str(images)))[2:])
    assert shard_contents(out) == whole


@pytest.mark.parametrize("quality", ["95; rm -rf ~", 0, 101, True, None])
def test_printed_command_has_nothing_untrusted(out, quality):
    edit(out, lambda index: index.update(quality=quality))
    edit(out, lambda index: [each.update(skipped=quality) for each in index["splits"]["train"]["shards"]])
    flip(out / "train-00002.tar")
    assert read_all(Shards(out)).endswith(
        f" is corrupt. alexnet shards IMAGES {out} --size 16 --per-shard 9 creates train-00002.tar again."
    )


@pytest.mark.parametrize("is_finished", [True, False])
def test_shards_that_another_process_rewrites_are_recognized(images, out, is_finished):
    shards = Shards(out)
    for path in (images / "train" / "ant").iterdir():
        make_image(2, 0).save(path)
    make_shards(list_splits(images), out, 16, per_shard=9)
    if not is_finished:
        (out / INDEX).unlink()
        (out / UNFINISHED).mkdir()
    message = read_all(shards)
    assert re.search(rf"train-0000\d.tar is corrupt: another process has rewritten the shards in {out}", message)
    assert message.endswith("or is doing so. Start again when it has finished.")
    (out / "train-00000.tar").unlink()
    assert "train-00000.tar not found: another process has rewritten" in read_all(shards)


def test_deleted_directory_is_not_taken_for_another_process(out):
    shards = Shards(out)
    shutil.rmtree(out)
    assert "not found. alexnet shards IMAGES" in read_all(shards)


# --- untrusted indexes ----------------------------------------------------------------------------------------------


def edit(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the content of shards.json."""
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))
    change(index)
    (out / INDEX).write_text(json.dumps(index), encoding="utf-8")


def shard(index: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return index["splits"]["train"]["shards"][number]


NAMES = ("./../../newdir/x", "../train-00000.tar", "/etc/passwd", "train-00000.tar/../x", "val-00000.tar",
         "train-0.tar", "train-00000.tar\n", "train-00000.TAR", "train-\u0660\u0660\u0660\u0660\u0660.tar", "", ".",
         "train-00000.tar\0", 7, None, ["x"])  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["local", "store"])
def test_shard_names_that_leave_the_directory_are_refused(store, out, tmp_path, name, where):
    edit(out, lambda index: shard(index).update(name=name))
    root, cache = (store[0], tmp_path / "a" / "b" / "cache") if where == "store" else (out, None)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(DataError, match=r"shards.json is corrupt: .* is not a shard name such as train-0") as error:
        Shards(root, cache).fetch("train", 0)
    assert str(error.value).isprintable()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_planted_links_in_the_cache_are_not_written_through(store, tmp_path):
    """Lock and scratch files of a download replace a link instead of truncating what it points to."""
    shards = Shards(store[0], tmp_path / "cache")
    shards.folder.mkdir(parents=True)
    victim = tmp_path / "precious"
    victim.write_text("precious")
    (shards.folder / ".train-00000.tar.part").symlink_to(victim)
    shards.fetch("train", 0)
    assert victim.read_text() == "precious"


INVALID = {
    "many images": lambda index: shard(index).update(images=10**13),
    "negative images": lambda index: shard(index).update(images=-1),
    "images as float": lambda index: shard(index).update(images=1e13),
    "images as bool": lambda index: shard(index).update(images=True),
    "many images in many bytes": lambda index: shard(index).update(images=10**11, bytes=2**50),
    "more images than there are": lambda index: shard(index).update(images=10),
    "negative bytes": lambda index: shard(index).update(bytes=-1),
    "no bytes": lambda index: shard(index).pop("bytes"),
    "fewer bytes": lambda index: shard(index).update(bytes=20_000),
    "no digest": lambda index: shard(index).update(sha256="abc"),
    "huge side": lambda index: index.update(side=MAX_SIDE + 1),
    "side 0": lambda index: index.update(side=0),
    "side as text": lambda index: index.update(side="16"),
    "unknown split": lambda index: index["splits"].update({"../x": index["splits"]["train"]}),
    "no splits": lambda index: index.update(splits={}),
    "splits as list": lambda index: index.update(splits=[]),
    "no shards": lambda index: index["splits"]["train"].update(shards=[]),
    "shards as text": lambda index: index["splits"]["train"].update(shards="train-00000.tar"),
    "one shard twice": lambda index: shard(index).update(name="train-00001.tar"),
    "no classes": lambda index: index.update(class_names=[]),
    "fewer classes": lambda index: index.update(class_names=["ant", "bee"]),
    "equal classes": lambda index: index.update(class_names=["ant", "bee", "bee"]),
    "classes as numbers": lambda index: index.update(class_names=[1, 2, 3]),
    "no skipped": lambda index: index.pop("skipped"),
    "no array digest": lambda index: index.pop("arrays_sha256"),
}


@pytest.mark.parametrize("change", INVALID)
def test_invalid_indexes_are_refused_before_allocating(out, change):
    edit(out, INVALID[change])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="(shards.json|shards.npz) is corrupt: ") as refusal:
        Shards(out)
    assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


def replace_arrays(out: Path, change: Callable[[dict[str, np.ndarray]], None], save: Callable = np.savez) -> None:
    """Change the arrays of shards.npz, and its digest with them."""
    arrays = dict(np.load(out / ARRAYS))
    change(arrays)
    buffer = io.BytesIO()
    save(buffer, **arrays)
    (out / ARRAYS).write_bytes(buffer.getvalue())
    edit(out, lambda index: index.update(arrays_sha256=sha256(buffer.getvalue()).hexdigest()))


ARRAY_CHANGES = {
    "beyond the shard": lambda arrays: arrays["train_offset"].__setitem__(3, 10**7),
    "offset overflow": lambda arrays: arrays["train_offset"].__setitem__(3, 2**64 - 1),
    "huge image": lambda arrays: arrays["train_size"].__setitem__(3, 2**32 - 1),
    "empty image": lambda arrays: arrays["train_size"].__setitem__(3, 0),
    "label beyond the classes": lambda arrays: arrays["train_label"].__setitem__(3, 3),
    "negative label": lambda arrays: arrays["train_label"].__setitem__(3, -1),
    "missing column": lambda arrays: arrays.pop("train_crc32"),
    "short column": lambda arrays: arrays.update(train_crc32=arrays["train_crc32"][:-1]),
    "two dimensions": lambda arrays: arrays.update(train_label=arrays["train_label"].reshape(6, 6)),
    "floating point": lambda arrays: arrays.update(train_label=arrays["train_label"].astype(float)),
    "objects": lambda arrays: arrays.update(train_label=arrays["train_label"].astype(object)),
}


@pytest.mark.parametrize("change", ARRAY_CHANGES)
def test_invalid_arrays_are_refused(out, change):
    replace_arrays(out, ARRAY_CHANGES[change])
    with pytest.raises(DataError, match="shards.npz is corrupt: ") as refusal:
        Shards(out)
    assert "\n" not in str(refusal.value)


READ = """
import resource, sys
from alexnet_pl.data.shards.reader import Shards
from alexnet_pl.runtime.errors import DataError

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Shards(sys.argv[1])
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ["compressed arrays", "nested lists", "large index"])
def test_peak_memory_of_index_bombs_is_bounded(out, bomb):
    if bomb == "compressed arrays":  # 1 MB that unpack to 1 GB
        zeros = np.zeros(2**27, np.uint64)
        replace_arrays(out, lambda arrays: arrays.update(test_offset=zeros), np.savez_compressed)
        assert (out / ARRAYS).stat().st_size < 2**21
    elif bomb == "nested lists":
        (out / INDEX).write_text("[" * 1_000_000, encoding="utf-8")
    else:
        with (out / INDEX).open("wb") as file:
            file.truncate(2**35)
    done = subprocess.run([sys.executable, "-c", READ, out], capture_output=True, text=True, check=True, timeout=600)
    message, added = done.stdout.splitlines()
    assert "corrupt" in message or "is larger than 256 MB, too large for an index" in message
    assert int(added) < 700


@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_images_of_another_size_are_refused_before_decoding(monkeypatch, with_simplejpeg):
    if not with_simplejpeg:
        monkeypatch.setattr(datamodule, "simplejpeg", None)
    file = io.BytesIO()
    Image.new("L", (5000, 5000)).save(file, "JPEG")
    with pytest.raises(ValueError, match="5000×5000 pixels"):
        decode_into(np.empty((16, 16, 3), np.uint8), bytearray(file.getvalue()))


def test_valid_shards_pass_every_check(out, tmp_path):
    """The checks must not refuse what the writer writes, also after a move."""
    shutil.copytree(out, tmp_path / "moved")
    whole = torch.cat([labels for _, labels in make_loader(Shards(out))])
    assert torch.equal(torch.cat([labels for _, labels in make_loader(Shards(tmp_path / "moved"))]), whole)
