"""What is refused before a run starts, what is not, and which names a run folder's configuration may contain."""

from typing import Literal

import pytest
import torch
from helpers import config
from omegaconf import OmegaConf
from torch import Tensor, nn

from alexnet_pl.config.schema import accepted_arguments, describe_type, matches_type
from alexnet_pl.config.validate import LOGGED_BEFORE_SAVING, MONITORS, validate
from alexnet_pl.data.cifar10 import CIFAR10DataModule
from alexnet_pl.models.alexnet import AlexNet
from alexnet_pl.runtime.errors import ConfigError, did_you_mean
from alexnet_pl.training.run import run


class OwnNet(AlexNet):
    """As a user may write one: other keys, and some handed on."""

    def __init__(self, depth: int, fc_width: int = 8, **settings):
        self.depth = depth
        super().__init__(fc_width=fc_width, **settings)


def own_head(num_classes: int, image_size: int, hidden: list[int] = None) -> nn.Module:
    return nn.Linear(image_size, num_classes)


STEPS = "{_target_:torch.optim.lr_scheduler.StepLR,_partial_:true,step_size:3}"
MILESTONES = "{_target_:torch.optim.lr_scheduler.MultiStepLR,_partial_:true,milestones:[2,3]}"
STOP = "{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:%s,mode:%s}"


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
        "+optimizer.betas=[0.9,0.99] +trainer.gradient_clip_val=1 trainer.precision=32",
        "+callbacks.stop=" + STOP % ("val/acc", "max"),
        "+callbacks.rate={_target_:lightning.pytorch.callbacks.LearningRateMonitor}",
        "callbacks.best.monitor=val/error callbacks.best.mode=min",
        "+width=64 model.fc_width=${width}",
        "trainer.limit_train_batches=3 trainer.limit_val_batches=0.5",
        f"model._target_={__name__}.OwnNet +model.depth=3 +model.anything=1",
    ],
)
def test_what_works_is_let_through(overrides):
    validate(config(*overrides.split()))


def test_a_function_of_ones_own_makes_the_model():
    cfg = config("data.image_size=50")
    node = {"_target_": f"{__name__}.own_head", "num_classes": 10, "image_size": 50, "hidden": None}
    cfg.model = OmegaConf.create(node)
    validate(cfg)
    cfg.model = OmegaConf.create({**node, "hiden": [3]})
    with pytest.raises(ConfigError, match="model.hiden=.3. is not possible: own_head has no argument hiden. Did you"):
        validate(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("+model.depth=8", "model.depth=8 is not possible: AlexNet has no argument depth. Available: num_classes, "),
        ("model=lenet5 +model.norm.size=5 model/norm=batch",
         "model.norm.size=5 is not possible: BatchNorm2d has no argument size."),
        ("data=cifar10 +data.roott=x", "data.roott=x is not possible: CIFAR10DataModule has no argument roott. Did you "
         "mean root?"),
        ("+trainer.max_epoch=3", "Trainer has no argument max_epoch. Did you mean max_epochs?"),
        ("+width=64", "width=64: nothing reads a key width. Available: seed, "),
        ("+callbacks.bset.monitor=val/acc", "callbacks.bset has no _target_, so it describes nothing. Available: "
         "callbacks.best"),
        ("~callbacks.best", "callbacks.best is missing"),
        ("~logger.csv", "logger.csv is missing"),
        ("~trainer", "trainer is missing"),
        ("~model.num_classes", "model.num_classes is missing"),
        ("optimizer._target_=torch.optim.Adamm", "optimizer._target_=torch.optim.Adamm cannot be imported"),
        ("seed=x", "seed=x is not possible: it is a whole number from 0"),
        ("seed=-1", "seed=-1"),
        ("split_seed=4294967296", "split_seed=4294967296"),
        ("data.seed=-1", "data.seed=-1"),
        ("optimizer.lr=0", "optimizer.lr=0 is not possible: it is a number above 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan"),
        ("optimizer.lr=inf", "optimizer.lr=inf"),
        ("optimizer.lr=true", "optimizer.lr=true is not possible: it is a number"),
        ("+optimizer.betas=[0.9,2]", "optimizer=torch.optim.Adam is not possible: Invalid beta parameter at index 1"),
        ("+optimizer.weight_decay=-1", "Invalid weight_decay value: -1"),
        ("scheduler.factor=1", "scheduler.factor=1 is not possible: it is above 0 and below 1"),
        ("scheduler.patience=-1", "scheduler.patience=-1"),
        ("scheduler.patience=1.5", "scheduler.patience=1.5 is not possible: it is a whole number"),
        ("~scheduler.factor ~scheduler.patience scheduler._target_=torch.optim.lr_scheduler.StepLR",
         "scheduler=torch.optim.lr_scheduler.StepLR is not possible: .*step_size"),
        ("data.batch_size=1.5", "data.batch_size=1.5 is not possible: it is a whole number."),
        ("data.std=[0,1,1]", "data.std=.0, 1, 1. is not possible: it is three numbers above 0"),
        ("data.mean=[0.5]", "data.mean=.0.5. is not possible: it is three numbers"),
        ("data.image_size=abc", "data.image_size=abc is not possible: it is a whole number."),
        ("model.image_size=abc", "model.image_size=abc"),
        ("model.dropout=abc", "model.dropout=abc is not possible: it is a number."),
        ("model.channels=7", "model.channels=7 is not possible: it is a list, each entry a whole number."),
        ("model.bias_before_norm=maybe", "model.bias_before_norm=maybe is not possible: it is true or false."),
        ("trainer.max_epochs=0", "trainer.max_epochs=0 is not possible: it is a whole number, 1 or more"),
        ("trainer.max_epochs=-1", "trainer.max_epochs=-1"),
        ("trainer.max_epochs=many", "trainer.max_epochs=many"),
        ("trainer.limit_test_batches=0", "trainer.limit_test_batches=0"),
        ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches=1.5"),
        ("trainer.precision=15", "trainer.precision=15 is not possible: it is .*16-mixed.* or auto"),
        ("trainer.accelerator=cpu trainer.precision=16-mixed", "trainer.precision=16-mixed is not possible on a CPU"),
        ("trainer.accelerator=gup", "trainer.accelerator=gup does not exist. Did you mean gpu?"),
        ("trainer.accelerator=cpu trainer.devices=0", "trainer.devices=0 is not possible on cpu"),
        ("callbacks.best.monitor=val_acc", "callbacks.best.monitor=val_acc is never logged. Did you mean val/acc?"),
        ("callbacks.best.monitor=train/acc", "callbacks.best.monitor=train/acc is never logged in time."),
        ("~callbacks.resume", "callbacks.resume is missing"),
        ("callbacks.resume.interval_minutes=x", "callbacks.resume.interval_minutes=x is not possible: it is a number"),
        ("callbacks.best.monitor=val/loss", "callbacks.best.mode=max takes the worst val/loss for the best: set "
         "callbacks.best.mode=min"),
        ("+callbacks.stop=" + STOP % ("val/acc", "min"), "callbacks.stop.mode=min takes the worst val/acc"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("?", "[?]").replace("+", "[+]")) as refusal:
        validate(config(*overrides.split()))
    assert str(refusal.value).count("\n") <= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_missing_gpu_is_refused(accelerator):
    with pytest.raises(ConfigError, match=f"trainer.accelerator={accelerator} is not possible.*Available: auto, cpu"):
        validate(config(f"trainer.accelerator={accelerator}"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_gpus_than_there_are_are_refused():
    count = torch.cuda.device_count()
    validate(config("trainer.accelerator=gpu", f"trainer.devices={count}", "trainer.precision=16-mixed"))
    with pytest.raises(ConfigError, match=f"trainer.devices={count + 1} is not possible on cuda"):
        validate(config("trainer.accelerator=gpu", f"trainer.devices={count + 1}"))


def test_a_configuration_from_a_run_folder_is_let_through_with_a_key_of_ones_own(tmp_path):
    """Its references are resolved, so that nothing shows who read ``width``."""
    cfg = config("+width=64", "model.fc_width=${width}", run_dir=tmp_path)
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    validate(OmegaConf.load(tmp_path / "config.yaml"))


@pytest.mark.parametrize("monitor", LOGGED_BEFORE_SAVING)
def test_every_monitor_is_logged_when_a_checkpoint_looks_for_it(monitor, tmp_path):
    settings = ("model=lenet5", "trainer=smoke", "trainer.accelerator=cpu", "trainer.max_epochs=1")
    mode = f"callbacks.best.mode={'max' if '/acc' in monitor else 'min'}"
    run(config(*settings, f"callbacks.best.monitor={monitor}", mode, run_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").exists()


def test_every_monitor_is_logged_in_an_epoch(tmp_path):
    """EarlyStopping fails where the quantity is not there."""
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


def test_arguments_are_followed_through_this_projects_classes_only():
    accepted, others_too = accepted_arguments(CIFAR10DataModule)
    assert not others_too
    assert {"root", "batch_size", "val_fraction", "augment"} <= set(accepted)
    assert "settings" not in accepted
    assert accepted["batch_size"] is int
    accepted, others_too = accepted_arguments(OwnNet)
    assert others_too
    assert set(accepted) == {"depth", "fc_width"}
    assert accepted_arguments(nn.Identity)[1]


def test_the_nearest_name_or_all_of_them():
    assert did_you_mean("widht", ["width", "depth"]) == " Did you mean width?"
    assert did_you_mean("x", ["width", "depth"]) == " Available: width, depth."
    assert did_you_mean("x", []) == ""
