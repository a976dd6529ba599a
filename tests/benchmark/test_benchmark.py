"""The benchmark refuses missing devices and reports every number it promises."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import alexnet_pl.benchmark.components
import alexnet_pl.benchmark.loops
import alexnet_pl.cli.benchmark
from alexnet_pl.benchmark.loops import Interleave
from alexnet_pl.benchmark.render import markdown, number
from alexnet_pl.runtime.errors import ConfigError


def test_a_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device=cuda is invalid"):
        alexnet_pl.cli.benchmark.main(["--device", "cuda"])


def test_the_first_steps_and_the_last_of_an_epoch_count_once_per_epoch(monkeypatch, tmp_path):
    """Six steps of 1 s, before the first of which 3 s, in the second 2 s and in the last 4 s pass once per epoch."""
    OmegaConf.save({}, tmp_path / "cfg.yaml")
    interleave = Interleave(str(tmp_path / "cfg.yaml"), str(tmp_path / "times.json"))
    ends = (4.0, 7.0, 8.0, 9.0, 10.0, 15.0)
    trainer = SimpleNamespace(num_training_batches=6, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    for step, now in enumerate(ends):
        monkeypatch.setattr(alexnet_pl.benchmark.loops.time, "perf_counter", lambda now=now: now)
        interleave.on_train_batch_end(trainer, None, None, None, step)
    assert interleave.first_step == 4.0
    assert interleave.batches == pytest.approx(6.0)


@pytest.mark.slow
def test_every_promised_number_is_reported(monkeypatch):
    monkeypatch.setattr(alexnet_pl.benchmark.components, "LRN_SHAPES", ((2, 8, 5, 5),))
    for name, value in (("IMAGES", {"cpu": 320}), ("FULL_IMAGES", {"cpu": 320}), ("BATCH_SIZES", (8,))):
        monkeypatch.setattr(alexnet_pl.benchmark.components, name, value)
    found = alexnet_pl.benchmark.components.bench("cpu", repeats=1, compile_mode=None)
    assert set(found) >= {"project_vs_tutorial", "project_vs_handwritten", "lrn_vs_torch", "input_images_per_second"}
    assert ("lrn_compiled_vs_torch" if shutil.which("g++") else "lrn_compiled_error") in found
    rates = found["images_per_second"]
    assert set(rates) == {"tutorial", "handwritten", "project"}
    assert found["project_vs_tutorial"] == pytest.approx(rates["project"] / rates["tutorial"])
    assert found["hardware_floor"]["gflop_per_image"] == pytest.approx(0.39, abs=0.01)
    assert all(number(rate) in markdown(found) for rate in rates.values())
