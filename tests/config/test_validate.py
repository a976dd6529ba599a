"""Validation of configs: what is refused before a run starts, in which words, and what is accepted."""

from typing import Literal

import pytest
import torch
from helpers import REPOSITORY, config
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from alexnet_pl.config.hydra_versions import VERSION_BASE
from alexnet_pl.config.schema import accepted_arguments, describe_type, matches_type
from alexnet_pl.config.validate import LOGGED_BEFORE_SAVING, MONITORS, validate
from alexnet_pl.data.cifar10 import CIFAR10DataModule
from alexnet_pl.models.alexnet import AlexNet
from alexnet_pl.runtime.errors import ConfigError, did_you_mean
from alexnet_pl.training.run import run


class OwnNet(AlexNet):
    """A network of the user's own: other arguments, and some passed on."""

    def __init__(self, depth: int, fc_width: int = 8, **settings):
        self.depth = depth
        super().__init__(fc_width=fc_width, **settings)


def own_head(num_classes: int, image_size: int, hidden: list[int] = None) -> nn.Module:
    """A function of the user's own, with an implicitly optional argument."""
    return nn.Linear(image_size, num_classes)


STEPS = "{_target_:torch.optim.lr_scheduler.StepLR,_partial_:true,step_size:3}"
MILESTONES = "{_target_:torch.optim.lr_scheduler.MultiStepLR,_partial_:true,milestones:[2,3]}"
STOP = "{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:%s,mode:%s}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++trainer.devices=1000", "trainer.devices=1000 is invalid: expected at most "),
        ("+callbacks.best._partial_=true", "callbacks.best._partial_=true is invalid: expected false. The run needs"),
        ("+model._partial_=true", "model._partial_=true is invalid: expected false. The run needs the object itself."),
    ],
)
def test_a_config_that_no_run_can_use_is_refused(override, message):
    cfg = config("data=digits", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", override)
    with pytest.raises(ConfigError, match=message):
        validate(cfg)


@pytest.mark.parametrize("section", ["callbacks", "logger"])
def test_a_list_in_place_of_named_objects_is_refused(section):
    cfg = config()
    cfg[section] = [{"_target_": "alexnet_pl.training.MetricsCSV"}]
    with pytest.raises(ConfigError, match=rf"^{section}=.* is invalid: expected a mapping from names to objects"):
        validate(cfg)


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "experiment=tutorial",
        "model=lenet5 trainer=smoke augment=crop_flip",
        "data=cifar10",
        "~scheduler",
        "~scheduler +scheduler=" + STEPS,
        "~scheduler +scheduler=" + MILESTONES,
        "optimizer._target_=torch.optim.SGD ~optimizer.fused +optimizer.momentum=0.9 +optimizer.nesterov=true",
        "+optimizer.betas=[0.9,0.99] trainer.gradient_clip_val=1 trainer.precision=32",
        "+callbacks.stop=" + STOP % ("val/acc", "max"),
        "+callbacks.rate={_target_:lightning.pytorch.callbacks.LearningRateMonitor}",
        "callbacks.best.monitor=val/error callbacks.best.mode=min",
        "+width=64 model.fc_width=${width}",
        "trainer.limit_train_batches=3 trainer.limit_val_batches=0.5",
        "~logger",
        "~logger.csv",
        "~logger.tensorboard",
        "+callbacks.mc={_target_:lightning.pytorch.callbacks.ModelCheckpoint}",
        "+callbacks.mc={_target_:lightning.pytorch.callbacks.ModelCheckpoint,monitor:val/acc,mode:max}",
        "scheduler=one_cycle",
        "scheduler=cosine scheduler.interval=step",
        "~scheduler.factor",
        "optimizer=sgd scheduler=warmup_plateau",
        "optimizer=sgd scheduler=warmup_plateau ~scheduler.warmup_lr trainer.max_epochs=2",
        "trainer.max_epochs=-1 +trainer.max_steps=3",
        "+trainer.val_check_interval=1.0 +trainer.check_val_every_n_epoch=2 trainer.accumulate_grad_batches=4",
        "+trainer.fast_dev_run=true",
        "trainer.gradient_clip_val=1.0 trainer.precision=bf16-mixed",
        "trust=[my_module]",
        f"model._target_={__name__}.OwnNet +model.depth=3 +model.anything=1",
    ],
)
def test_a_valid_config_is_accepted(overrides):
    validate(config(*overrides.split()))


def test_a_function_of_the_users_own_creates_the_network():
    cfg = config("data.image_size=50")
    node = {"_target_": f"{__name__}.own_head", "num_classes": 10, "image_size": 50, "hidden": None}
    cfg.model = OmegaConf.create(node)
    validate(cfg)
    cfg.model = OmegaConf.create({**node, "hiden": [3]})
    with pytest.raises(ConfigError, match="model.hiden=.3. is invalid: own_head has no argument hiden. Did you"):
        validate(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("+model.depth=8", "model.depth=8 is invalid: AlexNet has no argument depth. Available: num_classes, "),
        ("model=lenet5 +model.norm.size=5 model/norm=batch",
         "model.norm.size=5 is invalid: BatchNorm2d has no argument size."),
        ("data=cifar10 +data.roott=x", "data.roott=x is invalid: CIFAR10DataModule has no argument roott. Did you "
         "mean root?"),
        ("+trainer.max_epoch=3", "trainer.max_epoch=3 is invalid: Trainer has no argument max_epoch. Did you mean "
         "max_epochs?"),
        ("+width=64", "width=64 is invalid: no other key refers to width. Available: seed, "),
        ("+callbacks.bset.monitor=val/acc", "callbacks.bset._target_ not found: every section names a class. "
         "Available: callbacks.best"),
        ("callbacks.best=best", "callbacks.best=best is invalid: expected a mapping with _target_"),
        ("~callbacks.best", "callbacks.best not found"),
        ("~trainer", "trainer not found"),
        ("~model.num_classes", "model.num_classes not found"),
        ("optimizer._target_=torch.optim.Adamm", "optimizer._target_=torch.optim.Adamm cannot be imported"),
        ("augment=mixup augment.mixup.alpha=0", "augment.mixup.alpha=0 is invalid: expected a number above 0"),
        ("augment=[crop_flip,cutmix] augment.cutmix.alpha=-1", "augment.cutmix.alpha=-1 is invalid: expected a num"),
        ("model.norm=batch", "model.norm=batch is invalid: expected a mapping with _target_. Choose an option: "
         "model/norm=batch"),
        ("data.augment=flip", "data.augment=flip is invalid: .* Choose an option: augment=flip$"),
        ("model.activation=gelu", "model.activation=gelu is invalid: .*: model/activation=gelu"),
        ("seed=x", "seed=x is invalid: expected a whole number from 0"),
        ("seed=-1", "seed=-1 is invalid"),
        ("split_seed=4294967296", "split_seed=4294967296 is invalid"),
        ("data.seed=-1", "data.seed=-1 is invalid"),
        ("trust=my_module", "trust=my_module is invalid: expected a list of module names, as in trust=.my_module."),
        ("optimizer.lr=0", "optimizer.lr=0 is invalid: expected a number above 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan is invalid"),
        ("optimizer.lr=inf", "optimizer.lr=inf is invalid"),
        ("optimizer.lr=true", "optimizer.lr=true is invalid: expected a number"),
        ("+optimizer.betas=[0.9,2]", "optimizer._target_=torch.optim.Adam is invalid: Invalid beta parameter at index "
         "1"),
        ("+optimizer.weight_decay=-1", "Invalid weight_decay value: -1"),
        ("optimizer._target_=torch.optim.Muon ~optimizer.fused", "optimizer._target_=torch.optim.Muon is invalid: "),
        ("scheduler.factor=1.5", "scheduler.factor=1.5 is invalid: expected a number above 0 and up to 1"),
        ("scheduler.factor=1", "scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau is invalid: Factor"),
        ("scheduler.patience=-1", "scheduler.patience=-1 is invalid"),
        ("scheduler.patience=1.5", "scheduler.patience=1.5 is invalid: expected a whole number"),
        ("~scheduler.factor ~scheduler.patience scheduler._target_=torch.optim.lr_scheduler.StepLR",
         "scheduler._target_=torch.optim.lr_scheduler.StepLR is invalid: .*step_size"),
        ("scheduler=cosine scheduler.interval=batch", "scheduler.interval=batch is invalid: expected epoch or step"),
        ("scheduler=plateau scheduler.interval=step", "scheduler.interval=step is invalid"),
        ("scheduler=one_cycle scheduler.interval=epoch", "scheduler.interval=epoch is invalid"),
        ("scheduler=one_cycle scheduler.total_steps=0", "scheduler.total_steps=0 is invalid: expected auto"),
        ("scheduler=cosine scheduler.T_max=all", "scheduler.T_max=all is invalid: expected auto"),
        ("data.batch_size=1.5", "data.batch_size=1.5 is invalid: expected a whole number."),
        ("data.std=[0,1,1]", "data.std=.0, 1, 1. is invalid: expected three numbers above 0"),
        ("data.mean=[0.5]", "data.mean=.0.5. is invalid: expected three numbers"),
        ("data.image_size=abc", "data.image_size=abc is invalid: expected a whole number."),
        ("data.image_size=12", "model.image_size=12 is invalid: expected 47 pixels or more for AlexNet"),
        ("model.image_size=abc", "model.image_size=abc is invalid"),
        ("model.dropout=abc", "model.dropout=abc is invalid: expected a number."),
        ("model.channels=7", "model.channels=7 is invalid: expected a list, each entry a whole number."),
        ("model.bias_before_norm=maybe", "model.bias_before_norm=maybe is invalid: expected true or false."),
        ("trainer.max_epochs=0", "trainer.max_epochs=0 is invalid: expected a whole number ≥ 1"),
        ("trainer.max_epochs=-1", "trainer.max_epochs=-1 is invalid: expected a whole number ≥ 1, or a max_steps"),
        ("trainer.max_epochs=-2 +trainer.max_steps=3", "trainer.max_epochs=-2 is invalid"),
        ("trainer.max_epochs=many", "trainer.max_epochs=many is invalid"),
        ("+trainer.max_steps=0", "trainer.max_steps=0 is invalid: expected a whole number ≥ 1"),
        ("trainer.limit_test_batches=0", "trainer.limit_test_batches=0 is invalid"),
        ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches=1.5 is invalid"),
        ("trainer.precision=15", "trainer.precision=15 is invalid: expected one of: auto, 32-true, 16-mixed, bf16-mi"),
        ("trainer.accelerator=cpu trainer.precision=16-mixed", "trainer.precision=16-mixed is invalid: expected auto, "
         "bf16-mixed or 32-true on a CPU"),
        *((f"trainer.precision={name}", f"trainer.precision={name} is invalid: expected one of: auto, 32-true")
          for name in ("64-true", "bf16-true", "16-true", "transformer-engine")),
        ("trainer.accelerator=gup", "trainer.accelerator=gup is invalid: expected one of: .*Did you mean gpu?"),
        ("trainer.accelerator=cpu trainer.devices=0", "trainer.devices=0 is invalid on cpu"),
        ("trainer=ddp trainer.use_distributed_sampler=true", "trainer.use_distributed_sampler=true is invalid: "
         "expected false"),
        ("+trainer.strategy=fsdp", "trainer.strategy=fsdp is invalid: expected one of: auto, ddp"),
        ("callbacks.best.monitor=val_acc", "callbacks.best.monitor=val_acc is invalid: it is never logged. Did you "
         "mean val/acc?"),
        ("callbacks.best.monitor=train/acc", "callbacks.best.monitor=train/acc is invalid: it is never logged in "
         "time."),
        ("callbacks.resume.interval_minutes=x", "callbacks.resume.interval_minutes=x is invalid: expected a number"),
        ("augment=[crop_flip,none]", "augment=none is invalid with the steps crop: expected none alone, or a list"),
        ("callbacks=early_stopping callbacks.early_stopping.monitor=train/loss",
         "callbacks.early_stopping.monitor=train/loss is invalid: it is never logged in time"),
        ("callbacks.best.monitor=val/loss", "callbacks.best.mode=max is invalid: expected min. It would keep the "
         "worst val/loss. Set callbacks.best.mode=min"),
        ("+callbacks.stop=" + STOP % ("val/acc", "min"), "callbacks.stop.mode=min is invalid: expected max"),
        ("+callbacks.mc={_target_:lightning.pytorch.callbacks.ModelCheckpoint,monitor:val/acc}",
         "callbacks.mc.mode=min .the default. is invalid: expected max. .* Set +callbacks.mc.mode=max"),
    ],
)  # fmt: skip
def test_an_invalid_config_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("?", "[?]").replace("+", "[+]")) as refusal:
        validate(config(*overrides.split()))
    assert str(refusal.value).count("\n") <= 2


PHOTOS = ["data=digits", "data.test_crops=1", "data.mean=[1,1,1]", "data.std=[1,1,1]"]


@pytest.mark.parametrize(
    ("overrides", "message", "removed"),
    [
        ("rung=cutout augment=none", "augment.crop={'padding': 4} is invalid: expected a transform with a _target_. If "
         "rung=cutout sets it, remove it: ", "~augment.crop"),
        ("experiment=record augment=flip", "augment.crop={'padding': 4} is invalid: expected a transform with a "
         "_target_. If experiment=record sets them, remove them: ", "~augment.crop ~augment.cutout"),
        ("experiment=record callbacks=default", "callbacks.ema._target_ not found: every section names a class. If "
         "experiment=record sets it, remove it: ", "~callbacks.ema"),
        ("experiment=record scheduler=cosine", "scheduler.cycle_momentum=false is invalid: CosineAnnealingLR has no "
         "argument cycle_momentum. If experiment=record sets it, remove it: ", "~scheduler.cycle_momentum"),
        ("experiment=record scheduler=cosine +scheduler.foo=1", "scheduler.cycle_momentum=false is invalid: "
         "CosineAnnealingLR has no argument cycle_momentum. If experiment=record sets it, remove it: ", None),
        ("experiment=record scheduler=cosine ++scheduler.cycle_momentum=true", "scheduler.cycle_momentum=true is "
         "invalid: CosineAnnealingLR has no argument cycle_momentum. Available: ", None),
        ("scheduler=cosine +scheduler.cycle_momentum=true", "scheduler.cycle_momentum=true is invalid: "
         "CosineAnnealingLR has no argument cycle_momentum. Available: ", None),
        ("experiment=record +scheduler.foo=1", "scheduler.foo=1 is invalid: OneCycleLR has no argument foo.", None),
    ],
)  # fmt: skip
def test_what_is_left_of_an_experiment_is_named_with_the_override_that_removes_it(
    overrides, message, removed, monkeypatch
):
    def check(*added: str) -> None:
        given = [*overrides.split(), *PHOTOS, "local=none", "run_dir=unused", *added]
        with initialize_config_dir(str(REPOSITORY / "conf"), job_name="train", **VERSION_BASE):
            cfg = compose("train", overrides=given, return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        validate(cfg)

    with pytest.raises(ConfigError) as refused:
        check()
    assert str(refused.value).startswith(message + (removed or ""))
    if removed:
        assert str(refused.value) == message + removed
        check(*removed.split())


@pytest.mark.parametrize("group", ["experiment", "rung", "local"])
def test_an_own_option_without_its_package_is_told_the_line_that_it_lacks(group, tmp_path):
    (tmp_path / group).mkdir()
    (tmp_path / group / "own.yaml").write_text("seed: 2\n")
    with pytest.raises(ConfigError, match=f"^{group}=.*2.* is invalid: .* with the line # @package _global_$"):
        validate(config(f"hydra.searchpath=['{tmp_path}']", f"{group}=own"))


@pytest.mark.parametrize("name", ["best", "resume"])
def test_a_missing_callback_that_every_run_needs_is_refused(name):
    cfg = config()
    cfg.callbacks = {key: value for key, value in cfg.callbacks.items() if key != name}
    with pytest.raises(ConfigError, match=f"^callbacks.{name} not found: every run needs it."):
        validate(cfg)


@pytest.mark.parametrize(
    "setting",
    [
        "overfit_batches=2", "val_check_interval=1", "val_check_interval=0.5", "max_time='00:00:00:10'",
        "barebones=true", "reload_dataloaders_every_n_epochs=1", "inference_mode=false", "limit_predict_batches=3",
        "logger=false", "callbacks=null", "plugins=null", "enable_checkpointing=false", "enable_progress_bar=true",
        "model_registry=x", "check_val_every_n_epoch=0", "profiler=nope", "accumulate_grad_batches=0",
        "gradient_clip_val=-1", "gradient_clip_algorithm=max", "fast_dev_run=-1", "max_steps=-5",
    ],
)  # fmt: skip
def test_a_trainer_setting_that_a_run_does_not_support_is_refused(setting):
    with pytest.raises(ConfigError, match=f"^trainer.{setting.partition('=')[0]}=.* is invalid: expected "):
        validate(config(f"++trainer.{setting}"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_missing_gpu_is_refused(accelerator):
    with pytest.raises(
        ConfigError, match=f"trainer.accelerator={accelerator} is invalid: expected one of: auto, cpu. torch"
    ):
        validate(config(f"trainer.accelerator={accelerator}"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_gpus_than_the_machine_has_are_refused():
    count = torch.cuda.device_count()
    validate(config("trainer.accelerator=gpu", f"trainer.devices={count}", "trainer.precision=16-mixed"))
    with pytest.raises(ConfigError, match=f"trainer.devices={count + 1} is invalid on cuda"):
        validate(config("trainer.accelerator=gpu", f"trainer.devices={count + 1}"))


def test_a_saved_config_is_accepted_with_a_key_of_the_users_own(tmp_path):
    """Its references are resolved, so nothing shows any more that another key refers to ``width``."""
    cfg = config("+width=64", "model.fc_width=${width}", run_dir=tmp_path)
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    validate(OmegaConf.load(tmp_path / "config.yaml"))


@pytest.mark.parametrize("monitor", LOGGED_BEFORE_SAVING)
def test_every_monitor_is_logged_before_the_best_checkpoint_compares(monitor, tmp_path):
    settings = ("model=lenet5", "trainer=smoke", "trainer.accelerator=cpu", "trainer.max_epochs=1")
    mode = f"callbacks.best.mode={'max' if '/acc' in monitor else 'min'}"
    run(config(*settings, f"callbacks.best.monitor={monitor}", mode, run_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").exists()


def test_every_monitor_is_logged_once_per_epoch(tmp_path):
    """EarlyStopping raises an error if its metric is missing."""
    settings = ("model=lenet5", "trainer=smoke", "trainer.accelerator=cpu", "trainer.max_epochs=1")
    stops = [
        f"+callbacks.stop{i}=" + STOP % (name, "max" if "/acc" in name else "min") for i, name in enumerate(MONITORS)
    ]
    run(config(*settings, *stops, run_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, True), (1.0, int, False), (True, int, False), ("1", int, False),
        (1, float, True), (1.5, float, True), (True, float, False), ("abc", float, False),
        ("abc", float | Tensor, False), (0.1, float | Tensor, True), (None, float | None, True), (None, float, False),
        ([1, 2], tuple[int, ...], True), ([1, "x"], list[int], False), (3, int | list[int], True),
        ("max", Literal["min", "max"], True), ("mix", Literal["min", "max"], False), ("x", str, True), (3, str, False),
        ("any", nn.Module, True), ({"a": 1}, dict[str, int], True), ([1], dict[str, int], False),
    ],
)  # fmt: skip
def test_types(value, annotation, expected):
    assert matches_type(value, annotation) is expected


def test_types_in_words():
    assert describe_type(int | None) == ["a whole number", "null"]
    assert describe_type(list[float] | float | Tensor) == ["a list, each entry a number", "a number"]
    assert describe_type(Literal["min", "max"]) == ["min", "max"]


def test_arguments_include_those_of_base_classes_for_this_projects_classes_only():
    accepted, others_too = accepted_arguments(CIFAR10DataModule)
    assert not others_too
    assert {"root", "batch_size", "val_fraction", "augment"} <= set(accepted)
    assert "settings" not in accepted
    assert accepted["batch_size"] is int
    accepted, others_too = accepted_arguments(OwnNet)
    assert others_too
    assert set(accepted) == {"depth", "fc_width"}
    assert accepted_arguments(nn.Identity)[1]


def test_the_nearest_name_or_all_names_are_suggested():
    assert did_you_mean("widht", ["width", "depth"]) == " Did you mean width?"
    assert did_you_mean("x", ["width", "depth"]) == " Available: width, depth."
    assert did_you_mean("x", []) == ""
