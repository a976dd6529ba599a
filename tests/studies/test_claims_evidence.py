"""Evidence: from run directories to a CSV file, and from its rows to a finding, worked by hand and with scipy."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from alexnet_pl.runtime.errors import UserError
from alexnet_pl.studies.claims import Claim, Contrast, Pilot, Published
from alexnet_pl.studies.claims_evidence import (
    Finding,
    collect,
    find,
    findings,
    headline,
    power_calculation,
    read_evidence,
    restore,
)
from alexnet_pl.studies.statistics import seeds_to_detect, seeds_to_exclude
from alexnet_pl.studies.store import Study
from alexnet_pl.studies.table import read_study


def claim(**changes: object) -> Claim:
    """Return the claim that LRN lowers the test error by 1.4 points."""
    plain = Claim(
        "a", "LRN helps.", "Paper", "3", Published("−1.4 points", -1.4, -1), None, "norms", (), "difference",
        Contrast("norm", "none", "lrn", {}), "test/error", 0.5, {"lab": 3}, Pilot(), Path("a.yaml"),
    )  # fmt: skip
    return replace(plain, **changes)


def frame(rows: list[dict], **common: object) -> pd.DataFrame:
    """Return rows of a CSV file; keys with an underscore in front are factors."""
    named = [
        {f"factor {key[1:]}" if key[:1] == "_" else key: value for key, value in {**common, **row}.items()}
        for row in rows
    ]
    return pd.DataFrame(named)


def errors(values: dict[str, list[float]], **columns: list) -> pd.DataFrame:
    """Return test errors by level of ``norm``, one per seed."""
    rows = [
        {
            "_norm": level,
            "seed": seed,
            "test/error": value,
            **{name: by[level][seed - 1] for name, by in columns.items()},
        }
        for level, of in values.items()
        for seed, value in enumerate(of, start=1)
    ]
    return frame(rows)


NONE, LRN = [0.30, 0.31, 0.29], [0.286, 0.297, 0.2755]


def test_a_difference_is_paired_by_seed():
    found = find(claim(), "lab", errors({"none": NONE, "lrn": LRN}))
    differences = [lrn - none for lrn, none in zip(LRN, NONE, strict=True)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found.effect.low, found.effect.high) == pytest.approx((interval.low, interval.high))
    assert found.shown.mean == pytest.approx(100 * stats.tmean(differences))
    assert (found.n, found.verdict.name, found.bound, found.left_out) == (3, "confirmed", "", [])
    assert found.compared == pytest.approx({"none": 0.30, "lrn": stats.tmean(LRN)})
    reversed_claim = claim(published=Published("", None, 1))
    assert find(reversed_claim, "lab", found.trials).verdict.name == "reversed"


def test_a_seed_without_its_pair_is_left_out():
    found = find(claim(), "lab", errors({"none": [*NONE, 0.5], "lrn": LRN}))
    assert (found.n, found.left_out) == (3, [4])
    assert found.compared == pytest.approx({"none": 0.30, "lrn": stats.tmean(LRN)})  # their difference is the effect
    alone = find(claim(), "lab", errors({"none": NONE}))
    assert (alone.effect, alone.verdict.name, alone.left_out) == (None, "open", [1, 2, 3])


def test_other_factors_are_averaged_over_or_fixed():
    rows = [
        {"_norm": norm, "_pool": pool, "seed": seed, "test/error": 0.3 - (norm == "lrn") * gain * (1 + 0.01 * seed)}
        for norm in ("none", "lrn")
        for pool, gain in (("x", 0.01), ("y", 0.03))
        for seed in (1, 2, 3)
    ]
    assert find(claim(), "lab", frame(rows)).effect.mean == pytest.approx(-0.02 * 1.02)
    fixed = claim(contrast=Contrast("norm", "none", "lrn", {"pool": "y"}))
    assert find(fixed, "lab", frame(rows)).effect.mean == pytest.approx(-0.03 * 1.02)


def test_an_effect_below_the_margin_and_an_open_one():
    tiny = errors({"none": [0.3000, 0.3100, 0.2900, 0.3], "lrn": [0.3004, 0.3095, 0.2902, 0.2999]})
    assert find(claim(), "lab", tiny).verdict.name == "no effect beyond the margin"
    wild = find(claim(), "lab", errors({"none": [0.30, 0.31, 0.29], "lrn": [0.32, 0.28, 0.285]}))
    assert wild.verdict.name == "open"
    assert wild.verdict.more_seeds > 0


SPEED = "epochs_to(train/error, 0.25)"


def speed(epochs: dict[str, list[float]], reached: dict[str, list[bool]] | None = None) -> Finding:
    reached = reached or {level: [True] * len(of) for level, of in epochs.items()}
    ratio = claim(
        test="ratio", contrast=Contrast("norm", "relu", "tanh", {}), measure=SPEED, margin=1.1,
        published=Published("about 6 times", 6.0, 1),
    )  # fmt: skip
    table = errors(epochs, **{"reached(train/error, 0.25)": reached})
    return find(ratio, "lab", table.rename(columns={"test/error": SPEED}))


def test_a_ratio_is_a_geometric_mean_of_paired_ratios():
    found = speed({"relu": [2.0, 2.5, 2.2], "tanh": [4.0, 6.0, 5.0]})
    logs = [math.log(2), math.log(2.4), math.log(5 / 2.2)]
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    shown = (found.shown.mean, found.shown.low, found.shown.high)
    assert shown == pytest.approx((math.exp(stats.tmean(logs)), math.exp(interval.low), math.exp(interval.high)))
    assert (found.verdict.name, found.bound) == ("confirmed", "")


def test_runs_that_never_got_there_make_the_ratio_a_bound():
    relu, tanh = [2.0, 2.5, 2.2], [100.0, 100.0, 100.0]
    found = speed({"relu": relu, "tanh": tanh}, {"relu": [True] * 3, "tanh": [False, False, True]})
    assert (found.bound, found.verdict.name, found.n) == ("at least", "confirmed", 3)
    # A bound from above supports no confirmation, however large it is.
    found = speed({"relu": relu, "tanh": tanh}, {"relu": [False, True, True], "tanh": [True] * 3})
    assert (found.bound, found.verdict.name) == ("at most", "open")
    # A seed bounded from both sides says nothing.
    found = speed({"relu": relu, "tanh": tanh}, {"relu": [False, True, True], "tanh": [False, False, True]})
    assert (found.bound, found.unknown, found.left_out, found.n) == ("at least", [1], [], 2)
    found = speed({"relu": relu, "tanh": tanh}, {"relu": [False, True, True], "tanh": [True, False, True]})
    assert (found.effect, found.unknown, found.left_out) == (None, [1, 2, 3], [])
    assert found.is_measured


def test_a_run_without_its_pair_bounds_no_ratio():
    """Neither from below, as one of tanh would, nor from above: seed 4 is not in the mean at all."""
    found = speed(
        {"relu": [2.0, 2.5, 2.2], "tanh": [4.0, 6.0, 5.0, 100.0]},
        {"relu": [True, True, False], "tanh": [True, True, True, False]},
    )
    assert (found.bound, found.left_out, found.unknown, found.n) == ("at most", [4], [], 3)
    alone = speed({"relu": [], "tanh": [4.0, 6.0]})
    assert (alone.n, alone.left_out, alone.is_measured) == (0, [1, 2], False)


def crossed(measure: str, lacking: tuple[str, int]) -> pd.DataFrame:
    """Return a measure of two poolings and four seeds without the run of one level and seed."""
    rows = [
        {"_pool": pool, "seed": seed, measure: -0.01 * seed - base}
        for pool, base in (("x", 0.01), ("y", 0.03))
        for seed in (1, 2, 3, 4)
        if (pool, seed) != lacking
    ]
    return frame(rows)


@pytest.mark.parametrize("test", ["within", "level"])
def test_a_seed_that_lacks_a_run_is_left_out_of_means_over_runs(test):
    """Each seed's mean is over both poolings: seed 4 has one of them, whose level is another."""
    own = claim(test=test, contrast=Contrast(None, "", "", {}), measure="gap_final",
                published=Published("", -10.0, -1))  # fmt: skip
    found = find(own, "lab", crossed("gap_final", lacking=("y", 4)))
    assert (found.n, found.left_out, found.unknown) == (3, [4], [])
    assert found.effect.mean == pytest.approx(-0.04)
    assert found.compared == pytest.approx({"": -0.04})
    fixed = replace(own, contrast=Contrast(None, "", "", {"pool": "x"}))
    assert find(fixed, "lab", crossed("gap_final", lacking=("y", 4))).n == 4
    alone = find(own, "lab", crossed("gap_final", lacking=("y", 4)).query("seed == 4 or `factor pool` == 'y'"))
    assert (alone.effect, alone.verdict.name, alone.left_out) == (None, "open", [1, 2, 3, 4])


@pytest.mark.parametrize("test", ["within", "difference"])
def test_a_level_of_what_the_study_does_not_vary_is_refused(test):
    factor = "norm" if test == "difference" else None
    tested = claim(test=test, contrast=Contrast(factor, "none", "lrn", {"pool": "y"}))
    message = r"^a\.yaml: contrast\.where\.pool=y is invalid: expected a key that the study norms-lab varies \(norm\)\."
    with pytest.raises(UserError, match=message):
        find(tested, "lab", errors({"none": NONE, "lrn": LRN}))


def test_a_difference_within_each_run_and_a_level():
    gains = frame([{"seed": seed, "ten_crop_gain": value} for seed, value in enumerate([-0.012, -0.015, -0.016], 1)])
    within = claim(test="within", contrast=Contrast(None, "", "", {}), measure="ten_crop_gain")
    assert find(within, "lab", gains).verdict.name == "confirmed"
    levels = claim(
        test="level", contrast=Contrast(None, "", "", {}), measure="val/acc", margin=1.0,
        published=Published("73.4%", 73.4, 1),
    )  # fmt: skip
    for accuracies, name in (
        ([0.741, 0.738, 0.743], "confirmed"),
        ([0.729, 0.728, 0.731], "confirmed"),  # within a point
        ([0.715, 0.712, 0.718], "reversed"),
        ([0.715, 0.735, 0.74], "open"),
    ):
        found = find(levels, "lab", frame([{"seed": s, "val/acc": a} for s, a in enumerate(accuracies)]))
        assert found.verdict.name == name
        assert found.shown.mean == pytest.approx(100 * stats.tmean(accuracies))


def test_a_measure_that_was_not_recorded_leaves_the_claim_open():
    found = find(claim(measure="gap_final"), "lab", errors({"none": NONE, "lrn": LRN}))
    assert (found.n, found.verdict.name) == (0, "open")


def test_the_finding_to_quote_is_the_largest_scale_that_settles_the_claim():
    seeds = claim(seeds={"lab": 3, "full": 3})
    lab = find(seeds, "lab", errors({"none": NONE, "lrn": LRN}))
    full = find(seeds, "full", errors({"none": NONE[:2], "lrn": LRN[:2]}))
    whole = find(seeds, "full", errors({"none": NONE, "lrn": LRN}))
    assert headline([lab, full]) is lab
    assert headline([lab, whole]) is whole
    unsettled = find(seeds, "full", errors({"none": NONE, "lrn": NONE[::-1]}))
    assert (unsettled.n, unsettled.verdict.name) == (3, "open")
    assert headline([lab, unsettled]) is lab
    assert headline([unsettled]) is unsettled
    assert headline([full]) is full
    assert headline([]) is None


def test_the_power_calculation_detects_the_published_effect_and_excludes_the_margin():
    assert power_calculation(claim(), 0.006) == (seeds_to_detect(0.014, 0.006), seeds_to_exclude(0.005, 0.006))
    unknown = claim(published=Published("", None, -1))
    assert power_calculation(unknown, 0.006)[0] == seeds_to_detect(0.005, 0.006)
    ratio = claim(test="ratio", margin=1.1, published=Published("", 6.0, 1))
    assert power_calculation(ratio, 0.1) == (seeds_to_detect(math.log(6), 0.1), seeds_to_exclude(math.log(1.1), 0.1))


# --- collecting -----------------------------------------------------------------------------------------------------


def write_study(root: Path, trials: dict[str, tuple[dict, dict | None]], planned: list[str] | None = None) -> None:
    """Write a study from config hash → overrides and changes of the result (None: not finished)."""
    known = {}
    for digits, (overrides, changes) in trials.items():
        known[digits] = {"run_dir": f"trial-{digits}", "overrides": overrides, "choices": {"norm": overrides["norm"]}}
        run_dir = root / f"trial-{digits}"
        run_dir.mkdir(parents=True)
        config = {"model": {"num_classes": 10}, "data": {"root": "/secret/place"}}
        (run_dir / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        (run_dir / "metrics.csv").write_text("epoch,train/error,val/error\n1,0.6,0.6\n2,0.4,0.5\n", encoding="utf-8")
        if changes is None:
            continue
        accuracies = {f"{split}/{name}": value for split in ("val", "test")
                      for name, value in (("acc", 0.75), ("acc_top5", 0.97), ("loss", 0.8))}  # fmt: skip
        result = {
            "status": "finished", **accuracies, "train/acc_final": 0.9, "test/acc_final": 0.7, "best_epoch": 2,
            "epochs": 2, "seconds": 60.0, "parameters": 10, "device": "cpu (x)", "precision": "32-true",
            "seed": int(overrides["seed"]), "git_commit": "abc", "versions": {"torch": "2"},
            "data": {"source": "images in /secret/place"},
        }  # fmt: skip
        (run_dir / "result.json").write_text(json.dumps(result | changes), encoding="utf-8")
    commands = [{"command": "x", "launcher": "basic", "started": 0.0, "trials": planned or [*known]}]
    content = {"axes": ["norm", "seed"], "trials": known, "commands": commands}
    (root / "study.json").write_text(json.dumps(content), encoding="utf-8")


def trial(norm: str, seed: int) -> dict:
    return {"experiment": "norms", "study": "norms-lab", "data.root": "/secret/place", "norm": norm, "seed": str(seed),
            "callbacks.dashboard.figures": "false"}  # fmt: skip


def test_a_study_becomes_a_csv_file_with_every_measure(tmp_path):
    claims = [claim(), claim(id="b", test="ratio", measure="epochs_to(train/error, 0.50)", margin=1.1)]
    write_study(
        tmp_path / "multirun" / "norms-lab",
        {"0000000001": (trial("None", 1), {}), "0000000002": (trial("lrn", 1), None)},
    )
    (line,) = collect(claims, tmp_path / "multirun", tmp_path / "csv")
    assert line.endswith("norms-lab.csv: 1 of 2 trials")
    text = (tmp_path / "csv" / "norms-lab.csv").read_text(encoding="utf-8")
    assert "secret" not in text
    (row,) = read_evidence(tmp_path / "csv" / "norms-lab.csv").to_dict("records")
    expected = {
        "study": "norms-lab", "scale": "lab", "config_hash": "0000000001", "factor norm": "None", "seed": 1,
        "test/acc": 0.75, "test/error": 0.25, "test/error_top5": pytest.approx(0.03), "epochs": 2,
        "train/error_final": pytest.approx(0.1), "gap_final": pytest.approx(0.2), "device": "cpu (x)",
        # From 0.9 before the first epoch to 0.6 after it and 0.4 after the second one.
        "epochs_to(train/error, 0.50)": 1.5, "reached(train/error, 0.50)": True, "data_source": "images in DIR",
        "versions": "torch 2", "command": "alexnet train experiment=norms norm=None seed=1",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert math.isnan(row["images_per_second"])


def test_a_command_with_fewer_seeds_deletes_no_evidence(tmp_path):
    """Neither committed rows, nor trials that an earlier command has finished."""
    root, csv = tmp_path / "multirun" / "norms-lab", tmp_path / "csv"
    trials = {f"000000000{seed}": (trial("lrn", seed), {}) for seed in (1, 2, 3)}
    write_study(root, trials, planned=["0000000001"])
    (line,) = collect([claim()], tmp_path / "multirun", csv)
    assert line.endswith("3 of 3 trials")
    shutil.rmtree(root)
    write_study(root, {"0000000001": trials["0000000001"]})
    assert restore(["norms-lab"], tmp_path / "multirun", csv) == 2
    collect([claim()], tmp_path / "multirun", csv)
    assert sorted(read_evidence(csv / "norms-lab.csv")["seed"]) == [1, 2, 3]


def test_only_settings_of_the_latest_command_count_and_committed_rows_outlive_their_runs(tmp_path):
    root, csv = tmp_path / "multirun" / "norms-lab", tmp_path / "csv"
    before = {**trial("lrn", 1), "optimizer.lr": "0.1"}
    write_study(root, {"0000000001": (before, {})} | {f"000000000{n}": (trial("lrn", n), {}) for n in (2, 3)})
    collect([claim()], tmp_path / "multirun", csv)
    for path in (tmp_path / "multirun").rglob("*"):
        if path.is_file():
            path.unlink()
    assert collect([claim()], tmp_path / "multirun", csv) == []
    planned = ["0000000002", "0000000003", "0000000004"]
    again = {digits: (trial("lrn", int(digits)), {} if digits == planned[-1] else None) for digits in planned}
    write_study(tmp_path / "again" / "norms-lab", again)
    (line,) = collect([claim()], tmp_path / "again", csv)
    assert line.endswith("3 of 3 trials")
    assert read_evidence(csv / "norms-lab.csv")["config_hash"].tolist() == planned
    ((_, (found,)),) = findings([claim()], csv)
    assert found.n == 0  # there is nothing to compare with


def test_settings_that_change_no_number_do_not_divide_a_study(tmp_path):
    """Seeds that another machine adds, with other directories and pauses between resume checkpoints, join the rest."""
    elsewhere = {**trial("lrn", 2), "data.root": "/elsewhere", "callbacks.resume.interval_minutes": "60",
                 "trainer.accelerator": "cpu", "threads": "1"}  # fmt: skip
    trials = {"0000000001": (trial("lrn", 1), {}), "0000000002": (elsewhere, {})}
    write_study(tmp_path / "multirun" / "norms-lab", trials, planned=["0000000002"])
    (line,) = collect([claim()], tmp_path / "multirun", tmp_path / "csv")
    assert line.endswith("2 of 2 trials")
    found = read_evidence(tmp_path / "csv" / "norms-lab.csv")["command"]
    assert found.str.replace(r" seed=.", "", regex=True).nunique() == 1


def test_of_trials_with_the_same_command_the_latest_counts(tmp_path):
    """Their hashes differ by a setting that changes no number, or by a key that the config has gained since."""
    multirun, csv = tmp_path / "multirun", tmp_path / "csv"
    elsewhere = {**trial("lrn", 1), "trainer.accelerator": "cpu"}
    trials = {"0000000001": (trial("lrn", 1), {}), "0000000002": (elsewhere, {}), "0000000003": (trial("None", 1), {})}
    write_study(multirun / "norms-lab", trials)
    os.utime(multirun / "norms-lab" / "trial-0000000002" / "result.json", (1, 1))
    (line,) = collect([claim()], multirun, csv)
    assert line.endswith("2 of 2 trials")
    assert read_evidence(csv / "norms-lab.csv")["config_hash"].tolist() == ["0000000001", "0000000003"]
    shutil.rmtree(multirun)
    write_study(multirun / "norms-lab", {"0000000003": (trial("None", 1), None), "0000000004": (elsewhere, {})})
    (line,) = collect([claim()], multirun, csv)
    assert line.endswith("2 of 2 trials")
    assert read_evidence(csv / "norms-lab.csv")["config_hash"].tolist() == ["0000000003", "0000000004"]


def test_the_order_of_overrides_does_not_divide_a_study(tmp_path):
    root, csv = tmp_path / "multirun" / "norms-lab", tmp_path / "csv"
    write_study(root, {"0000000001": (trial("lrn", 1), {})})
    collect([claim()], tmp_path / "multirun", csv)
    before = (csv / "norms-lab.csv").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(root)
    turned = {f"000000000{n}": (dict(reversed(trial("lrn", n).items())), {}) for n in (2, 3)}
    again = {**turned, "0000000004": (trial("lrn", 4), {})}
    write_study(root, again, planned=["0000000003"])
    (line,) = collect([claim()], tmp_path / "multirun", csv)
    assert line.endswith("4 of 4 trials")
    assert sorted(read_evidence(csv / "norms-lab.csv")["seed"]) == [1, 2, 3, 4]
    assert before[1] in (csv / "norms-lab.csv").read_text(encoding="utf-8").splitlines()


def test_two_rows_of_one_seed_and_level_are_refused(tmp_path):
    """As after two files were merged by hand: pandas would end with a traceback, or average them."""
    table = errors({"none": NONE, "lrn": [*LRN, 0.3]}).assign(config_hash="x")
    table.loc[table["seed"] == 4, "seed"] = 2
    table.to_csv(tmp_path / "norms-lab.csv", index=False)
    message = r"norms-lab\.csv is corrupt: more than one row has norm=lrn, seed=2\. Delete all but one"
    with pytest.raises(UserError, match=message):
        findings([claim()], tmp_path)


def test_trials_on_record_are_not_run_again_after_their_run_directories_are_gone(tmp_path):
    multirun, csv, digits = tmp_path / "multirun", tmp_path / "csv", ["0000000001", "0000000002"]
    write_study(
        multirun / "norms-lab", {each: (trial(norm, 1), {}) for each, norm in zip(digits, ("none", "lrn"), strict=True)}
    )
    collect([claim()], multirun, csv)
    before = (csv / "norms-lab.csv").read_text(encoding="utf-8")
    assert restore(["norms-lab", "other"], multirun, csv) == 0
    shutil.rmtree(multirun)
    assert restore(["norms-lab", "other"], multirun, csv) == 2
    study = Study(multirun / "norms-lab")
    study.add("x", "basic", ["norm", "seed"], {each: {"overrides": trial("lrn", 1), "choices": {}} for each in digits})
    assert [study.state(each) for each in digits] == ["finished"] * 2
    _, trials = read_study(study.root)
    assert [each.excluded for each in trials] == ["", ""]
    assert collect([claim()], multirun, csv) == [f"{csv / 'norms-lab.csv'}: 2 of 2 trials"]
    assert (csv / "norms-lab.csv").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", 'seed,"x\n'])
def test_a_corrupt_csv_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "norms-lab.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"norms-lab\.csv is corrupt"):
        findings([claim()], tmp_path)
