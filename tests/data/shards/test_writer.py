"""Writing shards: contents, unreadable images, changes, and damage."""

import io
import json
import os
import tarfile
import warnings

import numpy as np
import pytest
from helpers import CLASSES, make_image, make_image_folder, shard_contents
from PIL import Image

from alexnet_pl.cli.shards import main, verify
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.image_io import central_square, read_image
from alexnet_pl.data.shards.reader import INDEX, UNFINISHED, Shards
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.runtime.errors import DataError

from .corruption import flip, stored


def test_every_image_is_there_once_with_its_label(images, out):
    shards = Shards(out)
    assert (shards.class_names, shards.side) == (CLASSES, 16)
    assert [len(split.names) for split in shards.splits.values()] == [4, 2]
    for split in ("train", "val"):
        expected = {
            (path, label): np.asarray(central_square(read_image(images / path), 16))
            for path, label in list_splits(images).files[split]
        }
        for pixels, label in stored(shards, split):
            distance = {key: np.abs(pixels.astype(int) - other).mean() for key, other in expected.items()}
            nearest = min(distance, key=distance.get)
            assert (nearest[1], distance.pop(nearest) < 3) == (label, True)
            del expected[nearest]
        assert not expected


def test_tar_files_follow_webdatasets_format(out):
    """Read pairs of <key>.jpg and <key>.cls with tarfile, at the offsets of the index."""
    shards = Shards(out)
    with tarfile.open(out / "train-00001.tar") as tar:
        members = tar.getmembers()
        images, labels = members[::2], members[1::2]
        assert len(images) == len(labels) == 9
        for position, (image, label) in enumerate(zip(images, labels, strict=True), start=9):
            assert image.name.removesuffix(".jpg") == label.name.removesuffix(".cls")
            assert image.offset_data == shards.splits["train"].offset[position]
            number = int(tar.extractfile(label).read())
            assert (CLASSES[number], number) == (image.name.split("/")[0], shards.splits["train"].label[position])
            assert tar.extractfile(image).read() == shards.read("train", [position])[0]


def test_images_of_every_format_become_rgb(tmp_path):
    """Gray, palette, transparent, CMYK, 16-bit gray, rotated by EXIF, and a suffix of another format."""
    root = make_image_folder(tmp_path / "images", train=2, val=2)
    base, folder = make_image(0, 0, 48, 64), root / "train" / "ant"
    for path in folder.iterdir():
        path.unlink()
    base.convert("L").save(folder / "gray.jpg")
    base.convert("P").save(folder / "palette.gif")
    transparent = base.convert("RGBA")
    transparent.putalpha(128)
    transparent.save(folder / "alpha.png")
    base.convert("LA").save(folder / "gray_alpha.PNG")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) << 8).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "rotated.jpg", exif=exif)
    base.save(folder / "a_png_by_content.jpg", "PNG")
    listing = list_splits(root)
    make_shards(listing, tmp_path / "out", 48)
    expected = sorted((np.asarray(central_square(read_image(path), 48)) for path in folder.iterdir()), key=np.sum)
    found = sorted((pixels for pixels, label in stored(Shards(tmp_path / "out")) if label == 0), key=np.sum)
    assert len(found) == 8
    for ours, reference in zip(found, expected, strict=True):
        assert ours.shape == (48, 48, 3)
        assert np.abs(ours.astype(int) - reference).mean() < 4  # the palette is dithered


def test_jpegs_of_the_right_size_are_stored_unchanged(tmp_path):
    root = make_image_folder(tmp_path / "images", train=2, val=2)
    ready, rotated = root / "train" / "ant" / "ready.jpg", root / "train" / "ant" / "rotated.jpg"
    make_image(0, 1, 32, 32).save(ready, quality=40)
    exif = Image.Exif()
    exif[0x0112] = 3
    make_image(0, 1, 32, 32).save(rotated, exif=exif)
    make_shards(list_splits(root), tmp_path / "out", 32)
    shards = Shards(tmp_path / "out")
    kept = [bytes(content) for content in shards.read("train", range(len(shards.splits["train"].label)))]
    assert ready.read_bytes() in kept
    assert rotated.read_bytes() not in kept


def test_number_of_workers_does_not_change_the_files(images, out, tmp_path):
    make_shards(list_splits(images), tmp_path / "parallel", 16, per_shard=9, workers=2)
    assert shard_contents(tmp_path / "parallel") == shard_contents(out)


def test_unreadable_images_are_counted_and_named_and_skipped_on_request(images, tmp_path, caplog):
    folder = images / "train" / "bee"
    whole = io.BytesIO()
    make_image(1, 0).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:-200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.JPG").write_text("this is not an image")
    (folder / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (images / "val" / "bee" / "empty.png").write_bytes(b"")
    listing, out = list_splits(images), tmp_path / "out"
    with pytest.raises(DataError, match="5 of 53 images cannot be read") as refused:
        make_shards(listing, out, 16, per_shard=9)
    advice = "Replace them: finished shards are kept. If images are removed or added, their split is converted again."
    for name in ("cut.jpg", "empty.png", "text.JPG", "nowhere.png", advice, "skip them with --skip-unreadable"):
        assert name in str(refused.value)
    assert not (out / INDEX).exists()
    with pytest.raises(DataError, match="the conversion was interrupted"):
        Shards(out)

    index = make_shards(listing, out, 16, per_shard=9, skip_unreadable=True)
    assert len(index["skipped"]) == 5
    assert "5 unreadable images were skipped" in caplog.text
    assert verify(str(out)).splits["train"].label.tolist().count(1) == 12
    with pytest.raises(DataError, match="5 of 53 images cannot be read"):  # and the shards stay
        make_shards(listing, out, 16, per_shard=9)
    assert len(Shards(out).splits["train"].label) == 36

    for path in (*folder.glob("[cetn]*"), images / "val" / "bee" / "empty.png"):
        make_image(1, 5).save(path.unlink() or path)
    assert make_shards(list_splits(images), out, 16, per_shard=9)["skipped"] == []
    assert len(Shards(out).splits["train"].label) == 40


def test_odd_metadata_neither_ends_the_conversion_nor_warns(images, tmp_path, recwarn):
    """The threads that decode do not change Python's filters of warnings: see test_image_io.py."""
    header, truncated = b"Exif\0\0XX*\0\x08\0\0\0", b"Exif\0\0II*\0\x08\0\0\0\x05\0"
    for name, exif in (("header", header), ("truncated", truncated)):
        make_image(1, 0, 16, 16).save(images / "train" / "bee" / f"{name}.jpg", exif=exif, dpi=(72, 72))
    index = make_shards(list_splits(images), tmp_path / "out", 16, workers=2)
    assert (index["splits"]["train"]["images"], len(recwarn)) == (38, 0)
    warnings.warn("still shown", stacklevel=1)
    assert [str(each.message) for each in recwarn] == ["still shown"]


def test_class_without_a_readable_image_is_refused(images, tmp_path):
    for path in (images / "val" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="val/cat has no image that can be read"):
        make_shards(list_splits(images), tmp_path / "out", 16, skip_unreadable=True)


def test_only_changed_shards_are_written_again(images, out):
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    whole = shard_contents(out)
    assert make_shards(list_splits(images), out, 16, per_shard=9) == json.loads(whole[INDEX])
    make_image(1, 7).save(images / "train" / "bee" / "003.png")
    make_shards(list_splits(images), out, 16, per_shard=9)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sum(before[name] != after[name] for name in before) == 1
    verify(str(out))
    make_shards(list_splits(images), out, 16, per_shard=30)  # fewer and larger shards, and the old ones are gone
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-00000.tar", "train-00001.tar", "val-00000.tar"]
    assert not (out / UNFINISHED).exists()


def test_directories_that_hold_something_else_are_not_touched(images, tmp_path):
    listing = list_splits(images)
    other = tmp_path / "other"
    other.mkdir()
    (other / INDEX).write_text('{"name": "of another program"}')
    (other / "train-00000.tar").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for directory, message in [
        (other, "holds something else"),
        (tmp_path / "file", "is a file"),
        (images, "is a directory of the images themselves"),
        (images / "train" / "shards", "is a directory of the images themselves"),
    ]:
        with pytest.raises(DataError, match=message):
            make_shards(listing, directory, 16)
    assert (other / "train-00000.tar").read_text() == "precious"
    assert not (images / "train" / "shards").exists()


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is corrupt"),
        (lambda path: os.truncate(path, 3000), "has 3,000 bytes instead of"),
        (lambda path: path.unlink(), "not found"),
    ],
)
def test_corrupt_shard_is_named_and_written_again(images, out, damage, message):
    whole = shard_contents(out)
    damage(out / "train-00002.tar")
    shards = Shards(out)
    with pytest.raises(DataError, match=r"train-00002.tar (is|has|not found).*\n?") as refused:
        shards.read("train", range(36))
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match=f"1 shards of .*\n.*train-00002.tar {message}"):
        verify(str(out))
    main([str(images), str(out), "--size", "16", "--per-shard", "9", "--workers", "1"])
    assert shard_contents(out) == whole


@pytest.mark.parametrize("name", ["shards.json", "shards.npz"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{]"), flip])
def test_corrupt_index_is_named_and_written_again(images, out, name, damage):
    whole = shard_contents(out)
    damage(out / name)
    with pytest.raises(DataError, match=str(out)):
        Shards(out).read("train", range(36))
    main([str(images), str(out), "--size", "16", "--per-shard", "9", "--workers", "1"])
    assert shard_contents(out) == whole


def test_index_of_a_stranger_is_not_taken_apart(images, out):
    """Shard names become file names of the records. A directory whose index is invalid counts as a foreign one."""
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))
    index["splits"]["train"]["shards"][0]["name"] = "../../escaped"
    (out / INDEX).write_text(json.dumps(index), encoding="utf-8")
    make_shards(list_splits(images), out, 16, per_shard=30)
    assert not list(images.parent.glob("escaped*"))
    verify(str(out))


def test_records_of_a_stranger_do_not_end_in_a_traceback(images, out):
    whole = shard_contents(out)
    (out / INDEX).unlink()
    (out / UNFINISHED).mkdir()
    digest = json.loads(whole[INDEX])["splits"]["train"]["shards"][0]["digest"]
    for content in ({"digest": digest, "unknown": 1}, {"digest": digest}, [[]]):
        (out / UNFINISHED / "train-00000.tar.json").write_text(json.dumps(content), encoding="utf-8")
        make_shards(list_splits(images), out, 16, per_shard=9)
        assert shard_contents(out) == whole
        (out / INDEX).unlink()
        (out / UNFINISHED).mkdir()
