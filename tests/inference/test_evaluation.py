"""Evaluation of trained runs against scikit-learn, against the run's own test, and by ten-crop."""

import csv
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, config
from hydra.utils import instantiate
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score

from alexnet_pl.cli.evaluate import as_json, report
from alexnet_pl.cli.evaluate import main as evaluate_command
from alexnet_pl.data.image_io import Preprocess
from alexnet_pl.data.transforms import ten_crop
from alexnet_pl.inference.evaluation import AveragedViews, evaluate, uncropped
from alexnet_pl.inference.run_data import find_data
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.run_folder import results_table
from alexnet_pl.training.run import run as train_run
from inference import RUN


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_equals_the_runs_own_and_scikit_learns(run, folder, split, tmp_path, capsys):
    evaluate_command([str(folder), "--split", split, "--json", "--predictions", str(tmp_path / "p.csv")])
    figures = json.loads(capsys.readouterr().out)
    for name in ("loss", "acc", "acc_top5"):
        assert figures[f"{split}/{name}"] == run.result[f"{split}/{name}"]  # bit for bit

    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([int(row["label"]) for row in rows])
    probabilities = np.array([[float(row[name]) for name in run.class_names] for row in rows])
    predictions = probabilities.argmax(1)
    assert len(rows) == figures["images"] == run.result["data"][split]
    assert figures[f"{split}/loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-4)
    assert figures[f"{split}/error"] == pytest.approx(1 - accuracy_score(labels, predictions), abs=1e-6)
    top5 = top_k_accuracy_score(labels, probabilities, k=5)
    assert figures[f"{split}/error_top5"] == pytest.approx(1 - top5, abs=1e-6)
    assert figures[f"{split}/confusion"] == confusion_matrix(labels, predictions).tolist()
    per_class = list(figures[f"{split}/class_acc"].values())
    assert per_class == pytest.approx(recall_score(labels, predictions, average=None).tolist(), abs=1e-6)

    confidence, right = probabilities.max(1), predictions == labels
    bins = np.ceil(confidence * 15)
    expected = sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)
    )
    assert figures[f"{split}/ece"] == pytest.approx(expected, abs=1e-5)


def test_a_class_without_images_has_no_accuracy(run):
    """Issue: JSON had 0, so the mean over 1,000 logits for ten classes was a hundredth of the accuracy."""
    confusion = torch.diag(torch.tensor([3, *[0] * 9]))
    found = SimpleNamespace(split="test", confusion=confusion, figures={}, labels=[0] * 3, description="", precision="")
    assert [*as_json(run, found, 1)["test/class_acc"].values()] == [1.0, *[None] * 9]


def test_the_report_says_that_it_equals_the_runs_own(folder, capsys):
    evaluate_command([str(folder)])
    assert "identical to the metrics in result.json" in capsys.readouterr().out


def test_another_image_folder_with_the_same_classes(run, tmp_path):
    data = instantiate(config(*RUN).data)
    source = data.load()
    for index, (pixels, label) in enumerate(zip(source.test.images[:200], source.test.labels[:200], strict=True)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / str(label) / f"{index:04}.png")
    result = evaluate(run, data_root=tmp_path)
    data.setup()
    images = data.on_after_batch_transfer((data.test_dataloader().images[:200], None), 0)[0]
    expected = run.probabilities(images).argmax(1).numpy() == source.test.labels[:200]
    assert result.figures["test/acc"] == pytest.approx(expected.mean(), abs=1e-6)

    (tmp_path / "3").rename(tmp_path / "three")
    with pytest.raises(DataError, match="missing 3; unexpected three"):
        evaluate(run, data_root=tmp_path)


def test_limits_of_a_run_are_not_those_of_other_images(run, tmp_path):
    """Issue: a twentieth of very few batches is none, which ended in a traceback; others were cut short."""
    limited = replace(run, config={**run.config, "trainer": {**run.config["trainer"], "limit_test_batches": 0.05}})
    for name in run.class_names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (int(name) * 20, 0, 0)).save(tmp_path / name / "0.png")
    assert len(evaluate(limited, data_root=tmp_path).labels) == 10
    with pytest.raises(DataError, match="This limit is the run's"):
        evaluate(replace(limited, config={**limited.config, "data": {**run.config["data"], "batch_size": 512}}))


def test_evaluation_uses_the_runs_memory_format(run):
    seen = []
    hook = run.net.register_forward_pre_hook(
        lambda net, inputs: seen.append(net.features.conv1.weight.is_contiguous(memory_format=torch.channels_last))
    )
    other = replace(run, config={**run.config, "channels_last": True})
    evaluate(other)
    hook.remove()
    assert all(seen)
    assert run.net.features.conv1.weight.is_contiguous()


def test_ten_crop_is_the_papers():
    images = torch.arange(256 * 256.0).view(1, 1, 256, 256)
    crops = ten_crop(images, 224)
    assert crops.shape == (10, 1, 1, 224, 224)
    corners = [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    assert [divmod(int(crop[0, 0, 0, 0]), 256) for crop in crops[:5]] == corners
    assert torch.equal(crops[5:], crops[:5].flip(-1))
    for size, larger in [(224, 256), (50, 57), (32, 37)]:
        assert uncropped(Preprocess(size, (), ())).image_size == larger
        assert uncropped(Preprocess(size, (), (), resize_size=size)).image_size == larger
        assert uncropped(Preprocess(size, (), (), resize_size=size + 3)).image_size == size + 3


def test_ten_crop_averages_the_softmax(run):
    images = torch.randn(3, 3, 37, 37)
    one_by_one = torch.stack([run.probabilities(crop) for crop in ten_crop(images, 32)]).mean(0)
    with torch.no_grad():
        assert torch.allclose(AveragedViews(run.net, 32, 10)(images).exp(), one_by_one, atol=1e-6)
    result = evaluate(run, crops=10)
    assert len(as_json(run, result, 10)["test/confusion"]) == 10


@pytest.mark.parametrize(("crops", "name"), [(2, "mirror"), (6, "shifted_mirror")])
def test_a_run_tests_the_views_that_evaluate_repeats(crops, name, tmp_path):
    train_run(config(*SHORT_RUN, f"data.test_crops={crops}", run_dir=tmp_path / "run"))
    run = load_run(tmp_path / "run")
    assert run.result[f"test/loss_{name}"] != run.result["test/loss"]
    assert "identical to the metrics in result.json" in report(run, evaluate(run, crops=crops), crops)
    words = {"mirror": "mirror", "shifted_mirror": "6 views"}[name]
    assert f"{words:10}{run.result[f'test/loss_{name}']:10.4f}" in results_table(run.result)


def test_a_run_tests_center_crop_and_ten_crop_in_one_pass(cropped):
    """Both results against NumPy on crops that are cut by hand; evaluate repeats both exactly."""
    run = load_run(cropped)
    data = instantiate(config(*RUN, "data.resize_size=37").data)
    data.setup()
    images, labels = data.test_dataloader().images.numpy(), data.test_dataloader().labels.numpy()
    assert images.shape[1:] == (3, 37, 37)
    corners = [(0, 0), (0, 5), (2, 2), (5, 0), (5, 5)]
    crops = [images[:, :, top : top + 32, left : left + 32] for top, left in corners]
    crops += [crop[..., ::-1] for crop in crops]
    softmax = np.stack([
        run.probabilities(torch.from_numpy((crop.astype(np.float32) / 255 - 0.5) / 0.5)).double().numpy()
        for crop in crops
    ])  # fmt: skip
    for suffix, probabilities in (("", softmax[2]), ("_ten_crop", softmax.mean(0))):
        assert run.result[f"test/acc{suffix}"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
        top5 = top_k_accuracy_score(labels, probabilities, k=5)
        assert run.result[f"test/acc_top5{suffix}"] == pytest.approx(top5)
        assert run.result[f"test/loss{suffix}"] == pytest.approx(log_loss(labels, probabilities), rel=1e-4)
    assert run.result["test/loss"] != run.result["test/loss_ten_crop"]
    for crops in (1, 10):
        assert "identical to the metrics in result.json" in report(run, evaluate(run, crops=crops), crops)
    loss = f"{run.result['test/loss_ten_crop']:.4f}"
    assert re.search(rf"^ +(10 views|ten-crop|10 crops) +{loss} ", results_table(run.result), re.MULTILINE)


# --- data that a checkpoint names -----------------------------------------------------------------------------------


def with_data(edited, **changes):
    return load_run(edited(lambda checkpoint: checkpoint["hyper_parameters"]["data"].update(changes)))


def test_an_address_in_a_checkpoint_is_contacted_only_if_the_user_repeats_it(edited):
    target = "alexnet_pl.data.ShardedDataModule"
    run = with_data(edited, _target_=target, root="http://127.0.0.1:9/shards")
    with pytest.raises(DataError, match="If you trust that address: --data-root http://127.0.0.1:9/shards"):
        evaluate(run)


@pytest.mark.security
def test_a_checkpoint_does_not_choose_where_evaluation_writes(edited, tmp_path):
    (tmp_path / "train").mkdir()
    target = "alexnet_pl.data.ImageFolderDataModule"
    run = with_data(edited, _target_=target, root=str(tmp_path), shards=str(tmp_path / "home"), cache="/etc")
    data = find_data(run, "test", None, run.preprocess)
    assert str(tmp_path) not in str(data.root)
    assert data.cache is None


@pytest.mark.security
def test_class_names_of_strangers_reach_terminal_and_csv_filtered(edited, tmp_path, capsys):
    names = ["\x1b[2Jcat", "=cmd|' /C calc'!A0", *"23456789"]
    path = edited(lambda checkpoint: checkpoint["hyper_parameters"].update(class_names=names))
    run = load_run(path)
    evaluated = evaluate(load_run(edited(lambda checkpoint: None, "same.ckpt")))
    text = report(run, evaluated, 1)
    assert "\x1b" not in text
    assert "[2Jcat" in text
    from alexnet_pl.cli.evaluate import predictions_csv

    header = next(csv.reader(predictions_csv(run, evaluated).splitlines()))
    assert header[1:3] == ["[2Jcat", "'=cmd|' /C calc'!A0"]
