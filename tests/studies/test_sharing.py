"""Sharing of trials between studies: what is taken over, when not, and that either study may be deleted."""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from faults.processes import DIGITS, Command
from helpers import config
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from alexnet_pl.runtime.system import NUMERICS
from alexnet_pl.studies import runner
from alexnet_pl.studies.sharing import running_elsewhere, take_over
from alexnet_pl.studies.store import Study, config_hash

HASH = "0123456789"


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    model = {"_target_": "alexnet_pl.models.AlexNet", "activation": {"_target_": "torch.nn.ReLU"}}
    data, trainer = {"root": str(tmp_path / "data")}, {"accelerator": "cpu"}
    return OmegaConf.create({"study": "b", "model": model, "data": data, "trainer": trainer})


SourceMaker = Callable[..., Path]


@pytest.fixture
def make_source(cfg: DictConfig, tmp_path: Path) -> SourceMaker:
    """Write a finished trial of the study ``a``; ``changes`` go to its result.json."""

    def make(name: str = f"seed_1-{HASH}", root: str | None = None, **changes: object) -> Path:
        run_dir = tmp_path / "multirun" / "a" / name
        (run_dir / "checkpoints").mkdir(parents=True)
        (run_dir / "checkpoints" / "best.ckpt").write_bytes(b"weights")
        (run_dir / "metrics.csv").write_text("epoch\n1\n")
        (run_dir / "train.log").write_text("of a")
        (run_dir / "config.yaml").write_text(json.dumps({"data": {"root": root or cfg.data.root}}))
        result = {"status": "finished", "val/acc": 0.5, "device": "cpu (x)", "numerics": NUMERICS,
                  "versions": {"torch": version("torch")}}  # fmt: skip
        (run_dir / "result.json").write_text(json.dumps(result | changes))
        entry = {"run_dir": name, "overrides": {}, "choices": {}}
        content = {"axes": [], "trials": {HASH: entry}, "commands": []}
        (run_dir.parent / "study.json").write_text(json.dumps(content))
        return run_dir

    return make


@pytest.fixture
def own(tmp_path: Path) -> tuple[Study, Path]:
    """Return the study ``b`` and the directory of its trial, which was interrupted."""
    run_dir = tmp_path / "multirun" / "b" / f"pool_x-seed_1-{HASH}"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest.ckpt").write_bytes(b"state")
    (run_dir / "train.log").write_text("of b")
    return Study(run_dir.parent), run_dir


def test_a_finished_trial_is_copied_and_survives_its_source(cfg, make_source, own):
    source, (study, run_dir) = make_source(), own
    assert take_over(cfg, study, run_dir) == f"a/seed_1-{HASH}"
    assert (run_dir / "checkpoints/best.ckpt").stat().st_nlink == 1  # resuming refuses hard links
    shutil.rmtree(source.parent)
    assert study.state(HASH) == "finished"
    assert json.loads((run_dir / "result.json").read_text())["taken_over_from"] == f"a/seed_1-{HASH}"
    assert sorted(path.name for path in run_dir.rglob("*")) == [
        "best.ckpt", "checkpoints", "config.yaml", "metrics.csv", "result.json", "train.log",
    ]  # fmt: skip
    assert (run_dir / "checkpoints/best.ckpt").read_bytes() == b"weights"
    assert (run_dir / "train.log").read_text() == "of b"


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "failed"},
        {"numerics": NUMERICS - 1},
        {"numerics": None},
        {"versions": {"torch": "1.0.0"}},
        {"device": "cuda (x)"},
        {"root": "/another/copy"},
        {"name": "seed_1-9876543210"},
        {"name": f"seed_1-0{HASH}"},
    ],
)
def test_other_trials_are_not_taken_over(cfg, make_source, own, changes):
    make_source(**changes)
    study, run_dir = own
    assert take_over(cfg, study, run_dir) is None
    assert (run_dir / "checkpoints/latest.ckpt").is_file()
    assert not (run_dir / "result.json").exists()


@pytest.mark.parametrize(("key", "value"), [("study", None), ("model.activation._target_", "my_module.Swish")])
def test_sweeps_without_a_name_and_own_classes_share_nothing(cfg, make_source, own, key, value):
    source, (study, run_dir) = make_source(), own
    OmegaConf.update(cfg, key, value)
    assert take_over(cfg, study, run_dir) is None
    (source.parent / ".locks").mkdir()
    with Study(source.parent).lock(HASH):
        assert running_elsewhere(cfg, study, run_dir) is None


def test_what_cannot_be_copied_is_left_to_training(cfg, make_source, own, monkeypatch):
    def fill(*arguments: object) -> None:
        raise OSError("disk full")

    make_source()
    study, run_dir = own
    monkeypatch.setattr(shutil, "copyfile", fill)
    assert take_over(cfg, study, run_dir) is None
    assert [path.name for path in run_dir.iterdir()] == ["train.log"]


def test_a_trial_that_a_neighbor_is_running_is_left_to_it(cfg, make_source, own):
    source, (study, run_dir) = make_source(), own
    assert running_elsewhere(cfg, study, run_dir) is None
    neighbor = Study(source.parent)
    (source.parent / ".locks").mkdir()
    with neighbor.lock(HASH):
        assert running_elsewhere(cfg, study, run_dir) == "a"


def test_a_trial_that_is_running_on_another_copy_of_the_data_is_not_left_to_it(cfg, make_source, own):
    """It could not be taken over when it has finished. Before a run has written its config, nothing is known of it."""
    source, (study, run_dir) = make_source(root="/another/copy", status="failed"), own
    (source.parent / ".locks").mkdir()
    with Study(source.parent).lock(HASH):
        assert running_elsewhere(cfg, study, run_dir) is None
        (source / "config.yaml").unlink()
        assert running_elsewhere(cfg, study, run_dir) == "a"


def test_of_two_studies_that_start_a_shared_trial_at_once_one_runs_it(cfg, tmp_path, monkeypatch):
    """Both hold the lock of their own trial before either looks for the other's."""
    both_hold, both_looked, ran = threading.Barrier(2), threading.Barrier(2), []
    asked: dict[str, int] = {}

    def finished_score(run_dir: Path) -> None:
        asked[run_dir.parent.name] = asked.get(run_dir.parent.name, 0) + 1
        if asked[run_dir.parent.name] == 2:  # the second time is after the lock
            both_hold.wait(timeout=60)

    def look(*arguments: object) -> str | None:
        found = running_elsewhere(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_looked.wait(timeout=1)  # which is over without the other, if one looks after the other
        return found

    monkeypatch.setattr(runner, "finished_score", finished_score)
    monkeypatch.setattr(runner, "running_elsewhere", look)
    monkeypatch.setattr(runner, "_run_or_record", lambda cfg, run_dir: ran.append(run_dir.parent.name) or 0.5)
    threads = []
    for name in "ab":
        run_dir = tmp_path / "multirun" / name / f"seed_1-{HASH}"
        run_dir.mkdir(parents=True)
        (run_dir.parent / ".locks").mkdir()
        trials = {HASH: {"run_dir": run_dir.name, "overrides": {}, "choices": {}}}
        (run_dir.parent / "study.json").write_text(json.dumps({"axes": [], "trials": trials, "commands": []}))
        threads.append(threading.Thread(target=runner._run_locked, args=(cfg, Study(run_dir.parent), run_dir, [HASH])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ran) == 1


@pytest.mark.slow
def test_a_second_study_takes_over_the_trials_of_the_first(tmp_path):
    trial = ("-m", *DIGITS, "trainer=smoke", "callbacks.dashboard.figures=false", "seed=1,2")
    first = Command(*trial, "study=a", cwd=tmp_path)
    assert first.wait() == 0, first.text
    second = Command(*trial, "study=b", cwd=tmp_path)
    assert second.wait() == 0, second.text
    assert second.text.count("is taken over from a/seed_") == 2
    assert "epoch" not in second.text
    shutil.rmtree(tmp_path / "multirun" / "a")
    third = Command(*trial, "study=b", cwd=tmp_path)
    assert third.wait() == 0, third.text
    assert third.text.count("has already finished") == 2


def test_the_baseline_of_the_presets_is_one_trial():
    """AlexNet with LRN stands in two studies, at either scale."""
    baseline = {
        "norm_x_pool": ["model/norm=lrn", "model/pool=overlapping"],
        "dropout": ["model.dropout=0.5"],
    }
    for scale in ("lab", "full"):
        configs = [config(f"experiment={name}", f"scale={scale}", *rest) for name, rest in baseline.items()]
        assert len({config_hash(cfg) for cfg in configs}) == 1
    width = ["model.channels=[48,128,192,192,128]", "model.fc_width=1024"]
    assert config_hash(config("scale=lab")) == config_hash(config(*width)) != config_hash(config())
    assert config_hash(config("model=lenet5", "scale=lab")) == config_hash(config("model=lenet5"))


@pytest.mark.parametrize(
    ("model", "channels", "width"),
    [
        ("alexnet_bn", [48, 128, 192, 192, 128], 1024),
        ("alexnet_paper", [48, 128, 192, 192, 128], 1024),
        ("alexnet_2012", [48, 128, 192, 192, 128], 1024),
        ("alexnet_half", [48, 128, 192, 192, 128], 1024),
        ("alexnet_torchvision", [32, 96, 192, 128, 128], 1024),
    ],
)
def test_lab_scale_works_for_every_alexnet(model, channels, width):
    cfg = config(f"model={model}", "scale=lab")
    assert (list(cfg.model.channels), cfg.model.fc_width) == (channels, width)
    with pytest.raises(InterpolationResolutionError, match="a factor of -1 in the section scale is invalid"):
        _ = config(f"model={model}", "scale.convolutions=-1").model.channels
