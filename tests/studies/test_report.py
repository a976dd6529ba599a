"""Study reports: numbers, intervals, published values, and every way in which a study can be incomplete or corrupt."""

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
from helpers import REPOSITORY
from scipy import stats

from alexnet_pl.cli.study import main
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.studies.plots import curves_figure, results_figure
from alexnet_pl.studies.report import report, write_report
from alexnet_pl.studies.table import factors_of, read_study, tabulate

# --- studies --------------------------------------------------------------------------------------------------------


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
    """Write a study from ``(overrides, result or None)`` pairs, one per trial."""

    def make(name: str, trials: list[tuple[dict, object]], errors: list[float] = (0.6, 0.5), **config: object) -> Path:
        root, known = tmp_path / name, {}
        root.mkdir()
        for index, (overrides, content) in enumerate(trials):
            run_dir = root / f"trial-{index:010x}"
            choices = {"model/norm": "none", **{key: value for key, value in overrides.items() if "/" in key}}
            overrides = {key: str(value) for key, value in overrides.items()}
            known[f"{index:010x}"] = {"run_dir": run_dir.name, "overrides": overrides, "choices": choices}
            if content is None:
                continue
            run_dir.mkdir()
            (run_dir / "result.json").write_text(content if isinstance(content, str) else json.dumps(content))
            settings = {"model": {"num_classes": 10}, "optimizer": {"lr": 0.001}, **config}
            (run_dir / "config.yaml").write_text(json.dumps(settings))
            rows = "".join(f"{epoch},{error},{error}\n" for epoch, error in enumerate(errors, start=1))
            (run_dir / "metrics.csv").write_text(f"epoch,train/error,val/error\n{rows}")
        axes = list(dict.fromkeys(key for overrides, _ in trials for key in overrides))
        command = {
            "command": f"python train.py -m study={name}",
            "launcher": "basic",
            "started": 0.0,
            "trials": [*known],
        }
        content = {"study": name, "axes": axes, "trials": known, "commands": [command]}
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
    assert "None: every trial has finished." in text
    table = pd.read_csv(root / "results.csv")
    assert table["test/acc"].tolist() == [value for values in THREE.values() for value in values]
    assert table["model/norm"].tolist() == ["none"] * 3 + ["lrn"] * 3
    for name in ("results", "curves"):
        assert (root / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (root / f"{name}.svg").read_text()


def test_committed_report_has_the_numbers_of_its_csv(make_study):
    """Every row of the tables that README quotes, computed again from docs/results/norm_x_pool."""
    committed = REPOSITORY / "docs" / "results" / "norm_x_pool"
    results = pd.read_csv(committed / "results.csv")
    factors = ["model/norm", "model/pool"]
    trials = [
        (
            {**{key: row[key] for key in factors}, "seed": row["seed"]},
            {
                "status": "finished",
                **{key: value for key, value in row.items() if key in result(0, 0) and key != "data"},
            },
        )
        for row in json.loads(results.to_json(orient="records", double_precision=15))
    ]
    lines = report(tabulate([make_study("s", trials)])).splitlines()
    rows = [line for line in (committed / "report.md").read_text(encoding="utf-8").splitlines() if "[" in line]
    rows = [row for row in rows if row.startswith("| ")]
    assert len(rows) == 6 + 6 + 4 + 3
    assert [row for row in rows if row not in lines] == []


@pytest.mark.parametrize(
    "level",
    ["<img src=x onerror=alert(1)>", "![x](http://example.org/x.png)", "a | b", "# x", "`rm`", "\x1b[31mred", "a\nb"],
)
def test_text_of_strangers_cannot_break_the_report(make_study, level):
    """Levels, devices and errors come from files that anybody may have written."""
    trials = norms({"none": [0.70, 0.71]}, device=level)
    trials += [({"model/norm": level, "seed": seed}, result(0.7, seed, device=level)) for seed in (1, 2)]
    trials += [({"model/norm": "none", "seed": 3}, {"status": "failed", "error": level})]
    root = make_study("s", trials)
    text = report(write_report([root], root))
    tables = [line for line in text.splitlines() if line.startswith("|")]
    rows = [line for line in tables if line.startswith(("| none |", "| trial-"))]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7, 5}
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(http|\x1b", text.replace("![Test error", "").replace("![Learning", ""))
    for line in text.splitlines():
        assert not line.startswith("# ") or line == "# Study s"


def test_csv_holds_no_formulas(make_study):
    trials = [
        ({"model/norm": level, "seed": 1}, result(0.7, 1)) for level in ("=cmd|' /C calc'!A0", "@x", "-1", "none")
    ]
    root = make_study("s", trials)
    write_report([root], root)
    levels = pd.read_csv(root / "results.csv", dtype=str)["model/norm"].tolist()
    assert levels == ["'=cmd|' /C calc'!A0", "'@x", "-1", "none"]


def test_one_seed_has_no_interval(make_study):
    text = report(tabulate([make_study("s", norms({"none": [0.70], "lrn": [0.71]}))]))
    (row,) = rows_of(text, "| none | 1 | ")
    assert row[2:] == ["70.00", "30.00", "70.00", "30.00"]
    (effect,) = rows_of(text, "| lrn instead of none")
    assert effect[1:4] == ["1", "−1.00", "−1.00"]


def test_averaged_views_of_the_test_images_are_reported(make_study):
    values = norms(THREE)
    for (_, content), views in zip(values, [0.75, 0.77, 0.76, 0.80, 0.81, 0.82], strict=True):
        content["test/acc_shifted_mirror"] = views
    root = make_study("s", values)
    text = report(write_report([root], root))
    (head,) = rows_of(text, "| norm | n | ")
    assert head[-1] == "test accuracy, 6 views"
    assert [row[-1][:12] for row in rows_of(text, "| none | 3 | ") + rows_of(text, "| lrn | 3 | ")] == [
        "76.00 ± 1.00",
        "81.00 ± 1.00",
    ]
    assert pd.read_csv(root / "results.csv")["test/acc_shifted_mirror"].tolist() == [0.75, 0.77, 0.76, 0.80, 0.81, 0.82]


def test_views_that_some_runs_lack_have_no_column(make_study):
    values = norms(THREE)
    values[0][1]["test/acc_mirror"] = 0.75
    root = make_study("s", values)
    assert "mirror" not in report(write_report([root], root))
    assert pd.read_csv(root / "results.csv")["test/acc_mirror"].notna().sum() == 1


def test_what_does_not_count_is_listed_with_its_reason(make_study):
    trials = norms({"none": [0.70, 0.72]})
    broken = [
        ({"status": "failed", "error": "the loss is nan at step 1.\nMore."}, "failed: the loss is nan at step 1."),
        ("{", "result.json is corrupt"),
        ("[1]", "result.json is corrupt"),
        (None, "not started"),
        (json.dumps(result(math.nan, 7)), "result.json has val/acc=nan"),
        (result(1.5, 8), "result.json has val/acc=1.5"),
        ({key: value for key, value in result(0.7, 9).items() if key != "test/acc"}, "result.json lacks test/acc"),
        (result(0.7, 10, seconds="long"), "result.json lacks seconds"),
    ]
    trials += [({"model/norm": "lrn", "seed": seed}, content) for seed, (content, _) in enumerate(broken, start=3)]
    root = make_study("s", trials)
    text = report(write_report([root], root))
    assert text.startswith("# Study s\n\n2 of 10 trials, seeds 1, 2.")
    listed = {row[2]: row[3] for row in rows_of(text.split("## Excluded trials")[1], "| trial-")}
    assert listed == {str(seed): reason for seed, (_, reason) in enumerate(broken, start=3)}
    assert pd.read_csv(root / "results.csv")["counts"].sum() == 2


def test_what_mixes_is_flagged(make_study):
    trials = norms({"none": [0.7, 0.7]})
    mixed = {
        "copies of the data": {"data": {"source": "another"}},
        "commits": {"git_commit": "def"},
        "versions": {"versions": {"torch": "2.16"}},
        "devices": {"device": "cuda (X)"},
        "precisions": {"precision": "16-mixed"},
    }
    for what, change in mixed.items():
        other = [({"model/norm": "lrn", "seed": 1}, result(0.7, 1, **change))]
        table = tabulate([make_study(what.replace(" ", "_"), trials + other)])
        assert [note.partition(":")[0] for note in table.notes] == [f"mixed {what}"]
    dirty = tabulate([make_study("dirty", norms({"none": [0.7]}, git_commit="abc-dirty"))])
    assert dirty.notes == ["1 trial ran from a checkout with uncommitted changes"]
    lengths = trials + [({"model/norm": "lrn", "seed": 1}, result(0.7, 1, epochs=3))]
    assert tabulate([make_study("lengths", lengths)]).notes == ["runs of different lengths: 2, 3 epochs"]


def test_axes_that_do_not_cross_are_said_and_what_can_be_paired_is(make_study):
    trials = [
        ({"model/norm": norm, "model/pool": pool, "seed": seed}, result(0.7 + seed / 100, seed))
        for norm, pool in (("none", "a"), ("lrn", "a"), ("none", "b"))
        for seed in (1, 2)
    ]
    text = report(tabulate([make_study("s", trials)]))
    assert "the axes are not fully crossed: no trial for 1 combination (lrn, b)" in text
    assert rows_of(text, "| lrn instead of none")[0][1:3] == ["2", "+0.00 [+0.00, +0.00]"]
    assert "## Interactions" not in text
    apart = [({"model/norm": "none", "seed": 1}, result(0.7, 1)), ({"model/norm": "lrn", "seed": 2}, result(0.7, 2))]
    text = report(tabulate([make_study("apart", apart)]))
    assert rows_of(text, "| lrn instead of none")[0][1:4] == ["0", "–", "–"]
    assert "lrn instead of none (norm): left out seeds 1, 2" in text


def test_defaults_are_looked_up_and_what_belongs_together_is_one_factor(make_study):
    trials = [
        ({"seed": 1}, result(0.7, 1)),  # no norm given: its choice says none; no rate given: its config says 0.001
        ({"seed": 2, "model/norm": "none", "optimizer.lr": "1e-3"}, result(0.7, 2)),
        ({"seed": 1, "model/norm": "lrn", "model/pool": "x", "data.root": "/a"}, result(0.7, 1)),
        (
            {"seed": 2, "model/norm": "lrn", "model/pool": "x", "study": "s", "callbacks.dashboard.figures": "false"},
            result(0.7, 2),
        ),
    ]
    table = tabulate([make_study("s", trials)])
    assert [(factor.key, factor.levels) for factor in table.factors] == [
        ("model/norm + model/pool", ["none, default", "lrn, x"])
    ]
    assert table.common["optimizer.lr"] == "0.001"
    assert "−1.4 / −1.2" in report(table)


def merged(root: Path, group: str, *parts: str) -> None:
    """Add the section of a group's options to the config of every trial, with the trial's own directory in it."""
    for path in root.glob("*/config.yaml"):
        section = {part: {"_target_": part, "folder": f"{path.parent}/checkpoints"} for part in parts}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run_dir": str(path.parent), group: section}))


def test_lists_of_options_are_settings_with_readable_levels(make_study):
    """Hydra names no choice for them, and the section that they are merged into holds the run directory."""
    trials = [({"callbacks": "[ema, early_stopping]", "seed": seed}, result(0.7, seed)) for seed in (1, 2)]
    same = make_study("same", trials)
    merged(same, "callbacks", "best", "ema", "early_stopping")
    table = tabulate([same])
    assert table.factors == []
    assert table.common == {"callbacks": "ema, early_stopping"}
    assert [len(cell) for cell in table.cells().values()] == [2]
    options = ("[crop_flip,cutout]", "[crop_flip,mixup]")
    swept = make_study("swept", [({"augment": option, "seed": 1}, result(0.7, 1)) for option in options])
    merged(swept, "augment", "crop")
    assert [factor.levels for factor in tabulate([swept]).factors] == [["crop_flip, cutout", "crop_flip, mixup"]]
    other = make_study("other", [({"callbacks": "[ema]", "seed": seed}, result(0.8, seed)) for seed in (1, 2)])
    merged(other, "callbacks", "best", "ema")
    table = tabulate([same, other])
    assert [factor.levels for factor in table.factors] == [["same", "other"]]
    assert table.notes[0] == "the studies differ in callbacks (ema, early_stopping against ema)"
    waiting = make_study("waiting", [*trials, ({"callbacks": "[ema,early_stopping]", "seed": 3}, None)])
    assert tabulate([waiting]).factors == []


def test_sections_that_no_override_names_hold_no_run_directory(make_study):
    """An experiment lists the options of one study, and replaces a callback in the other."""
    listed = make_study("listed", [({"seed": seed}, result(0.7, seed)) for seed in (1, 2)])
    merged(listed, "callbacks", "best", "ema")
    given = make_study("given", [({"callbacks": "[ema]", "callbacks.ema": "x", "seed": 1}, result(0.7, 1))])
    factors = {factor.key: factor.levels for factor in factors_of(read_study(listed)[1] + read_study(given)[1], [])[0]}
    ((key, levels),) = factors.items()
    assert key == "callbacks + callbacks.ema"
    assert levels == ["best, ema, {'_target_': 'ema', 'folder': '${run_dir}/checkpoints'}", "ema, x"]
    mappings = [({"augment": f"{{crop:{{padding:{pad}}}}}", "seed": 1}, result(0.7, 1)) for pad in (2, 4)]
    two = make_study("two", mappings)
    for path, pad in zip(sorted(two.glob("*/config.yaml")), (2, 4), strict=True):
        path.write_text(json.dumps({"augment": {"crop": {"_target_": "crop", "padding": pad}}}))
    assert len(tabulate([two]).factors[0].levels) == 2


def test_of_two_trials_with_the_same_settings_the_later_counts(make_study):
    root = make_study("s", [*norms({"none": [0.7]}), *norms({"none": [0.8]})])
    os.utime(root / "trial-0000000000" / "result.json", (1, 1))
    table = tabulate([root])
    assert [trial.result["val/acc"] for trial in table.counted] == [0.8]
    assert [trial.excluded for trial in table.trials if trial.excluded] == [
        "rerun since, with another config: trial-0000000001"
    ]


def test_the_latest_of_two_trials_is_the_one_started_last(make_study):
    """Not the one whose files are newer: copying a study and cloning a repository change the times of files."""
    root = make_study("s", [*norms({"none": [0.7]}), *norms({"none": [0.8]})])
    first, second = (root / f"trial-000000000{index}" for index in (0, 1))
    os.utime(first / "result.json", (1, 1))
    (first / "commands.txt").write_text(
        "2020-01-01 00:00:00 UTC\tpython train.py\n2020-01-03 00:00:00 UTC\tpython train.py resume=x\n"
    )
    (second / "commands.txt").write_text("2020-01-02 00:00:00 UTC\tpython train.py\n")
    assert [trial.result["val/acc"] for trial in tabulate([root]).counted] == [0.7]
    (second / "commands.txt").write_text("yesterday\tpython train.py\n")  # the time of its file counts
    assert [trial.result["val/acc"] for trial in tabulate([root]).counted] == [0.8]


def test_a_default_of_null_is_no_level_of_its_own(make_study):
    trials = [({"seed": 1}, result(0.7, 1)), ({"seed": 2, "model.without": "null"}, result(0.7, 2))]
    root = make_study("s", trials, model={"num_classes": 10, "without": None})
    table = tabulate([root])
    assert (table.factors, table.common["model.without"]) == ([], "None")
    unknown = [({"seed": 1}, result(0.7, 1)), ({"seed": 2, "x.y": "null"}, result(0.7, 2))]
    levels = [factor.levels for factor in tabulate([make_study("unknown", unknown)]).factors]
    assert levels == [["default", "None"]]  # no config says what the default is


def test_places_and_machines_are_no_factors(make_study):
    trials = [
        ({"seed": 1, "local": "none"}, result(0.7, 1)),
        ({"seed": 2, "local": "mine", "data_dir": "/a"}, result(0.7, 2)),
    ]
    table = tabulate([make_study("s", trials)])
    assert (table.factors, table.common) == ([], {})


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({"relu": [0.5, 0.2], "tanh": [0.8, 0.6, 0.4, 0.2]}, r"\| tanh to relu \| 2 \| 2.05 \[2.05, 2.05\] \| about 6"),
        ({"relu": [0.5, 0.2], "tanh": [0.8, 0.6, 0.4, 0.3]}, r"\| tanh to relu \| 2 \| more than 2.18: tanh did not"),
        ({"relu": [0.5, 0.4], "tanh": [0.8, 0.2]}, r"\| tanh to relu \| 2 \| less than 0.96: relu did not always"),
        ({"relu": [0.5, 0.4], "tanh": [0.8, 0.5]}, r"\| tanh to relu \| 2 \| unknown: neither always reached it"),
    ],
)  # fmt: skip
def test_epochs_to_the_training_error_and_their_ratio(make_study, errors, said):
    """(1 + 0.25 / 0.3) = 1.83 epochs for ReLU, 3 + 0.15 / 0.2 = 3.75 for tanh."""
    stop = {"callbacks": {"learned": {"_target_": "alexnet_pl.training.StopAtTrainingError", "error": 0.25}}}
    trials = [({"model/activation": name, "seed": seed}, result(0.7, seed)) for name in errors for seed in (1, 2)]
    root = make_study("s", trials, **stop)
    for index, (overrides, _) in enumerate(trials):
        rows = "".join(f"{i},{e},{e}\n" for i, e in enumerate(errors[overrides["model/activation"]], start=1))
        (root / f"trial-{index:010x}" / "metrics.csv").write_text(f"epoch,train/error,val/error\n{rows}")
    text = report(write_report([root], root))
    assert re.search(said, text), text
    assert "adjusted for their number. These runs stopped at a training error" in text
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
    assert "the axes are not fully crossed" in text
    c = make_study("c", norms({"batch": [0.7, 0.7]}))
    with pytest.raises(UserError, match="a and c have no finished configuration in common"):
        tabulate([a, c])


def test_directories_that_are_not_studies(make_study, tmp_path, capsys):
    with pytest.raises(UserError, match="not found"):
        tabulate([tmp_path / "absent"])
    make_study("s", norms({"none": [0.7]}))
    with pytest.raises(UserError, match=r"is not a study: study.json not found. Studies in it: s\."):
        tabulate([tmp_path])
    with pytest.raises(UserError, match="has no finished trial yet"):
        tabulate([make_study("t", [({"seed": 1}, None)])])
    with pytest.raises(UserError, match="a study without trials"):
        tabulate([make_study("u", [])])
    corrupt = make_study("v", norms({"none": [0.7]}))
    (corrupt / "study.json").write_text("{}")
    with pytest.raises(UserError, match="is corrupt"):
        tabulate([corrupt])
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


def test_many_configurations_are_told_apart_by_factor(make_study):
    """More than there are colors: a line style per level of the first factor, a color per level of the second."""
    levels = [(act, norm) for act in ("relu", "tanh") for norm in "abcde"]
    trials = [({"model/activation": act, "model/norm": norm, "seed": 1}, result(0.7, 1)) for act, norm in levels]
    lines = curves_figure(tabulate([make_study("s", trials)])).axes[0].lines
    looks = [(line.get_linestyle(), line.get_color()) for line in lines]
    assert [style for style, _ in looks] == ["-"] * 5 + ["--"] * 5
    colors = [color for _, color in looks]
    assert colors[:5] == colors[5:]
    assert len(set(colors)) == 5


def test_a_report_waits_for_nothing_that_trains():
    code = (
        "import sys, alexnet_pl.studies.report, alexnet_pl.studies.plots, alexnet_pl.studies.runner\n"
        "print(*sorted({'torch', 'lightning', 'torchvision', 'torchmetrics'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
