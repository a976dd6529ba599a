"""Model card: the run's own numbers, the images that were used, text from strangers."""

import html
import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from helpers import SHORT_RUN, config, make_image_folder
from markdown_it import MarkdownIt

from alexnet_pl.cli.card import main as card_command
from alexnet_pl.inference.model_card import card, wilson_interval
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import CORRUPTIONS
from alexnet_pl.training.run import run as train_run
from inference import RUN


def test_the_card_has_the_runs_numbers(run, folder, tmp_path):
    text = card(run)
    assert f"{1 - run.result['test/acc']:.4f}" in text
    for title in ("Model", "Intended use", "Training data", "Training recipe", "Results", "Limitations", "License"):
        assert f"\n## {title}\n" in text
    assert "62,006 parameters" in text
    assert str(folder.parent) not in text
    header = yaml.safe_load(text.split("---")[1])
    assert header["model-index"][0]["name"] == run.name
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == round(run.result["test/acc"], 4)
    with pytest.raises(UserError, match="no result.json"):
        card(load_run(shutil.copy(folder / "checkpoints/best.ckpt", tmp_path / "lone.ckpt")))


def test_the_card_names_what_trained_the_weights(run):
    assert "| weights |" not in card(run)
    ema = {"_target_": "alexnet_pl.training.EMA", "decay": 0.99}
    loss = {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1}
    text = card(replace(run, config={**run.config, "loss": loss, "callbacks": {**run.config["callbacks"], "ema": ema}}))
    assert "| weights | averaged: EMA (decay 0.99) |" in text
    assert "| loss | CrossEntropyLoss (label_smoothing 0.1) |" in text.replace("\\", "")


def test_wilsons_interval_is_the_tabulated_one():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_card_counts_the_images_that_were_used(tmp_path):
    limits = ("trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=2")
    train_run(config(*RUN, *limits, "data.batch_size=32", "trainer.max_epochs=1", run_dir=tmp_path / "run"))
    run = load_run(tmp_path / "run")
    assert [run.result["data"][split] for split in ("train", "val", "test")] == [96, 32, 64]
    text = card(run)
    assert "96 images for training, 32 held out for validation" in text
    assert "limit_test_batches=2" in text.replace("\\", "")
    assert "| test | 64 |" in text
    low, high = wilson_interval(run.result["test/acc"], 64)
    assert f"95% interval {low:.4f} to {high:.4f}" in text


def test_the_card_says_how_the_checkpoint_was_chosen_and_how_images_are_read(tmp_path):
    root = make_image_folder(tmp_path / "images", train=12, val=4, test=4)
    monitor = ("callbacks.best.monitor=val/loss", "callbacks.best.mode=min")
    settings = (*SHORT_RUN, "data=image_folder", f"data.root={root}", "data.batch_size=4", *monitor)
    train_run(config(*settings, run_dir=tmp_path / "run"))
    text = card(load_run(tmp_path / "run"))
    assert "the best by validation loss |" in text
    assert "selected by validation loss" in text
    assert "validation accuracy" not in text
    assert "of a validation set of their own" in text
    assert "stratified split" not in text
    assert "RGB, the central square of the image, resized to 32×32" in text
    assert "on corrupted images" in text
    (tmp_path / "run" / CORRUPTIONS).write_text("[]")
    assert "on corrupted images" not in card(load_run(tmp_path / "run"))


@pytest.mark.parametrize("key", ["device", "seed", "git_commit", "data"])
def test_an_incomplete_result_is_one_line(run, key):
    result = {name: value for name, value in run.result.items() if name != key}
    with pytest.raises(UserError, match=f"result.json is corrupt or incomplete: .*{key}"):
        card(replace(run, result=result))


@pytest.mark.security
def test_text_from_strangers_is_escaped(run):
    evil = "<script>x</script> [a](http://b) ![i](//c) `d` | e\n# f \x1b[2J"
    names = (evil, *run.class_names[1:])
    result = {**run.result, "device": evil, "data": {**run.result["data"], "name": evil}}
    text = card(replace(run, class_names=names, result=result))
    assert "<script>" not in text
    assert "\x1b" not in text
    header, body = text.split("---", 2)[1:]
    assert yaml.safe_load(header)["model-index"][0]["results"][0]["dataset"]["split"] == "test"
    page = MarkdownIt("commonmark").enable("table").render(body)
    assert not any(tag in page for tag in ("<a ", "<img", "<script"))
    assert page.count("<h1>") == 1
    assert "http://b" not in body  # GitHub would make it a link
    cell = html.unescape(re.search("<td>hardware</td>\n<td>(.*?)</td>", page)[1])
    assert cell == "<script>x</script> [a](http://b) ![i](//c) `d` | e # f [2J"


@pytest.mark.parametrize("change", [{"test/acc": "high"}, {"data": {}}, {"versions": None}, {"test/acc": 7.0}])
def test_a_corrupt_result_is_one_line(run, change):
    with pytest.raises(UserError, match="result.json is corrupt or incomplete") as caught:
        card(replace(run, result={**run.result, **change}))
    assert "\n" not in str(caught.value)


def test_the_command_writes_a_file_or_prints(folder, tmp_path, capsys):
    card_command([str(folder), "--out", str(tmp_path / "README.md")])
    capsys.readouterr()
    card_command([str(folder)])
    assert capsys.readouterr().out == (tmp_path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        card_command([str(folder), "--out", str(tmp_path / "nowhere" / "README.md")])
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
