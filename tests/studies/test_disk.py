"""Disk estimate of a study: parameters × kept files, and a warning if the disk has less."""

import shutil
from collections import namedtuple

import pytest
from helpers import config
from omegaconf import OmegaConf

from alexnet_pl.runtime.system import usable_cores
from alexnet_pl.studies.disk import OTHER_BYTES, disk_estimate, parameter_count, size
from alexnet_pl.studies.hydra_callback import parallel_trials

ALEXNET, LENET = 21_622_154, 62_006
"""Parameters of the default network, 50×50 in (docs/facts), and of LeNet-5."""


def free(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, int(count)))


def test_parameters_are_counted_without_memory():
    assert parameter_count(config("model=alexnet_lrn")) == ALEXNET
    assert parameter_count(config("model=alexnet_paper", "model.num_classes=1000")) == 60_965_224
    assert parameter_count(config("model=lenet5")) == LENET
    assert parameter_count(config("model._target_=nowhere.Net")) is None


@pytest.mark.slow
def test_estimate_counts_best_weights_per_trial_and_resume_checkpoints_of_one(monkeypatch, tmp_path):
    free(monkeypatch, 50e9)
    configs = {str(seed): config(f"seed={seed}", "callbacks.resume.keep=false") for seed in range(18)}
    line, warning = disk_estimate(tmp_path / "absent" / "study", configs)
    kept, scratch = 18 * (4 * ALEXNET + OTHER_BYTES), 6 * 4 * ALEXNET
    running = f"{scratch / 1e6:.0f} MB for resume checkpoints while they run"
    assert line == f"disk: about {kept / 1e9:.1f} GB for 18 trials, and {running}; 50.0 GB free"
    assert warning == ""
    both = disk_estimate(tmp_path, configs, parallel=2)[0]
    assert f"and {2 * scratch / 1e9:.1f} GB for resume checkpoints" in both
    keeping = {key: config(f"seed={key}", "callbacks.resume.keep=true") for key in configs}
    assert disk_estimate(tmp_path, keeping)[0] == (
        f"disk: about {(kept + 18 * scratch) / 1e9:.1f} GB for 18 trials; 50.0 GB free"
    )


def test_warning_if_the_disk_is_too_small(monkeypatch, tmp_path):
    free(monkeypatch, 1.6e9)
    line, warning = disk_estimate(
        tmp_path / "study", {str(seed): config(f"seed={seed}", "callbacks.resume.keep=false") for seed in range(18)}
    )
    assert line.endswith("; 1.6 GB free")
    assert warning.startswith(f"warning: {tmp_path} has 1.6 GB free, less than the 2.2 GB this study may need.")


def test_nothing_is_said_of_networks_that_cannot_be_built(tmp_path):
    assert disk_estimate(tmp_path, {"a": config("model._target_=nowhere.Net")}) == ("", "")
    assert disk_estimate(tmp_path, {}) == ("", "")


def test_sizes_have_units():
    assert [size(count) for count in (0, 86_488_616, 999_999_999, 1_556_000_000)] == [
        "1 MB", "86 MB", "1000 MB", "1.6 GB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [({}, 1), ({"n_jobs": 4}, 4), ({"n_jobs": -1}, usable_cores()), ({"array_parallelism": 256}, 256)],
)
def test_parallel_trials_of_launchers(launcher, expected):
    assert parallel_trials(OmegaConf.create(launcher)) == expected
