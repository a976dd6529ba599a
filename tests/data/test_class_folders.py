"""Listing of class folders, and directories that are not what they should be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CLASSES, make_image

from alexnet_pl.data.class_folders import ClassFolders, interleave, list_images, list_splits, nearby_root
from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.runtime.errors import DataError


def test_everyday_directories_are_listed(images, tmp_path):
    """Upper-case suffixes, nested directories, links, hidden and other files, a link that leads back up."""
    cat = images / "train" / "cat"
    make_image(2, 0).save(cat / "UPPER.JPEG")
    (cat / "deep" / "deeper").mkdir(parents=True)
    make_image(2, 1).save(cat / "deep" / "deeper" / "a.b.Jpg")
    (cat / "deep" / "again").symlink_to(cat)
    make_image(2, 2).save(tmp_path / "elsewhere.png")
    (cat / "linked.png").symlink_to(tmp_path / "elsewhere.png")
    (cat / "Thumbs.db").write_bytes(b"x")
    (cat / ".hidden.png").write_bytes(b"x")
    (images / "train" / ".cache").mkdir()
    listing = list_splits(images)
    assert listing.class_names == CLASSES
    names = {os.path.relpath(path, "train/cat") for path, label in listing.files["train"] if label == 2}
    assert names == {*(f"{i:03}.png" for i in range(12)), "UPPER.JPEG", "deep/deeper/a.b.Jpg", "linked.png"}
    assert (len(listing), listing.ignored) == (36 + 3 + 12, 1)


def test_files_are_ordered_by_class_or_interleaved(images):
    ordered, ignored = list_images(images / "val", CLASSES)
    assert ordered == [(f"{name}/{i:03}.png", label) for label, name in enumerate(CLASSES) for i in range(4)]
    in_turn = [(f"{name}/{i:03}.png", label) for i in range(4) for label, name in enumerate(CLASSES)]
    assert interleave(ordered) == in_turn
    assert ignored == 0


def flat_validation(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    make_image(0, 0).save(root / "val" / "ILSVRC2012_val_00000001.JPEG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "not found. Give the dataset's directory with data.root=DIR"),
        (lambda root: (shutil.rmtree(root), root.write_text("")), "is a file, not a directory"),
        (lambda root: shutil.rmtree(root / "train"), "train not found"),
        (lambda root: shutil.rmtree(root / "val"), "has neither val/ nor test/"),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "train has no class folders"),
        (lambda root: [path.unlink() for path in (root / "train" / "bee").iterdir()], "train/bee holds no images"),
        (lambda root: (root / "val" / "dog").mkdir(), "val does not have the 3 classes of train/: unexpected dog"),
        (lambda root: shutil.rmtree(root / "val" / "ant"), "val does not have the 3 classes of train/: missing ant"),
        (flat_validation, "holds 1 images without a class. ILSVRC"),
    ],
)
def test_invalid_directories_are_refused(images, damage, message):
    damage(images)
    with pytest.raises(DataError, match=message):
        list_splits(images)


@pytest.mark.parametrize("has_test", [True, False])
@pytest.mark.parametrize(
    ("split", "given"),
    [("train", "Train"), ("train", "training"), ("val", "valid"), ("val", "validation"), ("val", "VAL")],
)
def test_misspelled_splits_are_recognized(images, split, given, has_test):
    """Also next to all other splits, where a misspelled one used to be ignored without a word."""
    if has_test:
        shutil.copytree(images / "val", images / "test")
    (images / split).rename(images / given)
    with pytest.raises(DataError, match=rf"{given} is not a split\. Did you mean {split}/\? Rename it") as refusal:
        list_splits(images)
    assert "\n" not in str(refusal.value)


def test_root_one_level_away_is_named(images):
    for root in (images.parent, images / "train"):
        with pytest.raises(DataError, match=f"train not found. Did you mean data.root={images}?"):
            list_splits(root)


def test_unreadable_neighbors_are_skipped(tmp_path):
    """lost+found, or another user's directory beside the data, used to end the search for it with a traceback."""
    for name in ("lost+found", "mine"):
        (tmp_path / "root" / name).mkdir(parents=True)

    def has_data(directory: Path) -> bool:
        if directory.name in ("lost+found", tmp_path.name):
            raise PermissionError(13, "Permission denied", str(directory))
        return directory.name == "mine"

    assert nearby_root(tmp_path / "root", has_data) == f"Did you mean data.root={tmp_path / 'root' / 'mine'}?"
    assert nearby_root(tmp_path / "root" / "lost+found", lambda directory: has_data(tmp_path)) == ""


def test_class_names_cannot_write_to_the_terminal(images):
    (images / "val" / "dog\x1b[2J\x1b]0;owned\x07").mkdir()
    with pytest.raises(DataError, match="unexpected dog") as refusal:
        list_splits(images)
    assert str(refusal.value).isprintable()


# --- FIFOs and devices ----------------------------------------------------------------------------------------------

READ_FIFO = """
import sys
from pathlib import Path
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards.reader import Shards
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.data.image_io import image_files, read_image
from alexnet_pl.runtime.errors import DataError

root, out = Path(sys.argv[1]), Path(sys.argv[2])
listing = list_splits(root)
assert (len(listing), listing.ignored) == (48, 2), listing
make_shards(listing, out, 16)
assert root / "train" / "bee" / "pipe.png" not in image_files([root])
(out / "shards.json").unlink()
import os
os.mkfifo(out / "shards.json")
for read in (lambda: read_image(root / "train" / "bee" / "pipe.png"), lambda: Shards(out)):
    try:
        read()
    except DataError as error:
        assert "is not a regular file" in str(error), error
    else:
        raise AssertionError
"""


def test_fifos_and_devices_are_ignored_instead_of_opened(images, tmp_path):
    """Run in a subprocess, because opening a FIFO would block for good."""
    os.mkfifo(images / "train" / "bee" / "pipe.png")
    (images / "val" / "cat" / "zero.png").symlink_to("/dev/zero")
    subprocess.run([sys.executable, "-c", READ_FIFO, images, tmp_path / "out"], check=True, timeout=300)


def test_class_folders_as_test_data(images):
    """The classes come in turn; other class folders than the run's are refused by name."""
    preprocess = Preprocess(16, (0.5,) * 3, (0.5,) * 3)
    data = ClassFolders(images / "val", CLASSES, preprocess, 5)
    data.setup()
    assert data.test_dataloader().labels.tolist() == [0, 1, 2] * 4
    with pytest.raises(DataError, match="does not have the 2 classes of the run: missing dog; unexpected bee, cat"):
        ClassFolders(images / "val", ("ant", "dog"), preprocess, 5).setup()
    with pytest.raises(DataError, match="nowhere not found"):
        ClassFolders(images / "nowhere", CLASSES, preprocess, 5).setup()
