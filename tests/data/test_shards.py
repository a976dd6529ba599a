"""Trees of class folders, shards made of them, and batches streamed from shards."""

import functools
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, assert_same_run, config, make_image, make_image_folder, run_until_stopped, shard_contents
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image

from alexnet_pl import load_run
from alexnet_pl.cli.shards import main, verify
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.image_io import central_square, read_image
from alexnet_pl.data.loaders import IGNORE_INDEX
from alexnet_pl.data.shards import datamodule as streaming
from alexnet_pl.data.shards.datamodule import ShardShuffle, StreamLoader, choose_splits
from alexnet_pl.data.shards.reader import INDEX, UNFINISHED, Shards
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.distributed.environment import World
from alexnet_pl.inference.evaluation import evaluate
from alexnet_pl.inference.prediction import predict
from alexnet_pl.runtime.errors import DataError, UserError
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.run import run

RUN = ("model=lenet5", "data.image_size=16", "trainer.accelerator=cpu", "trainer.precision=32-true",
       "trainer.max_epochs=2", "data.batch_size=8", "data.workers=2")  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "tree")


@pytest.fixture
def out(tree: Path, tmp_path: Path) -> Path:
    """Five shards of the tree: four of training images, one of validation images."""
    make_shards(list_splits(tree), tmp_path / "out", 16, per_shard=9)
    return tmp_path / "out"


# --- what there is --------------------------------------------------------------------------------------------------


def test_a_tree_is_listed_as_people_have_them(tree, tmp_path):
    """Suffixes in upper case, folders in class folders, links, hidden and other files, a link that leads back up."""
    cat = tree / "train" / "cat"
    make_image(2, 0).save(cat / "UPPER.JPEG")
    (cat / "deep" / "deeper").mkdir(parents=True)
    make_image(2, 1).save(cat / "deep" / "deeper" / "a.b.Jpg")
    (cat / "deep" / "again").symlink_to(cat)
    make_image(2, 2).save(tmp_path / "elsewhere.png")
    (cat / "linked.png").symlink_to(tmp_path / "elsewhere.png")
    (cat / "Thumbs.db").write_bytes(b"x")
    (cat / ".hidden.png").write_bytes(b"x")
    (tree / "train" / ".cache").mkdir()
    listing = list_splits(tree)
    assert listing.class_names == CLASSES
    names = {os.path.relpath(path, "train/cat") for path, label in listing.files["train"] if label == 2}
    assert names == {*(f"{i:03}.png" for i in range(12)), "UPPER.JPEG", "deep/deeper/a.b.Jpg", "linked.png"}
    assert (len(listing), listing.ignored) == (36 + 3 + 12, 1)


def flat_validation(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    make_image(0, 0).save(root / "val" / "ILSVRC2012_val_00000001.JPEG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "does not exist. Give a folder with data.root=FOLDER"),
        (lambda root: (shutil.rmtree(root), root.write_text("")), "is a file, not a folder"),
        (lambda root: shutil.rmtree(root / "train"), "train does not exist"),
        (lambda root: shutil.rmtree(root / "val"), "has neither val/ nor test/"),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "train has no class folders"),
        (lambda root: [path.unlink() for path in (root / "train" / "bee").iterdir()], "train/bee holds no picture"),
        (lambda root: (root / "val" / "dog").mkdir(), "val has the class folder.s. dog, which train/ does not have"),
        (lambda root: shutil.rmtree(root / "val" / "ant"), "val lacks the class folder.s. ant, which train/ has"),
        (flat_validation, "holds 1 pictures that no folder names the class of. ILSVRC"),
    ],
)
def test_trees_that_cannot_work_are_refused(tree, damage, message):
    damage(tree)
    with pytest.raises(DataError, match=message):
        list_splits(tree)


def test_the_last_labelled_folder_is_the_test_set():
    assert choose_splits(["train", "val", "test"]) == {"train": "train", "val": "val", "test": "test"}
    assert choose_splits(["train", "test"]) == {"train": "train", "val": "train", "test": "test"}
    assert choose_splits(["train", "val"]) == {"train": "train", "val": "train", "test": "val"}


# --- making shards --------------------------------------------------------------------------------------------------


def stored(shards: Shards, split: str = "train") -> list[tuple[np.ndarray, int]]:
    found = shards.splits[split]
    pictures = shards.read(split, range(len(found.label)))
    return [
        (np.asarray(Image.open(io.BytesIO(content))), label)
        for content, label in zip(pictures, found.label, strict=True)
    ]


def test_every_picture_is_there_once_with_its_label(tree, out):
    shards = Shards(out)
    assert (shards.class_names, shards.side) == (CLASSES, 16)
    assert [len(split.names) for split in shards.splits.values()] == [4, 2]
    for split in ("train", "val"):
        expected = {
            (path, label): np.asarray(central_square(read_image(tree / path), 16))
            for path, label in list_splits(tree).files[split]
        }
        for pixels, label in stored(shards, split):
            distance = {key: np.abs(pixels.astype(int) - other).mean() for key, other in expected.items()}
            nearest = min(distance, key=distance.get)
            assert (nearest[1], distance.pop(nearest) < 3) == (label, True)
            del expected[nearest]
        assert not expected


def test_the_tar_files_are_webdatasets(out):
    """Pairs of <key>.jpg and <key>.cls in what any tar reads, at the offsets of the index."""
    shards = Shards(out)
    with tarfile.open(out / "train-00001.tar") as tar:
        members = tar.getmembers()
        pictures, labels = members[::2], members[1::2]
        assert len(pictures) == len(labels) == 9
        for place, (image, label) in enumerate(zip(pictures, labels, strict=True), start=9):
            assert image.name.removesuffix(".jpg") == label.name.removesuffix(".cls")
            assert image.offset_data == shards.splits["train"].offset[place]
            number = int(tar.extractfile(label).read())
            assert (CLASSES[number], number) == (image.name.split("/")[0], shards.splits["train"].label[place])
            assert tar.extractfile(image).read() == shards.read("train", [place])[0]


def test_pictures_of_every_kind_become_rgb(tmp_path):
    """Grey, palette, transparent, CMYK, 16-bit grey, turned by EXIF; and a name that does not tell the kind."""
    root = make_image_folder(tmp_path / "tree", train=2, val=2)
    base, folder = make_image(0, 0, 48, 64), root / "train" / "ant"
    for path in folder.iterdir():
        path.unlink()
    base.convert("L").save(folder / "grey.jpg")
    base.convert("P").save(folder / "palette.gif")
    transparent = base.convert("RGBA")
    transparent.putalpha(128)
    transparent.save(folder / "alpha.png")
    base.convert("LA").save(folder / "grey_alpha.PNG")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) << 8).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    base.save(folder / "a_png_by_content.jpg", "PNG")
    listing = list_splits(root)
    make_shards(listing, tmp_path / "out", 48)
    expected = sorted((np.asarray(central_square(read_image(path), 48)) for path in folder.iterdir()), key=np.sum)
    found = sorted((pixels for pixels, label in stored(Shards(tmp_path / "out")) if label == 0), key=np.sum)
    assert len(found) == 8
    for ours, reference in zip(found, expected, strict=True):
        assert ours.shape == (48, 48, 3)
        assert np.abs(ours.astype(int) - reference).mean() < 4  # the palette is dithered


def test_a_jpeg_of_the_right_size_loses_nothing(tmp_path):
    root = make_image_folder(tmp_path / "tree", train=2, val=2)
    ready, turned = root / "train" / "ant" / "ready.jpg", root / "train" / "ant" / "turned.jpg"
    make_image(0, 1, 32, 32).save(ready, quality=40)
    exif = Image.Exif()
    exif[0x0112] = 3
    make_image(0, 1, 32, 32).save(turned, exif=exif)
    make_shards(list_splits(root), tmp_path / "out", 32)
    shards = Shards(tmp_path / "out")
    kept = [bytes(content) for content in shards.read("train", range(len(shards.splits["train"].label)))]
    assert ready.read_bytes() in kept
    assert turned.read_bytes() not in kept


def test_any_number_of_workers_makes_the_same_files(tree, out, tmp_path):
    make_shards(list_splits(tree), tmp_path / "parallel", 16, per_shard=9, workers=2)
    assert shard_contents(tmp_path / "parallel") == shard_contents(out)


def test_unreadable_pictures_are_counted_and_named_and_left_out_when_allowed(tree, tmp_path, caplog):
    folder = tree / "train" / "bee"
    whole = io.BytesIO()
    make_image(1, 0).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:-200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.JPG").write_text("this is no picture")
    (folder / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (tree / "val" / "bee" / "empty.png").write_bytes(b"")
    listing, out = list_splits(tree), tmp_path / "out"
    with pytest.raises(DataError, match="5 of 53 pictures cannot be read") as refused:
        make_shards(listing, out, 16, per_shard=9)
    for name in ("cut.jpg", "empty.png", "text.JPG", "nowhere.png", "--skip-unreadable leaves them out"):
        assert name in str(refused.value)
    assert not (out / INDEX).exists()
    with pytest.raises(DataError, match="its making was interrupted"):
        Shards(out)

    index = make_shards(listing, out, 16, per_shard=9, skip_unreadable=True)
    assert len(index["skipped"]) == 5
    assert "5 pictures that cannot be read were left out" in caplog.text
    assert verify(str(out)).splits["train"].label.tolist().count(1) == 12
    with pytest.raises(DataError, match="5 of 53 pictures cannot be read"):  # not allowed, and not taken apart either
        make_shards(listing, out, 16, per_shard=9)
    assert len(Shards(out).splits["train"].label) == 36

    for path in (*folder.glob("[cetn]*"), tree / "val" / "bee" / "empty.png"):
        make_image(1, 5).save(path.unlink() or path)
    assert make_shards(list_splits(tree), out, 16, per_shard=9)["skipped"] == []
    assert len(Shards(out).splits["train"].label) == 40


def test_a_class_without_a_readable_picture_is_an_error(tree, tmp_path):
    for path in (tree / "val" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="val/cat has no picture that can be read"):
        make_shards(list_splits(tree), tmp_path / "out", 16, skip_unreadable=True)


def test_only_what_has_changed_is_made_again(tree, out):
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    whole = shard_contents(out)
    assert make_shards(list_splits(tree), out, 16, per_shard=9) == json.loads(whole[INDEX])
    make_image(1, 7).save(tree / "train" / "bee" / "003.png")
    make_shards(list_splits(tree), out, 16, per_shard=9)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sum(before[name] != after[name] for name in before) == 1
    verify(str(out))
    make_shards(list_splits(tree), out, 16, per_shard=30)  # fewer, larger ones: the others are gone
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-00000.tar", "train-00001.tar", "val-00000.tar"]
    assert not (out / UNFINISHED).exists()


def test_folders_that_hold_something_else_are_left_alone(tree, tmp_path):
    listing = list_splits(tree)
    other = tmp_path / "other"
    other.mkdir()
    (other / INDEX).write_text('{"name": "of another program"}')
    (other / "train-00000.tar").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for folder, message in [
        (other, "holds something else"),
        (tmp_path / "file", "is a file"),
        (tree, "is a folder of the pictures themselves"),
        (tree / "train" / "shards", "is a folder of the pictures themselves"),
    ]:
        with pytest.raises(DataError, match=message):
            make_shards(listing, folder, 16)
    assert (other / "train-00000.tar").read_text() == "precious"
    assert not (tree / "train" / "shards").exists()


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[700] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "is damaged"),
        (lambda path: os.truncate(path, 3000), "has 3,000 bytes instead of"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_shard_is_named_and_made_again(tree, out, damage, said):
    whole = shard_contents(out)
    damage(out / "train-00002.tar")
    shards = Shards(out)
    with pytest.raises(DataError, match=r"train-00002.tar (is|has).*\n?") as refused:
        shards.read("train", range(36))
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match=f"1 shards of .*\n.*train-00002.tar {said}"):
        verify(str(out))
    main([str(tree), str(out), "--size", "16", "--per-shard", "9", "--workers", "1"])
    assert shard_contents(out) == whole


@pytest.mark.parametrize("name", ["shards.json", "shards.npz"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{]"), flip])
def test_a_damaged_index_is_named_and_made_again(tree, out, name, damage):
    whole = shard_contents(out)
    damage(out / name)
    with pytest.raises(DataError, match=str(out)):
        Shards(out).read("train", range(36))
    main([str(tree), str(out), "--size", "16", "--per-shard", "9", "--workers", "1"])
    assert shard_contents(out) == whole


def test_without_simplejpeg_the_pixels_are_the_same(out, monkeypatch):
    assert streaming.simplejpeg is not None
    fast = list(loader(Shards(out)))
    monkeypatch.setattr(streaming, "simplejpeg", None)
    for ours, theirs in zip(loader(Shards(out)), fast, strict=True):
        assert torch.equal(ours[0], theirs[0])


# --- order ----------------------------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch_and_stays_within_a_window():
    shards = np.repeat(np.arange(10), 7)
    shuffle = ShardShuffle(shards, seed=3, window=4)
    first = shuffle.order()
    assert sorted(first.tolist()) == list(range(70))
    assert torch.equal(first, ShardShuffle(shards, seed=3, window=4).order())
    for start in (0, 28, 56):
        assert len(set(shards[first[start : start + 28]])) == len(first[start : start + 28]) // 7
    shuffle.set_epoch(1)
    assert not torch.equal(first, shuffle.order())
    assert not torch.equal(first, ShardShuffle(shards, seed=4, window=4).order())
    assert len(set(shards[ShardShuffle(shards, 3, window=10).order()[:14]])) > 5  # all of them mixed


def loader(shards: Shards, **settings) -> StreamLoader:
    indices = torch.arange(len(shards.splits["train"].label))
    return StreamLoader(shards, "train", indices, **{"side": 16, "workers": 2, "batch_size": 8, **settings})


def test_batches_are_the_pictures_in_order_with_their_labels(out):
    shards = Shards(out)
    reference = stored(shards)
    seen = 0
    batches = list(loader(shards))
    for images, labels in batches:
        assert (images.dtype, images.shape, labels.shape) == (torch.uint8, (8, 3, 16, 16), (8,))
        for image, label in zip(images, labels, strict=True):
            if label != IGNORE_INDEX:
                assert label == reference[seen][1]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), reference[seen][0])
                seen += 1
    assert seen == 36
    assert (batches[-1][1] == IGNORE_INDEX).sum() == 4


def test_an_epoch_goes_on_at_any_batch(out):
    shards = Shards(out)
    train = loader(shards, sampler=ShardShuffle(shards.splits["train"].shard, seed=1))
    whole = list(train)
    assert len(whole) == len(train) == 4  # the incomplete batch is dropped
    train.start_image = 16
    for ours, theirs in zip(train, whole[2:], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert len(list(train)) == 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_every_batch_and_evaluation_counts_each_image_once(out, size):
    shards = Shards(out)
    for sampler in (None, ShardShuffle(shards.splits["train"].shard, seed=1)):
        alone = loader(shards, sampler=sampler)
        ranks = [loader(shards, sampler=sampler, group=World(rank, size)) for rank in range(size)]
        assert {len(each) for each in ranks} == {len(alone)}
        for whole, *parts in zip(alone, *ranks, strict=True):
            assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
            assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith(("decode", "fetch")):
            thread.join(10)


def test_leaving_an_iteration_early_ends_its_threads(out):
    before = threading.active_count()
    for _ in loader(Shards(out)):
        break
    wait_for_threads()
    assert threading.active_count() == before


# --- an object store ------------------------------------------------------------------------------------------------


@pytest.fixture
def store(out: Path) -> Iterator[tuple[str, list[str]]]:
    """The shards behind a web server: their URL, and what was asked for so far."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(Path(self.path).name)
            super().do_GET()

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=out))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_shards_are_fetched_once_from_a_url(store, out, tmp_path):
    url, asked = store
    local = list(loader(Shards(out), batch_size=7))
    for _ in range(2):
        for ours, theirs in zip(loader(Shards(url, tmp_path / "cache"), batch_size=7), local, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    assert sorted(name for name in asked if name.endswith(".tar")) == [f"train-{i:05}.tar" for i in range(4)]


@pytest.mark.parametrize(("damage", "said"), [(flip, "is damaged: its SHA-256"), (Path.unlink, "does not exist")])
def test_what_is_wrong_in_the_store_is_named(store, out, tmp_path, damage, said):
    url, _ = store
    damage(out / "train-00001.tar")
    with pytest.raises(DataError, match=f"{url}/train-00001.tar {said}"):
        list(loader(Shards(url, tmp_path / "cache")))
    wait_for_threads()
    assert not list((tmp_path / "cache").rglob("*train-00001.tar"))
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_store_that_is_not_there(tmp_path):
    for url, said in [
        ("http://127.0.0.1:9/shards", "shards.json cannot be read"),
        ("nosuch://bucket/shards", "nosuch://bucket/shards cannot be opened"),
        ("memory://empty", "it has no shards.json"),
    ]:
        with pytest.raises(DataError, match=said) as refused:
            Shards(url, tmp_path)
        assert "\n" not in str(refused.value)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_on_a_tree_keeps_its_class_names_and_can_be_used(tmp_path, caplog):
    tree = make_image_folder(tmp_path / "tree", train=20, val=8)
    settings = ("data=image_folder", f"data.root={tree}", *RUN, "optimizer.lr=0.01", "trainer.max_epochs=20",
                "callbacks.best.monitor=val/loss", "callbacks.best.mode=min")  # fmt: skip
    run(config(*settings, run_dir=tmp_path / "run"))
    result = finished_result(tmp_path / "run")
    assert {split: result["data"][split] for split in ("train", "val", "test")} == {"train": 54, "val": 6, "test": 24}
    assert "validation is 0.1 of train/, test is val/" in result["data"]["source"]
    assert result["test/acc"] == 1
    hyperparameters = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")["hyper_parameters"]
    assert (hyperparameters["class_names"], hyperparameters["model"]["num_classes"]) == (list(CLASSES), 3)

    trained = load_run(tmp_path / "run")
    files = [tree / "val" / name / "002.png" for name in CLASSES]
    assert [prediction.top[0][0] for prediction in predict(trained, files)] == list(CLASSES)
    again = evaluate(trained, "test")
    assert {name: again.figures[name] for name in ("test/acc", "test/loss")} == {
        name: result[name] for name in ("test/acc", "test/loss")
    }
    shutil.rmtree(tree / "train" / "cat")
    shutil.rmtree(tree / "val" / "cat")
    with pytest.raises(DataError, match="The classes are not the run's"):
        evaluate(trained, "test")


def test_a_run_on_shards_that_was_stopped_and_resumed_is_the_run_that_was_not(out, tmp_path, monkeypatch):
    settings = ("data=shards", f"data.root={out}", *RUN, "augment=crop_flip")
    run(config(*settings, run_dir=tmp_path / "whole"))
    for step in (2, 4):
        run_dir = tmp_path / f"stopped{step}"
        run_until_stopped(config(*settings, run_dir=run_dir), monkeypatch, step)
        run(config("resume=here", run_dir=run_dir))
        assert_same_run(run_dir, tmp_path / "whole")


def test_training_names_the_damaged_shard_in_one_line(out, tmp_path):
    flip(out / "train-00003.tar")
    with pytest.raises(
        DataError, match="train-00003.tar is damaged. python -m alexnet_pl shards TREE .* makes"
    ) as error:
        run(config("data=shards", f"data.root={out}", *RUN, run_dir=tmp_path / "run"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=image_folder"], "data.root is missing: data.root=FOLDER"),
        (["data=shards"], "data.root is missing: data.root=FOLDER or a URL"),
        (["data=shards", "data.root=/nowhere"], "/nowhere is no finished folder of shards: it has no shards.json"),
        (["data=image_folder", "data.root=/nowhere"], "/nowhere does not exist"),
        (["data=image_folder", "data.root=x", "data.quality=0"], "data.quality=0 is not possible"),
        (["data=shards", "data.root=x", "data.workers=0"], "data.workers=0 is not possible"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, message, tmp_path):
    with pytest.raises(Exception, match=message) as refused:
        run(config(*overrides, run_dir=tmp_path / "run"))
    assert isinstance(refused.value, UserError | InstantiationException)
    assert not (tmp_path / "run").exists()


def test_every_data_option_for_folders_composes_without_a_root():
    for option in ("image_folder", "shards"):
        assert instantiate(config(f"data={option}").data).classes_from_files
