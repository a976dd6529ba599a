"""Store of a study: the hash that identifies a trial, names of run directories."""

from pathlib import Path

import pytest
from helpers import config

from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.studies.runner import study_dir
from alexnet_pl.studies.store import config_hash, trial_name


@pytest.mark.parametrize(
    "overrides",
    [
        ["study=other"],
        ["data.root=/elsewhere"],
        ["optimizer.lr=0.001"],
        ["trainer.max_epochs=30"],
        ["callbacks.resume.interval_minutes=3"],
        ["callbacks.nan_monitor.max_skipped=3"],
        ["+callbacks.images={_target_:alexnet_pl.training.Dashboard}"],
        ["~logger.tensorboard"],
        ["resume=x", "allow_changes=true", "trust=[my_module]"],
    ],
    ids=" ".join,
)
def test_hash_ignores_what_cannot_change_a_number(overrides):
    base = ["data=cifar10"]
    assert config_hash(config(*base, *overrides)) == config_hash(config(*base, run_dir=Path("another")))


def test_hash_changes_with_everything_that_changes_a_number():
    settings = ["", "seed=2",
                "split_seed=1", "model/norm=none", "model.dropout=0.4", "optimizer.lr=0.002", "~scheduler",
                "trainer.max_epochs=31", "trainer.precision=32-true", "trainer.accelerator=cpu", "augment=crop_flip",
                "data=digits", "data.mean=[0,0,0]", "callbacks.best.monitor=val/loss", "init_from=somewhere",
                "trainer.gradient_clip_val=1"]  # fmt: skip
    names = [config_hash(config("data=cifar10", *filter(None, [setting]))) for setting in settings]
    assert len(set(names)) == len(settings)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("augment=[crop_flip,cutout]", "augment=[cutout,crop_flip]"),
        ("+optimizer.layers={conv*:{lr_multiplier:2},conv1:{lr_multiplier:0}}",
         "+optimizer.layers={conv1:{lr_multiplier:0},conv*:{lr_multiplier:2}}"),
    ],
)  # fmt: skip
def test_hash_changes_with_the_order_of_what_applies_in_order(one, other):
    """Issue: the second of two studies that differ in it printed the numbers of the first."""
    assert config_hash(config(one)) != config_hash(config(other))
    plain = config(one)
    plain.optimizer = dict(reversed(plain.optimizer.items()))  # whose order is of no consequence
    assert config_hash(plain) == config_hash(config(one))


def test_directory_names_are_short_and_safe():
    overrides = {"model/pool": "overlapping", "seed": "3", "optimizer.lr": "1e-3", "model.channels": "[1, 2]/../x"}
    axes = ["seed", "model/pool", "optimizer.lr", "model.channels", "trainer"]
    assert trial_name(overrides, axes) == "pool_overlapping-lr_1e-3-channels_1_2_.._x-seed_3"
    assert len(trial_name({"model": "x" * 300}, ["model"])) == 100
    assert study_dir(None, "otherwise") == "otherwise"
    assert study_dir("a.b-1", "otherwise") == "multirun/a.b-1"
    for name in ("../x", "a/b", "", ".x", "a b"):
        with pytest.raises(ConfigError, match="is invalid: expected"):
            study_dir(name, "otherwise")
