"""Robustness in a study's report: the curve of the trials that were evaluated under corruptions."""

import json

import pytest
from helpers import pixels

from alexnet_pl.runtime.run_folder import CORRUPTIONS
from alexnet_pl.studies.report import corruption_errors, report
from alexnet_pl.studies.robustness import robustness, robustness_figure
from alexnet_pl.studies.table import Factor, Table, Trial

RESULT = {
    "status": "finished", "seconds": 10.0, "parameters": 100, "epochs": 2, "val/acc": 0.7, "test/acc": 0.7,
    "val/acc_top5": 0.9, "test/acc_top5": 0.9, "val/loss": 1.0, "test/loss": 1.0,
}  # fmt: skip


def make_table(tmp_path, measured) -> Table:
    """Return a study of two norms and two seeds; ``measured`` maps ``(norm, seed)`` to an error at severity 0."""
    trials = []
    for norm in ("lrn", "batch"):
        for seed in (1, 2):
            run_dir = tmp_path / f"{norm}-{seed}"
            run_dir.mkdir()
            if (error := measured.get((norm, seed))) is not None:
                rows = [{"corruption": "", "severity": 0, "test/error": error}] + [
                    {"corruption": name, "severity": severity, "test/error": error + severity * slope}
                    for name, slope in (("blur", 0.02), ("jpeg", 0.04))
                    for severity in range(1, 6)
                ]
                (run_dir / CORRUPTIONS).write_text(json.dumps(rows))
            trials.append(
                Trial("s", f"{norm}{seed}", run_dir, {"model/norm": norm}, {}, result={**RESULT, "seed": seed})
            )
    return Table("s", [Factor("model/norm", ["lrn", "batch"])], trials, {}, [], [])


def test_the_curve_is_the_mean_over_corruptions_and_seeds(tmp_path) -> None:
    table = make_table(tmp_path, {("lrn", 1): 0.2, ("lrn", 2): 0.3, ("batch", 1): 0.1})
    curves = robustness(table)
    assert list(curves) == [("lrn",), ("batch",)]
    assert [point.mean for point in curves[("lrn",)]] == pytest.approx([0.25, 0.28, 0.31, 0.34, 0.37, 0.40])
    assert [point.n for point in curves[("batch",)]] == [1] * 6
    frame = corruption_errors(table)
    assert frame is not None
    assert frame["severity 5"].tolist()[1] == "25.00"
    text = report(table)
    assert "## Robustness" in text
    assert "![Test error by severity](corruptions.png)" in text
    axes = robustness_figure(table, curves).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lrn (n=2)", "batch (n=1)"]
    assert pixels(robustness_figure(table, curves)).std() > 0


def test_without_measurements_the_report_has_no_such_section(tmp_path) -> None:
    table = make_table(tmp_path, {})
    assert corruption_errors(table) is None
    assert "Robustness" not in report(table)


def test_a_trial_with_missing_severities_is_left_out(tmp_path) -> None:
    table = make_table(tmp_path, {("lrn", 1): 0.2})
    path = tmp_path / "lrn-1" / CORRUPTIONS
    path.write_text(json.dumps(json.loads(path.read_text())[:-5]))
    assert len(robustness(table)) == 1
    path.write_text(json.dumps(json.loads(path.read_text())[:4]))
    assert robustness(table) == {}
