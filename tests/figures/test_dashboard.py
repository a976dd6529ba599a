"""TensorBoard's pages, the files under figures/ and report.html: what a run leaves, and what bad input leaves of it."""

import base64
import csv
import html.parser
import io
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import config
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch import nn

from alexnet_pl.cli import report, tensorboard
from alexnet_pl.data.transforms import normalize
from alexnet_pl.figures.charts import plot_confusion_matrix, plot_learning_curves, plot_training_curves
from alexnet_pl.figures.features import (
    activation_stats,
    extract_features,
    feature_layer,
    compute_histogram,
    kernel_groups,
    pca,
    evaluation_mode,
)
from alexnet_pl.figures.html_report import write_report
from alexnet_pl.figures.image_grids import plot_kernels, plot_captioned, plot_nearest_images, plot_top5, png
from alexnet_pl.figures.run_figures import (
    DRAWN_BY,
    NUM_MISTAKES,
    SAMPLE_SIZE,
    TITLES,
    FigureInputs,
    TestPredictions,
    draw,
    spread_over_classes,
)
from alexnet_pl.runtime.errors import ConfigError, UserError
from alexnet_pl.training.callbacks.tensorboard import HP_METRICS, LAYOUT, hyperparameters, open_row
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.run import run

RUN = ("model=lenet5", "data=digits", "trainer=smoke", "trainer.accelerator=cpu", "trainer.precision=32-true")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A run of two epochs with everything on."""
    run_dir = tmp_path_factory.mktemp("drawn") / "run"
    run(config(*RUN, "callbacks.dashboard.histogram_every_n_epochs=1", run_dir=run_dir, figures=True))
    return run_dir


@pytest.fixture(scope="module")
def events(drawn) -> EventAccumulator:
    return EventAccumulator(
        str(drawn / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "histograms": 0}
    ).Reload()


@pytest.fixture
def copied(drawn, tmp_path) -> Path:
    """A copy of the run, to damage."""
    shutil.copytree(drawn, tmp_path / "copy")
    return tmp_path / "copy"


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def test_scalars_have_every_quantity_of_every_split(events):
    tags = set(events.Tags()["scalars"])
    names = ("loss", "acc", "acc_top5", "error", "error_top5")
    assert tags >= {f"{split}/{name}" for split in ("train", "val", "test") for name in names}
    assert tags >= {"lr", "epoch_seconds", "images_per_second", "grad_norm", "weight_norm", *HP_METRICS}
    assert tags >= {f"dead_relu/act{layer}" for layer in (1, 2, 3, 4)}


def test_the_charts_put_the_splits_of_one_quantity_together(events):
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: [*chart.multiline.tag] for category in layout.category for chart in category.chart}
    tags = events.Tags()["scalars"]
    shown = {title: {tag for tag in tags for regex in found if re.match(regex, tag)} for title, found in charts.items()}
    assert shown["top-1 accuracy"] == {"train/acc", "val/acc", "test/acc"}
    assert shown["loss (nats)"] == {"train/loss", "val/loss", "test/loss"}
    assert all(shown[title] for category in LAYOUT.values() for title in category)
    shared = [tag for found in shown.values() for tag in found]
    assert len(shared) == len(set(shared))


def test_hyperparameters_are_one_plain_row(drawn, events):
    result, tags = json.loads((drawn / "result.json").read_text()), events.Tags()["scalars"]
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


def test_images_texts_curves_graph_and_histograms_are_there(drawn, events):
    tags = events.Tags()
    assert set(tags["images"]) == {f"figures/{name}" for name in DRAWN_BY}
    for name in DRAWN_BY:
        assert events.Images(f"figures/{name}")[0].encoded_image_string == (drawn / f"figures/{name}.png").read_bytes()
    texts = {tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode() for tag in
             ("configuration", "command", "model")}  # fmt: skip
    assert "batch_size: 64" in texts["configuration"]
    assert "| features.conv1 | Conv2d(3, 6, kernel_size=(5, 5), stride=(1, 1)) | 456 |" in texts["model"]
    assert texts["command"].strip().startswith("python ")
    assert {f"precision_recall/{digit}" for digit in "0123456789"} <= set(tags["tensors"])
    assert tags["graph"]
    histograms = set(tags["histograms"])
    assert histograms >= {f"weights/{layer}" for layer in ("conv1", "conv2", "fc3", "fc4", "fc5")}
    assert histograms >= {f"activations/act{layer}" for layer in (1, 2, 3, 4)}
    assert len(events.Histograms("weights/fc3")) == 2
    weights = read_checkpoint(drawn / "checkpoints" / "latest.ckpt")["state_dict"]["net.classifier.fc3.weight"]
    last = events.Histograms("weights/fc3")[-1].histogram_value
    assert last.num == weights.numel()
    assert last.sum == pytest.approx(float(weights.double().sum()), abs=1e-2)
    assert (last.min, last.max) == pytest.approx((float(weights.min()), float(weights.max())))


def test_the_projector_has_features_thumbnails_and_names(drawn):
    settings = (drawn / "tensorboard" / "projector_config.pbtxt").read_text()
    folder = drawn / "tensorboard" / "00004" / "fc4"
    points = np.loadtxt(folder / "tensors.tsv")
    names = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert names[0] == ["class", "predicted"]
    assert len(points) == len(names) - 1 == 128  # two batches of test images
    assert {name for row in names[1:] for name in row} <= set("0123456789")
    assert 'tensor_name: "fc4:00004"' in settings
    side = 32 * 12  # 128 thumbnails in a square of 12 × 12
    assert Image.open(folder / "sprite.png").size == (side, side)


def test_norms_are_those_of_the_last_step_and_the_weights_after_it(tmp_path):
    """Plain SGD moves the weights by the learning rate times the gradient."""
    sgd = ("optimizer._target_=torch.optim.SGD", "~optimizer.fused", "optimizer.lr=0.5", "trainer.max_epochs=1")
    weights = []
    for steps in (1, 2):
        run(config(*RUN, *sgd, f"trainer.limit_train_batches={steps}", run_dir=tmp_path / str(steps)))
        state = read_checkpoint(tmp_path / str(steps) / "checkpoints" / "latest.ckpt")["state_dict"].values()
        weights.append(torch.cat([value.flatten().double() for value in state]))
    (row,) = csv.DictReader((tmp_path / "2" / "metrics.csv").read_text().splitlines())
    assert float(row["grad_norm"]) == pytest.approx(float((weights[1] - weights[0]).norm() / 0.5), rel=1e-4)
    assert float(row["weight_norm"]) == pytest.approx(float(weights[1].norm()), rel=1e-6)


def test_a_run_computes_the_same_with_and_without_a_dashboard(drawn, tmp_path):
    run(config(*RUN, "~callbacks.dashboard", run_dir=tmp_path / "bare", figures=True))
    assert not (tmp_path / "bare" / "figures").exists()
    assert not (tmp_path / "bare" / "report.html").exists()
    with_it, without = (
        read_checkpoint(folder / "checkpoints" / "latest.ckpt") for folder in (drawn, tmp_path / "bare")
    )
    assert all(torch.equal(value, without["state_dict"][name]) for name, value in with_it["state_dict"].items())
    for key in ("val/acc", "val/loss", "test/acc", "test/loss", "best_epoch"):
        ours, theirs = (json.loads((f / "result.json").read_text())[key] for f in (drawn, tmp_path / "bare"))
        assert ours == theirs, key


def test_a_figure_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, caplog):
    def broken(material):
        raise RuntimeError("the pen is dry\nreally")

    monkeypatch.setitem(DRAWN_BY, "conv1_kernels", broken)
    monkeypatch.setattr("alexnet_pl.training.callbacks.dashboard.add_graph", broken)
    run(config(*RUN, run_dir=tmp_path / "run", figures=True))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    assert "no figure conv1_kernels: drawing it failed: the pen is dry really" in caplog.text
    assert "no graph on the dashboard" in caplog.text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the pen is dry really" in page
    assert page.count("<img ") == len(TITLES) - 1


def test_the_profile_is_written_where_the_run_says(tmp_path, caplog):
    caplog.set_level("INFO")
    run(config(*RUN, "trainer.profile=true", run_dir=tmp_path / "run"))
    trace = tmp_path / "run" / "profile" / "trace.json"
    assert f"profile {trace}" in caplog.text
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("conv2d" in name for name in names)
    assert any("backward" in name.lower() for name in names)
    with pytest.raises(ConfigError, match="trainer.profile=maybe is not possible: it is true or false"):
        run(config(*RUN, "trainer.profile=maybe", run_dir=tmp_path / "refused"))


def test_figures_of_a_test_with_ten_views_show_the_centre(tmp_path):
    """Every image once, although each was looked at ten times."""
    views = ("data.resize_size=37", "data.test_crops=10", "data.val_fraction=0.5")
    run(config(*RUN, *views, run_dir=tmp_path / "run", figures=True))
    page = opened(tmp_path / "run")
    assert len(page.images) == len(TITLES)
    points = (tmp_path / "run" / "tensorboard" / "00004" / "fc4" / "metadata.tsv").read_text().splitlines()
    assert len(points) == 1 + 128


@pytest.mark.parametrize(
    "setting", ["histogram_every_n_epochs=-1", "num_neighbor_images=-1", "figures=some", "histogram_every_n_epochs=x"]
)
def test_settings_are_checked_before_data_is_read(setting, tmp_path):
    with pytest.raises(ConfigError, match=f"callbacks.dashboard.{setting.partition('=')[0]}"):
        run(config(f"callbacks.dashboard.{setting}", run_dir=tmp_path / "run", figures=True))
    assert not (tmp_path / "run").exists()


# --- the report -----------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; keeps text, images and whatever would be fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.fetched, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"])
        assert tag not in ("script", "link", "iframe")
        self.fetched += [
            value for name, value in attributes if name in ("src", "href") and not value.startswith("data:")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def opened(run_dir: Path) -> Page:
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    return Page(text)


def test_the_report_has_results_figures_configuration_and_versions(drawn):
    page, result = opened(drawn), json.loads((drawn / "result.json").read_text())
    assert page.fetched == []
    assert len(page.images) == len(TITLES) == len([*(drawn / "figures").glob("*.png")])
    for source in page.images:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert min(picture.size) > 50
    for shown in (f"{result['test/acc']:.4f}", f"{result['val/loss']:.4f}", "LeNet5 on digits", "batch_size: 64",
                  result["versions"]["torch"], result["device"], "Finished after 2 epochs"):  # fmt: skip
        assert shown in page.text, shown
    assert "Left out" not in page.text


def test_a_report_is_made_anew_from_the_checkpoint(copied, capsys):
    before = {path.name: path.read_bytes() for path in (copied / "figures").iterdir()}
    shutil.rmtree(copied / "figures")
    (copied / "report.html").unlink()
    report.main([str(copied)])
    assert capsys.readouterr().out.splitlines() == [str(copied / "report.html")]
    after = {path.name: path.read_bytes() for path in (copied / "figures").iterdir()}
    assert set(after) == set(before)
    same = [name for name in before if after[name] == before[name]]
    assert set(same) >= {"conv1_kernels.png", "confusion_matrix.png", "mistakes.png", "top5.png", "learning_curves.png"}


def test_a_run_killed_half_way_has_a_report(copied, capsys):
    """After its first epoch, with a best checkpoint; then one that has none."""
    (copied / "result.json").unlink()
    shutil.rmtree(copied / "figures")
    head, first, _ = (copied / "metrics.csv").read_text().splitlines()
    (copied / "metrics.csv").write_text(f"{head}\n{first}\n")
    report.main([str(copied)])
    page = opened(copied)
    assert "Not finished: 1 epochs so far" in page.text
    assert "Of epoch 1, the best so far" in page.text
    assert len(page.images) == len(TITLES)
    shutil.rmtree(copied / "checkpoints")
    shutil.rmtree(copied / "figures")
    report.main([str(copied)])
    assert "lacks checkpoints/best.ckpt" in capsys.readouterr().out
    assert len(opened(copied).images) == 2  # the curves
    (copied / "metrics.csv").unlink()
    shutil.rmtree(copied / "figures")
    report.main([str(copied)])
    page = opened(copied)
    assert "no epoch has ended" in page.text
    assert "There are no results yet" in page.text
    assert page.images == []


def test_a_run_whose_data_is_gone_keeps_its_figures(copied, capsys):
    checkpoint = torch.load(copied / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["data"] |= {
        "_target_": "alexnet_pl.data.CIFAR10DataModule",
        "root": str(copied / "gone"),
    }
    torch.save(checkpoint, copied / "checkpoints" / "best.ckpt")
    (copied / "checkpoints" / "SHA256SUMS").unlink()
    (copied / "figures" / "top5.png").unlink()
    report.main([str(copied)])
    said = capsys.readouterr().out
    assert "Confusion matrix, the one of before is kept: The run's data is not in" in said
    page = opened(copied)
    assert len(page.images) == len(TITLES) - 1
    assert "Test images and the five likeliest classes (figure 4, left): The run's data is not in" in page.text


def test_what_a_run_folder_says_is_shown_and_not_obeyed(copied):
    (copied / "config.yaml").write_text('seed: "<script>alert(1)</script>"\nmodel: {_target_: "a.<b>"}\n\x00: [')
    (copied / "result.json").write_text("{ no json")
    (copied / "metrics.csv").write_text("epoch,val/acc,train/loss,lr\n1,nan,inf,nan\n2,0.5,,0.1\n3,-inf,nan,0\n")
    write_report(copied, {"<i>figure</i>": "because of <b>&amp;"})
    page = opened(copied)
    assert "<script>alert(1)</script>" in page.text
    assert "because of <b>&amp;" in page.text
    assert "Of epoch 2, the best so far" in page.text
    (copied / "metrics.csv").write_text("epoch,val/acc\n1,what\n")
    write_report(copied)
    assert (
        "metrics.csv is damaged" in opened(copied).text if not (copied / "figures/learning_curves.png").exists() else 1
    )
    for content in ("", "epoch,val/acc\n"):
        (copied / "metrics.csv").write_text(content)
        write_report(copied)
        assert "no epoch has ended" in opened(copied).text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="does not exist"):
        report.main([str(tmp_path / "absent")])
    assert not [*tmp_path.iterdir()]


# --- make dashboard -------------------------------------------------------------------------------------------------


def test_the_dashboard_says_when_there_is_nothing_to_show(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there are no runs yet. Try: make quickstart"):
        tensorboard.main([])
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="there are no runs yet"):
        tensorboard.main([])
    with pytest.raises(UserError, match="absent does not exist"):
        tensorboard.main(["absent"])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "run").symlink_to(drawn)
    for folder in (drawn, drawn.parent, Path("linked")):  # one run, a folder of runs, a folder of links to them
        assert tensorboard.log_folders([folder]) == [folder]


def test_the_dashboard_says_when_the_port_is_taken(drawn):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use.*\nTry PORT={port + 1} "):
            tensorboard.main([str(drawn), "--port", str(port)])
    with pytest.raises(UserError, match="port=99999 is invalid"):
        tensorboard.main([str(drawn), "--port", "99999"])


# --- the numbers behind the pictures --------------------------------------------------------------------------------


def test_a_record_keeps_the_mistakes_and_a_fair_sample():
    """Against the whole set in one piece; padding does not count, and half of it recorded elsewhere is merged."""
    random = torch.Generator().manual_seed(1)
    count, mean, std = 1000, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=random)
    images[:, 0, 0, 0] = torch.arange(count) % 256
    labels, logits = torch.randint(0, 7, (count,), generator=random), torch.randn(count, 7, generator=random) * 3
    halves = [TestPredictions(mean, std), TestPredictions(mean, std)]
    for index, part in enumerate(torch.arange(count).split(64)):
        padded = torch.cat([labels[part], torch.tensor([-100])])
        pick = torch.cat([part, part[:1]])
        halves[index % 2].add(normalize(images[pick], mean, std), padded, logits[pick])
    record = halves[0]
    record.merge(halves[1])
    assert sorted(record.labels.tolist()) == sorted(labels.tolist())
    confidence, predicted = logits.softmax(1).max(1)
    wrong = confidence.where(predicted != labels, -1)
    worst = wrong.argsort(descending=True)[:NUM_MISTAKES]
    assert torch.equal(record.mistakes.images, images[worst])
    assert torch.equal(record.mistakes.labels, labels[worst])
    assert torch.allclose(record.mistakes.probabilities, logits[worst].softmax(1))
    assert len(record.sample.images) == SAMPLE_SIZE
    assert len(record.sample.images.flatten(1).unique(dim=0)) == SAMPLE_SIZE
    assert len(record.sample.labels.unique()) == 7


def test_examples_are_of_as_many_classes_as_there_are():
    labels = torch.tensor([3, 3, 3, 1, 0, 1, 3, 0])
    assert spread_over_classes(labels, 5) == [0, 3, 4, 1, 5]
    assert spread_over_classes(labels, 50) == [0, 3, 4, 1, 5, 7, 2, 6]
    assert spread_over_classes(torch.empty(0), 5) == []


def test_histograms_and_dead_units_are_counted_right():
    values = torch.randn(5000)
    values[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found, finite = compute_histogram(values), values[values.isfinite()].numpy()
    counts, edges = np.compute_histogram(finite, bins=64)
    assert np.abs(found.counts - counts).sum() <= 4  # a value on an edge may fall on either side
    assert np.allclose(found.edges, edges, atol=1e-6)
    assert found.squares == pytest.approx(float((finite**2).sum()), rel=1e-4)
    assert compute_histogram(torch.full((9,), 2.0)).counts.sum() == 9
    assert compute_histogram(torch.tensor([float("nan")])) is None
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Tanh())
    with torch.no_grad():
        net[0].bias[:1], net[3].bias[:3] = -1e6, -1e6
        net[0].bias[1:], net[3].bias[3:] = 1e3, 1e6
    seen = activation_stats(net, torch.rand(6, 3, 4, 4))
    assert {name: answers.dead for name, answers in seen.items()} == {"1": 0.25, "4": pytest.approx(0.6), "5": None}


def test_looking_inside_a_network_leaves_it_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 5))
    net[2].eval()
    before, modes = {n: v.clone() for n, v in net.state_dict().items()}, [m.training for m in net.modules()]
    batch = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, -100, 3, 4])
    state = torch.get_rng_state()
    found = extract_features(net, [batch, batch], (0.5,) * 3, (0.5,) * 3, 8)
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    with evaluation_mode(net):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_the_projectors_points_have_the_features_distances():
    features = torch.rand(30, 200) * torch.rand(200)
    turned = pca(features)
    assert turned.shape == (30, 29)
    assert torch.allclose(torch.pdist(turned), torch.pdist(features), atol=1e-5)
    assert torch.all(turned.var(0)[:-1] >= turned.var(0)[1:] - 1e-6)
    assert pca(torch.rand(1, 4)).shape == (1, 1)


# --- figures --------------------------------------------------------------------------------------------------------


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(figure))))


def test_the_confusion_matrix_has_scikit_learns_numbers():
    random = np.random.default_rng(0)
    true, said = random.integers(0, 4, 200), random.integers(0, 4, 200)
    counts = sklearn_confusion(true, said)
    axes = plot_confusion_matrix(counts, ["cat", "dog", "$x_1$", "a name that is much too long for it"]).axes[0]
    expected = 100 * counts / counts.sum(1, keepdims=True)
    assert np.allclose(axes.images[0].get_array(), expected)
    assert [text.get_text() for text in axes.texts] == [f"{share:.0f}" for share in expected.flat]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["cat", "dog", "$x_1$"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize("classes", [1, 2, 31, 1000])
def test_a_confusion_matrix_of_any_size_can_be_read(classes):
    counts = np.eye(classes, dtype=np.int64) * 10
    counts[0, -1] += 7 * (classes > 1)
    counts[classes // 2] = 0  # a class without images
    figure = plot_confusion_matrix(counts, [f"class {index}" for index in range(classes)])
    shown = pixels(figure)
    assert max(shown.shape) < 2000
    if classes > 30:
        assert figure.axes[1].texts[0].get_text() == f" class 0 taken for class {classes - 1}"
        assert [bar.get_width() for bar in figure.axes[1].patches] == [7]


def test_kernels_lie_in_blocks_of_their_group_on_their_own_scale():
    kernels = np.zeros((96, 3, 11, 11), dtype=np.float32)
    kernels[:, 0], kernels[48:, 1] = 0.5, -2.0
    page = plot_kernels(kernels, groups=2).axes[0].images[0].get_array()
    first, second = (page == (255, 128, 128)).all(2), (page == (159, 0, 128)).all(2)
    assert first.sum() == second.sum() == 48 * 44 * 44
    rows = [np.flatnonzero(found.any(1)) for found in (first, second)]
    assert rows[1].min() - rows[0].max() > 3 * (np.diff(rows[0]).max() - 1)  # a gap that tells the groups apart
    assert kernel_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2))) == 2
    assert kernel_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))) == 1
    assert kernel_groups(nn.Linear(2, 2)) == 1
    with pytest.raises(ValueError, match="5 channels"):
        plot_kernels(np.zeros((4, 5, 3, 3)))
    pixels(plot_kernels(np.full((6, 1, 5, 5), np.nan)))


def test_the_true_class_and_other_neighbours_are_marked():
    picture = Image.new("RGB", (8, 8))
    figure = plot_top5([(picture, "cat", [("dog", 0.7), ("cat", 0.3)])], ["cat"])
    colours = [patch.get_facecolor()[:3] for patch in figure.axes[1].patches]
    assert colours[0] != colours[1]
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    found = np.stack([images, images])
    figure = plot_nearest_images(images, ["cat", "dog"], found, [["cat", "dog"], ["dog", "dog"]], np.eye(2), "fc7")
    marked = [text.get_text() for text in figure.axes[0].texts if text.get_color() not in ("black",)]
    assert marked == ["dog 0.00"]


def test_captions_of_the_longest_names_do_not_touch():
    images = np.zeros((16, 32, 32, 3), dtype=np.uint8)
    figure = plot_captioned(images, [["MWMWMWMWMWMWMWMWMWMWMW 1.000", "true: MWMWMWMWMWMWMW"]] * 16)
    shown = pixels(figure).min(2)
    captions = shown[150:165]  # the bold line of the first row
    gaps = (captions.min(0) > 200).astype(int)
    assert np.count_nonzero(np.diff(gaps) == 1) >= 7


def test_curves_with_gaps_and_infinities_are_drawn():
    odd = {
        "epoch": [1.0, 2.0],
        "train/loss": [float("nan"), float("inf")],
        "val/acc": [0.1, float("nan")],
        "lr": [0.0, 1],
    }
    assert pixels(plot_learning_curves({"": odd})).shape[2] == 3
    assert len(plot_training_curves(odd).axes) == 1
    assert pixels(plot_training_curves(odd)).shape[2] == 3
    assert plot_training_curves({}).axes == []


def material(net: nn.Module, classes: int, probabilities: torch.Tensor | None = None) -> FigureInputs:
    record = TestPredictions((0.5,) * 3, (0.5,) * 3)
    logits = torch.randn(20, classes) if probabilities is None else probabilities
    record.add(torch.randn(20, 3, 8, 8), torch.arange(20) % classes, logits)
    names = [f"class {index}" for index in range(classes)]
    return FigureInputs(net, names, record, missing={"features": "no features here"})


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_figures_of_any_number_of_classes(classes):
    drawn, left_out = draw(material(nn.Conv2d(3, 4, 3), classes))
    assert set(drawn) | set(left_out) == set(DRAWN_BY)
    assert left_out["nearest"] == "no features here"
    assert set(left_out) == {"nearest", "augmented_batch"} | ({"mistakes"} if classes == 1 else set())


def test_figures_of_networks_and_numbers_that_have_nothing_to_show():
    drawn, left_out = draw(material(nn.Linear(2, 2), 3, torch.full((20, 3), float("nan"))))
    assert left_out["conv1_kernels"] == "the network has no convolution"
    assert {"confusion_matrix", "top5"} <= set(drawn)
    drawn, left_out = draw(FigureInputs(nn.Conv2d(5, 4, 3), ["a"], missing={"test": "no data"}))
    assert drawn == {}
    assert left_out["conv1_kernels"] == "its first convolution reads 5 channels, which make no image"
    assert left_out["confusion_matrix"] == left_out["top5"] == "no data"


def test_networks_without_the_usual_layers_have_what_they_have():
    """A linear layer alone has no convolution, no hidden layer and no non-linearity."""
    assert feature_layer(nn.Linear(3, 2)) == "last hidden layer"
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    found = extract_features(net, [(torch.randn(3, 3, 2, 2), torch.tensor([0, 1, 0]))], (0.5,) * 3, (0.5,) * 3, 5)
    assert found.features.shape == (3, 12)
    assert (
        extract_features(nn.Flatten(), [(torch.randn(3, 3, 2, 2), torch.tensor([0, 1, 0]))], (0.5,) * 3, (0.5,) * 3, 5)
        is None
    )
    assert activation_stats(net, torch.randn(3, 3, 2, 2)) == {}
