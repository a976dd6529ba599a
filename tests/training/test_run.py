"""Whole runs: what they compute, what they leave behind, and that they repeat."""

import csv
import importlib
import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import NO_FIGURES, REPOSITORY, SHORT_RUN, config, train
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import OmegaConf
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexnet_pl.config.resolve import default_precision, resolve_auto
from alexnet_pl.data.digits import DigitsDataModule
from alexnet_pl.data.loaders import IGNORE_INDEX
from alexnet_pl.runtime.errors import ConfigError, one_line_errors
from alexnet_pl.training import build
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.lightning_internals import EpochProgressBar
from alexnet_pl.training.run import _errors_for_users, run

RUN = ("model=lenet5", "data=digits", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=3")
QUANTITIES = ("loss", "acc", "acc_top5", "error", "error_top5")


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the directory of a real run of three epochs and what it returned to Hydra."""
    run_dir = tmp_path_factory.mktemp("run") / "here"
    return run_dir, run(config(*RUN, run_dir=run_dir))


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def test_result_has_every_key_and_agrees_with_the_metrics(finished):
    run_dir, score = finished
    result = result_of(run_dir)
    assert set(result) == {
        "status", "val/acc", "val/acc_top5", "val/loss", "test/acc", "test/acc_top5", "test/loss", "best_epoch",
        "epochs", "seconds", "images_per_second", "data", "model", "parameters", "device", "precision", "seed",
        "split_seed", "versions", "git_commit", "numerics", "threads",
    }  # fmt: skip
    rows = read_metrics(run_dir)
    validation = [float(row["val/acc"]) for row in rows]
    assert result["status"] == "finished"
    assert result["epochs"] == len(rows) == 3
    assert score == result["val/acc"] == max(validation)
    assert result["best_epoch"] == validation.index(max(validation)) + 1
    assert result["val/loss"] == float(rows[result["best_epoch"] - 1]["val/loss"])
    assert result["parameters"] == 62_006
    assert result["data"] == {
        "name": "digits",
        "source": "scikit-learn's handwritten digits (8×8, bundled)",
        "train": 1293,
        "val": 144,
        "test": 360,
    }
    assert (result["seed"], result["split_seed"], result["precision"]) == (1, 0, "32-true")
    assert result["device"].startswith("cpu (")
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["images_per_second"] > 0
    assert result["seconds"] > 0


def test_metrics_csv_has_one_complete_row_an_epoch(finished):
    run_dir, _ = finished
    rows = read_metrics(run_dir)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["20", "40", "60"]  # 1,293 images, 64 a step, the rest dropped
    for row in rows:
        for split in ("train", "val"):
            values = {name: float(row[f"{split}/{name}"]) for name in QUANTITIES}
            assert values["error"] == pytest.approx(1 - values["acc"], abs=1e-6)
            assert values["error_top5"] == pytest.approx(1 - values["acc_top5"], abs=1e-6)
            assert values["acc"] <= values["acc_top5"] <= 1
        assert float(row["lr"]) == pytest.approx(1e-3)
        assert float(row["epoch_seconds"]) > 0
        assert float(row["images_per_second"]) > 0
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"]) < 1.1 * math.log(10)
    tested = [row["epoch"] for row in rows if row["test/acc"]]
    assert tested == [str(result_of(run_dir)["best_epoch"])]


def test_tensorboard_has_the_same_figures(finished):
    run_dir, _ = finished
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    rows = read_metrics(run_dir)
    assert "hp_metric" not in events.Tags()["scalars"]
    for name in (
        *(f"{s}/{q}" for s in ("train", "val") for q in QUANTITIES),
        "lr",
        "epoch_seconds",
        "images_per_second",
    ):
        logged = [event.value for event in events.Scalars(name)]
        assert logged == pytest.approx([float(row[name]) for row in rows]), name
    for quantity in QUANTITIES:
        assert len(events.Scalars(f"test/{quantity}")) == 1  # the test set is read once


def test_best_checkpoint_gives_the_reported_figures_and_identical_logits(finished):
    """scikit-learn on the logits of the reloaded network, against what the run wrote."""
    run_dir, _ = finished
    result, cfg = result_of(run_dir), OmegaConf.load(run_dir / "config.yaml")
    data = instantiate(cfg.data)
    data.setup()

    def reload():
        checkpoint = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)
        net = instantiate(cfg.model)
        net.load_state_dict({name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()})
        return checkpoint, net.eval()

    (checkpoint, net), (_, again) = reload(), reload()
    assert checkpoint["epoch"] + 1 == result["best_epoch"]
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        with torch.no_grad():
            logits = torch.cat([net(images) for images, _ in batches])
            assert torch.equal(logits, torch.cat([again(images) for images, _ in batches]))
        labels = torch.cat([labels for _, labels in batches])
        logits, labels = logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]
        assert len(labels) == result["data"][split]
        probabilities = logits.double().softmax(1)
        assert result[f"{split}/acc"] == pytest.approx(accuracy_score(labels, logits.argmax(1)), abs=1e-6)
        assert result[f"{split}/acc_top5"] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5), abs=1e-6)
        assert result[f"{split}/loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)


def test_latest_checkpoint_is_of_the_last_epoch(finished):
    run_dir, _ = finished
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "SHA256SUMS",
        "best.ckpt",
        "latest.ckpt",
    ]
    assert torch.load(run_dir / "checkpoints" / "latest.ckpt", weights_only=True)["position"] == {
        "epoch": 3,
        "batch": 0,
        "images": 0,
        "step": 60,
    }


def test_same_seed_same_numbers(finished, tmp_path):
    """Bit for bit, and another seed gives others: the comparison can fail."""
    run_dir, _ = finished
    run(config(*RUN, run_dir=tmp_path / "same"))
    run(config(*RUN, "seed=2", run_dir=tmp_path / "other"))

    def figures(folder):
        timing = {"epoch_seconds", "images_per_second"}
        return [{name: value for name, value in row.items() if name not in timing} for row in read_metrics(folder)]

    def weights(folder):
        return torch.load(folder / "checkpoints" / "latest.ckpt", weights_only=True)["state_dict"]

    assert figures(tmp_path / "same") == figures(run_dir) != figures(tmp_path / "other")
    assert all(torch.equal(value, weights(run_dir)[name]) for name, value in weights(tmp_path / "same").items())


def test_a_used_directory_is_refused_and_not_changed(finished):
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config(*RUN, run_dir=run_dir))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_run_with_the_config_of_another_writes_into_its_own_directory(finished, tmp_path):
    """A run's config.yaml names every file that the run has written."""
    run_dir, _ = finished
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    cfg = OmegaConf.load(run_dir / "config.yaml")
    cfg.run_dir, cfg.seed, cfg.trainer.max_epochs = str(tmp_path / "again"), 2, 1
    run(cfg)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    made = {path.relative_to(tmp_path / "again").as_posix() for path in (tmp_path / "again").rglob("*")}
    assert {"checkpoints/best.ckpt", "metrics.csv", "result.json", "config.yaml"} <= made
    assert str(run_dir) not in (tmp_path / "again" / "config.yaml").read_text()


@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_of_ones_own_stands_in_for_ours_where_one_is_shown(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_progress_bar", lambda: [EpochProgressBar()] if shown else [])
    bars = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *_, **__: bars.append(self.progress_bar_callback))
    cfg = config(*RUN, "trainer.max_epochs=1", run_dir=tmp_path / "run")
    OmegaConf.update(cfg, "callbacks.mine", {"_target_": "lightning.pytorch.callbacks.TQDMProgressBar"}, force_add=True)
    with suppress(Exception):  # nothing was trained
        run(cfg)
    assert [type(bar) for bar in bars] == [TQDMProgressBar if shown else type(None)]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["disabled", "stdout", "none"])
def test_every_option_of_hydras_job_logging_works(option, tmp_path):
    done = train("model=lenet5", "trainer=smoke", f"hydra/job_logging={option}", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
    assert not (tmp_path / "run" / "train.log").exists()


def test_settings_that_cannot_work_are_refused_before_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(DigitsDataModule, "load", lambda self: pytest.fail("data was read"))
    for setting, message in [
        ("model.num_classes=9", "num_classes=9 is invalid: expected at least 10, the classes of the data"),
        ("data.image_size=12", "image_size=12 is invalid: expected 13 pixels or more for LeNet5"),
        ("model.image_size=12", "image_size=12"),
        ("model.channels=[6,-16]", "channels=.6, -16. is invalid: expected 2 whole numbers ≥ 1"),
    ]:
        with pytest.raises(Exception, match=message):
            run(config(*RUN, setting, run_dir=tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def test_the_learning_rate_falls_when_the_validation_loss_stands_still(tmp_path):
    """After the first epoch and three without improvement (patience 2), as in the tutorial's log."""
    still = "optimizer.lr=1e-6"  # too small to improve the loss by ReduceLROnPlateau's 1 in 10,000
    few = [f"trainer.limit_{split}_batches=2" for split in ("train", "val", "test")]
    run(config(*RUN[:4], *few, "trainer.max_epochs=5", still, run_dir=tmp_path / "run"))
    rates = [float(row["lr"]) for row in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([1e-6, 1e-6, 1e-6, 1e-6, 1e-7])


@pytest.mark.slow
def test_a_network_overfits_one_batch(tmp_path):
    """AlexNet itself, through the LightningModule: 20 digits learned by heart."""
    settings = ("data.batch_size=20", "model.dropout=0", "model.fc_width=128", "optimizer.lr=3e-4")
    cfg = config("model=alexnet_bn", "data=digits", *settings)
    data = instantiate(cfg.data)
    data.setup()
    torch.manual_seed(0)
    model = ImageClassifier(instantiate(cfg.model), 10, instantiate(cfg.optimizer))
    trainer = Trainer(
        max_epochs=80, overfit_batches=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    data.train_dataloader().sampler = None  # the same batch every epoch
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["train/acc"] == 1
    assert trainer.callback_metrics["train/loss"] < 0.05


def test_the_network_is_built_for_the_size_that_the_data_has():
    cfg = config("model=alexnet_bn", "data.image_size=96", "model.fc_width=8")
    resolve_auto(cfg)
    assert cfg.model.image_size == 96
    assert instantiate(cfg.model)(torch.zeros(1, 3, 96, 96)).shape == (1, 10)
    assert config("model=alexnet_bn").data.image_size == 50
    assert config("model=lenet5").data.image_size == 32


def test_precision_follows_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_precision("auto") == default_precision("gpu") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bf16, amx, capped, expected in [
        (True, False, False, "bf16-mixed"), (False, True, False, "bf16-mixed"), (False, False, False, "32-true"),
        (True, True, True, "32-true"),
    ]:  # fmt: skip
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda capped=capped: not capped)
        assert default_precision("cpu") == expected
    cfg = config("trainer.precision=64-true")
    resolve_auto(cfg)
    assert cfg.trainer.precision == "64-true"  # a choice of one's own is kept


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "16", "bf16", "32-true"])
def test_feature_maps_are_channels_last_in_16_bits_on_a_gpu(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = config(f"trainer.precision={precision}", "trainer.accelerator=gpu", "trainer.devices=1")
    resolve_auto(cfg)
    assert cfg.channels_last is (precision != "32-true")


def test_precision_follows_a_capped_instruction_set():
    """``ONEDNN_MAX_CPU_ISA`` is read when torch is loaded, hence the process of its own."""
    code = "from alexnet_pl.config.resolve import default_precision; print(default_precision('cpu'))"
    capped = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=capped, capture_output=True, text=True, check=True)
    assert done.stdout == "32-true\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_run_in_16_bits_learns(tmp_path):
    run(config("model=alexnet_lrn", "data=digits", "trainer.max_epochs=12", run_dir=tmp_path / "run"))
    result = result_of(tmp_path / "run")
    assert result["precision"] == "16-mixed"
    assert result["test/acc"] > 0.8


# --- from the command line ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_leaves_complete_runs_in_separate_directories(tmp_path):
    done = train("-m", "model=lenet5", "model/pool=overlapping,non_overlapping", "data=digits", "trainer=smoke",
                 f"hydra.sweep.dir={tmp_path}/sweep", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for pool in ("OverlappingMaxPool2d", "NonOverlappingMaxPool2d"):
        option = {"OverlappingMaxPool2d": "overlapping", "NonOverlappingMaxPool2d": "non_overlapping"}[pool]
        (folder,) = (tmp_path / "sweep").glob(f"pool_{option}-*")
        assert result_of(folder)["status"] == "finished"
        assert OmegaConf.load(folder / "config.yaml").model.pool._target_.endswith(f".{pool}")
        assert len(read_metrics(folder)) == 2
        for name in ("checkpoints/best.ckpt", "checkpoints/latest.ckpt", "tensorboard", "train.log"):
            assert (folder / name).exists()
        assert done.stdout.count(f"run directory {folder}\n") == 1


def test_the_log_reads_well_and_without_control_characters(tmp_path):
    done = train("model=lenet5", "trainer=smoke", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.isprintable() or set(done.stdout) - set("\n") == {c for c in set(done.stdout) if c.isprintable()}
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"]
    for line in epochs:
        assert " s " in line
        assert " val loss " in line
        assert " val acc " in line
    assert done.stdout.splitlines()[-1] == f"run directory {tmp_path}/run"
    assert "epoch 2/2" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("logits", [10, 12])
def test_logits_that_no_class_has_are_told(tmp_path, caplog, logits):
    """The presets for ImageNet have 1,000, and a dataset of ten classes is trained with them."""
    caplog.set_level("INFO", logger="alexnet_pl")
    run(config(*SHORT_RUN, NO_FIGURES, f"model.num_classes={logits}", run_dir=tmp_path / "run"))
    told = "12 logits for 10 classes; model.num_classes=10 has one for each"
    assert (told in caplog.text) == (logits == 12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=32"], "error: model.image_size=32 is invalid: expected 47 pixels or more for AlexNet"),
        (["model/norm=layer"], "error: model/norm=layer is invalid: expected one of: batch, lrn, "),
        (["model=vgg"], "error: model=vgg is invalid: expected one of: alexnet_2012, alexnet_bn, "),
        (["+model.depth=8"], "error: model.depth=8 is invalid: AlexNet has no argument depth."),
        (["model.widht=8"], "error: model.widht=8: key model.widht not found. Did you mean model.fc_width?"),
        (["mdoel=lenet5"], "error: mdoel=lenet5: key mdoel not found. Did you mean model?"),
        (["model/nrom=batch"], "error: model/nrom=batch: key model/nrom not found. Did you mean model/norm?"),
        (["scheduler=null"], "error: A config group cannot be null. To leave one out, put a tilde before its name"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, overrides, message):
    done = train(*overrides, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_the_first_run_on_a_machine_speaks_of_itself_alone(tmp_path):
    """matplotlib, which then makes a list of the machine's fonts, would say so."""
    settings = ("model=lenet5", "data=digits", "trainer=smoke", f"hydra.run.dir={tmp_path / 'run'}")
    done = train(*settings, cwd=tmp_path, figures=True, MPLCONFIGDIR=str(tmp_path / "matplotlib"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "matplotlib").glob("fontlist*")), "not the first run"
    assert done.stdout.startswith("data    ")
    assert "font" not in done.stdout + done.stderr
    assert "font" not in (tmp_path / "run" / "train.log").read_text()


def test_a_mistyped_resume_leaves_no_directory_of_that_name(tmp_path):
    done = train("resume=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: resume=nowhere not found.")
    assert not list(tmp_path.iterdir())


def test_the_traceback_is_there_when_asked_for(tmp_path):
    done = train("data.image_size=32", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_help_and_cfg_answer_without_running(tmp_path):
    shown = train("--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for word in (
        "model=alexnet_lrn data=cifar10",
        "data.root=",
        "model/norm: batch, lrn, ",
        "experiment: annealed, augmentation, ",
    ):
        assert word in shown.stdout
    printed = train("--cfg", "job", "model=alexnet_bn", "optimizer.lr=0.5", cwd=tmp_path)
    assert OmegaConf.create(printed.stdout).optimizer.lr == 0.5
    assert not list(tmp_path.iterdir())


def test_reporting_errors_leaves_the_environment_as_it_was(monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit), one_line_errors():
        raise ConfigError("something to mend")
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert capsys.readouterr().err == "error: something to mend\n"


def test_a_terminal_gets_a_progress_bar_that_counts_as_the_lines_do(tmp_path):
    """Under a real pseudo-terminal: the bar and the lines of an epoch give it the same number."""
    import pty

    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "model=lenet5",
        "trainer=smoke",
        f"hydra.run.dir={tmp_path}/r",
        NO_FIGURES,
    ]
    shown = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        shown.extend(data)
        return data

    environment = {"TERM": "xterm-256color", "COLUMNS": "120"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert pty.spawn(command, read) == 0
    text = shown.decode()
    assert "━" in text
    for epoch in ("1/2", "2/2"):
        assert re.search(rf"epoch {epoch} .*s .*val loss", text)
        assert re.search(rf"epoch {epoch}.*━", text)
    assert "Epoch" not in text


def test_a_package_that_a_callback_of_lightning_needs():
    class Needy(Callback):
        def setup(self, trainer, pl_module, stage):
            raise ModuleNotFoundError("`Needy` needs psutil, which is not installed.")

    cfg = OmegaConf.create({"run_dir": "run"})
    with pytest.raises(ConfigError, match="needs psutil"), _errors_for_users(cfg):
        Needy().setup(None, None, "fit")
    with pytest.raises(ModuleNotFoundError, match="nowhere"), _errors_for_users(cfg):
        importlib.import_module("nowhere")  # a bug keeps its traceback
