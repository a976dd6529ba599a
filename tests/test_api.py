"""Python interface: what a run returns, that nothing of it stays in the process, interruptions, studies."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from config.test_compose import OTHER_VERSION_BASE, hydra_state
from helpers import SHORT_RUN, metric_rows, stop_at
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig

import alexnet_pl
from alexnet_pl.config.compose import CONF
from alexnet_pl.config.hydra_versions import VERSION_BASE
from alexnet_pl.runtime.errors import ConfigError, UserError
from alexnet_pl.training.run import run as run_config

FAST = [*SHORT_RUN, "callbacks.dashboard.figures=false"]


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def process_state() -> dict[str, object]:
    names = (None, "alexnet_pl", "lightning.pytorch", "lightning.fabric", "matplotlib", "hydra")
    loggers = [logging.getLogger(name) for name in names]
    return {
        "hydra": hydra_state(),
        "logging": [([*logger.handlers], logger.level, logger.propagate) for logger in loggers],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "environment": {**os.environ},
        "warnings": [*warnings.filters],
        "process": (os.getcwd(), [*sys.argv], [*sys.path], sys.excepthook, sys.stdout),
        "random": (random.getstate()[1][:9], [*np.random.get_state()[1][:9]], torch.get_rng_state().tolist()),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
                  torch.are_deterministic_algorithms_enabled()),
    }  # fmt: skip


# --- one run --------------------------------------------------------------------------------------------------------


def test_a_run_returns_what_it_has_computed(capsys):
    run = alexnet_pl.train([*SHORT_RUN, "callbacks.dashboard.num_neighbor_images=0"], seed=3)
    assert run.result["status"] == "finished"
    assert run.result["seed"] == 3
    assert run.result["val/acc"] == run.metrics["val/acc"].max()
    assert isinstance(run.metrics, pd.DataFrame)
    assert [*run.metrics["epoch"]] == [1, 2]
    assert run.figures["learning_curves"]._repr_png_().startswith(b"\x89PNG")
    assert Path(run.figures["learning_curves"]) == run.directory / "figures" / "learning_curves.png"
    generator = torch.get_rng_state()
    assert run.net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert torch.equal(torch.get_rng_state(), generator)
    assert run.trained.class_names == tuple("0123456789")
    assert "top-1 acc" in str(run)
    assert str(run) in run._repr_markdown_()
    assert (
        repr(run) == f"Run {run.directory}: val/acc {run.result['val/acc']:.4f}, test/acc {run.result['test/acc']:.4f}"
    )
    epoch = run.trained.epoch
    assert repr(run.trained) == f"TrainedRun {run.trained.checkpoint}: LeNet5 on digits, epoch {epoch}, 10 classes"
    command = (run.directory / "commands.txt").read_text(encoding="utf-8").split("\t")[1].split()
    assert command == ["alexnet", "train", *SHORT_RUN, "callbacks.dashboard.num_neighbor_images=0", "seed=3"]
    log = (run.directory / "train.log").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    for text in ("epoch 1/2", f"run directory {run.directory}"):
        assert text in log
        assert text in shown


def test_nothing_of_a_run_stays_in_the_process():
    before = process_state()
    alexnet_pl.train(FAST, trainer={"deterministic": True})
    after = process_state()
    for part, state in before.items():
        assert after[part] == state, part


def test_runs_in_a_thread_and_inside_another_application_are_the_same_run(tmp_path, monkeypatch):
    runs = [alexnet_pl.train(FAST)]
    thread = threading.Thread(target=lambda: runs.append(alexnet_pl.train(FAST)))
    thread.start()
    thread.join()
    (tmp_path / "app.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), job_name="app", **OTHER_VERSION_BASE):
        app = hydra_compose("app", return_hydra_config=True)
        app.hydra.job.num = 0
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(app)
        runs.append(alexnet_pl.train(FAST))
        assert HydraConfig.get().job.num == 0
    assert len({run.directory for run in runs}) == 3
    assert metric_rows(runs[0].directory) == metric_rows(runs[1].directory) == metric_rows(runs[2].directory)


def test_a_config_can_be_changed_before_it_runs():
    cfg = alexnet_pl.compose(FAST)
    cfg.seed = 5
    run = alexnet_pl.train(cfg)
    assert (run.result["seed"], str(run.directory)) == (5, cfg.run_dir)
    with pytest.raises(ConfigError, match="settings are invalid beside a config"):
        alexnet_pl.train(cfg, seed=1)


def test_a_config_of_hydras_own_compose_runs():
    with initialize_config_dir(str(CONF), **VERSION_BASE):
        cfg = hydra_compose("train", overrides=FAST)
    assert run_config(cfg) > 0
    assert len([*Path("runs").glob("20*/result.json")]) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 is invalid"),
        (["data.val_fraction=2"], "data.val_fraction=2"),
        (["study=s"], "expected a single run. Use alexnet_pl.study"),
        (["trainer.devices=2"], "2 ranks are launched by alexnet train"),
        (["model.num_classes=9", "run_dir=new/run"], "expected at least 10"),
    ],
)
def test_a_refused_config_leaves_nothing_behind(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        alexnet_pl.train([*FAST, *overrides])
    assert [*tmp_path.iterdir()] == []


def test_several_values_and_bare_text_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model=\[lenet5,cnn4\] is invalid: expected one option, .* alexnet_pl.study"
    ):
        alexnet_pl.train(model=["lenet5", "cnn4"])
    for call in (alexnet_pl.train, lambda overrides: alexnet_pl.study("s", overrides)):
        with pytest.raises(ConfigError, match=r"overrides=model=lenet5 is invalid: expected a list of text"):
            call("model=lenet5")
    assert [*tmp_path.iterdir()] == []


def test_an_interrupted_run_resumes(monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(3, patch, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            alexnet_pl.train(FAST, run_dir="stopped")
    assert not Path("stopped/result.json").exists()
    resumed, whole = alexnet_pl.train(resume="stopped"), alexnet_pl.train(FAST)
    assert resumed.directory == Path("stopped")
    assert metric_rows(resumed.directory) == metric_rows(whole.directory)


def test_a_network_of_ones_own_is_trusted_in_its_own_run(tmp_path, monkeypatch):
    (tmp_path / "nets_of_a_notebook.py").write_text(
        "from alexnet_pl.models import LeNet5\n\nclass Mine(LeNet5):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = alexnet_pl.train(FAST, **{"model._target_": "nets_of_a_notebook.Mine"})
    assert type(run.net).__name__ == "Mine"
    assert run.trust == ("nets_of_a_notebook.Mine",)


def test_public_names_are_imported_on_first_use():
    code = (
        "import sys, alexnet_pl; alexnet_pl.compose(model='lenet5'); assert 'torch' not in sys.modules\n"
        "assert set(alexnet_pl.__all__) <= set(dir(alexnet_pl))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in alexnet_pl.__all__:
        assert getattr(alexnet_pl, name) is not None


# --- a study --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_from_python_resumes_and_reports(capsys):
    for _ in range(2):
        study = alexnet_pl.study("pairs", FAST, seed=[1, 2])
    assert "has already finished" in capsys.readouterr().out
    assert len(study.results) == 2
    assert study.directory == Path("multirun/pairs")
    assert "95%" in study.report
    assert study.figures["results"]._repr_png_().startswith(b"\x89PNG")
    recorded = json.loads((study.directory / "study.json").read_text(encoding="utf-8"))
    assert recorded["commands"][-1]["command"].startswith("alexnet train -m study=pairs model=lenet5")


@pytest.mark.slow
def test_a_study_that_fails_raises_the_commands_words():
    with pytest.raises(UserError, match=r"model=nope is invalid: expected one of: "):
        alexnet_pl.study("wrong", model=["nope"])
    assert not Path("multirun").exists()


def test_a_config_that_resumes_is_refused(tmp_path):
    """Issue: nothing was compared, so its changes were ignored."""
    cfg = alexnet_pl.compose(FAST, resume=tmp_path)
    with pytest.raises(ConfigError, match=r"^resume is invalid in a config. Pass it with the changes: train\(resume=…"):
        alexnet_pl.train(cfg)
