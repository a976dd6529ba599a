"""Streaming batches from shards: order, threads, resuming, runs."""

import io
import shutil
import threading

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    assert_same_run,
    config,
    make_image,
    make_image_folder,
    run_until_stopped,
    shard_contents,
)
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from alexnet_pl import load_run
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.loaders import IGNORE_INDEX
from alexnet_pl.data.shards import datamodule
from alexnet_pl.data.shards.datamodule import ShardShuffle, choose_splits
from alexnet_pl.data.shards.reader import Shards
from alexnet_pl.data.shards.writer import make_shards
from alexnet_pl.distributed.environment import World
from alexnet_pl.inference.evaluation import evaluate
from alexnet_pl.inference.prediction import predict
from alexnet_pl.runtime.errors import DataError, UserError
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.run import run

from ..modules import data_module
from .corruption import flip, make_loader, stored, wait_for_threads

RUN = ("model=lenet5", "data.image_size=16", "trainer.accelerator=cpu", "trainer.precision=32-true",
       "trainer.max_epochs=2", "data.batch_size=8", "data.workers=2")  # fmt: skip


def test_last_labeled_directory_is_the_test_set():
    assert choose_splits(["train", "val", "test"]) == {"train": "train", "val": "val", "test": "test"}
    assert choose_splits(["train", "test"]) == {"train": "train", "val": "train", "test": "test"}
    assert choose_splits(["train", "val"]) == {"train": "train", "val": "train", "test": "val"}


# --- batches --------------------------------------------------------------------------------------------------------


def test_order_depends_on_seed_and_epoch_and_stays_within_a_window():
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


def test_batches_hold_the_images_in_order_with_their_labels(out):
    shards = Shards(out)
    reference = stored(shards)
    seen = 0
    batches = list(make_loader(shards))
    for images, labels in batches:
        assert (images.dtype, images.shape, labels.shape) == (torch.uint8, (8, 3, 16, 16), (8,))
        for image, label in zip(images, labels, strict=True):
            if label != IGNORE_INDEX:
                assert label == reference[seen][1]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), reference[seen][0])
                seen += 1
    assert seen == 36
    assert (batches[-1][1] == IGNORE_INDEX).sum() == 4


def test_epoch_resumes_at_any_image(out):
    shards = Shards(out)
    train = make_loader(shards, sampler=ShardShuffle(shards.splits["train"].shard, seed=1))
    whole = list(train)
    assert len(whole) == len(train) == 4  # the incomplete batch is dropped
    train.start_image = 16
    for ours, theirs in zip(train, whole[2:], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert len(list(train)) == 4
    other = make_loader(shards, sampler=ShardShuffle(shards.splits["train"].shard, seed=1), batch_size=5)
    other.start_image = 16
    assert torch.equal(torch.cat([labels for _, labels in other])[:16], torch.cat([labels for _, labels in whole[2:]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_every_batch_and_evaluation_counts_each_image_once(out, size):
    shards = Shards(out)
    for sampler in (None, ShardShuffle(shards.splits["train"].shard, seed=1)):
        alone = make_loader(shards, sampler=sampler)
        ranks = [make_loader(shards, sampler=sampler, group=World(rank, size)) for rank in range(size)]
        assert {len(each) for each in ranks} == {len(alone)}
        for whole, *parts in zip(alone, *ranks, strict=True):
            assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
            assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def test_early_exit_ends_the_threads(out):
    before = threading.active_count()
    for _ in make_loader(Shards(out)):
        break
    wait_for_threads()
    assert threading.active_count() == before


def test_pillow_and_simplejpeg_decode_the_same_pixels(out, monkeypatch):
    assert datamodule.simplejpeg is not None
    fast = list(make_loader(Shards(out)))
    monkeypatch.setattr(datamodule, "simplejpeg", None)
    for ours, theirs in zip(make_loader(Shards(out)), fast, strict=True):
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_stored_jpegs_with_recoverable_errors_are_decoded(tmp_path, monkeypatch, with_simplejpeg):
    """JPEGs that Pillow reads are stored unchanged, stray bytes in the header and a short scan included."""
    if not with_simplejpeg:
        monkeypatch.setattr(datamodule, "simplejpeg", None)
    root = make_image_folder(tmp_path / "images", train=2, val=2)
    file = io.BytesIO()
    make_image(2, 0, 16, 16).save(file, "JPEG")
    whole = file.getvalue()
    odd = {"header": whole[:20] + bytes(3) + whole[20:], "scan": whole[:-6] + whole[-2:]}
    for name, content in odd.items():
        (root / "train" / "cat" / f"{name}.jpg").write_bytes(content)
    make_shards(list_splits(root), tmp_path / "out", 16)
    shards = Shards(tmp_path / "out")
    assert set(odd.values()) < {bytes(content) for content in shards.read("train", range(8))}
    (images, _), *_ = make_loader(shards)
    for image, (expected, _) in zip(images, stored(shards), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_run_on_class_folders_keeps_its_class_names_and_can_be_used(tmp_path, caplog):
    images = make_image_folder(tmp_path / "images", train=20, val=8)
    settings = ("data=image_folder", f"data.root={images}", *RUN, "optimizer.lr=0.01", "trainer.max_epochs=20",
                "callbacks.best.monitor=val/loss", "callbacks.best.mode=min")  # fmt: skip
    run(config(*settings, run_dir=tmp_path / "run"))
    result = finished_result(tmp_path / "run")
    assert {split: result["data"][split] for split in ("train", "val", "test")} == {"train": 54, "val": 6, "test": 24}
    assert "validation is 0.1 of train/, test is val/" in result["data"]["source"]
    assert result["test/acc"] == 1
    hyperparameters = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")["hyper_parameters"]
    assert (hyperparameters["class_names"], hyperparameters["model"]["num_classes"]) == (list(CLASSES), 3)

    trained = load_run(tmp_path / "run")
    files = [images / "val" / name / "002.png" for name in CLASSES]
    assert [prediction.top[0][0] for prediction in predict(trained, files)] == list(CLASSES)
    again = evaluate(trained, "test")
    assert {name: again.figures[name] for name in ("test/acc", "test/loss")} == {
        name: result[name] for name in ("test/acc", "test/loss")
    }
    shutil.rmtree(images / "train" / "cat")
    shutil.rmtree(images / "val" / "cat")
    with pytest.raises(DataError, match="the data has other classes than the run: ant, bee"):
        evaluate(trained, "test")


def test_run_on_shards_resumes_exactly(out, tmp_path, monkeypatch):
    settings = ("data=shards", f"data.root={out}", *RUN, "augment=crop_flip")
    run(config(*settings, run_dir=tmp_path / "whole"))
    for step in (2, 4):
        run_dir = tmp_path / f"stopped{step}"
        run_until_stopped(config(*settings, run_dir=run_dir), monkeypatch, step)
        run(config("resume=here", run_dir=run_dir))
        assert_same_run(run_dir, tmp_path / "whole")


def test_training_names_the_corrupt_shard_in_one_line(out, tmp_path):
    flip(out / "train-00003.tar")
    with pytest.raises(DataError, match="train-00003.tar is corrupt. alexnet shards IMAGES .* creates") as error:
        run(config("data=shards", f"data.root={out}", *RUN, run_dir=tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_shards_of_class_folders_are_deleted_and_written_again(images, tmp_path):
    settings = ("data=image_folder", f"data.root={images}", f"data.shards={tmp_path / 'out'}", "data.image_size=16")
    data_module(*settings)
    whole = shard_contents(tmp_path / "out")
    flip(tmp_path / "out" / "train-00000.tar")
    corrupt = data_module(*settings)  # the size is right: a run does not read its shards twice
    with pytest.raises(DataError, match=r"train-00000.tar is corrupt\. Delete it: the next run writes it again\.$"):
        list(corrupt.val_dataloader())
    (tmp_path / "out" / "train-00000.tar").unlink()
    with pytest.raises(DataError, match=r"train-00000.tar not found\. The next run writes it again\.$"):
        list(corrupt.val_dataloader())
    data_module(*settings)
    assert shard_contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=image_folder"], "data.root not found. Give the dataset's directory with data.root=DIR"),
        (["data=shards"], "data.root not found. Give the directory or URL of the shards with data.root=DIR"),
        (["data=shards", "data.root=/nowhere"], "/nowhere does not hold finished shards: shards.json not found"),
        (["data=image_folder", "data.root=/nowhere"], "/nowhere not found"),
        (
            ["data=image_folder", "data.root=x", "data.quality=0"],
            "data.quality=0 is invalid: expected an integer",
        ),
        (
            ["data=shards", "data.root=x", "data.workers=0"],
            "data.workers=0 is invalid: expected a number of",
        ),
    ],
)
def test_invalid_settings_are_refused(overrides, message, tmp_path):
    with pytest.raises(Exception, match=message) as refusal:
        run(config(*overrides, run_dir=tmp_path / "run"))
    assert isinstance(refusal.value, UserError | InstantiationException)
    assert not (tmp_path / "run").exists()


def test_data_options_compose_without_a_root():
    for option in ("image_folder", "shards"):
        assert instantiate(config(f"data={option}").data).classes_from_files
