"""The benchmark refuses missing devices and reports every number it promises."""

import pytest
import torch

import alexnet_pl.benchmark.components
import alexnet_pl.cli.benchmark
from alexnet_pl.benchmark.render import markdown, number
from alexnet_pl.runtime.errors import ConfigError


def test_a_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device=cuda is invalid"):
        alexnet_pl.cli.benchmark.main(["--device", "cuda"])


@pytest.mark.slow
def test_every_promised_number_is_reported(monkeypatch):
    monkeypatch.setattr(alexnet_pl.benchmark.components, "LRN_SHAPES", ((2, 8, 5, 5),))
    for name, value in (("IMAGES", {"cpu": 320}), ("FULL_IMAGES", {"cpu": 320}), ("BATCH_SIZES", (8,))):
        monkeypatch.setattr(alexnet_pl.benchmark.components, name, value)
    found = alexnet_pl.benchmark.components.bench("cpu", repeats=1, compile_mode=None)
    assert set(found) >= {"project_vs_tutorial", "project_vs_handwritten", "lrn_vs_torch", "input_images_per_second"}
    rates = found["images_per_second"]
    assert set(rates) == {"tutorial", "handwritten", "project"}
    assert found["project_vs_tutorial"] == pytest.approx(rates["project"] / rates["tutorial"])
    assert found["hardware_floor"]["gflop_per_image"] == pytest.approx(0.39, abs=0.01)
    assert all(number(rate) in markdown(found) for rate in rates.values())
