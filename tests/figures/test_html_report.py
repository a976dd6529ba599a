"""report.html: what a page shows of finished, unfinished and hostile run directories, and ``alexnet report``."""

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import read_report
from PIL import Image

from alexnet_pl.cli import report
from alexnet_pl.data import DigitsDataModule
from alexnet_pl.figures.html_report import describe_variant, open_command, write_report
from alexnet_pl.figures.run_figures import TITLES
from alexnet_pl.inference.redraw import redraw
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import record_command


@pytest.fixture
def copied(drawn_run, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    shutil.copytree(drawn_run, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_report_has_results_figures_config_and_versions(drawn_run):
    page, result = read_report(drawn_run), json.loads((drawn_run / "result.json").read_text(encoding="utf-8"))
    assert page.fetched == []
    assert len(page.images) == len(TITLES) == len([*(drawn_run / "figures").glob("*.png")])
    for source in page.images:
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert min(image.size) > 50
    for shown in (f"{result['test/acc']:.4f}", f"{result['val/loss']:.4f}", "LeNet5 on digits", "batch_size: 64",
                  result["versions"]["torch"], result["device"], "Finished after 2 epochs"):  # fmt: skip
        assert shown in page.text, shown
    assert "Unavailable" not in page.text


def test_the_report_names_variant_date_and_every_command(copied):
    (copied / "commands.txt").write_text("", encoding="utf-8")
    record_command(copied, "python train.py model=lenet5 'run=<b>'")
    record_command(copied, "python train.py resume=runs/a")
    write_report(copied)
    page, text = read_report(copied), (copied / "report.html").read_text(encoding="utf-8")
    variant = "normalization: none; pooling: NonOverlappingMaxPool2d; activation: ReLU"
    assert variant in page.text
    assert "python train.py model=lenet5 'run=<b>'" in page.text
    assert "python train.py resume=runs/a" in page.text
    assert "'run=<b>'" not in text  # escaped
    started, _, _ = (copied / "commands.txt").read_text(encoding="utf-8").partition("\t")
    assert page.text.count(started) >= 2  # beside the command and as the run's date
    norm = {"_target_": "torch.nn.BatchNorm2d"}
    assert describe_variant({"norm": norm, "norm_placement": "before_activation"}) == (
        "normalization: BatchNorm2d before activation"
    )


def test_the_report_command_redraws_from_the_checkpoint(copied, capsys):
    before = {path.name: path.read_bytes() for path in (copied / "figures").iterdir()}
    shutil.rmtree(copied / "figures")
    (copied / "report.html").unlink()
    report.main([str(copied)])
    assert capsys.readouterr().out.splitlines() == [str(copied / "report.html")]
    after = {path.name: path.read_bytes() for path in (copied / "figures").iterdir()}
    assert set(after) == set(before)
    same = [name for name in before if after[name] == before[name]]
    assert set(same) >= {"conv1_kernels.png", "confusion_matrix.png", "mistakes.png", "top5.png", "learning_curves.png"}


def test_figures_are_not_drawn_from_data_with_other_classes(copied, tmp_path, monkeypatch):
    """Issue: other classes got the run's names, in figures that replaced the run's own."""
    before = (copied / "figures" / "confusion_matrix.png").read_bytes()
    setup = DigitsDataModule.setup

    def other_classes(self, stage=None):
        setup(self, stage)
        self.class_names = ("zero", *self.class_names[1:])

    monkeypatch.setattr(DigitsDataModule, "setup", other_classes)
    missing = redraw(copied)
    assert "the data has other classes than the run: zero, 1" in missing["confusion_matrix"]
    assert (copied / "figures" / "confusion_matrix.png").read_bytes() == before


def test_a_run_killed_half_way_has_a_report(copied, capsys):
    """After its first epoch, with a best checkpoint; then without one; then without any epoch."""
    (copied / "result.json").unlink()
    shutil.rmtree(copied / "figures")
    head, first, _ = (copied / "metrics.csv").read_text().splitlines()
    (copied / "metrics.csv").write_text(f"{head}\n{first}\n")
    report.main([str(copied)])
    page = read_report(copied)
    assert "Not finished: 1 epoch so far." in page.text
    assert "From epoch 1, the best so far." in page.text
    assert len(page.images) == len(TITLES)
    shutil.rmtree(copied / "checkpoints")
    shutil.rmtree(copied / "figures")
    capsys.readouterr()
    report.main([str(copied)])
    assert "checkpoints/best.ckpt" in capsys.readouterr().out
    assert len(read_report(copied).images) == 2  # the curves
    (copied / "metrics.csv").unlink()
    shutil.rmtree(copied / "figures")
    report.main([str(copied)])
    page = read_report(copied)
    assert "no epoch has ended" in page.text
    assert "There are no results yet" in page.text
    assert page.images == []


def test_a_run_whose_data_is_missing_keeps_its_figures(copied, capsys):
    checkpoint = torch.load(copied / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["data"] |= {
        "_target_": "alexnet_pl.data.CIFAR10DataModule",
        "root": str(copied / "gone"),
    }
    torch.save(checkpoint, copied / "checkpoints" / "best.ckpt")
    (copied / "checkpoints" / "SHA256SUMS").unlink()
    (copied / "figures" / "top5.png").unlink()
    report.main([str(copied)])
    assert "Confusion matrix (previous version kept): " in capsys.readouterr().out
    page = read_report(copied)
    assert len(page.images) == len(TITLES) - 1
    assert f"{TITLES['top5']}: " in page.text
    assert str(copied / "gone") in page.text


def test_text_of_a_strangers_run_is_shown_and_not_obeyed(copied):
    (copied / "config.yaml").write_text('seed: "<script>alert(1)</script>"\nmodel: {_target_: "a.<b>"}\n\x00: [')
    (copied / "result.json").write_text("{ not json")
    (copied / "commands.txt").write_text("now\t<script>alert(2)</script>\x1b[31m\n")
    (copied / "metrics.csv").write_text("epoch,val/acc,train/loss,lr\n1,nan,inf,nan\n2,0.5,,0.1\n3,-inf,nan,0\n")
    write_report(copied, {"<i>figure</i>": "because of <b>&amp;"})
    page = read_report(copied)
    assert "<script>alert(1)</script>" in page.text
    assert "<script>alert(2)</script>[31m" in page.text
    assert "because of <b>&amp;" in page.text
    assert "From epoch 2, the best so far" in page.text
    assert "\x1b" not in page.text
    assert "\x00" not in page.text
    shutil.rmtree(copied / "figures")
    (copied / "metrics.csv").write_text("epoch,val/acc\n1,what\n")
    write_report(copied)
    assert "metrics.csv is corrupt" in read_report(copied).text
    for content in ("", "epoch,val/acc\n"):
        (copied / "metrics.csv").write_text(content)
        write_report(copied)
        assert "no epoch has ended" in read_report(copied).text


@pytest.mark.parametrize(
    "result",
    [
        "[1, 2]",
        '{"status": "finished", "data": "x", "versions": [], "seconds": "a", "parameters": {}, "val/acc": null}',
        '{"status": "failed", "val/loss": "nan", "epochs": [], "images_per_second": 1e400, "data": {"train": "<b>"}}',
        '{"versions": {"torch": {"a": 1}}, "model": ["<b>"], "device": 1}',
    ],
)
def test_a_result_of_any_shape_makes_a_page(result, copied):
    (copied / "result.json").write_text(result)
    write_report(copied)
    assert len(read_report(copied).images) == len(TITLES)


def test_only_png_files_of_a_plausible_size_are_embedded(copied):
    (copied / "secret").write_text("private")
    (copied / "figures" / "top5.png").unlink()
    (copied / "figures" / "top5.png").symlink_to(copied / "secret")
    write_report(copied)
    page = read_report(copied)
    assert len(page.images) == len(TITLES) - 1
    assert not any(base64.b64encode(b"private").decode() in source for source in page.images)


def test_a_failing_chart_is_named_in_the_report(copied, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of\nink")

    monkeypatch.setattr("alexnet_pl.figures.html_report.plot_learning_curves", broken)
    shutil.rmtree(copied / "figures")
    write_report(copied)
    assert f"{TITLES['learning_curves']}: drawing failed: out of ink" in read_report(copied).text


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="absent not found"):
        report.main([str(tmp_path / "absent")])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("platform", "command"),
    [
        ("linux", "xdg-open 'my runs/a$b/report.html'"),
        ("darwin", "open 'my runs/a$b/report.html'"),
        ("win32", 'start "" "my runs/a$b/report.html"'),
    ],
)
def test_the_command_that_opens_a_report_is_the_platforms(platform, command, monkeypatch):
    monkeypatch.setattr("sys.platform", platform)
    assert open_command(Path("my runs/a$b/report.html")) == command
