"""Exports: each file against the original network, and its metadata."""

import json

import numpy as np
import pytest
import torch

from alexnet_pl.cli.export import main as export_command
from alexnet_pl.inference.exporters import SUFFIXES, export, real_images
from alexnet_pl.runtime.errors import UserError


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
        images = real_images()[:5]
        pixels = torch.stack([run.preprocess.pixels(image) for image in images])
        for count in (1, 5):
            (probabilities,) = session.run(["probabilities"], {"images": pixels[:count].numpy()})
            expected = run.probabilities(run.preprocess(images[:count]))
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
    wrong = lambda path, trust: lambda images: (images.sum(), images.sum())  # noqa: E731
    monkeypatch.setattr("alexnet_pl.inference.exporters.read_safetensors", wrong)
    with pytest.raises(UserError, match="was not written: its outputs differ"):
        export(run, "safetensors", tmp_path / "m.safetensors", torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())


def test_a_file_name_without_the_usual_suffix_is_kept(folder, tmp_path):
    export_command([str(folder), "--format", "safetensors", "--out", str(tmp_path / "weights.v2")])
    assert [path.name for path in tmp_path.iterdir()] == ["weights.v2"]
