"""Reports of studies: the statistics against scipy's, and every way in which a folder can be less than one hopes."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from alexnet_pl.cli.study import main
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.studies.plots import curves_figure, results_figure
from alexnet_pl.studies.report import report, write_report
from alexnet_pl.studies.statistics import Estimate, epochs_to, estimate, interaction, main_effect
from alexnet_pl.studies.table import tabulate

# --- statistics -----------------------------------------------------------------------------------------------------

SEEDS = (1, 2, 3, 4)
NOISE = {1: 0.031, 2: -0.012, 3: 0.004, 4: 0.02}  # of a seed, far larger than the effects: pairing removes it
WOBBLE = {1: 0.001, 2: -0.002, 3: 0.0005, 4: 0.0012}


def crossed(effect: float = -0.014, other: float = -0.004, both: float = 0.003) -> dict:
    """Two factors of two levels with known effects; the first one's varies a little from seed to seed."""
    return {
        ((norm, pool), seed): 0.4 + NOISE[seed]
        + (norm == "lrn") * (effect + WOBBLE[seed]) + (pool == "overlapping") * other
        + (norm == "lrn" and pool == "overlapping") * (both + 2 * WOBBLE[seed])
        for norm in ("none", "lrn") for pool in ("plain", "overlapping") for seed in SEEDS
    }  # fmt: skip


def assert_interval(found: Estimate, values: list[float]) -> None:
    """scipy's own t-interval of the mean."""
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.n == len(values)
    assert (found.mean, found.low, found.high) == pytest.approx((stats.tmean(values), interval.low, interval.high))
    assert found.std == pytest.approx(stats.tstd(values))


def test_mean_deviation_and_interval_are_scipys():
    assert_interval(estimate([0.711, 0.702, 0.718]), [0.711, 0.702, 0.718])
    assert estimate([0.5]) == Estimate(1, 0.5, None, None, None)
    assert estimate([0.5, 0.5]) == Estimate(2, 0.5, 0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="nothing"):
        estimate([])


def test_main_effects_are_differences_between_equal_seeds():
    found = main_effect(crossed(), 0, "none", "lrn").estimate
    # For each seed the mean over both poolings: −0.014 + 0.003 / 2 and twice the wobble.
    assert_interval(found, [-0.0125 + 2 * WOBBLE[seed] for seed in SEEDS])
    with_plain = [crossed()[("none", "plain"), seed] for seed in SEEDS]
    with_lrn = [crossed()[("lrn", "plain"), seed] for seed in SEEDS]
    assert stats.ttest_ind(with_lrn, with_plain).pvalue > 0.3  # unpaired, the seeds drown it
    assert found.high < 0
    back = main_effect(crossed(), 0, "lrn", "none").estimate
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_interactions_are_differences_of_differences():
    found = interaction(crossed(), (0, 1), ("none", "plain"), ("lrn", "overlapping")).estimate
    assert_interval(found, [0.003 + 2 * WOBBLE[seed] for seed in SEEDS])


def test_a_seed_that_lacks_a_run_is_left_out_as_a_whole():
    values = crossed()
    del values[("lrn", "plain"), 2]
    effect = main_effect(values, 0, "none", "lrn")
    assert_interval(effect.estimate, [-0.0125 + 2 * WOBBLE[seed] for seed in (1, 3, 4)])
    assert effect.left_out == [2]
    assert interaction(values, (0, 1), ("none", "plain"), ("lrn", "overlapping")).estimate.n == 3
    apart = {(("a",), 1): 0.1, (("b",), 2): 0.2}
    assert main_effect(apart, 0, "a", "b").estimate is None


def test_epochs_to_an_error_are_linear_between_epochs():
    assert epochs_to([0.5, 0.3, 0.2], 0.25, start=0.9) == pytest.approx(2.5)
    assert epochs_to([0.1], 0.25, start=0.9) == pytest.approx(0.65 / 0.8)
    assert epochs_to([0.5, 0.25], 0.25, start=0.9) == pytest.approx(2)
    assert epochs_to([0.5, 0.26], 0.25, start=0.9) is None


# --- folders --------------------------------------------------------------------------------------------------------


def result(accuracy: float, seed: int, **changes: object) -> dict:
    figures = {f"{split}/{name}": value for split in ("val", "test")
               for name, value in (("acc", accuracy), ("acc_top5", 0.9 + accuracy / 100), ("loss", 1.0))}  # fmt: skip
    rest = {
        "status": "finished", "best_epoch": 2, "epochs": 2, "seconds": 60.0, "images_per_second": 1000.0,
        "data": {"name": "digits", "source": "digits", "train": 1293, "val": 144, "test": 360}, "model": "LeNet5",
        "parameters": 62006, "device": "cpu (test)", "precision": "32-true", "seed": seed, "split_seed": 0,
        "versions": {"python": "3.11", "torch": "2.15"}, "git_commit": "abc",
    }  # fmt: skip
    return {**figures, **rest, **changes}


StudyMaker = Callable[..., Path]


@pytest.fixture
def make_study(tmp_path: Path) -> StudyMaker:
    """Write a study's folder from ``(overrides, result or None)`` pairs."""

    def make(name: str, points: list[tuple[dict, object]], errors: list[float] = (0.6, 0.5), **config: object) -> Path:
        root, known = tmp_path / name, {}
        root.mkdir()
        for index, (overrides, content) in enumerate(points):
            folder = root / f"point-{index:010x}"
            choices = {"model/norm": "none", **{key: value for key, value in overrides.items() if "/" in key}}
            overrides = {key: str(value) for key, value in overrides.items()}
            known[f"{index:010x}"] = {"folder": folder.name, "overrides": overrides, "choices": choices}
            if content is None:
                continue
            folder.mkdir()
            (folder / "result.json").write_text(content if isinstance(content, str) else json.dumps(content))
            settings = {"model": {"num_classes": 10}, "optimizer": {"lr": 0.001}, **config}
            (folder / "config.yaml").write_text(json.dumps(settings))
            rows = "".join(f"{epoch},{error},{error}\n" for epoch, error in enumerate(errors, start=1))
            (folder / "metrics.csv").write_text(f"epoch,train/error,val/error\n{rows}")
        axes = list(dict.fromkeys(key for overrides, _ in points for key in overrides))
        command = {
            "command": f"python train.py -m study={name}",
            "launcher": "basic",
            "started": 0.0,
            "points": [*known],
        }
        content = {"study": name, "axes": axes, "points": known, "commands": [command]}
        (root / "study.json").write_text(json.dumps(content))
        return root

    return make


def norms(values: dict[str, list[float]], **changes: object) -> list[tuple[dict, dict]]:
    return [
        ({"model/norm": norm, "seed": seed}, result(value, seed, **changes))
        for norm, accuracies in values.items()
        for seed, value in enumerate(accuracies, start=1)
    ]


THREE = {"none": [0.70, 0.72, 0.71], "lrn": [0.712, 0.731, 0.722]}


def rows_of(text: str, start: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith(start)
    ]


def test_a_report_has_the_numbers_the_intervals_and_what_was_published(make_study):
    root = make_study("s", norms(THREE))
    text = report(write_report([root], root))
    assert text == (root / "report.md").read_text()
    (row,) = rows_of(text, "| none | 3 | ")
    low, high = stats.ttest_1samp(THREE["none"], 0).confidence_interval(0.95)
    assert row[2] == row[4] == f"71.00 ± 1.00 [{100 * low:.2f}, {100 * high:.2f}]"
    assert row[3] == row[5] == f"29.00 ± 1.00 [{100 - 100 * high:.2f}, {100 - 100 * low:.2f}]"
    (effect,) = rows_of(text, "| lrn instead of none")
    differences = [none - lrn for none, lrn in zip(THREE["none"], THREE["lrn"], strict=True)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    expected = f"{100 * stats.tmean(differences):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]".replace("-", "−")
    assert effect[1:4] == ["3", expected, expected]
    assert effect[5].startswith("−1.4 / −1.2 (ImageNet, Krizhevsky et al. 2012, section 3.3")
    for said in ("`python train.py -m study=s`", "cpu (test)", "torch 2.15", "digits (1,293 train", "62,006", "60 s"):
        assert said in text
    assert "Note" not in text
    assert "None: every point has finished." in text
    table = pd.read_csv(root / "results.csv")
    assert table["test/acc"].tolist() == [value for values in THREE.values() for value in values]
    assert table["model/norm"].tolist() == ["none"] * 3 + ["lrn"] * 3
    for name in ("results", "curves"):
        assert (root / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (root / f"{name}.svg").read_text()


def test_one_seed_has_no_interval(make_study):
    text = report(tabulate([make_study("s", norms({"none": [0.70], "lrn": [0.71]}))]))
    (row,) = rows_of(text, "| none | 1 | ")
    assert row[2:] == ["70.00", "30.00", "70.00", "30.00"]
    (effect,) = rows_of(text, "| lrn instead of none")
    assert effect[1:4] == ["1", "−1.00", "−1.00"]


def test_what_does_not_count_is_listed_with_its_reason(make_study):
    points = norms({"none": [0.70, 0.72]})
    broken = [
        ({"status": "failed", "error": "the loss is nan at step 1.\nMore."}, "failed: the loss is nan at step 1."),
        ("{", "result.json is damaged"),
        ("[1]", "result.json is damaged"),
        (None, "not begun"),
        (json.dumps(result(math.nan, 7)), "result.json has val/acc=nan"),
        (result(1.5, 8), "result.json has val/acc=1.5"),
        ({key: value for key, value in result(0.7, 9).items() if key != "test/acc"}, "result.json lacks test/acc"),
        (result(0.7, 10, seconds="long"), "result.json lacks seconds"),
    ]
    points += [({"model/norm": "lrn", "seed": seed}, content) for seed, (content, _) in enumerate(broken, start=3)]
    root = make_study("s", points)
    text = report(write_report([root], root))
    assert text.startswith("# Study s\n\n2 of 10 points, seeds 1, 2.")
    listed = {row[2]: row[3] for row in rows_of(text.split("## Points that do not count")[1], "| point-")}
    assert listed == {str(seed): reason for seed, (_, reason) in enumerate(broken, start=3)}
    assert pd.read_csv(root / "results.csv")["counts"].sum() == 2


def test_what_mixes_is_flagged(make_study):
    points = norms({"none": [0.7, 0.7]})
    mixed = {
        "copies of the data": {"data": {"source": "another"}},
        "commits of the code": {"git_commit": "def"},
        "versions": {"versions": {"torch": "2.16"}},
        "devices": {"device": "cuda (X)"},
        "precisions": {"precision": "16-mixed"},
    }
    for what, change in mixed.items():
        other = [({"model/norm": "lrn", "seed": 1}, result(0.7, 1, **change))]
        table = tabulate([make_study(what.replace(" ", "_"), points + other)])
        assert [note.partition(":")[0] for note in table.notes] == [f"mixed {what}"]
    dirty = tabulate([make_study("dirty", norms({"none": [0.7]}, git_commit="abc-dirty"))])
    assert dirty.notes == ["1 points ran from a checkout with changes that no commit has"]
    lengths = points + [({"model/norm": "lrn", "seed": 1}, result(0.7, 1, epochs=3))]
    assert tabulate([make_study("lengths", lengths)]).notes == ["runs of different lengths: 2, 3 epochs"]


def test_axes_that_do_not_cross_are_said_and_what_can_be_paired_is(make_study):
    points = [
        ({"model/norm": norm, "model/pool": pool, "seed": seed}, result(0.7 + seed / 100, seed))
        for norm, pool in (("none", "a"), ("lrn", "a"), ("none", "b"))
        for seed in (1, 2)
    ]
    text = report(tabulate([make_study("s", points)]))
    assert "the axes do not cross: 1 combinations have no point (lrn, b)" in text
    assert rows_of(text, "| lrn instead of none")[0][1:3] == ["2", "+0.00 [+0.00, +0.00]"]
    assert "## Interactions" not in text
    apart = [({"model/norm": "none", "seed": 1}, result(0.7, 1)), ({"model/norm": "lrn", "seed": 2}, result(0.7, 2))]
    text = report(tabulate([make_study("apart", apart)]))
    assert rows_of(text, "| lrn instead of none")[0][1:4] == ["0", "–", "–"]
    assert "lrn instead of none (norm): left out seeds 1, 2" in text


def test_defaults_are_looked_up_and_what_belongs_together_is_one_factor(make_study):
    points = [
        ({"seed": 1}, result(0.7, 1)),  # no norm given: its choice says none; no rate given: its config says 0.001
        ({"seed": 2, "model/norm": "none", "optimizer.lr": "1e-3"}, result(0.7, 2)),
        ({"seed": 1, "model/norm": "lrn", "model/pool": "x", "data.root": "/a"}, result(0.7, 1)),
        (
            {"seed": 2, "model/norm": "lrn", "model/pool": "x", "study": "s", "callbacks.dashboard.figures": "false"},
            result(0.7, 2),
        ),
    ]
    table = tabulate([make_study("s", points)])
    assert [(factor.key, factor.levels) for factor in table.factors] == [
        ("model/norm + model/pool", ["none, default", "lrn, x"])
    ]
    assert table.common["optimizer.lr"] == "0.001"
    assert "−1.4 / −1.2" in report(table)


def test_of_two_points_with_the_same_settings_the_later_counts(make_study):
    root = make_study("s", [*norms({"none": [0.7]}), *norms({"none": [0.8]})])
    os.utime(root / "point-0000000000" / "result.json", (1, 1))
    table = tabulate([root])
    assert [point.result["val/acc"] for point in table.counted] == [0.8]
    assert [point.excluded for point in table.points if point.excluded] == [
        "made anew since, with other settings: point-0000000001"
    ]


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({"relu": [0.5, 0.2], "tanh": [0.8, 0.6, 0.4, 0.2]}, r"\| tanh to relu \| 2 \| 2.05 \[2.05, 2.05\] \| about 6"),
        ({"relu": [0.5, 0.2], "tanh": [0.8, 0.6, 0.4, 0.3]}, r"\| tanh to relu \| 2 \| more than 2.18: tanh did not"),
        ({"relu": [0.5, 0.4], "tanh": [0.8, 0.2]}, r"\| tanh to relu \| 2 \| less than 0.96: relu did not always"),
        ({"relu": [0.5, 0.4], "tanh": [0.8, 0.5]}, r"\| tanh to relu \| 2 \| unknown: neither always got there"),
    ],
)  # fmt: skip
def test_epochs_to_the_training_error_and_their_ratio(make_study, errors, said):
    """(1 + 0.25 / 0.3) = 1.83 epochs for ReLU, 3 + 0.15 / 0.2 = 3.75 for tanh."""
    stop = {"callbacks": {"learned": {"_target_": "alexnet_pl.training.StopAtTrainingError", "error": 0.25}}}
    points = [({"model/activation": name, "seed": seed}, result(0.7, seed)) for name in errors for seed in (1, 2)]
    root = make_study("s", points, **stop)
    for index, (overrides, _) in enumerate(points):
        rows = "".join(f"{i},{e},{e}\n" for i, e in enumerate(errors[overrides["model/activation"]], start=1))
        (root / f"point-{index:010x}" / "metrics.csv").write_text(f"epoch,train/error,val/error\n{rows}")
    text = report(write_report([root], root))
    assert re.search(said, text), text
    if errors["tanh"][-1] == 0.3:
        assert "| tanh | 2 | 0 of 2 | more than 4.00: 2 of 2 not within 4 epochs |" in text
    assert "25%" in text


def test_two_studies_are_compared_by_what_they_share(make_study):
    a = make_study("a", norms({"none": [0.70, 0.72], "lrn": [0.71, 0.73]}))
    b = make_study("b", norms({"none": [0.74, 0.75], "batch": [0.8, 0.8]}), optimizer={"lr": 0.01})
    text = report(tabulate([a, b]))
    (effect,) = rows_of(text, "| b instead of a (study)")
    assert effect[1] == "2"
    assert effect[2].startswith("−3.50 [")  # none alone is in both
    assert "the axes do not cross" in text
    c = make_study("c", norms({"batch": [0.7, 0.7]}))
    with pytest.raises(UserError, match="a and c have no finished configuration in common"):
        tabulate([a, c])


def test_folders_that_are_no_study(make_study, tmp_path, capsys):
    with pytest.raises(UserError, match="does not exist"):
        tabulate([tmp_path / "absent"])
    make_study("s", norms({"none": [0.7]}))
    with pytest.raises(UserError, match=r"is no study: it has no study.json. Studies in it: s\."):
        tabulate([tmp_path])
    with pytest.raises(UserError, match="has no finished point yet"):
        tabulate([make_study("t", [({"seed": 1}, None)])])
    with pytest.raises(UserError, match="a study without points"):
        tabulate([make_study("u", [])])
    damaged = make_study("v", norms({"none": [0.7]}))
    (damaged / "study.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        tabulate([damaged])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "s"), str(tmp_path / "s")])
    assert "give two different studies" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        main([str(tmp_path / "s"), "--out", str(tmp_path / "file" / "x")])


def test_figures_show_the_numbers(make_study):
    table = tabulate([make_study("s", norms(THREE), errors=[0.6, 0.5])])
    (axes,) = results_figure(table).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [sorted(line.get_xdata()) for line in dots] == [
        pytest.approx([28, 29, 30]),
        pytest.approx([26.9, 27.8, 28.8]),
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["none (n=3)", "lrn (n=3)"]
    training, validation = curves_figure(table).axes
    for axes in (training, validation):
        for line in axes.lines:
            assert list(line.get_xdata()) == [1, 2]
            assert list(line.get_ydata()) == pytest.approx([60, 50])
        assert len(axes.collections) == 2  # a band each


def test_a_report_waits_for_nothing_that_trains():
    code = (
        "import sys, alexnet_pl.studies.report, alexnet_pl.studies.plots, alexnet_pl.studies.runner\n"
        "print(*sorted({'torch', 'lightning', 'torchvision', 'torchmetrics'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
