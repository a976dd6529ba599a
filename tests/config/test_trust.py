"""Allow-list for foreign configs: which names each section accepts, limits on size and nesting, opt-in trust."""

import builtins
import subprocess
import sys

import pytest
from helpers import config
from omegaconf import OmegaConf
from torch import nn

from alexnet_pl.config.trust import MAX_VALUES, check_targets, refused_targets
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.run_folder import MAX_DEPTH, MAX_FILE_BYTES, MAX_FILE_VALUES, load_plain

pytestmark = pytest.mark.security


class OwnNet(nn.Module):
    """A network of the user's own module."""


def own_net() -> nn.Module:
    return OwnNet()


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "model=lenet5 augment=crop_flip",
        "experiment=tutorial",
        "model=alexnet_bn ~scheduler",
        "augment=crop_flip_color optimizer=sgd scheduler=warmup_plateau data=cifar10",
        "data=shards scheduler=cosine trainer=ddp",
        "data=image_folder augment=paper",
    ],
)
def test_every_config_of_this_project_is_accepted(overrides, tmp_path):
    cfg = config(*overrides.split(), run_dir=tmp_path)
    plain = OmegaConf.to_container(cfg, resolve=True)
    check_targets(plain)
    check_targets(OmegaConf.create(plain))


ACCEPTED = {
    "model": ["torch.nn.SyncBatchNorm", "torch.nn.Sequential", "torchvision.models.DenseNet", "alexnet_pl.models.CNN4"],
    "augment": ["torchvision.transforms.v2.RandomErasing", "alexnet_pl.data.RandomCropFlip", "torch.nn.Identity"],
    "optimizer": ["torch.optim.AdamW"],
    "scheduler": ["torch.optim.lr_scheduler.OneCycleLR", "alexnet_pl.training.WarmupPlateau"],
    "data": ["alexnet_pl.data.DigitsDataModule"],
    "trainer": ["lightning.Trainer", "alexnet_pl.training.Trainer"],
}


@pytest.mark.parametrize(("section", "target"), [(key, name) for key, names in ACCEPTED.items() for name in names])
def test_classes_of_a_section_are_accepted_there_and_in_no_other(section, target):
    check_targets({section: {"_target_": target}})
    for other in {*ACCEPTED, "callbacks", "logger", "seed"} - {section}:
        if target not in ACCEPTED.get(other, []) and not (other in ("model", "augment") and ".nn." in target):
            with pytest.raises(ConfigError, match=f"^{other}._target_={target} is refused"):
                check_targets({other: {"_target_": target}})


@pytest.mark.parametrize(
    ("section", "target"),
    [
        ("callbacks", "lightning.pytorch.callbacks.EarlyStopping"),
        ("callbacks", "alexnet_pl.training.Dashboard"),
        ("logger", "lightning.pytorch.loggers.CSVLogger"),
        ("logger", "alexnet_pl.training.MetricsCSV"),
    ],
)
def test_callbacks_and_loggers_are_accepted_by_name_only_one_level_below_their_section(section, target):
    check_targets({section: {"mine": {"_target_": target}}})
    check_targets({section: [{"_target_": target}]})
    for nested in ({"_target_": target}, {"mine": {"inner": {"_target_": target}}}):
        with pytest.raises(ConfigError, match="_target_=.* is refused"):
            check_targets({section: nested})


REFUSED = [
    "os.system", "builtins.eval", "subprocess.Popen", "my_project.Net", "torchx.nn.Module", "torch", "torch.nn", "",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.jit.ScriptModule", "torch.fx.GraphModule",
    "torch.os.system", "torch.hub.os.system", "torch.serialization.pickle.Unpickler", "torch.hub.Path",
    "torch.utils.cpp_extension.load", "torch.multiprocessing.Process", "torch.nn.functional.relu",
    "torch.nn.modules.module.torch.load", "torch.nn.Module.__subclasses__", "torch.nn.init.torch.os.system",
    "torch.optim.lr_scheduler.partial", "torchvision.datasets.CIFAR10", "torchvision.models.resnet18",
    "torchvision.datasets.utils.download_url", "lightning.pytorch.cli.LightningCLI", "lightning.pytorch.__main__",
    "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule", "alexnet_pl.runtime.system.subprocess.Popen",
    "alexnet_pl.training.run.run", "alexnet_pl.data.cifar10.shutil.rmtree", "torch.nn.Identity ",
    "torch.nn.\nIdentity", "alexnet_pl.data.shards.Shards", "alexnet_pl.data.shards.reader.Shards",
    "alexnet_pl.models.layers.torch.load", "lightning.Trainer", "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.callbacks.ModelCheckpoint", "alexnet_pl.data.CIFAR10DataModule", "torch.nn.Parameter",
    "torch.nn.LinearCrossEntropyOptions", "alexnet_pl.models.layers", "torch.nn.Identity.",
]  # fmt: skip


@pytest.mark.parametrize("target", REFUSED)
@pytest.mark.parametrize("place", ["norm", "activation", "pool"])
def test_other_names_are_refused_in_a_network(place, target):
    with pytest.raises(ConfigError, match=rf"^model\.{place}\._target_=") as refusal:
        check_targets(OmegaConf.create({"model": {"_target_": "torch.nn.Identity", place: {"_target_": target}}}))
    assert "is refused" in str(refusal.value)


PLACES = {
    "activation": ["torch.nn.ReLU", "torch.nn.PReLU", "torch.nn.Identity"],
    "norm": ["torch.nn.GroupNorm", "alexnet_pl.models.LocalResponseNorm", "torch.nn.Identity"],
    "pool": ["torch.nn.MaxPool2d", "alexnet_pl.models.OverlappingMaxPool2d", "torch.nn.Identity"],
}


@pytest.mark.parametrize(("place", "target"), [(place, name) for place, names in PLACES.items() for name in names])
def test_a_place_of_a_network_accepts_layers_of_its_kind_only(place, target):
    for other, names in PLACES.items():
        config = {"model": {"_target_": "alexnet_pl.models.AlexNet", other: {"_target_": target, "_partial_": True}}}
        if target in names:
            check_targets(config)
        else:
            with pytest.raises(ConfigError, match=rf"^model.{other}._target_={target} is refused.* Expected a cl"):
                check_targets(config)
    for layer in ("ZeroPad2d", "Upsample", "LSTM", "Linear", "Sequential", "Embedding", "PixelShuffle", "Unfold"):
        config = {"model": {"_target_": "torch.nn.Identity", place: {"_target_": f"torch.nn.{layer}"}}}
        with pytest.raises(ConfigError, match=rf"is refused.*\n.*--trust torch.nn.{layer}"):
            check_targets(config)
        check_targets(config, trust=[f"torch.nn.{layer}"])


SECTIONS = ["model", "augment", "data", "loss", "optimizer", "scheduler", "trainer", "callbacks"]


@pytest.mark.parametrize("section", SECTIONS)
def test_names_are_refused_before_anything_is_imported(section, monkeypatch):
    """Hydra's ``get_object`` imports every prefix of a name, and importing alone runs code."""
    imported = []
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: imported.append(name) or real(name, *rest))
    for target in ("antigravity.x.Net", "torch.utils.cpp_extension.Net", "alexnet_pl.cli.serve.Net"):
        assert target.rpartition(".")[0] not in sys.modules or target.startswith(("torch", "alexnet_pl"))
        with pytest.raises(ConfigError, match="is refused"):
            check_targets({section: {"_target_": target, "x": {"_target_": target}}})
        assert target.rpartition(".")[0] not in imported
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "place",
    [
        {"a": [{"b": {"_target_": "os.system"}}]},
        [{"_target_": "os.system"}],
        {"_target_": "torch.nn.Identity", "_args_": [{"_target_": "os.system"}]},
        {"_target_": "torch.nn.Identity", "_recursive_": False, "x": {"_target_": "os.system"}},
        {"_target_": "torch.nn.Identity", "_partial_": True, "_convert_": "all", "x": [[{"_target_": "os.system"}]]},
        ({"_target_": "os.system"},),
    ],
    ids=str,
)
def test_targets_are_found_wherever_they_are(place):
    with pytest.raises(ConfigError, match="_target_=os.system is refused"):
        check_targets({"model": place})


def test_a_target_outside_the_sections_is_refused():
    for tree in ({"_target_": "torch.nn.Identity"}, {"mine": {"_target_": "torch.nn.Identity"}}):
        with pytest.raises(ConfigError, match="_target_=torch.nn.Identity is refused"):
            check_targets(tree)


def test_a_target_that_is_not_text_and_an_unknown_hydra_key_are_refused():
    with pytest.raises(ConfigError, match="_target_"):
        check_targets({"model": {"_target_": ["os.system"]}})
    with pytest.raises(ConfigError, match="model._mode_ is refused"):
        check_targets({"model": {"_target_": "torch.nn.Identity", "_mode_": "x"}})


def test_interpolations_are_refused():
    hidden = OmegaConf.create({"model": "${oc.create:'{_target_: os.system}'}"})
    with pytest.raises(ConfigError, match="^model=.* is refused: the config of a run directory has no interpol"):
        check_targets(hidden)


# --- opt-in ---------------------------------------------------------------------------------------------------------


def test_the_refusal_names_the_option_that_trusts_a_users_module():
    with pytest.raises(ConfigError, match=r"--trust my_module, for train trust=\[my_module\]"):
        check_targets({"model": {"_target_": "my_module.Net"}})
    with pytest.raises(ConfigError, match="trust=.torchvision.models.resnet18."):
        check_targets({"model": {"_target_": "torchvision.models.resnet18"}})
    for target in ("os.system", "alexnet_pl.data.shards.Shards", "torch.hub.load"):
        with pytest.raises(ConfigError, match="is refused") as refusal:
            check_targets({"model": {"_target_": target}})
        assert "trust" not in str(refusal.value)


def test_a_trusted_module_means_what_it_defines_not_what_it_imports():
    for target in (f"{__name__}.OwnNet", f"{__name__}.own_net"):
        with pytest.raises(ConfigError, match="is refused"):
            check_targets({"model": {"_target_": target}})
        check_targets({"model": {"_target_": target}}, trust=[__name__])
    assert subprocess.Popen
    for target in ("subprocess.Popen", "sys.modules", "builtins.eval", "__class__", "nn.Module"):
        with pytest.raises(ConfigError, match="is refused"):
            check_targets({"model": {"_target_": f"{__name__}.{target}"}}, trust=[__name__])
    check_targets({"model": {"_target_": "torchvision.models.resnet18"}}, trust=["torchvision.models.resnet18"])


AUGMENT_BOMBS = [
    {"_target_": "torch.nn.ZeroPad2d", "padding": 30_000},
    {"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 10**9},
    {"_target_": "torch.nn.Upsample", "scale_factor": 1000},
    {"_target_": "torch.nn.Linear", "in_features": 10**6, "out_features": 10**6},
    {"_target_": "torchvision.transforms.v2.RandomZoomOut", "side_range": [1, 1000]},
    {"_target_": "torchvision.transforms.v2.ScaleJitter", "target_size": [9, 9], "scale_range": [1, 999]},
    {"_target_": "torchvision.transforms.v2.Resize", "size": [30_000, 30_000]},
    {"_target_": "torchvision.transforms.v2.GaussianBlur", "kernel_size": 99_999},
    {"_target_": "alexnet_pl.data.RandomCropFlip", "padding": 30_000},
    {"_target_": "alexnet_pl.data.Compose", "crop": {"_target_": "alexnet_pl.data.RandomCropFlip", "padding": -1e9}},
    {"_target_": "torchvision.transforms.v2.ElasticTransform", "sigma": float("inf")},
]
PADDED = {"_target_": "torchvision.transforms.v2.Pad", "padding": 1024}


@pytest.mark.parametrize("bomb", AUGMENT_BOMBS, ids=lambda bomb: bomb["_target_"])
def test_an_augmentation_that_enlarges_images_without_bound_is_refused(bomb):
    for hostile in ({"augment": bomb}, {"data": {"augment": bomb}}):
        with pytest.raises(ConfigError, match=r"^(data\.)?augment\..* is refused"):
            check_targets(hostile)
        check_targets(hostile, trust=[bomb["_target_"]])


def test_augmentations_that_enlarge_images_together_are_refused():
    """Thirty steps of 1,024 pixels each are 11 GB per image."""
    steps = {f"pad{i}": PADDED for i in range(30)}
    with pytest.raises(ConfigError, match="is refused: expected numbers up to 4096 in total in augmentations"):
        check_targets({"augment": {"_target_": "alexnet_pl.data.Compose", **steps}})
    check_targets({"augment": PADDED, "data": {"augment": PADDED}})


def test_a_null_character_is_refused():
    with pytest.raises(ConfigError, match="logger.tensorboard.name is refused: it holds a null character"):
        check_targets({"logger": {"tensorboard": {"name": "a\0b"}}})


def test_the_names_that_need_trust_are_listed():
    cfg = config("model._target_=my_module.Net", "+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint")
    assert refused_targets(cfg) == ["my_module.Net", "lightning.pytorch.callbacks.ModelCheckpoint"]
    check_targets(OmegaConf.to_container(cfg, resolve=True), trust=refused_targets(cfg))
    assert refused_targets(config("model=lenet5")) == []


# --- limits ---------------------------------------------------------------------------------------------------------


def test_aliases_in_memory_do_not_multiply():
    tree = [1]
    for _ in range(20):
        tree = [tree] * 10
    endless = []
    endless.append(endless)
    for bomb in (tree, endless, {"a": list(range(MAX_VALUES + 1))}):
        with pytest.raises(ConfigError, match="levels deep|values"):
            check_targets({"model": bomb})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 100_000, "nested more than"),
        ("- " * 100_000, "nested more than"),
        ("{a: " * 60_000, "nested more than"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("a: &a {x: 1}\nb: {<<: *a}", "aliases"),
        (f"a: [{'1,' * 3 * MAX_FILE_VALUES}]", "more than"),
        (f"a: {'x' * MAX_FILE_BYTES}", "at most 256 KiB"),
        ("a: b: c", "mapping values"),
        ("a: !!python/object/apply:os.system [id]", "corrupt"),
        ("[1]", "expected a mapping"),
        ("a: \x00", "corrupt"),
    ],
    ids=range(11),
)
def test_a_yaml_bomb_is_refused_by_its_form(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"config.yaml is corrupt: .*{message}" if message != "corrupt" else message):
        load_plain(path)


def test_a_runs_config_is_loaded_as_plain_values(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-3\nlist: [1, é]\nref: ${lr}\nnone: null\n1: {a: b}", encoding="utf-8")
    assert load_plain(path) == {"lr": 1e-3, "list": [1, "é"], "ref": "${lr}", "none": None, "1": {"a": "b"}}
    nested = "a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    path.write_text(nested)
    assert load_plain(path)
