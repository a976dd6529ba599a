"""Private API of Hydra and torch: each test fails by name if an upgrade removes what studies rely on."""

import gc
from pathlib import Path

import pytest
import torch
from helpers import run_in_fresh_process
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf, open_dict
from torch import nn

from alexnet_pl.config.compose import CONF
from alexnet_pl.config.hydra_versions import IS_1_4, VERSION_BASE
from alexnet_pl.studies.hydra_callback import StudyCallback
from alexnet_pl.studies.internals import SweepComposer, clear_traced_modules, expand_sweep


def test_hydra_basic_sweeper_split_arguments():
    parsed = OverridesParser.create().parse_overrides(["seed=1,2", "model/norm=lrn,none", "x=3"])
    assert BasicSweeper.split_arguments(parsed, None)[0] == [
        [f"seed={seed}", f"model/norm={norm}", "x=3"] for seed in (1, 2) for norm in ("lrn", "none")
    ]


def test_hydra_job_return_configs(tmp_path: Path):
    """Hydra keeps one per trial until a sweep ends; with its configs each holds 1,300 objects."""
    (tmp_path / "c.yaml").write_text("a: 1")
    with initialize_config_dir(str(tmp_path), **VERSION_BASE):
        cfg = compose("c")
    kept = JobReturn(overrides=["a=1"], cfg=cfg, hydra_cfg=cfg)
    StudyCallback().on_job_end(cfg, job_return=kept)
    assert kept.cfg is None
    assert kept.hydra_cfg is None


@pytest.mark.slow
def test_torch_jit_class_registry():
    """torch.jit.trace, with which TensorBoard draws the network's graph, registers one class per module for ever.

    Nothing is freed while any scripted module is alive, such as one that another test has left behind.
    """
    run_in_fresh_process(_check_class_registry)


def _check_class_registry() -> None:
    def wrappers() -> int:
        gc.collect()
        return sum(type(thing) is type and thing.__name__ == "QualnameWrapper" for thing in gc.get_objects())

    def trace() -> None:
        torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2))

    trace()
    clear_traced_modules()
    before = wrappers()
    trace()
    assert wrappers() > before, "torch frees traced modules by itself: clear_traced_modules is no longer needed"
    clear_traced_modules()
    assert wrappers() == before
    trace()  # tracing still works
    clear_traced_modules()


SWEEP = ("study=s", "model=alexnet_lrn,lenet5", "data=digits", "seed=1,2,3", "optimizer.lr=1e-3,0.01",
         "model.norm=null", "+own=${seed}", "trainer.max_epochs=3,null")  # fmt: skip


@pytest.mark.skipif(IS_1_4, reason="Hydra 1.4 composes the trials itself")
def test_hydra_load_sweep_config():
    """Trials that are copied from the first one are what Hydra composes, all of hydra's own section included."""
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        config = compose("train", overrides=["data=digits", "hydra.mode=MULTIRUN"], return_hydra_config=True)
        with open_dict(config):
            config.hydra.overrides.task = [*SWEEP]
        loader = GlobalHydra.instance().config_loader()
        calls = []

        def composed_by_hydra(master_config, sweep_overrides):
            calls.append(sweep_overrides)
            return loader.load_sweep_config(master_config, sweep_overrides)

        fast = SweepComposer(composed_by_hydra, OverridesParser.create(config_loader=loader))
        trials = [list(overrides) for overrides in expand_sweep(config)][::5]
        assert len(trials) == 5
        for overrides in trials:
            expected = loader.load_sweep_config(config, overrides)
            assert OmegaConf.to_container(fast(config, overrides)) == OmegaConf.to_container(expected), overrides
        assert len(calls) == 2  # one per network


@pytest.mark.skipif(IS_1_4, reason="Hydra 1.4 composes the trials itself")
@pytest.mark.parametrize(
    ("lists", "swept"),
    [
        (["rung=cutout"], [["rung=cutout", f"augment={option}"] for option in ("crop_flip", "crop", "none")]),
        (["callbacks=[ema,early_stopping]"], [["callbacks=ema"], ["callbacks=default"]]),
        (["logger=[tensorboard,csv]"], [["logger=csv"], ["logger=default"]]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else None,
)
def test_hydra_choices_of_a_list(lists: list[str], swept: list[list[str]]):
    """Hydra's choices lack groups whose options an experiment lists; sweeping one is still a choice of options."""
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        config = compose("train", overrides=[*lists, "hydra.mode=MULTIRUN"], return_hydra_config=True)
        group = swept[0][-1].partition("=")[0]
        assert group not in config.hydra.runtime.choices
        loader = GlobalHydra.instance().config_loader()
        fast = SweepComposer(loader.load_sweep_config, OverridesParser.create(config_loader=loader))
        for overrides in [*swept, *swept]:
            expected = loader.load_sweep_config(config, overrides)
            assert OmegaConf.to_container(fast(config, overrides)) == OmegaConf.to_container(expected), overrides
