"""Robustness of a run: corruptions of its own test set, published sets, the command, and the curve of a study."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SHORT_RUN, config, make_image_folder
from PIL import Image

from alexnet_pl.cli import evaluate as command
from alexnet_pl.data.robustness import SEVERITIES, STRENGTHS
from alexnet_pl.inference.robustness import Part, evaluate_corruptions, evaluate_published, is_own_data, record
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import DataError, UserError
from alexnet_pl.runtime.run_folder import CORRUPTIONS, finished_result, read_corruptions
from alexnet_pl.training.run import run as train_run


def test_corruptions_start_with_the_runs_own_test(run, folder: Path) -> None:
    first, *parts = evaluate_corruptions(run)
    result = finished_result(folder)
    assert {name: first.figures[f"test/{name}"] for name in ("loss", "acc")} == {
        name: result[f"test/{name}"] for name in ("loss", "acc")
    }
    assert [(p.corruption, p.severity) for p in parts] == [(n, s) for n in STRENGTHS for s in SEVERITIES]
    noise = [part.figures["test/error"] for part in parts if part.corruption == "gaussian_noise"]
    blur = [part.figures["test/error"] for part in parts if part.corruption == "gaussian_blur"]
    assert max(noise) > first.figures["test/error"]
    assert blur[-1] > first.figures["test/error"]


def test_class_folders_are_corrupted_as_they_are_stored(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", train=12, test=6)
    sizes = ("data.image_size=28", "data.resize_size=32", "data.batch_size=6")
    settings = (*SHORT_RUN, "data=image_folder", f"data.root={root}", "data.val_fraction=0.25", *sizes)
    train_run(config(*settings, run_dir=tmp_path / "run"))
    first, second, *_ = evaluate_corruptions(load_run(tmp_path / "run"))
    assert first.figures["test/loss"] == finished_result(tmp_path / "run")["test/loss"]
    assert (second.corruption, second.images) == ("gaussian_noise", 12)  # two batches, as in the smoke run
    assert second.figures["test/loss"] != first.figures["test/loss"]


def test_moved_class_folders_are_corrupted_in_their_own_resolution(class_folders, tmp_path: Path) -> None:
    """Issue: with --data-root, images were resized, corrupted, and resized and cropped again."""
    root = class_folders(train_per_class=10, test_per_class=2)
    sizes = ("data.batch_size=10", "data.image_size=32", "data.resize_size=37")
    train_run(config(*SHORT_RUN, "data=cifar10", f"data.root={root}", *sizes, run_dir=tmp_path / "run"))
    run = load_run(tmp_path / "run")
    expected = [part.figures for part in evaluate_corruptions(run)]
    moved = root.rename(tmp_path / "moved")
    assert [part.figures for part in evaluate_corruptions(run, moved)] == expected
    assert expected[0]["test/loss"] == finished_result(tmp_path / "run")["test/loss"]
    lone = tmp_path / "lone"  # DIR/test/<class>/* without training images
    shutil.copytree(moved / "test", lone / "test")
    assert not is_own_data(run, lone)
    assert next(evaluate_corruptions(run, lone)).images == 20
    for path in (moved / "test").rglob("*.png"):
        Image.open(path).resize((48, 48)).save(path)
    assert next(evaluate_corruptions(run, moved)).images == 20
    others = tmp_path / "others"  # the same images without the training images: other data, for all the program knows
    (moved / "test").rename(others)
    assert next(evaluate_corruptions(run, others)).images == 20
    assert is_own_data(run, moved)
    assert not is_own_data(run, others)


def test_only_the_runs_own_result_is_recorded(folder: Path, run, tmp_path: Path) -> None:
    parts, others = ([Part("", 0, 360, {"test/acc": acc})] for acc in (run.result["test/acc"], 0.5))
    shutil.copytree(folder, tmp_path / "run")
    other = tmp_path / "run" / "checkpoints" / "latest.ckpt"
    shutil.copy(folder / "checkpoints" / "best.ckpt", other)
    (other.parent / "SHA256SUMS").unlink()
    assert record(load_run(other), parts) is None
    assert record(load_run(tmp_path / "run"), others) is None
    assert record(load_run(tmp_path / "run"), parts) == tmp_path / "run" / CORRUPTIONS
    result = tmp_path / "run" / "result.json"
    result.write_text('{"status": "failed"}')
    assert load_run(tmp_path / "run").result is None


def test_the_command_prints_a_table_and_keeps_it(folder: Path, capsys) -> None:
    command.main([str(folder), "--corruptions"])
    shown = capsys.readouterr().out
    assert "without corruption" in shown
    assert [line.split()[0] for line in shown.splitlines()[-7:-2]] == [*STRENGTHS, "mean"]
    rows = read_corruptions(folder)
    assert len(rows) == 1 + 5 * len(STRENGTHS)
    (folder / CORRUPTIONS).unlink()
    result = (folder / "result.json").read_text()
    try:
        (folder / "result.json").unlink()
        command.main([str(folder), "--corruptions", "--json"])
    finally:
        (folder / "result.json").write_text(result)
    assert "corruptions.json was not written: it belongs to the best checkpoint" in capsys.readouterr().err
    assert not (folder / CORRUPTIONS).exists()


@pytest.mark.parametrize(
    "content", ["[", "{}3", '[{"corruption": 1}]', '[{"corruption": "a", "severity": "b"}]', "[3]"]
)
def test_corrupt_records_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / CORRUPTIONS).write_text(content)
    with pytest.raises(UserError, match=r"corruptions\.json is corrupt"):
        read_corruptions(tmp_path)


def test_published_sets_need_the_classes_of_cifar10(run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a run with CIFAR-10's ten classes"):
        next(evaluate_published(run, "cifar10_1", tmp_path))


def test_published_sets_on_a_run_of_cifar10(class_folders, tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    root = class_folders(train_per_class=10, test_per_class=2)
    train_run(config(*SHORT_RUN, "data=cifar10", f"data.root={root}", "data.batch_size=10", run_dir=run_dir))
    images = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.arange(10), 10))
    capsys.readouterr()
    command.main([str(run_dir), "--data", "cifar10_c", str(tmp_path), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["corruption"], row["severity"], row["images"]) for row in rows] == [("fog", s, 20) for s in SEVERITIES]
    assert all(0 <= row["test/error"] <= 1 for row in rows)
    assert not (run_dir / CORRUPTIONS).exists()
    np.save(tmp_path / "cifar10.1_v4_data.npy", images)
    np.save(tmp_path / "cifar10.1_v4_labels.npy", np.tile(np.arange(10), 10))
    command.main([str(run_dir), "--data", "cifar10_1", str(tmp_path)])
    assert "top-1 error on 100 images" in capsys.readouterr().out
    assert load_run(run_dir).class_names[0] == "airplane"


def test_the_mean_is_the_benchmarks(run) -> None:
    """Issue: the archive of CIFAR-10-C has four more corruptions than papers average over."""
    errors = {**dict.fromkeys(command.CORRUPTIONS, 0.5), "saturate": 0.1}
    parts = [
        Part(name, severity, 10, {"test/error": error}) for name, error in errors.items() for severity in SEVERITIES
    ]
    text = command.robustness_report(run, parts)
    (mean,) = (line for line in text.splitlines() if line.startswith("mean "))
    assert set(mean.split()[1:]) == {"0.5000"}
    assert text.endswith("mean: of the benchmark's 15 corruptions, without saturate")
    (mean,) = (
        line for line in command.robustness_report(run, parts[:5] + parts[-5:]).splitlines() if "mean " in line[:5]
    )
    assert set(mean.split()[1:]) == {"0.3000"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "cifar11", "x"],
        ["--data", "cifar10_1"],
        ["--data", "cifar10_c", "x", "--corruptions"],
        ["--corruptions", "--crops", "10"],
        ["--corruptions", "--split", "val"],
    ],
)
def test_contradictory_arguments_are_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(["nowhere", *arguments])
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --data")
    assert error.count("\n") == 1
    if arguments == ["--data", "cifar10_1"]:
        assert "--data is invalid: expected cifar10_1|cifar10_c DIR. alexnet evaluate --help" in error
