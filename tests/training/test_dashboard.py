"""Dashboard: TensorBoard's pages, the files in figures/, and failures of drawing that leave the run alone."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, config, read_report, run_in_fresh_process, run_until_stopped
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from alexnet_pl.figures.run_figures import DRAWN_BY, TITLES, FigureInputs, TestPredictions
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.callbacks.checkpoint import BestCheckpoint
from alexnet_pl.training.callbacks.dashboard import Dashboard
from alexnet_pl.training.callbacks.tensorboard import (
    HP_METRICS,
    LAYOUT,
    add_best_accuracy,
    add_graph,
    hyperparameters,
    open_row,
)
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.lightning_internals import free_traced_types
from alexnet_pl.training.run import run


def read_events(run_dir: Path) -> EventAccumulator:
    sizes = {"images": 0, "tensors": 0, "histograms": 0}
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=sizes).Reload()


@pytest.fixture(scope="module")
def events(drawn_run) -> EventAccumulator:
    return read_events(drawn_run)


# --- TensorBoard's pages --------------------------------------------------------------------------------------------


def test_scalars_include_every_quantity_of_every_split(events):
    tags = set(events.Tags()["scalars"])
    names = ("loss", "acc", "acc_top5", "error", "error_top5")
    assert tags >= {f"{split}/{name}" for split in ("train", "val", "test") for name in names}
    assert tags >= {"lr", "epoch_seconds", "images_per_second", "grad_norm", "weight_norm", *HP_METRICS}
    assert tags >= {f"dead_relu/act{layer}" for layer in (1, 2, 3, 4)}


def test_the_splits_of_one_quantity_share_a_chart(events):
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: [*chart.multiline.tag] for category in layout.category for chart in category.chart}
    tags = events.Tags()["scalars"]
    shown = {title: {tag for tag in tags for regex in found if re.match(regex, tag)} for title, found in charts.items()}
    assert shown["top-1 accuracy"] == {"train/acc", "val/acc", "test/acc"}
    assert shown["loss (nats)"] == {"train/loss", "val/loss", "test/loss"}
    assert all(shown[title] for category in LAYOUT.values() for title in category)
    shared = [tag for found in shown.values() for tag in found]
    assert len(shared) == len(set(shared))


def test_hyperparameters_are_one_flat_row(drawn_run, events):
    result, tags = finished_result(drawn_run), events.Tags()["scalars"]
    assert "hp_metric" not in tags
    assert [event.value for event in events.Scalars("hp/test_acc")] == pytest.approx([result["test/acc"]])
    assert events.Scalars("hp/val_acc_best")[-1].value == pytest.approx(result["val/acc"])
    assert events.Scalars("hp/seconds")[0].value == pytest.approx(result["seconds"])
    content = events.SummaryMetadata(hparams_metadata.SESSION_START_INFO_TAG).plugin_data.content
    row = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
    assert row["model"].string_value == "LeNet5"
    assert row["model.pool"].string_value == "NonOverlappingMaxPool2d"
    assert row["optimizer.lr"].number_value == 0.001
    assert row["seed"].number_value == 1
    assert not [name for name, value in row.items() if "/" in value.string_value or "dir" in name or "root" in name]
    content = events.SummaryMetadata(hparams_metadata.EXPERIMENT_TAG).plugin_data.content
    declared = hparams_metadata.parse_experiment_plugin_data(content)
    assert set(row) <= {info.name for info in declared.hparam_infos}
    assert [info.name.tag for info in declared.metric_infos] == [*HP_METRICS]


def test_columns_named_on_the_command_line_come_first():
    data = {"_target_": "alexnet_pl.data.CIFAR10DataModule", "root": "/secret", "batch_size": 8, "mean": [0.5]}
    norm = {"_target_": "torch.nn.BatchNorm2d", "_partial_": True, "eps": 1e-5}
    trainer = {"_target_": "lightning.Trainer", "max_epochs": 3, "default_root_dir": "/secret", "devices": 1}
    row = hyperparameters({"seed": 0, "data": data, "model": {"norm": norm, "channels": [6, 16]}, "trainer": trainer})
    assert row == {
        "seed": 0, "model.norm": "BatchNorm2d", "model.norm.eps": 1e-5, "model.channels": "6, 16", "data": "CIFAR10",
        "data.batch_size": 8, "trainer.max_epochs": 3,
    }  # fmt: skip
    declared, _ = open_row({"model.norm": "a", "seed": 1, "model": "b"}, ["model.norm", "data.root"])
    infos = hparams_metadata.parse_experiment_plugin_data(declared.value[0].metadata.plugin_data.content).hparam_infos
    assert [info.name for info in infos if info.differs] == ["model.norm"]


def test_images_text_curves_graph_and_histograms_are_written(drawn_run, events):
    tags = events.Tags()
    assert set(tags["images"]) == {f"figures/{name}" for name in DRAWN_BY}
    for name in DRAWN_BY:
        file = drawn_run / "figures" / f"{name}.png"
        assert events.Images(f"figures/{name}")[0].encoded_image_string == file.read_bytes()
    texts = {
        tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("configuration", "command", "model", "results")
    }
    assert "batch_size: 64" in texts["configuration"]
    assert f"| test/acc | {finished_result(drawn_run)['test/acc']:.4f} |" in texts["results"]
    assert f"`{drawn_run / 'report.html'}`" in texts["results"]
    assert "| features.conv1 | Conv2d(3, 6, kernel_size=(5, 5), stride=(1, 1)) | 456 |" in texts["model"]
    assert texts["command"].strip().startswith(("python train.py", "alexnet train"))
    assert {f"precision_recall/{digit}" for digit in "0123456789"} <= set(tags["tensors"])
    assert tags["graph"]
    histograms = set(tags["histograms"])
    assert histograms >= {f"weights/{layer}" for layer in ("conv1", "conv2", "fc3", "fc4", "fc5")}
    assert histograms >= {f"activations/act{layer}" for layer in (1, 2, 3, 4)}
    assert len(events.Histograms("weights/fc3")) == 2
    weights = read_checkpoint(drawn_run / "checkpoints" / "latest.ckpt")["state_dict"]["net.classifier.fc3.weight"]
    last = events.Histograms("weights/fc3")[-1].histogram_value
    assert last.num == weights.numel()
    assert last.sum == pytest.approx(float(weights.double().sum()), abs=1e-2)
    assert (last.min, last.max) == pytest.approx((float(weights.min()), float(weights.max())))


def test_the_projector_has_features_thumbnails_and_names(drawn_run):
    settings = (drawn_run / "tensorboard" / "projector_config.pbtxt").read_text()
    folder = drawn_run / "tensorboard" / "00004" / "fc4"
    points = np.loadtxt(folder / "tensors.tsv")
    names = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert names[0] == ["class", "predicted"]
    assert len(points) == len(names) - 1 == 128  # two batches of test images
    assert {name for row in names[1:] for name in row} <= set("0123456789")
    assert 'tensor_name: "fc4:00004"' in settings
    side = 32 * 12  # 128 thumbnails in a square of 12 × 12
    assert Image.open(folder / "sprite.png").size == (side, side)


@pytest.mark.slow
def test_traced_types_are_freed_unless_a_scripted_module_needs_them(tmp_path):
    """``torch._C._jit_clear_class_registry``: without it, a study's process grows with every graph."""
    run_in_fresh_process(_check_traced_types, tmp_path)


def _check_traced_types(tmp_path: Path) -> None:
    def traced_name() -> str:
        """Name of a traced class, which is mangled if a traced class of that name is still registered."""
        return torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))._c._type().qualified_name()

    free_traced_types()
    plain = traced_name()
    assert traced_name() != plain
    predictions = TestPredictions((0.5,) * 3, (0.5,) * 3)
    predictions.add(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2))
    inputs = FigureInputs(nn.Sequential(nn.Conv2d(3, 2, 3)), ["a", "b"], predictions)
    with SummaryWriter(tmp_path) as writer:
        add_graph(writer, inputs)
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["graph"]
    assert traced_name() == plain
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    free_traced_types()
    assert scripted(torch.zeros(1, 2)).shape == (1, 2)
    assert traced_name() != plain


# --- runs with and without it ---------------------------------------------------------------------------------------


def test_a_run_computes_the_same_with_and_without_a_dashboard(drawn_run, tmp_path):
    bare = tmp_path / "bare"
    run(config(*SHORT_RUN, "~callbacks.dashboard", "callbacks.resume.keep=true", run_dir=bare, figures=True))
    assert not (bare / "figures").exists()
    assert not (bare / "report.html").exists()
    ours, theirs = (read_checkpoint(run_dir / "checkpoints" / "latest.ckpt") for run_dir in (drawn_run, bare))
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    for key in ("val/acc", "val/loss", "test/acc", "test/loss", "best_epoch"):
        assert finished_result(drawn_run)[key] == finished_result(bare)[key], key


def test_a_figure_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("the pen is dry\nreally")

    monkeypatch.setitem(DRAWN_BY, "conv1_kernels", broken)
    monkeypatch.setattr("alexnet_pl.training.callbacks.dashboard.add_graph", broken)
    run(config(*SHORT_RUN, run_dir=tmp_path / "run", figures=True))
    assert finished_result(tmp_path / "run")["status"] == "finished"
    assert "figure conv1_kernels is unavailable: drawing failed: the pen is dry really" in caplog.text
    assert "graph unavailable on the dashboard: the pen is dry really" in caplog.text
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "the pen is dry really" in page
    assert page.count("<img ") == len(TITLES) - 1


def test_no_failure_of_the_dashboard_fails_the_run(tmp_path, monkeypatch, caplog):
    """Every function that it calls, in every phase, raises."""

    def broken(*arguments, **settings):
        raise OSError(28, "No space left on device")

    module = "alexnet_pl.training.callbacks.dashboard"
    monkeypatch.setattr(Dashboard, "_keep", broken)
    for name in ("add_best_accuracy", "add_histogram", "activation_stats", "compute_histogram", "close_hparams_row",
                 "describe_run", "select_center_crop", "denormalize", "normalize", "logit_names", "save"):  # fmt: skip
        monkeypatch.setattr(f"{module}.{name}", broken)
    run(config(*SHORT_RUN, run_dir=tmp_path / "run", figures=True))
    assert finished_result(tmp_path / "run")["status"] == "finished"
    for what in ("training batch", "text", "scalars", "histograms", "test", "hyperparameters", "figures"):
        assert caplog.text.count(f"warning: {what} unavailable on the dashboard: ") == 1, what


@pytest.mark.slow
def test_a_short_test_limits_the_search_for_neighbors(tmp_path, monkeypatch):
    """``trainer=smoke`` tests two batches and used to extract features of 10,000 training images."""
    counts = []

    def counting(net, batches, mean, std, count):
        counts.append(count)
        return None

    monkeypatch.setattr("alexnet_pl.training.callbacks.dashboard.extract_features", counting)
    monkeypatch.setattr(Dashboard, "_sample_features", lambda *arguments: torch.zeros(128, 3))
    run(config(*SHORT_RUN, "callbacks.dashboard.num_neighbor_images=500", run_dir=tmp_path / "a", figures=True))
    run(config(*SHORT_RUN, "callbacks.dashboard.num_neighbor_images=7", run_dir=tmp_path / "b", figures=True))
    whole = ("trainer=default", "trainer.max_epochs=1", "callbacks.dashboard.num_neighbor_images=500")
    run(config(*SHORT_RUN, *whole, run_dir=tmp_path / "c", figures=True))
    assert counts == [128, 7, 500]


def test_the_best_accuracy_is_that_of_the_best_checkpoint(tmp_path):
    """Under another monitor, the highest accuracy of any epoch is not the accuracy of the weights that were kept."""
    best = BestCheckpoint(tmp_path, monitor="val/loss", mode="min")
    written = []
    writer = SimpleNamespace(add_scalar=lambda *arguments: written.append(arguments))
    trainer = SimpleNamespace(callbacks=[best], callback_metrics={"val/acc": torch.tensor(0.5)})
    add_best_accuracy(writer, trainer, 1)  # before the first validation
    best.metrics = {"val/acc": 0.25}
    add_best_accuracy(writer, trainer, 2)
    assert written == [("hp/val_acc_best", 0.25, 2)]


def test_the_report_lists_the_commands_of_an_interrupted_run(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["train.py", "model=lenet5", "seed=1"])
    run_until_stopped(config(*SHORT_RUN, run_dir=run_dir, figures=True), monkeypatch, step=3)
    monkeypatch.setattr("sys.argv", ["train.py", "resume=my runs/a"])
    run(config("resume=here", run_dir=run_dir, figures=True))
    page = read_report(run_dir)
    assert "python train.py model=lenet5 seed=1" in page.text
    assert "python train.py 'resume=my runs/a'" in page.text
    assert len(page.images) == len(TITLES)


def test_figures_of_a_ten_crop_test_show_the_center_crop(tmp_path):
    """Each image appears once, although it was evaluated ten times."""
    crops = ("data.resize_size=37", "data.test_crops=10", "data.val_fraction=0.5")
    run(config(*SHORT_RUN, *crops, run_dir=tmp_path / "run", figures=True))
    page = read_report(tmp_path / "run")
    assert len(page.images) == len(TITLES)
    assert "test, ten-crop" in page.text
    points = (tmp_path / "run" / "tensorboard" / "00004" / "fc4" / "metadata.tsv").read_text().splitlines()
    assert len(points) == 1 + 128


@pytest.mark.parametrize(
    "setting", ["histogram_every_n_epochs=-1", "num_neighbor_images=-1", "figures=some", "histogram_every_n_epochs=x"]
)
def test_settings_are_checked_before_data_is_read(setting, tmp_path):
    with pytest.raises(ConfigError, match=f"callbacks.dashboard.{setting.partition('=')[0]}"):
        run(config(f"callbacks.dashboard.{setting}", run_dir=tmp_path / "run", figures=True))
    assert not (tmp_path / "run").exists()


def test_the_profile_is_written_to_the_path_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    run(config(*SHORT_RUN, "trainer.profile=true", run_dir=tmp_path / "run"))
    trace = tmp_path / "run" / "profile" / "trace.json"
    assert f"profile {trace}" in caplog.text
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("conv2d" in name for name in names)
    assert any("backward" in name.lower() for name in names)
    with pytest.raises(ConfigError, match="trainer.profile=maybe is "):
        run(config(*SHORT_RUN, "trainer.profile=maybe", run_dir=tmp_path / "refused"))
