"""Ten-crop study: center crop against ten-crop on trained runs, without training."""

import json
import signal
from pathlib import Path

import pytest
from faults.processes import DIGITS, Command, wait_for
from helpers import REPOSITORY

from alexnet_pl.studies.store import Study

TRAIN = ("-m", "study=s", *DIGITS, "callbacks.dashboard.figures=false", "trainer.max_epochs=1", "seed=1,2")

TEN_CROP = ("experiment=ten_crop", "ten_crop_of=multirun/s")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a study of two seeds in ``multirun/s`` of this directory."""
    cwd = tmp_path_factory.mktemp("study")
    command = Command(*TRAIN, cwd=cwd)
    assert command.wait() == 0, command.text
    return cwd


def results(study: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in study.glob("*/result.json")}


@pytest.mark.slow
def test_stopped_evaluation_continues_and_finished_one_is_skipped(trained):
    """Every finished trial by the center crop and by ten-crop, paired by seed."""
    root = trained / "multirun" / "s_ten_crop"
    stopped = Command(*TEN_CROP, cwd=trained)
    wait_for(lambda: "1 done" in stopped.text, stopped)
    stopped.send(signal.SIGTERM)
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.text
    last = stopped.text.rstrip().splitlines()[-1]
    assert last == "Re-running the command skips finished evaluations and continues with the rest."
    done = results(root)
    first = Command(*TEN_CROP, cwd=trained)
    assert first.wait() == 0, first.text
    assert first.text.endswith(f"report {root / 'report.md'}\n")
    assert done.items() <= results(root).items()

    trials = Study(root).trials
    assert len(trials) == 4
    for known in trials.values():
        result = json.loads((root / known["run_dir"] / "result.json").read_text(encoding="utf-8"))
        assert result["test_crops"] == int(known["overrides"]["data.test_crops"])
        if result["test_crops"] == 1:
            own = json.loads((Path(result["run"]) / "result.json").read_text(encoding="utf-8"))
            assert [result[f"test/{name}"] for name in ("acc", "loss")] == [
                own[f"test/{name}"] for name in ("acc", "loss")
            ]
    text = (root / "report.md").read_text(encoding="utf-8")
    (effect,) = (line for line in text.splitlines() if line.startswith("| 10 instead of 1 (test_crops) | 2 |"))
    assert "−1.5 / −1.3" in effect
    assert f"- command: `python {REPOSITORY / 'train.py'} experiment=ten_crop ten_crop_of=multirun/s`" in text

    before = results(root)
    assert Command(*TEN_CROP, cwd=trained).wait() == 0
    assert results(root) == before
    assert [path.name for path in trained.iterdir() if path.suffix != ".log"] == ["multirun"], "a run directory"


def test_an_axis_that_the_source_gains_is_known_of_earlier_evaluations(tmp_path):
    """Issue: seeds evaluated before and after counted as two configurations."""
    study = Study(tmp_path)
    study.add("first", "basic", ["seed"], {"a": {"overrides": {"seed": "1"}, "choices": {}}})
    more = {"overrides": {"optimizer.lr": "0.001", "seed": "1"}, "choices": {}}
    study.add("second", "basic", ["optimizer.lr", "seed"], {"a": more}, renews=True)
    assert Study(tmp_path).trials["a"] == {"run_dir": "seed_1-a", **more}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "ten_crop_of=multirun/norm_x_pool"),
        (("ten_crop_of=multirun/s", "seed=3"), "seed=3 has no effect"),
        (("ten_crop_of=nowhere",), "nowhere not found"),
        (("ten_crop_of=multirun/s", "-m"), "Leave -m out"),
    ],
)
def test_invalid_ten_crop_studies_are_refused(overrides, message, tmp_path):
    command = Command("experiment=ten_crop", *overrides, cwd=tmp_path)
    assert command.wait() == 2, command.text
    assert message in command.text
    assert len(command.text.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == [command.output]
