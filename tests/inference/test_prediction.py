"""Prediction for image files: preprocessing, unreadable files, output formats, bounded memory."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from PIL import Image

from alexnet_pl.cli.predict import main as predict_command
from alexnet_pl.data.image_io import read_image, to_rgb
from alexnet_pl.inference.model_card import card
from alexnet_pl.inference.prediction import MAX_BATCH_PIXELS, predict
from alexnet_pl.inference.trained_run import load_run
from inference import RUN


def test_preprocessing_equals_the_data_modules(run):
    data = instantiate(config(*RUN).data)
    data.setup()
    images = [Image.fromarray(pixels) for pixels in data.load().test.images]
    expected = data.on_after_batch_transfer((data.test_dataloader().images, None), 0)[0]
    assert torch.equal(run.preprocess(images), expected)


def test_images_for_a_run_on_crops_are_cropped_like_its_data(cropped):
    run = load_run(cropped)
    data = instantiate(config(*RUN, "data.resize_size=37").data)
    data.setup()
    images = [Image.fromarray(pixels) for pixels in data.load().test.images]
    expected = data.on_after_batch_transfer((data.test_dataloader().images, None), 0)[0]
    assert expected.shape[1:] == (3, 32, 32)
    assert torch.equal(run.preprocess(images), expected)
    assert "37×37, and only the middle 32×32" in card(run)


def save_formats(directory):
    """Save the same quarters, dark and bright, in many formats."""
    gray = np.array([[20, 200], [120, 60]], dtype=np.uint8).repeat(20, 0).repeat(30, 1)
    rgb = Image.fromarray(gray).convert("RGB")
    Image.fromarray(gray).save(directory / "gray.png")
    rgb.save(directory / "rgb.png")
    rgb.convert("CMYK").save(directory / "cmyk.tif")
    Image.fromarray(gray.astype(np.uint16) * 257).save(directory / "sixteen.png")
    rgb.quantize(16).save(directory / "palette.gif")
    Image.fromarray(gray / np.float32(255)).save(directory / "float.tif")
    rgb.quantize(16).save(directory / "animated.gif", save_all=True, append_images=[Image.new("P", rgb.size)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    rgb.transpose(Image.Transpose.ROTATE_90).save(directory / "turned.png", exif=exif)
    return gray


def test_every_format_gives_the_same_image(tmp_path):
    gray = save_formats(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        pixels = np.asarray(read_image(path)).astype(int)
        assert pixels.shape == (40, 60, 3), path.name
        assert abs(pixels - gray[..., None]).max() <= 3, path.name  # palettes and CMYK round


def test_transparency_is_composited_on_white():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(half).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (100, 255))).getpixel((0, 0)) == (100, 100, 100)


def test_unreadable_files_do_not_stop_the_others(folder, run, tmp_path, capsys):
    save_formats(tmp_path)
    Image.new("RGB", (1, 1), "white").save(tmp_path / "one.png")
    whole = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    (tmp_path / "notes.txt").write_text("no image")
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
    values, indices = expected.topk(3)
    assert [entry["name"] for entry in answers["rgb.png"]["top"]] == [run.class_names[index] for index in indices]
    assert [entry["probability"] for entry in answers["rgb.png"]["top"]] == pytest.approx(values.tolist(), abs=1e-6)
    assert Image.open(bars).width > 500


def test_csv_has_one_row_per_file(folder, tmp_path, capsys):
    save_formats(tmp_path)
    predict_command([str(folder), str(tmp_path / "rgb.png"), str(tmp_path / "gray.png"), "--top", "2", "--csv"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["file", "name_1", "p_1", "name_2", "p_2", "error"]
    assert rows[1][1:] == rows[2][1:]
    assert len(rows) == 3


@pytest.mark.security
@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"]], ids=["text", "csv", "json"])
def test_names_of_strangers_are_filtered(form, edited, tmp_path, capsys):
    names = ["\x1b[2J=x", "=cmd|' /C calc'!A0", *"+-@56789"]
    path = edited(lambda checkpoint: checkpoint["hyper_parameters"].update(class_names=names))
    Image.new("RGB", (8, 8)).save(tmp_path / "=\x1b[31mred.png")
    monkeyed = tmp_path / "bad\x9b.png"
    monkeyed.write_bytes(b"")
    with pytest.raises(SystemExit):
        predict_command([str(path), str(tmp_path / "=\x1b[31mred.png"), str(monkeyed), "--top", "10", *form])
    shown = capsys.readouterr()
    assert not any(character in shown.out + shown.err for character in "\x1b\x9b")
    if form == ["--csv"]:
        rows = list(csv.reader(shown.out.splitlines()))
        assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    if form == ["--json"]:
        found = [entry["name"] for entry in json.loads(shown.out.splitlines()[0])["top"]]
        assert sorted(found) == sorted(names)  # data is not changed


@pytest.mark.security
def test_batches_are_bounded_by_pixels(run, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    sizes = []
    real = type(run).probabilities

    def counting(self, images):
        sizes.append(len(images))
        return real(self, images)

    monkeypatch.setattr(type(run), "probabilities", counting)
    monkeypatch.setattr("alexnet_pl.inference.prediction.MAX_BATCH_PIXELS", 3 * 32**2)
    assert len(list(predict(run, [tmp_path / "a.png"] * 7))) == 7
    assert sizes == [3, 3, 1]
    assert MAX_BATCH_PIXELS // 224**2 == 39


MEASURED = """
import resource, sys
from alexnet_pl.cli.predict import main
from alexnet_pl.inference.trained_run import load_run
load_run(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.security
def test_a_small_file_with_many_pixels_takes_little_memory(folder, tmp_path):
    Image.new("RGBA", (6300, 6300)).save(tmp_path / "huge.png")  # 39.7 megapixels
    assert (tmp_path / "huge.png").stat().st_size < 200_000
    command = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / "huge.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 400_000  # KB; the decoded pixels alone take 160 MB
