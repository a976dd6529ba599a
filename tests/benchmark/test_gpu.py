"""The GPU benchmark on a CPU with tiny sizes: every part runs, and one that fails does not stop the others."""

import pytest

import alexnet_pl.benchmark.components
import alexnet_pl.benchmark.gpu
from alexnet_pl.benchmark.gpu import Sizes, bench_gpu
from alexnet_pl.benchmark.workers import bench_layouts

TINY = Sizes(images=320, repeats=1, batch_sizes=(128,), step_sizes=(8,), modes=(None,), epoch_images=320, epochs=1,
             workers=(1,), worker_images=320, seeds=(2,), seed_steps=1)  # fmt: skip


@pytest.mark.slow
def test_every_part_runs(monkeypatch):
    monkeypatch.setattr(alexnet_pl.benchmark.components, "LRN_SHAPES", ((2, 8, 5, 5),))
    monkeypatch.setattr(alexnet_pl.benchmark.workers, "LAYOUT_EPOCHS", 2)
    monkeypatch.setattr(alexnet_pl.benchmark.components.torch, "compile", lambda layer: layer)
    found = bench_gpu("cpu", TINY)
    assert [name for name, part in found.items() if isinstance(part, dict) and "error" in part] == []
    assert found["loops, batch 128, eager"]["project_vs_tutorial"] > 0
    assert found["tutorial"]["epochs"] == 1
    assert found["seeds"]["2"] > 0
    assert found["workers"]["without MPS"]["1"] > 0


def test_a_part_that_fails_says_why(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nkernel")

    for name in (
        "bench_loops",
        "bench_lrn",
        "bench_steps",
        "bench_input_path",
        "whole_run",
        "shared_device",
        "stacked_seeds",
    ):
        monkeypatch.setattr(alexnet_pl.benchmark.gpu, name, fail)
    found = bench_gpu("cpu", TINY)
    assert found["seeds"] == {"error": "RuntimeError: no such kernel"}
    assert "error" in found["loops, batch 128, eager"]


@pytest.mark.slow
def test_layouts_are_compared_on_both_scales():
    found = bench_layouts(count=320, repeats=1, cores=1)
    assert found["layouts"].keys() == {"lab", "full"}
    assert all(rate["images_per_second"] > 0 for rates in found["layouts"].values() for rate in rates.values())
