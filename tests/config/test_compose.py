"""Composition outside ``alexnet train``: overrides from Python, Hydra's state, own options, settings of the machine."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import REPOSITORY, config
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import OmegaConf

from alexnet_pl.config.compose import (
    CONF,
    OWN_OPTIONS,
    compose,
    find_own_options,
    name_run_dir,
    own_options_dir,
    refuse_lists,
    refuse_same_steps,
    to_overrides,
    to_sweep,
)
from alexnet_pl.config.hydra_versions import IS_1_4, VERSION_BASE, instantiate
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.studies.hydra_callback import check_launcher, check_slurm
from alexnet_pl.studies.store import config_hash, trial_entry

OTHER_VERSION_BASE = {} if IS_1_4 else {"version_base": "1.2"}
"""Argument of another application than ours; Hydra 1.4 accepts none."""


@pytest.fixture
def own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory of one's own options: a model whose name Hydra fills in, and settings of the machine."""
    directory = tmp_path / "own options"
    (directory / "model").mkdir(parents=True)
    (directory / "local").mkdir()
    (directory / "model" / "tiny.yaml").write_text("defaults: [lenet5, _self_]\nfc_widths: [8, 8]\n")
    (directory / "logger").mkdir()
    (directory / "logger" / "named.yaml").write_text(
        "csv:\n  _target_: alexnet_pl.training.MetricsCSV\n  path: ${hydra:runtime.choices.model}/${now:%Y}.csv\n"
    )
    (directory / "local" / "default.yaml").write_text("# @package _global_\ndata_dir: /datasets\nseed: 7\n")
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    return directory


# --- overrides from Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["data", "loss", "model", "optimizer", "scale", "scheduler", "trainer", "model/norm"])
@pytest.mark.parametrize("value", ["[a,b]", "[a]", "[a, b],[c]", "a,[b,c]"])
def test_a_list_of_options_is_refused_where_one_is_expected(group, value):
    with pytest.raises(ConfigError) as refused:
        refuse_lists(["seed=1", f"{group}={value}"])
    assert str(refused.value).startswith(f"{group}={value} is invalid: expected one option")
    assert f"-m {group}=a" in str(refused.value)


def test_lists_are_kept_where_they_combine():
    refuse_lists(["augment=[crop_flip,cutout]", "logger=[csv,mlflow]", "callbacks=[default,ema]", "data.mean=[1,2]",
                  "data=digits,mnist", "model=glob([a*,b*])", "model=glob(*,exclude=[a])", "rung=[a,b]"])  # fmt: skip


@pytest.mark.parametrize(
    ("options", "step"),
    [("crop_flip,crop", "crop"), ("crop_flip, paper", "crop"), ("cutout,crop_flip,crop_flip_color", "crop")],
)
def test_options_that_set_the_same_step_are_refused(options, step):
    for refusing in (refuse_same_steps, compose):
        with pytest.raises(ConfigError, match=rf"augment=\[{options}\] is invalid: .* both set augment.{step}"):
            refusing([f"augment=[{options}]"])
    refuse_same_steps(["augment=[crop_flip],[crop_flip,cutout]", "augment=crop,crop_flip", "augment=[crop,unknown]"])


@pytest.mark.parametrize("overrides", [["augment=broken"], ["augment=[broken,flip]"]])
def test_an_own_option_that_is_not_yaml_is_a_config_error(overrides, own_options, monkeypatch):
    (own_options / "augment").mkdir()
    (own_options / "augment" / "broken.yaml").write_text("flip:\n\tprobability: 1\n")
    monkeypatch.setenv(OWN_OPTIONS, str(own_options))
    with pytest.raises(ConfigError, match="broken.yaml is invalid YAML in line 2: "):
        compose(overrides)


@pytest.mark.parametrize("override", ["optimizer=[adam,sgd]", "+data=[digits,mnist]"])
def test_compose_refuses_a_list_of_options(override):
    with pytest.raises(ConfigError, match="is invalid: expected one option"):
        compose([override])


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"model": "lenet5", "seed": 3}, ["model=lenet5", "seed=3"]),
        ({"trainer": {"max_epochs": 2, "profile": False}}, ["trainer.max_epochs=2", "trainer.profile=False"]),
        ({"scheduler.factor": 0.5, "compile": None}, ["scheduler.factor=0.5", "compile=null"]),
        ({"data.root": Path("/a b")}, ["data.root='/a b'"]),
        ({"trust": ["a", "1"], "data.mean": (0.1, 0.2)}, ["trust=[a,'1']", "data.mean=[0.1,0.2]"]),
        ({"model.channels": [[1, 2], [3]]}, ["model.channels=[[1,2],[3]]"]),
    ],
)
def test_settings_become_overrides(settings, overrides):
    assert to_overrides(settings) == overrides


def test_scalars_of_numpy_and_torch_are_numbers():
    import numpy as np
    import torch

    assert to_overrides({"seed": np.int64(4), "optimizer": {"lr": torch.tensor(0.5)}}) == ["seed=4", "optimizer.lr=0.5"]


def test_ranges_and_arrays_are_lists():
    import numpy as np
    import torch

    values = {"data.mean": np.array([0.1, 0.2]), "model.channels": torch.tensor([[1, 2], [3, 4]]), "trust": range(2)}
    assert to_overrides(values) == ["data.mean=[0.1,0.2]", "model.channels=[[1,2],[3,4]]", "trust=[0,1]"]
    assert to_sweep({"seed": range(2), "optimizer": {"lr": np.array([0.1, 0.2])}, "data.mean": [np.ones(2)]}) == [
        "seed=0,1", "optimizer.lr=0.1,0.2", "data.mean=[1.0,1.0]",
    ]  # fmt: skip


def test_a_plus_before_a_key_that_exists_sets_it_as_on_the_command_line():
    assert compose(["+trainer.max_epochs=3"]).trainer.max_epochs == 3


def test_lists_are_swept_in_a_study():
    assert to_sweep({"seed": [1, 2], "model": "lenet5", "data": {"root": ["a b", "c"]}}) == [
        "seed=1,2", "model=lenet5", "data.root='a b',c",
    ]  # fmt: skip


def test_keywords_come_last_and_keep_their_types(tmp_path):
    cfg = compose(["model=alexnet_bn", "seed=1"], model="lenet5", seed=2, trainer={"max_epochs": 3}, run_dir=tmp_path)
    assert cfg.model._target_ == "alexnet_pl.models.LeNet5"
    assert (cfg.seed, cfg.trainer.max_epochs, cfg.run_dir) == (2, 3, str(tmp_path))
    cfg.model.image_size = 40
    assert cfg.data.image_size == 40  # interpolations stay


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=nope"], "model=nope is invalid: expected one of: "),
        (["trainer.max_epoch=3"], "Did you mean trainer.max_epochs?"),
        (["x"], "x is invalid: expected key=value"),
        (["resume=nowhere"], "resume=nowhere not found"),
        ("model=lenet5", r"expected a list of text, such as \['model=lenet5'\]"),
    ],
)
def test_wrong_overrides_are_config_errors_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)


# --- Hydra's state --------------------------------------------------------------------------------------------------


def hydra_state() -> tuple[object, ...]:
    resolvers = {name: OmegaConf.has_resolver(name) for name in ("now", "hydra", "python_version")}
    job = dict(JobRuntime.instance().conf)
    return GlobalHydra.instance().hydra, HydraConfig.instance().cfg, VersionBase.instance().version_base, job, resolvers


@pytest.mark.parametrize("overrides", [["model=lenet5"], ["model=nope"]])
def test_hydra_is_left_as_it_was(overrides):
    for name in ("now", "hydra", "python_version"):
        OmegaConf.clear_resolver(name)  # as in a process that has not used Hydra
    before = hydra_state()
    try:
        compose(overrides)
    except ConfigError:
        assert overrides == ["model=nope"]
    assert hydra_state() == before


def test_another_hydra_application_is_not_disturbed(tmp_path):
    (tmp_path / "app.yaml").write_text("when: ${now:%Y}\n")
    with initialize_config_dir(str(tmp_path), job_name="app", **OTHER_VERSION_BASE):
        before = hydra_state()
        assert compose(["model=lenet5"]).model._target_.endswith("LeNet5")
        assert hydra_state() == before
        assert hydra_compose("app").when.isdigit()


def test_a_config_names_its_own_run_directory(tmp_path):
    first, second = compose(["model=lenet5"]), compose(["model=lenet5"])
    assert first.run_dir.startswith("runs/lenet5_digits/20")
    assert first.run_dir != second.run_dir
    assert compose(["hydra.run.dir=there"]).run_dir == "there"
    assert compose(resume=tmp_path).run_dir == str(tmp_path)
    assert not OmegaConf.is_interpolation(first, "run_dir")
    assert "hydra" not in first


def test_a_config_of_hydras_own_compose_gets_a_run_directory():
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        cfg = hydra_compose("train", overrides=["model=lenet5"])
    name_run_dir(cfg)
    assert cfg.run_dir.startswith("runs/20")
    assert cfg.callbacks.best.folder == f"{cfg.run_dir}/checkpoints"


# --- own options and settings of the machine ------------------------------------------------------------------------


def test_a_directory_of_own_options_extends_conf(own_options):
    cfg = compose(["model=tiny", "logger=named", "data=cifar10"], config_dir=own_options)
    assert list(cfg.model.fc_widths) == [8, 8]
    assert cfg.logger.csv.path.startswith("tiny/20")  # what refers to Hydra has been resolved
    with pytest.raises(ConfigError, match="config_dir=nowhere not found"):
        compose(config_dir="nowhere")


def test_settings_of_the_machine_apply_to_every_run_below_overrides(own_options, monkeypatch):
    monkeypatch.setenv(OWN_OPTIONS, str(own_options))
    cfg = compose(["data=cifar10", "model=tiny"])
    assert (cfg.data_dir, cfg.data.root, cfg.seed) == ("/datasets", "/datasets", 7)
    assert compose(["data=cifar10", "seed=1", "data.root=x"]).data.root == "x"
    assert compose(["data=cifar10", "local=none"]).data.root == "data"


def test_directories_of_data_do_not_make_another_trial():
    assert config_hash(config("data=cifar10", "data_dir=/a")) == config_hash(config("data=cifar10", "data_dir=/b"))
    assert trial_entry([], {"model": "lenet5", "local": "default"})["choices"] == {"model": "lenet5"}


def test_own_options_are_found_in_the_configuration_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(OWN_OPTIONS, raising=False)
    find_own_options()
    assert OWN_OPTIONS not in os.environ
    directory = own_options_dir()
    assert directory == tmp_path / "alexnet_pl"
    directory.mkdir()
    monkeypatch.setenv(OWN_OPTIONS, "")  # restored after the test
    del os.environ[OWN_OPTIONS]
    find_own_options()
    assert os.environ[OWN_OPTIONS] == str(directory)
    os.environ[OWN_OPTIONS] = "chosen"
    find_own_options()
    assert os.environ[OWN_OPTIONS] == "chosen"


@pytest.mark.security
def test_the_home_directory_of_another_user_has_no_options(tmp_path, monkeypatch):
    """A container started with ``--user`` has HOME=/root, which that user may not enter."""
    monkeypatch.delenv(OWN_OPTIONS, raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".config" / "alexnet_pl").mkdir(parents=True)
    (tmp_path / "home").chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        find_own_options()
    finally:
        if is_root:
            os.seteuid(0)
        (tmp_path / "home").chmod(0o700)
    assert OWN_OPTIONS not in os.environ


def test_the_example_of_local_settings_is_the_only_one_in_the_repository():
    ignored = (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert ignored.index("/conf/local/*") < ignored.index("!/conf/local/example.yaml")
    assert config("local=example", "data=cifar10").data.root == "/data"


# --- launchers ------------------------------------------------------------------------------------------------------


def launcher(option: str) -> dict[str, object]:
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        cfg = hydra_compose("train", overrides=[f"hydra/launcher={option}", "study=s"], return_hydra_config=True)
    cfg.hydra.sweep.dir = "multirun/s"
    return OmegaConf.to_container(cfg.hydra.launcher, resolve=True)


@pytest.mark.parametrize(
    ("option", "name", "schema", "left_out"),
    [
        ("slurm", "SlurmLauncher", SlurmQueueConf, {"use_srun", "python", "srun_args"}),
        (
            "workers",
            "JoblibLauncher",
            JobLibLauncherConf,
            {"backend", "inner_max_num_threads"},
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_launcher_presets_have_the_keys_of_their_plugins(option, name, schema, left_out):
    settings = launcher(option)
    # What is left out is new in 1.4, or has one possible value.
    known = {field.name for field in fields(schema)}
    assert known - left_out <= set(settings) <= known
    assert type(instantiate(settings)).__name__ == name
    check_launcher(OmegaConf.create(settings))


def test_a_slurm_job_has_a_gpu_and_time_to_save(tmp_path):
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    settings = launcher("slurm")
    names = {"name": "job_name", "timeout_min": "time", "mem_gb": "mem"}
    left_out = ("_target_", "submitit_folder", "max_num_timeout", "tasks_per_node", "array_parallelism")
    parameters = {names.get(key, key): value for key, value in settings.items() if key not in left_out}
    parameters["mem"] = f"{parameters['mem']}GB"
    assert set(parameters) - set(SlurmExecutor._valid_parameters()) == set()
    script = _make_sbatch_string(command="true", folder=tmp_path, **parameters)
    for line in ("--gpus-per-node=1", "--time=720", "--signal=USR2@120", "--cpus-per-task=8", "--mem=32GB"):
        assert f"#SBATCH {line}\n" in script


def test_a_launcher_that_is_not_installed_is_named_with_its_extra():
    missing = OmegaConf.create({"_target_": "hydra_plugins.hydra_nowhere_launcher.Launcher"})
    with pytest.raises(ConfigError, match=r"hydra_nowhere_launcher: pip install 'alexnet_pl\[launchers\]'"):
        check_launcher(missing)


def test_slurm_needs_the_commands_of_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs SLURM's srun, which is not found. .* hydra/launcher=workers"):
        check_slurm(OmegaConf.create(launcher("slurm")))
    check_slurm(OmegaConf.create(launcher("workers")))
    (tmp_path / "srun").touch(mode=0o755)
    check_slurm(OmegaConf.create(launcher("slurm")))
