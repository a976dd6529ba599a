"""Checkpoint files: verified, bounded, never executed."""

import pickle
import zipfile

import pytest
import torch

from alexnet_pl.training import checkpoint_io
from alexnet_pl.training.checkpoint_io import (
    BEST,
    LATEST,
    MAX_PICKLE_BYTES,
    PREVIOUS,
    SUMS,
    CheckpointError,
    latest_valid,
    read_checkpoint,
    read_sums,
    remove_resume_checkpoints,
    write_checkpoint,
)

STATE = {"state_dict": {"net.weight": torch.arange(6.0)}}


def test_a_file_that_the_sums_do_not_list_is_refused(tmp_path):
    """Issue: SHA256SUMS filled with random bytes, and best.ckpt loads."""
    path = tmp_path / BEST
    write_checkpoint(STATE, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["net.weight"], torch.arange(6.0))
    for content in (b"\xf3\x00\x9a random bytes \xff", b"", b"0" * 64 + b"  other.ckpt\n"):
        (tmp_path / SUMS).write_bytes(content)
        with pytest.raises(CheckpointError, match="is not listed in .*SHA256SUMS, so it cannot be verified"):
            read_checkpoint(path)
    (tmp_path / SUMS).write_text("0" * 64 + f"  {BEST}\n")
    with pytest.raises(CheckpointError, match="is corrupt: its SHA-256 differs"):
        read_checkpoint(path)
    (tmp_path / SUMS).unlink()
    read_checkpoint(path)


@pytest.mark.security
def test_sums_that_are_no_regular_file_are_refused(tmp_path):
    write_checkpoint(STATE, tmp_path / BEST)
    (tmp_path / SUMS).unlink()
    (tmp_path / SUMS).mkdir()
    with pytest.raises(CheckpointError, match="SHA256SUMS is corrupt: expected a regular file"):
        read_checkpoint(tmp_path / BEST)


def test_the_previous_checkpoint_is_listed_even_if_the_sums_were_lost(tmp_path):
    write_checkpoint(STATE, tmp_path / LATEST)
    (tmp_path / SUMS).unlink()
    write_checkpoint(STATE, tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    assert set(read_sums(tmp_path)) == {LATEST, PREVIOUS}
    read_checkpoint(tmp_path / PREVIOUS)


def test_resume_checkpoints_are_removed_with_their_sums(tmp_path):
    for name in (BEST, LATEST, PREVIOUS):
        write_checkpoint(STATE, tmp_path / name)
    remove_resume_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {BEST, SUMS}
    assert set(read_sums(tmp_path)) == {BEST}


def rewritten(path, compression=zipfile.ZIP_STORED, change=lambda name, content: content):
    """Rewrite the ZIP archive of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    """Issue: 3.2 MB on disk, 3.7 GB in memory."""
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"net.weight": torch.zeros(4_000_000)}}, path)
    rewritten(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match="is refused: its archive has compressed entries"):
        read_checkpoint(path)


def test_a_large_pickle_is_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    torch.save(STATE, path)
    rewritten(path, change=lambda name, content: content + bytes(MAX_PICKLE_BYTES * name.endswith("data.pkl")))
    with pytest.raises(CheckpointError, match="is refused: its archive has a pickle larger than 2 MiB"):
        read_checkpoint(path)


@pytest.mark.parametrize("depth", [1_000, 200_000])
def test_deeply_nested_values_are_refused_quickly(depth, tmp_path):
    path = tmp_path / "nested.ckpt"
    torch.save(STATE, path)
    nested = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    rewritten(path, change=lambda name, content: nested if name.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", pickle.dumps({"state_dict": {}})])
def test_what_is_no_archive_is_corrupt(content, tmp_path):
    path = tmp_path / BEST
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is corrupt: expected a ZIP archive"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "position", [None, {}, {"epoch": 1, "batch": 2, "step": 3}, {"epoch": "1", "images": 0, "step": 3}]
)
def test_a_position_that_is_none_is_refused_in_one_line(position, tmp_path):
    write_checkpoint({**STATE, "position": position, "hyper_parameters": {}}, tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="is not a resume checkpoint of this version") as error:
        latest_valid(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.security
def test_pickles_in_the_format_before_torch_1_6_are_bounded(tmp_path, monkeypatch):
    """20 MB of nested lists took a minute and 2.3 GB before torch refused them."""
    monkeypatch.setattr(checkpoint_io, "MAX_PICKLE_BYTES", 2**16)
    path = tmp_path / "old.pt"
    torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert read_checkpoint(path, bare=True)["state_dict"]["a"].tolist() == [0, 1, 2]
    magic = whole[: whole.index(b".") + 1]
    for content in (b"\x80\x02" + b"]" * 2**17 + b".", magic + b"\x80\x02" + b"]" * 2**17 + b"."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is refused: it has a pickle larger than"):
            read_checkpoint(path, bare=True)
    for content in (b"", b"\x80\x02N.", b"text", magic, whole[:100], b"\x80\x02\x8b\xff\xff\xff\x7f" + b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"old.pt is corrupt (or not a checkpoint|or holds)"):
            read_checkpoint(path, bare=True)
