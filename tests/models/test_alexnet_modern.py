"""AlexNetModern: its layers, sizes and parameters, and the whitening layer against NumPy, in runs as well."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, assert_same_run, config, run_until_stopped
from hydra.utils import instantiate
from torch import nn

from alexnet_pl.inference.evaluation import evaluate
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.models import AlexNet, AlexNetModern, OverlappingMaxPool2d
from alexnet_pl.models.alexnet_modern import Whitening, feature_map_size
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.run import run

NARROW = ("model=alexnet_modern", "model.channels=[4,6,8,8,6]", "model.fc_width=16", *SHORT_RUN[1:])


def test_five_convolutions_and_three_fully_connected_layers_have_learned_weights():
    net = instantiate(config("model=alexnet_modern").model)
    learned = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert learned == [f"features.conv{i}" for i in range(1, 6)] + [f"classifier.fc{i}" for i in (6, 7, 8)]
    assert all(module.kernel_size == (3, 3) for module in net.modules() if isinstance(module, nn.Conv2d))
    matrices = [name.removesuffix(".weight") for name, parameter in net.named_parameters() if parameter.ndim > 1]
    assert matrices == learned
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 7
    assert "features.whitening.weight" in dict(net.named_buffers())
    weights = 24 * 64 * 9 + 64 * 256 * 9 + 3 * 256 * 256 * 9 + 256 * 9 * 512 + 512 * 512 + 512 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == weights + 2 * (64 + 4 * 256 + 2 * 512) == 3_381_898


@pytest.mark.parametrize(("norm", "has_bias"), [("lrn", True), ("within_map", True), ("batch", False), ("none", True)])
def test_layers_before_a_norm_that_keeps_the_mean_have_biases(norm, has_bias):
    """Issue: with LRN, the network had no bias but that of the last layer."""
    net = instantiate(config("model=alexnet_modern", f"model/norm={norm}").model)
    hidden = [net.get_submodule(name) for name in ("features.conv1", "features.conv5", "classifier.fc7")]
    assert [layer.bias is not None for layer in hidden] == [has_bias] * 3


@pytest.mark.parametrize("size", [16, 31, 32, 33, 64, 224])
@pytest.mark.parametrize("sizing", [{}, {"conv1_stride": 2, "pool_padding": 1}, {"whitening": 0, "pool_after": [1, 3]}])
@pytest.mark.parametrize("pool", [None, OverlappingMaxPool2d])
def test_every_size_has_the_feature_maps_that_were_computed(size, sizing, pool):
    layers = {} if pool is None else {"pool": pool}
    with torch.device("meta"):
        net = AlexNetModern(image_size=size, channels=(2, 2, 2, 2, 3), fc_width=4, **sizing, **layers).eval()
        maps = net.features(torch.empty(1, 3, size, size))
        assert net(torch.empty(1, 3, size, size)).shape == (1, 10)
    side = feature_map_size(size, **sizing)
    assert maps.shape[1:] == (3, side, side)
    assert net.classifier.fc6.in_features == 3 * side**2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 15}, "model.image_size=15 is invalid: expected 16 pixels or more for AlexNetModern"),
        ({"whitening": 1}, "model.whitening=1 is invalid: expected 0, 2 or 3"),
        ({"pool_after": [2, 1]}, "model.pool_after=.* is invalid: expected numbers from 1 to 5 in increasing order"),
        ({"pool_after": [6]}, "model.pool_after=.* is invalid"),
        ({"channels": [64]}, "model.channels=.* is invalid: expected 5 whole numbers"),
        ({"dropout": 1}, "model.dropout=1 is invalid"),
        ({"conv1_stride": 0}, "model.conv1_stride=0 is invalid"),
        ({"pool_padding": 2}, "model.pool_padding=2 is invalid"),
    ],
)
def test_invalid_arguments_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AlexNetModern(**settings)


# --- whitening ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 3])
def test_whitened_patches_have_unit_second_moments_in_numpy(side):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator)
    images = torch.einsum("ij,njhw->nihw", mixing, torch.randn(40, 3, 9, 8, generator=generator).cumsum(-1) / 3)
    layer = Whitening(side, epsilon=1e-3)
    layer.fit([images[:25], images[25:]])
    windows = np.lib.stride_tricks.sliding_window_view(images.numpy().astype(np.float64), (side, side), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 3 * side**2)
    variances, columns = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = layer.weight.flatten(1).double().numpy()
    for ours, variance, column in zip(filters[::-1], variances, columns.T, strict=True):
        theirs = column / np.sqrt(variance + 1e-3)
        np.testing.assert_allclose(ours * np.sign(ours @ theirs), theirs, rtol=1e-3, atol=1e-4)
        assert ours[np.abs(ours).argmax()] > 0
    outputs = layer(images)
    half = 3 * side**2
    assert torch.equal(outputs[:, half:], -outputs[:, :half])
    expected = (patches @ filters.T).reshape(40, 9 - side + 1, 8 - side + 1, half).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(outputs[:, :half].numpy(), expected, atol=1e-4)


def test_before_it_is_fitted_the_layer_returns_the_patches():
    image = torch.arange(27.0).view(1, 3, 3, 3)
    assert torch.equal(Whitening(2)(image)[0, :12, 0, 0], image[0, :, :2, :2].flatten())


def test_a_run_fits_the_layer_once_and_keeps_it(tmp_path, monkeypatch):
    settings = (*NARROW, "callbacks.resume.min_interval_seconds=0", "callbacks=ema")
    run(config(*settings, run_dir=tmp_path / "whole"))
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, step=3)
    monkeypatch.setattr(Whitening, "fit", lambda *_: pytest.fail("a resumed run has its filters"))
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")

    trained = load_run(tmp_path / "run")
    data = instantiate(config(*settings).data)
    data.setup()
    monkeypatch.undo()
    twin = Whitening(2)
    twin.fit([data.on_after_batch_transfer((torch.cat([*data.training_images()]), None), 0)[0]])
    # Gray images leave components without variance, in which any basis is right; the product is unique.
    ours, theirs = (layer.weight.flatten(1).double() for layer in (trained.net.features.whitening, twin))
    assert torch.allclose(ours.T @ ours, theirs.T @ theirs, rtol=1e-3)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert evaluate(trained).figures["test/loss"] == pytest.approx(result["test/loss"], rel=1e-6)


def test_a_warm_start_keeps_the_filters_it_loads(tmp_path, monkeypatch):
    run(config(*NARROW, run_dir=tmp_path / "first"))
    monkeypatch.setattr(Whitening, "fit", lambda *_: pytest.fail("the filters were loaded"))
    run(config(*NARROW, f"init_from={tmp_path / 'first'}", run_dir=tmp_path / "second"))


def test_a_warm_start_without_filters_fits_them(tmp_path):
    run(config(*NARROW, "model.whitening=0", run_dir=tmp_path / "first"))
    run(config(*NARROW, f"init_from={tmp_path / 'first'}", run_dir=tmp_path / "second"))
    assert load_run(tmp_path / "second").net.is_fitted


def test_whitening_keeps_its_digits_under_bfloat16_autocast():
    layer = Whitening(2)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(-1)  # smooth, as images are
    layer.fit([images])
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, layer(images))
    with torch.autocast("cpu", torch.float16):
        assert layer(images).dtype == torch.float16


def test_without_norm_layers_every_layer_has_a_bias():
    net = AlexNetModern(norm=nn.Identity, channels=(2, 2, 2, 2, 2), fc_width=4)
    assert all(module.bias is not None for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))


# --- the rung between AlexNet and this network ----------------------------------------------------------------------


def test_alexnet_with_norm_layers_in_every_convolutional_block():
    net = AlexNet(norm=nn.BatchNorm2d, norm_blocks=[1, 2, 3, 4, 5], bias_before_norm=False, channels=(2, 4, 6, 4, 2))
    names = [name for name, _ in net.features.named_children()]
    assert [name for name in names if name.startswith("norm")] == [f"norm{i}" for i in range(1, 6)]
    assert [name for name in names if name.startswith("pool")] == ["pool1", "pool2", "pool5"]
    assert all(module.bias is None for module in net.features if isinstance(module, nn.Conv2d))
    with pytest.raises(ConfigError, match="model.norm_blocks=.* is invalid: expected numbers from 1 to 5"):
        AlexNet(norm_blocks=[0])


def test_a_norm_layer_that_needs_an_even_width_is_accepted() -> None:
    cfg = config("model=alexnet_modern", "model/norm=lrn_2012", "model.image_size=32")
    with torch.device("meta"):
        assert instantiate(cfg.model)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_batch_of_one_image_is_refused_before_data_is_read(tmp_path: Path) -> None:
    """Issue: "Expected more than 1 value per channel when training", in the first step."""
    settings = ("model=alexnet_modern", "data=digits", "data.batch_size=1", "trainer.accelerator=cpu")
    with pytest.raises(ConfigError, match="data.batch_size=1 is invalid for AlexNetModern with BatchNorm"):
        run(config(*settings, run_dir=tmp_path / "run"))
