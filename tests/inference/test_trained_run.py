"""Loading trained runs: directories and lone checkpoints, hostile and corrupt files, networks of the user's own."""

import json
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import config

from alexnet_pl import load_run
from alexnet_pl.inference.trained_run import load_net
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.training.run import run as train_run
from inference import RUN


def test_a_directory_and_its_lone_checkpoint_give_the_same_network(folder, run, tmp_path):
    lone = load_run(shutil.copy(folder / "checkpoints/best.ckpt", tmp_path / "lone.ckpt"))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(lone.probabilities(images), run.probabilities(images))
    assert not run.net.training
    assert lone.class_names == run.class_names == tuple("0123456789")
    assert lone.preprocess == run.preprocess
    assert (lone.result, lone.folder) == (None, tmp_path)
    assert run.epoch == run.result["best_epoch"]


def test_a_run_without_recorded_class_names_uses_those_of_its_data(edited):
    def forget(checkpoint):
        del checkpoint["hyper_parameters"]["class_names"], checkpoint["hyper_parameters"]["version"]

    assert load_run(edited(forget)).class_names == tuple("0123456789")


def test_files_that_are_not_runs_are_refused_in_one_line(folder, edited, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").touch()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps(print))
    whole = (folder / "checkpoints/best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")

    def set_config(path, value):
        section, _, key = path.rpartition(".")

        def change(checkpoint):
            config = checkpoint["hyper_parameters"]
            (config[section] if section else config)[key] = value

        return change

    edited(set_config("version", "99.0"), "newer.ckpt")
    edited(set_config("version", "one.two"), "broken-version.ckpt")
    edited(set_config("version", 7), "number-version.ckpt")
    edited(set_config("model.depth", 3), "unknown.ckpt")
    edited(set_config("model", None), "no-model.ckpt")
    edited(set_config("data.image_size", 10**6), "large-side.ckpt")
    edited(set_config("data.std", [0.5, 0.0, 0.5]), "zero-std.ckpt")
    edited(set_config("class_names", [1, 2]), "numbers.ckpt")
    edited(set_config("class_names", [str(i) for i in range(11)]), "more-names.ckpt")
    edited(lambda checkpoint: checkpoint.update(state_dict={}), "weights.ckpt")
    for name, message in [
        ("nowhere", "not found"),
        ("x" * 256, "cannot be read: File name too long"),
        ("empty", "is not a run directory"),
        ("begun", "has no checkpoints/best.ckpt"),
        ("text.ckpt", "is corrupt"),
        ("code.ckpt", "is corrupt"),
        ("cut.ckpt", "is corrupt"),
        ("other.ckpt", "is not a checkpoint of an alexnet_pl run"),
        ("newer.ckpt", "written by alexnet_pl 99.0, newer than this"),
        ("broken-version.ckpt", "'one.two' is not a version"),
        ("number-version.ckpt", "'7' is not a version"),
        ("unknown.ckpt", "does not fit this version"),
        ("no-model.ckpt", "its config lacks model"),
        ("large-side.ckpt", "data.image_size=1000000 is invalid: expected an integer from 1 to 4096"),
        ("zero-std.ckpt", "std above 0"),
        ("numbers.ckpt", "class_names is invalid: expected a list of text"),
        ("more-names.ckpt", "expected 1 to 10 names, not 11"),
        ("weights.ckpt", "its weights do not fit the network"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_run(tmp_path / name)
        assert "\n" not in str(caught.value)


# --- checkpoints from strangers -------------------------------------------------------------------------------------


SHARDS = "alexnet_pl.data.shards.Shards"

HOSTILE = [
        {"_target_": "os.system", "command": "false"},
        {"_target_": "builtins.open", "file": "/etc/passwd"},
        {"_target_": "torch.hub.load", "repo_or_dir": "x/y", "model": "z"},
        {"_target_": "torch.load", "f": "/etc/passwd"},
        {"_target_": "torch.nn.init.zeros_"},
        {"_target_": "alexnet_pl.training.run.run"},
        {"_target_": "alexnet_pl.data.shards.Shards", "root": "SERVER/a"},
        {"_target_": "alexnet_pl.data.shards.reader.Shards", "root": "SERVER/b"},
        {"_target_": "alexnet_pl.data.shards.reader.Shards", "root": "reference://x::SERVER/c"},
        {"_target_": "alexnet_pl.data.ShardedDataModule", "root": "SERVER/d"},
        {"_target_": "alexnet_pl.data.CIFAR10DataModule", "root": "/etc"},
        {"_target_": "lightning.Trainer", "logger": True},
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "MARK"},
        {"_target_": "lightning.pytorch.loggers.WandbLogger"},
        {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "MARK"},
        {"_target_": "torchvision.datasets.utils.download_url", "url": "SERVER/e", "root": "MARK"},
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": SHARDS, "root": "SERVER/f"}]},
        {"_target_": "hydra.utils.get_object", "path": "os.system"},
]  # fmt: skip


@pytest.mark.security
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile["_target_"])
@pytest.mark.parametrize("place", ["model.activation", "model", "data", "data.augment"])
def test_a_hostile_checkpoint_reads_no_file_and_sends_no_request(hostile, place, edited, server, tmp_path):
    address, requests = server
    text = json.dumps(hostile).replace("SERVER", address).replace("MARK", str(tmp_path / "mark"))
    section, _, key = place.partition(".")

    def change(checkpoint):
        config = checkpoint["hyper_parameters"]
        if key:
            config[section][key] = json.loads(text)
        else:
            config[section].update(json.loads(text))

    if place == "data" and hostile["_target_"].endswith("DataModule"):  # one of this project's, which is not created
        load_run(edited(change))
    else:
        with pytest.raises(UserError, match="is refused"):
            load_run(edited(change))
    assert requests == []
    assert not (tmp_path / "mark").exists()


@pytest.mark.security
@pytest.mark.parametrize(
    "changes",
    [
        {"activation": {"_target_": "torch.nn.ZeroPad2d", "padding": 5000, "_partial_": True}},
        {"activation": {"_target_": "torch.nn.Upsample", "scale_factor": 300, "_partial_": True}},
        {"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 10**9},
        {"_target_": "torchvision.models.DenseNet", "block_config": [10**9]},
        {"channels": [10**9, 16]},
    ],
    ids=str,
)
def test_a_network_without_bounds_is_refused_before_memory_is_allocated(changes, edited):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"(is refused|does not fit this version|do not fit)") as caught:
        load_run(edited(lambda checkpoint: checkpoint["hyper_parameters"]["model"].update(changes)))
    assert "If you trust" in str(caught.value) or "does not fit this version" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.security
def test_a_hostile_name_is_not_imported(edited, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for section in ("model", "data"):
        path = edited(lambda checkpoint, s=section: checkpoint["hyper_parameters"][s].update(_target_="stranger.Net"))
        with pytest.raises(UserError, match=rf"{section}._target_=stranger.Net is refused"):
            load_run(path)
    assert "stranger" not in sys.modules


@pytest.mark.security
def test_sizes_that_the_file_does_not_hold_allocate_nothing(edited):
    def widen(checkpoint):
        checkpoint["hyper_parameters"]["model"]["num_classes"] = 10**6
        for name, tensor in checkpoint["state_dict"].items():
            if tensor.shape[0] == 10:  # one stored value, expanded to 320 MiB without memory
                checkpoint["state_dict"][name] = tensor.new_zeros(()).expand(10**6, *tensor.shape[1:])

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="weights are corrupt: they are larger than what the file stores"):
        load_run(edited(widen))
    for classes, message in ((10**6, "its weights do not fit"), (10**9, "model is refused: a tensor has 320,435 MiB")):
        with pytest.raises(UserError, match=message):
            load_run(edited(lambda file, count=classes: file["hyper_parameters"]["model"].update(num_classes=count)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_every_model_of_the_project_can_be_built_on_the_meta_device():
    for name in ("alexnet_lrn", "alexnet_paper", "alexnet_torchvision", "cnn4", "lenet5"):
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        model = OmegaConf.to_container(config(f"model={name}").model, resolve=True)
        weights = instantiate(model).state_dict()
        state = {f"net.{key}": value for key, value in weights.items()}
        assert load_net(model, state, model["image_size"]).state_dict().keys() == weights.keys()


# --- networks of the user's own -------------------------------------------------------------------------------------

OWN_NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, image_size):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.mark.slow
@pytest.mark.security
def test_a_network_of_the_users_own_needs_trust_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(OWN_NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = config(*RUN, "trainer=smoke", run_dir=tmp_path / "run")
    cfg.model = {"_target_": "my_nets.Net", "num_classes": 10, "image_size": 32}
    train_run(cfg)
    with pytest.raises(UserError, match=r"model._target_=my_nets.Net is refused") as caught:
        load_run(tmp_path / "run")
    assert "--trust my_nets" in str(caught.value)
    run = load_run(tmp_path / "run", trust=("my_nets",))
    assert run.name == "Net on digits"

    # In a fresh process of the installed command, which does not have the current directory on its path.
    script = "import sys; sys.path.remove(''); from alexnet_pl.__main__ import main; main(sys.argv[1:])"

    def alexnet(*arguments):
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    refused = alexnet("evaluate", "run")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--trust my_nets" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = alexnet("evaluate", "run", "--trust", "my_nets", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test/acc"] == run.result["test/acc"]
    done = alexnet("export", "run", "--trust", "my_nets", "--format", "safetensors")
    assert done.returncode == 0, done.stderr
