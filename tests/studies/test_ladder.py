"""Ladder reports: steps against NumPy, the second climb, averaged views, and studies that are no ladder."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY, config
from omegaconf import OmegaConf
from scipy import stats

from alexnet_pl.config.validate import validate
from alexnet_pl.studies.ladder import ORDER, OTHER_ORDER, climbs, ladder_figure, ladder_table, remarks
from alexnet_pl.studies.report import write_report
from alexnet_pl.studies.table import tabulate
from studies.test_report import result

RUNGS = sorted(path.stem for path in (REPOSITORY / "conf" / "rung").glob("*.yaml"))

ACCURACIES = {
    "tutorial": [0.70, 0.71, 0.72],
    "schedule": [0.75, 0.74, 0.76],
    "crop_flip": [0.80, 0.82, 0.81],
    "full_resolution": [0.90, 0.91, 0.89],
    "plateau_norm_everywhere": [0.74, 0.73, 0.75],
    "plateau_full_resolution": [0.78, 0.79, 0.80],
    "unaugmented_full_resolution": [0.83, 0.84, 0.82],
}


@pytest.fixture
def make_ladder(tmp_path: Path):
    def make(accuracies: dict[str, list[float]], views: float | None = 0.01) -> Path:
        root, known = tmp_path / "ladder", {}
        root.mkdir()
        trials = [(rung, seed, acc) for rung, values in accuracies.items() for seed, acc in enumerate(values, start=1)]
        for index, (rung, seed, accuracy) in enumerate(trials):
            run_dir = root / f"trial-{index:010x}"
            run_dir.mkdir()
            known[f"{index:010x}"] = {
                "run_dir": run_dir.name,
                "overrides": {"rung": rung, "seed": str(seed)},
                "choices": {"rung": rung},
            }
            averaged = {} if views is None else {"test/acc_shifted_mirror": accuracy + views * seed}
            (run_dir / "result.json").write_text(json.dumps(result(accuracy, seed, seconds=600.0 * seed, **averaged)))
            (run_dir / "config.yaml").write_text(json.dumps({"model": {"num_classes": 10}}))
            (run_dir / "metrics.csv").write_text("epoch,train/error,val/error\n1,0.5,0.5\n")
        command = {"command": "alexnet train", "launcher": "basic", "started": 0.0, "trials": [*known]}
        content = {"study": "ladder", "axes": ["rung", "seed"], "trials": known, "commands": [command]}
        (root / "study.json").write_text(json.dumps(content))
        return root

    return make


def test_steps_are_paired_differences_to_the_rung_before(make_ladder):
    table = tabulate([make_ladder(ACCURACIES)])
    first, second = climbs(table)
    assert first == ["tutorial", "schedule", "crop_flip", "full_resolution"]
    assert second == [*OTHER_ORDER]
    frame = ladder_table(table, first)
    assert frame["rung"].tolist() == [*first, "test: 6 views"]
    assert frame["step"][0] is None
    for place in range(1, 4):
        step = frame["step"][place]
        differences = np.subtract(ACCURACIES[first[place]], ACCURACIES[first[place - 1]])
        interval = stats.ttest_1samp(differences, 0).confidence_interval()
        assert (step.n, step.mean) == (3, pytest.approx(differences.mean()))
        assert (step.low, step.high) == pytest.approx((interval.low, interval.high))
    assert frame["test accuracy"][3].mean == pytest.approx(0.9)
    assert frame["time per run"][3] == "20.0 min"
    assert frame["test accuracy"][4].mean == pytest.approx(0.92)  # of the last rung's runs
    assert (frame["step"][4].mean, frame["n"][4]) == (pytest.approx(0.02), 3)
    other = ladder_table(table, second)
    assert other["rung"].tolist() == [*OTHER_ORDER, "test: 6 views"]
    assert other["step"][4].mean == pytest.approx(0.07)  # crops and mirroring, last


def test_the_report_shows_the_ladder_instead_of_every_pair(make_ladder, tmp_path):
    write_report([make_ladder(ACCURACIES)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| schedule | 3 | 75.00 ± 1.00 [72.52, 77.48] | +4.00 [" in text
    assert "points [95% t-interval]. The second table climbs" in text
    assert "## Effects" not in text
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("| --- ")]
    assert len(heads) >= 4
    assert all(lines[number - 2] == "" for number in heads)  # Python-Markdown takes other tables for text
    assert (tmp_path / "out" / "ladder.svg").is_file()


def test_an_incomplete_ladder_has_one_climb_and_no_views(make_ladder):
    table = tabulate(
        [
            make_ladder(
                {rung: ACCURACIES[rung] for rung in ("tutorial", "plateau_norm_everywhere", "full_resolution")}, None
            )
        ]
    )
    assert climbs(table) == [["tutorial", "full_resolution"]]
    assert ladder_table(table, ["tutorial", "full_resolution"])["rung"].tolist() == ["tutorial", "full_resolution"]
    assert len(ladder_figure(table).axes[0].get_yticks()) == 2


def test_the_figure_has_the_averaged_views_and_names_the_second_climb(make_ladder):
    axes = ladder_figure(tabulate([make_ladder(ACCURACIES)])).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "tutorial", "schedule", "crop flip", "full resolution", "test: 6 views",
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == [rung.replace("_", " ") for rung in OTHER_ORDER[1:-1]]
    (line,) = [line for line in axes.lines if line.get_label() == "one step after the other"]
    assert line.get_xdata()[-1] == pytest.approx(100 * (0.90 + 0.02))  # 0.01 · seed more than with one view


def test_seeds_are_listed_in_the_order_of_numbers(make_ladder, tmp_path):
    write_report([make_ladder({"tutorial": [0.7] * 10, "schedule": [0.8] * 10})], tmp_path / "out")
    assert "seeds 1, 2, 3, 4, 5, 6, 7, 8, 9, 10." in (tmp_path / "out" / "report.md").read_text()


def test_the_rungs_are_in_their_order_whatever_was_trained_first(make_ladder):
    """A rung that somebody tries first is not the lowest, and the averaged views are those of the highest."""
    first = ("full_resolution", "crop_flip", "of_the_user", "tutorial", "schedule")
    table = tabulate([make_ladder({rung: ACCURACIES.get(rung, [0.95]) for rung in first})])
    assert climbs(table) == [["tutorial", "schedule", "crop_flip", "full_resolution", "of_the_user"]]
    assert remarks(table)[0].startswith("norm_everywhere: no runs")


def test_a_step_says_which_seeds_it_leaves_out(make_ladder, tmp_path):
    rungs = {"tutorial": [0.7, 0.71, 0.72], "schedule": [0.75], "crop_flip": [0.75, 0.82, 0.81]}
    write_report([make_ladder(rungs)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| crop_flip | 3 | 79.33 ± 3.79 [69.93, 88.74] | +0.00 (n = 1) |" in text
    assert "- **Note:** step to crop_flip: without seeds 2, 3, which lack a run." in text


def test_a_study_of_rungs_and_something_else_says_why_there_is_no_ladder(make_ladder, tmp_path):
    root = make_ladder(ACCURACIES)
    study = json.loads((root / "study.json").read_text())
    study["axes"].append("scale")
    for number, trial in enumerate(study["trials"].values()):
        trial["overrides"]["scale"] = trial["choices"]["scale"] = "lab" if number % 2 else "full"
    (root / "study.json").write_text(json.dumps(study))
    table = tabulate([root])
    assert climbs(table) == []
    assert remarks(table)[0].startswith("no ladder is shown, because scale varies as well")


def test_a_single_rung_is_no_ladder(make_ladder):
    assert climbs(tabulate([make_ladder({"width": [0.9, 0.91]})])) == []


# --- the rungs themselves -------------------------------------------------------------------------------------------


def swept() -> list[str]:
    text = (REPOSITORY / "conf" / "experiment" / "ladder.yaml").read_text()
    return [name.strip(' "\\\n') for name in text.partition('rung: "')[2].replace("\\\n", "").split(",")]


def test_the_ladder_sweeps_every_rung_and_the_second_order_exists():
    assert sorted(swept()) == RUNGS
    assert [rung for rung in swept() if rung not in OTHER_ORDER[1:-1]] == [*ORDER]
    assert set(OTHER_ORDER) <= set(RUNGS)


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_is_a_valid_run(rung):
    cfg = config(f"rung={rung}")
    validate(cfg)
    assert cfg.data._target_.endswith("CIFAR10DataModule")


ADDED = {
    "schedule": {"scheduler"},
    "crop_flip": {"augment"},
    "norm_everywhere": {"model.norm_blocks"},
    "full_resolution": {"model", "data.image_size", "augment.crop.padding", "data.augment.crop.padding"},
    "width": {"model.channels"},
    "label_smoothing": {"loss.label_smoothing"},
    "cutout": {"augment.cutout"},
    "optimizer": {"optimizer", "scheduler.cycle_momentum", "scheduler.max_lr"},
    "ema": {"callbacks.ema"},
    "whitening": {"model.whitening", "data.mean", "data.std", "augment.cutout.fill"},
    "gelu": {"model.activation"},
    "alternating_flip": {"augment.alternating_flip", "augment.crop.flip"},
    "batch_size": {"callbacks.ema.decay", "data.batch_size", "optimizer.lr", "optimizer.weight_decay",
                   "scheduler.max_lr"},
    "late_pooling": {"model.channels", "model.pool_after", "data.batch_size", "optimizer.lr", "optimizer.weight_decay",
                     "scheduler.max_lr"},
    "regularization": {"loss.label_smoothing", "augment.cutout.size"},
}  # fmt: skip


def differences(before: str, rung: str) -> set[str]:
    """Return the keys in which two rungs differ; the data section repeats the augmentation."""

    def flat(values: object, key: str = "") -> dict[str, object]:
        if not isinstance(values, dict):
            return {key: values}
        return {name: leaf for k, v in values.items() for name, leaf in flat(v, f"{key}.{k}".strip(".")).items()}

    low, high = (flat(OmegaConf.to_container(config(f"rung={name}"), resolve=True)) for name in (before, rung))
    return {key.removeprefix("data.") if key.startswith("data.augment") else key
            for key in low.keys() | high.keys() if low.get(key, "-") != high.get(key, "-")}  # fmt: skip


@pytest.mark.parametrize(("before", "rung"), [*pairwise(ORDER)])
def test_every_rung_changes_what_it_says(before, rung):
    differ = differences(before, rung)
    unexpected = {key for key in differ if not any(f"{key}.".startswith(f"{name}.") for name in ADDED[rung])}
    assert not unexpected
    for name in ADDED[rung] - {"data.augment.crop.padding"}:
        assert any(f"{key}.".startswith(f"{name}.") for key in differ), name


def test_the_second_order_takes_the_steps_of_the_first():
    """Normalization, kernels, schedule, augmentation; crops are by 4 pixels at 32×32 and by 6 at 50×50."""
    taken = [*pairwise(OTHER_ORDER)]
    assert differences(*taken[0]) == differences("crop_flip", "norm_everywhere")
    assert differences(*taken[1]) == {
        key for key in differences("norm_everywhere", "full_resolution") if "crop" not in key
    }
    assert differences(*taken[2]) == differences("tutorial", "schedule")
    assert differences(*taken[3]) == differences("schedule", "crop_flip")


def test_the_ladder_ends_in_the_record():
    """The record adds views at test to the last rung, and has a length of its own."""
    last, record = (config(override) for override in ("rung=regularization", "experiment=record"))
    OmegaConf.update(last, "data.test_crops", 6)
    OmegaConf.update(last, "trainer.max_epochs", record.trainer.max_epochs)
    before, after = (OmegaConf.to_container(cfg, resolve=True) for cfg in (last, record))
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()


@pytest.mark.parametrize("rung", ["norm_everywhere", "full_resolution", "width", "late_pooling"])
def test_every_rung_follows_the_scale(rung):
    full, lab = (config(f"rung={rung}", f"scale={scale}").model.channels for scale in ("full", "lab"))
    assert list(lab) == [width // 2 for width in full]
