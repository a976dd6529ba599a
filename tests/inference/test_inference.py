"""A trained run in use: loading it safely, evaluate, predict, export and the card, each against an oracle."""

import csv
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score

from alexnet_pl import load_run
from alexnet_pl.cli.evaluate import as_json, report
from alexnet_pl.cli.evaluate import main as evaluate_command
from alexnet_pl.cli.export import main as export_command
from alexnet_pl.cli.export import real_pictures
from alexnet_pl.cli.predict import main as predict_command
from alexnet_pl.data.image_io import Preprocess, read_image, to_rgb
from alexnet_pl.data.transforms import ten_crop
from alexnet_pl.inference.evaluation import TenCrop, evaluate, uncropped
from alexnet_pl.inference.exporters import SUFFIXES, export
from alexnet_pl.inference.model_card import card, wilson_interval
from alexnet_pl.runtime.errors import DataError, UserError, one_line_errors
from alexnet_pl.runtime.run_folder import results_table
from alexnet_pl.training.run import run as train_run

RUN = ("model=lenet5", "trainer.accelerator=cpu", "trainer.precision=32-true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real run of three epochs on the digits, moved after its training."""
    trained = tmp_path_factory.mktemp("trained") / "before"
    train_run(config(*RUN, "trainer.max_epochs=3", run_dir=trained))
    return trained.rename(trained.with_name("moved"))


@pytest.fixture(scope="module")
def run(folder):
    return load_run(folder)


def edited(folder, path, **changes):
    """A checkpoint with other entries, by ``torch.save``."""
    checkpoint = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    torch.save({**checkpoint, **changes}, path)
    return path


# --- loading --------------------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch():
    code = "import sys, alexnet_pl; assert 'torch' not in sys.modules; assert 'load_run' in alexnet_pl.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_and_its_lone_checkpoint_give_the_same_network(folder, run, tmp_path):
    lone = load_run(shutil.copy(folder / "checkpoints/best.ckpt", tmp_path / "lone.ckpt"))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(lone.probabilities(images), run.probabilities(images))
    assert not run.net.training
    assert lone.class_names == run.class_names == tuple("0123456789")
    assert lone.preprocess == run.preprocess
    assert (lone.result, lone.folder) == (None, tmp_path)
    assert run.epoch == run.result["best_epoch"]


def test_a_run_without_recorded_class_names_has_those_of_its_data(folder, tmp_path):
    old = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["hyper_parameters"]
    del old["class_names"], old["version"]
    assert load_run(edited(folder, tmp_path / "old.ckpt", hyper_parameters=old)).class_names == tuple("0123456789")


@pytest.mark.parametrize(
    "target", ["os.system", "torch.hub.load", "alexnet_pl.training.run.run", "torch.nn.init.zeros_"]
)
def test_only_network_classes_are_made(folder, tmp_path, target):
    settings = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["hyper_parameters"]
    settings["model"]["activation"] = {"_target_": target, "command": "false"}
    with pytest.raises(UserError, match=f"activation._target_={target} is refused"):
        load_run(edited(folder, tmp_path / "bad.ckpt", hyper_parameters=settings))


def test_what_is_no_run_is_refused_in_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").touch()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps(print))
    whole = (folder / "checkpoints/best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    settings = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["hyper_parameters"]
    edited(folder, tmp_path / "newer.ckpt", hyper_parameters={**settings, "version": "99.0"})
    wider = {**settings, "model": {**settings["model"], "depth": 3}}
    edited(folder, tmp_path / "unknown.ckpt", hyper_parameters=wider)
    edited(folder, tmp_path / "weights.ckpt", state_dict={})
    for name, message in [
        ("nowhere", "does not exist"),
        ("empty", "is no run folder"),
        ("begun", "lacks checkpoints/best.ckpt"),
        ("text.ckpt", "is damaged|is no checkpoint"),
        ("code.ckpt", "holds more than tensors and plain values; it was not loaded"),
        ("cut.ckpt", "is no checkpoint, or a damaged one"),
        ("other.ckpt", "is no checkpoint of an alexnet_pl run"),
        ("newer.ckpt", "written by alexnet_pl 99.0, newer than this"),
        ("unknown.ckpt", "does not fit this version"),
        ("weights.ckpt", "does not fit this version"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_run(tmp_path / name)
        assert "\n" not in str(caught.value)


# --- evaluate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_is_the_runs_own_and_scikit_learns(run, folder, split, tmp_path, capsys):
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
    by_class = list(figures[f"{split}/class_acc"].values())
    assert by_class == pytest.approx(recall_score(labels, predictions, average=None).tolist(), abs=1e-6)

    confidence, right = probabilities.max(1), predictions == labels
    bins = np.ceil(confidence * 15)
    expected = sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)
    )
    assert figures[f"{split}/ece"] == pytest.approx(expected, abs=1e-5)


def test_the_report_says_that_it_is_the_runs_own(folder, capsys):
    evaluate_command([str(folder)])
    assert "exactly the figures of result.json" in capsys.readouterr().out


def test_another_tree_with_the_same_classes(run, tmp_path):
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
    with pytest.raises(DataError, match="lacks 3; it has besides three"):
        evaluate(run, data_root=tmp_path)


def test_ten_views_are_the_papers():
    images = torch.arange(256 * 256.0).view(1, 1, 256, 256)
    views = ten_crop(images, 224)
    assert views.shape == (10, 1, 1, 224, 224)
    corners = [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    assert [divmod(int(view[0, 0, 0, 0]), 256) for view in views[:5]] == corners
    assert torch.equal(views[5:], views[:5].flip(-1))
    for size, wide in [(224, 256), (50, 57), (32, 37)]:
        assert uncropped(Preprocess(size, (), ())).image_size == wide
        assert uncropped(Preprocess(size, (), (), resize_size=size)).image_size == wide
        assert uncropped(Preprocess(size, (), (), resize_size=size + 3)).image_size == size + 3


def test_ten_views_average_the_softmax(run):
    images = torch.randn(3, 3, 37, 37)
    one_by_one = torch.stack([run.probabilities(view) for view in ten_crop(images, 32)]).mean(0)
    with torch.no_grad():
        assert torch.allclose(TenCrop(run.net, 32)(images).exp(), one_by_one, atol=1e-6)
    result = evaluate(run, views=10)
    assert len(as_json(run, result, 10)["test/confusion"]) == 10


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    """A run on crops of 32 from 37 pixels, that tested ten views."""
    folder = tmp_path_factory.mktemp("cropped") / "run"
    larger = ("data.resize_size=37", "data.test_crops=10", "augment=crop_flip", "augment.padding=0", "augment.size=32")
    train_run(config(*RUN, *larger, "trainer.max_epochs=2", run_dir=folder))
    return folder


def test_a_run_tests_the_centre_and_ten_views_in_one_pass(cropped):
    """Both figures against NumPy on views that are cut by hand, and evaluate repeats both exactly."""
    run = load_run(cropped)
    data = instantiate(config(*RUN, "data.resize_size=37").data)
    data.setup()
    images, labels = data.test_dataloader().images.numpy(), data.test_dataloader().labels.numpy()
    assert images.shape[1:] == (3, 37, 37)
    corners = [(0, 0), (0, 5), (2, 2), (5, 0), (5, 5)]
    views = [images[:, :, top : top + 32, left : left + 32] for top, left in corners]
    views += [view[..., ::-1] for view in views]
    softmax = np.stack([
        run.probabilities(torch.from_numpy((view.astype(np.float32) / 255 - 0.5) / 0.5)).double().numpy()
        for view in views
    ])  # fmt: skip
    for suffix, probabilities in (("", softmax[2]), ("_ten_crop", softmax.mean(0))):
        assert run.result[f"test/acc{suffix}"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
        top5 = top_k_accuracy_score(labels, probabilities, k=5)
        assert run.result[f"test/acc_top5{suffix}"] == pytest.approx(top5)
        assert run.result[f"test/loss{suffix}"] == pytest.approx(log_loss(labels, probabilities), rel=1e-4)
    assert run.result["test/loss"] != run.result["test/loss_ten_crop"]
    for views in (1, 10):
        assert "exactly the figures of result.json" in report(run, evaluate(run, views=views), views)
    assert re.search(rf"^  ten-crop +{run.result['test/loss_ten_crop']:.4f} ", results_table(run.result), re.MULTILINE)


def test_pictures_for_a_run_on_crops_are_cut_as_its_data_are(cropped):
    run = load_run(cropped)
    data = instantiate(config(*RUN, "data.resize_size=37").data)
    data.setup()
    pictures = [Image.fromarray(pixels) for pixels in data.load().test.images]
    expected = data.on_after_batch_transfer((data.test_dataloader().images, None), 0)[0]
    assert expected.shape[1:] == (3, 32, 32)
    assert torch.equal(run.preprocess(pictures), expected)
    assert "37×37, and only the middle 32×32" in card(run)


# --- predict --------------------------------------------------------------------------------------------------------


def test_preprocessing_is_the_data_modules(run):
    data = instantiate(config(*RUN).data)
    data.setup()
    pictures = [Image.fromarray(pixels) for pixels in data.load().test.images]
    expected = data.on_after_batch_transfer((data.test_dataloader().images, None), 0)[0]
    assert torch.equal(run.preprocess(pictures), expected)


def save_kinds(folder):
    """Pictures of many kinds of the same quarters: dark and bright."""
    grey = np.array([[20, 200], [120, 60]], dtype=np.uint8).repeat(20, 0).repeat(30, 1)
    rgb = Image.fromarray(grey).convert("RGB")
    Image.fromarray(grey).save(folder / "grey.png")
    rgb.save(folder / "rgb.png")
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    rgb.quantize(16).save(folder / "palette.gif")
    Image.fromarray(grey / np.float32(255)).save(folder / "float.tif")
    rgb.quantize(16).save(folder / "animated.gif", save_all=True, append_images=[Image.new("P", rgb.size)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    rgb.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    return grey


def test_every_kind_of_picture_is_the_same_picture(tmp_path):
    grey = save_kinds(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        pixels = np.asarray(read_image(path)).astype(int)
        assert pixels.shape == (40, 60, 3), path.name
        assert abs(pixels - grey[..., None]).max() <= 3, path.name  # palettes and CMYK round


def test_transparency_lies_over_white():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(half).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (100, 255))).getpixel((0, 0)) == (100, 100, 100)


def test_bad_files_do_not_stop_the_others(folder, run, tmp_path, capsys):
    save_kinds(tmp_path)
    Image.new("RGB", (1, 1), "white").save(tmp_path / "one.png")
    whole = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    Image.new("L", (8000, 3000)).save(tmp_path / "large.png")
    bars = tmp_path.parent / "bars.png"
    with pytest.raises(SystemExit) as caught:
        predict_command([str(folder), str(tmp_path), "--top", "3", "--json", "--bars", str(bars)])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    answers = {line["file"].rpartition("/")[2]: line for line in map(json.loads, shown.out.splitlines())}
    assert set(answers) == {path.name for path in tmp_path.iterdir()}
    bad = {"cut.png", "notes.txt", "empty.jpg", "bomb.png"}
    assert {name for name, answer in answers.items() if "error" in answer} == bad
    assert shown.err.count("\n") == shown.err.count("error: ") == len(bad)
    expected = run.probabilities(run.preprocess(read_image(tmp_path / "rgb.png")))[0]
    values, places = expected.topk(3)
    assert [entry["name"] for entry in answers["rgb.png"]["top"]] == [run.class_names[place] for place in places]
    assert [entry["probability"] for entry in answers["rgb.png"]["top"]] == pytest.approx(values.tolist(), abs=1e-6)
    assert Image.open(bars).width > 500


def test_csv_has_a_row_a_file(folder, tmp_path, capsys):
    save_kinds(tmp_path)
    predict_command([str(folder), str(tmp_path / "rgb.png"), str(tmp_path / "grey.png"), "--top", "2", "--csv"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["file", "name_1", "p_1", "name_2", "p_2", "error"]
    assert rows[1][1:] == rows[2][1:]
    assert len(rows) == 3


# --- export and card ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SUFFIXES)
def test_an_export_is_one_file_that_agrees(folder, run, form, tmp_path, capsys):
    path = tmp_path / f"model{SUFFIXES[form]}"
    export_command([str(folder), "--format", form, "--out", str(path)])
    assert "largest difference" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [path]
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        pictures = real_pictures()[:5]
        pixels = torch.stack([run.preprocess.pixels(picture) for picture in pictures])
        for count in (1, 5):
            (probabilities,) = session.run(["probabilities"], {"images": pixels[:count].numpy()})
            expected = run.probabilities(run.preprocess(pictures[:count]))
            assert np.abs(probabilities - expected.numpy()).max() < 1e-4
    elif form == "safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            assert set(file.keys()) == set(run.net.state_dict())
    else:
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        about = json.loads(files["metadata.json"])
    assert json.loads(about["class_names"]) == list(run.class_names)
    assert json.loads(about["image_size"]) == 32


def test_an_export_that_differs_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "alexnet_pl.inference.exporters.read_safetensors", lambda path: lambda images: (images.sum(), images.sum())
    )
    with pytest.raises(UserError, match="was not written: its outputs differ"):
        export(run, "safetensors", tmp_path / "m.safetensors", torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())


def test_the_card_has_the_runs_figures(run, folder):
    text = card(run)
    assert f"{1 - run.result['test/acc']:.4f}" in text
    for title in ("Model", "Intended use", "Training data", "Training recipe", "Results", "Limits", "Licence"):
        assert f"## {title}\n" in text
    assert "62,006 parameters" in text
    assert str(folder.parent) not in text
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927, tabulated
    with pytest.raises(UserError, match="no result.json"):
        card(load_run(folder / "checkpoints/latest.ckpt"))


def test_commands_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        evaluate_command([str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
