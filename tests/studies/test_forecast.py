"""Forecast of a study's remaining time: synthetic trials of known durations, sequential and parallel."""

import json
import os
from pathlib import Path

import pytest
from helpers import config

from alexnet_pl.runtime.run_folder import CONFIG, RESULT
from alexnet_pl.studies.forecast import time_left, trial_costs
from alexnet_pl.studies.store import Study

BEGIN = 1_000_000.0
OVERHEAD = 2.0


def make_study(root: Path, costs: list[float]) -> Study:
    study = Study(root)
    entry = {"overrides": {}, "choices": {}}
    study.trials = {f"{i:010}": {"run_dir": f"{i:010}", **entry, "cost": cost} for i, cost in enumerate(costs)}
    study.commands = [{"command": "", "launcher": "basic", "started": BEGIN, "trials": [*study.trials]}]
    return study


def run(study: Study, digits: str, begin: float, end: float | None) -> None:
    """Leave the files of a trial that began and, unless ``end`` is None, ended at these times."""
    run_dir = study.run_dir(digits)
    run_dir.mkdir(parents=True)
    for name, when in ((CONFIG, begin), (RESULT, end)):
        if when is not None:
            content = json.dumps({"status": "finished", "seconds": when - begin - OVERHEAD})
            (run_dir / name).write_text(content)
            os.utime(run_dir / name, (when, when))


@pytest.mark.parametrize("seconds", [[30.0] * 12, [10.0, 10.0, 10.0] + [60.0] * 9], ids=["equal", "cheap ones first"])
def test_the_forecast_after_three_trials_is_right(tmp_path, seconds):
    """The start-up before the first trial counts once. Trials that cost more take longer in proportion."""
    study = make_study(tmp_path, costs=[7 * value for value in seconds])
    names, now = [*study.trials], BEGIN + 20
    for digits, taken in zip(names[:3], seconds, strict=False):
        run(study, digits, now, now := now + taken + OVERHEAD)
    states = dict.fromkeys(names[:3], "finished") | dict.fromkeys(names[3:], "missing")
    expected = sum(seconds[3:]) + OVERHEAD * len(names[3:])
    assert time_left(study, names, states, now) == pytest.approx(expected, rel=0.01)


def test_the_first_trial_of_a_process_is_slower_than_the_others(tmp_path):
    study = make_study(tmp_path, costs=[1.0] * 12)
    names, now = [*study.trials], BEGIN
    for digits, taken in zip(names[:3], (5.0, 2.5, 2.5), strict=False):
        run(study, digits, now, now := now + taken)
    states = dict.fromkeys(names[:3], "finished") | dict.fromkeys(names[3:], "missing")
    assert time_left(study, names, states, now) == pytest.approx(9 * 2.5)


def test_the_forecast_shares_the_work_among_parallel_workers(tmp_path):
    study = make_study(tmp_path, costs=[1.0] * 12)
    names = [*study.trials]
    for turn, digits in enumerate(names[:3]):  # two workers, half a trial apart
        run(study, digits, BEGIN + 10 * turn, BEGIN + 10 * turn + 20)
    run(study, names[3], BEGIN + 30, None)
    states = dict.fromkeys(names[:3], "finished") | {names[3]: "running"} | dict.fromkeys(names[4:], "missing")
    assert time_left(study, names, states, now=BEGIN + 40) == pytest.approx(8.5 * 20 / 2, rel=0.2)


def test_nothing_is_forecast_before_a_trial_of_this_command_has_ended(tmp_path):
    study = make_study(tmp_path, costs=[1.0, 1.0])
    first, second = study.trials
    assert time_left(study, [first, second], {first: "missing", second: "missing"}, BEGIN) is None
    run(study, first, BEGIN - 100, BEGIN - 50)  # by an earlier command
    assert time_left(study, [first, second], {first: "finished", second: "missing"}, BEGIN + 1) is None


def test_costs_follow_networks_epochs_and_limits():
    given = {
        "small": ("model=lenet5",),
        "large": ("model=alexnet_plain",),
        "long": ("model=lenet5", "trainer.max_epochs=60"),
        "limited": ("model=lenet5", "trainer.limit_train_batches=2"),
        "invalid": ("model=lenet5", "model.num_classes=-1"),
    }
    base = config("model=lenet5", "trainer.max_epochs=30")
    costs = trial_costs({name: config("trainer.max_epochs=30", *overrides) for name, overrides in given.items()})
    assert costs["large"] > 20 * costs["small"]
    assert costs["long"] == pytest.approx(2 * costs["small"])
    assert costs["limited"] == pytest.approx(costs["small"] * 2 * base.data.batch_size / 45_000)
    assert "invalid" not in costs
