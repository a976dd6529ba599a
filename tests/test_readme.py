"""Documentation: examples work when pasted; links, commands, make targets and config keys exist."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import REPOSITORY, config

from alexnet_pl.__main__ import COMMANDS
from alexnet_pl.studies.claims_evidence import read_evidence
from alexnet_pl.studies.report import report, results_frame
from alexnet_pl.studies.statistics import SEED, epochs_to, estimate
from alexnet_pl.studies.table import tabulate

PAGES = sorted(
    path.relative_to(REPOSITORY)
    for path in (
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").glob("*.md"),
        *(REPOSITORY / "docs/results").glob("*.md"),
    )
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def text(page: Path | str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def ladder_pages() -> str:
    return text("docs/ladder.md") + text("docs/ladder-search.md")


def code_blocks(page: Path | str) -> list[str]:
    """Return the bash blocks of a page with continued lines joined."""
    return [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL)]


def training_commands() -> list[str]:
    """Return every complete ``alexnet train`` command line in the pages, without its comment."""
    lines = [line for page in PAGES for block in code_blocks(page) for line in block.splitlines()]
    commands = [line.partition("#")[0].strip() for line in lines if line.startswith("alexnet train ")]
    left_out = ("--help", "--cfg", "hydra/launcher", "alexnet_narrow")  # the last is an option that a reader adds
    return sorted({command for command in commands if not any(word in command for word in left_out)})


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_variant_example_works(tmp_path: Path) -> None:
    """Runs in a copy of the checkout, because the example writes two files to conf/ and sweeps over them."""
    section = text("docs/models.md").split("## Adding a model variant")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    for name in ("conf", "alexnet_pl"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    script = re.sub(r"^alexnet ", f"{shlex.quote(sys.executable)} -m alexnet_pl ", block[1], flags=re.MULTILINE)
    done = subprocess.run(["bash", "-e"], input=script, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Half the width has about a quarter of the parameters of convolutions and fully connected layers.
    counts = [int(count.replace(",", "")) for count in re.findall(r"AlexNet, ([\d,]+) parameters", done.stdout)]
    assert counts == [5_427_066, 5_427_066]


@pytest.mark.slow
def test_the_study_example_works(tmp_path: Path) -> None:
    """Word for word, except for the dataset and the length of the runs."""
    (command,) = {line for line in training_commands() if "study=my_study" in line}
    overrides = [*shlex.split(command)[2:], "data=digits", "trainer=smoke"]
    arguments = [sys.executable, "-m", "alexnet_pl", "train", *overrides]
    done = subprocess.run(arguments, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "study my_study: 6 done, 0 running, 0 failed, 0 left" in done.stdout
    report = (tmp_path / "multirun" / "my_study" / "report.md").read_text(encoding="utf-8")
    assert "alexnet_bn instead of alexnet_lrn (model)" in report


@pytest.mark.parametrize("command", training_commands())
def test_documented_training_commands_compose(command: str) -> None:
    """Every group option and key in a documented command exists. A sweep is represented by its first values."""
    overrides = [word for word in shlex.split(command)[2:] if word not in ("-m", "…")]
    hydra = [word for word in overrides if word.startswith("hydra.")]
    first = [word if re.search(r"[\[{]", word) else word.partition(",")[0] for word in overrides if word not in hydra]
    assert config(*first).model is not None


# --- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_linked_file_and_heading_exists(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", text(page)):
        path = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_and_make_target_exists(page: Path) -> None:
    commands = set(re.findall(r"(?:^|`)\$? ?alexnet ([a-z_]+)", text(page), re.MULTILINE))
    assert commands <= COMMANDS.keys()
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text(page), re.MULTILINE))
    assert targets <= set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))


def test_documented_messages_are_those_of_the_code() -> None:
    """The constant parts of every message of this project in the troubleshooting table occur in the sources."""
    sources = " ".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "alexnet_pl").rglob("*.py")))
    code = re.sub(r'"\s*f?"', "", sources)  # literals that continue on the next line
    rows = re.findall(r"^\| (`.*?`) \|", text("docs/troubleshooting.md"), re.MULTILINE)
    assert len(rows) > 10
    for message in re.findall(r"`(.*?)`", " ".join(rows)):
        if "torchvision::" in message:  # torch's own
            continue
        for part in message.split("…"):
            words = re.sub(r"\b(SIGKILL|nan|loss)\b.*", "", part).strip(" ,.")
            assert words in code, message


def test_every_page_is_on_the_menu_of_the_site_and_every_figure_on_a_page() -> None:
    """What ``make docs`` checks as well, for which the tests need no MkDocs."""
    docs = REPOSITORY / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert pages == set(re.findall(r"(\S+\.md)$", text("mkdocs.yml"), re.MULTILINE))
    shown = {
        ((docs / page).parent / image).resolve()
        for page in pages
        for image in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text(f"docs/{page}"))
    }
    assert {path for path in docs.rglob("*.png") if "claims" not in path.parts} <= shown


# --- numbers --------------------------------------------------------------------------------------------------------


def table_row(page: str, part: str) -> list[str]:
    """Return the cells of the only table row with this text."""
    (row,) = [line for line in text(page).splitlines() if line.startswith("|") and part in line]
    return [cell.strip(" *") for cell in row.strip("|").split(" | ")]


@pytest.mark.parametrize(
    ("name", "command"),
    [("tutorial", "experiment=tutorial data=cifar10`"), ("lenet5", "model=lenet5"), ("alexnet_lrn", None)],
)
def test_accuracies_of_single_runs_are_those_of_their_logs(name: str, command: str | None) -> None:
    log = text(f"docs/results/{name}-cpu.log")
    found = {
        split: re.search(rf"^{split} +\S+ +(\S+) +\S+ +(\S+)", log, re.MULTILINE) for split in ("validation", "test")
    }
    length = re.search(r"best epoch (\d+) of (\d+)", log)
    assert length is not None
    (val, _), (test, top5) = (match.groups() for match in found.values() if match is not None)
    cells = table_row("docs/results/cifar10-cpu.md", f"{name}-cpu.log")
    assert cells[1:6] == [length[2], length[1], val, test, top5]
    if command is not None:
        assert table_row("README.md", command)[1:4] == [length[2], val, test]


def test_the_front_page_has_the_five_seeds_of_the_claim() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/claims/tutorial-full.csv")
    val, test = estimate(frame["val/acc"]), estimate(frame["test/acc"])
    cells = table_row("README.md", "the same, five seeds")
    measured = f"{val.mean:.4f} [{val.low:.4f}, {val.high:.4f}]"
    assert cells[1:4] == ["30", measured, f"{test.mean:.4f}, n = {test.n}"]


def test_accuracies_of_the_rung_over_16_epochs_are_those_of_their_results() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/record_16_epochs/results.csv")
    frame = frame[frame["counts"]]
    center, views = (estimate(frame[name]) for name in ("test/acc", "test/acc_shifted_mirror"))
    interval = f"[{views.low:.4f}, {views.high:.4f}]"
    minutes = frame["seconds"].mean() / 60
    said = (
        f"{views.mean:.2%} of the test images {interval} with six views, {center.mean:.2%} with one, n = {views.n}, "
        f"{minutes:.0f} minutes per run"
    )
    page = re.sub(r"\s+", " ", text("docs/ladder.md"))
    assert said in page
    assert f"[{center.low:.4f}, {center.high:.4f}]" in page


def test_accuracies_of_the_record_are_those_of_its_results() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/record/results.csv")
    frame = frame[frame["counts"]]
    val, center, views = (estimate(frame[name]) for name in ("val/acc", "test/acc", "test/acc_shifted_mirror"))
    alone = frame.sort_values("seconds").iloc[0]  # the other runs shared the GPU
    header = text("conf/experiment/record.yaml").replace("\n# ", " ")
    interval = f"[{views.low:.4f}, {views.high:.4f}]"
    assert (
        f"{views.mean:.2%} of the test images {interval} with six views, {center.mean:.2%} with one, n = 10" in header
    )
    assert f"{alone['seconds']:.0f} seconds of training and validation on one H100" in header
    page = re.sub(r"\s+", " ", text("docs/ladder.md"))
    assert f"**{views.mean:.2%} of the test images {interval}** with six views, {center.mean:.2%} with one" in page
    assert f"with one [{center.low:.4f}, {center.high:.4f}], n = {views.n}" in page
    assert f"{alone['seconds']:.0f} seconds of training and validation on one H100" in page
    assert f"({round(alone['images_per_second'], -2):,.0f} images/s)" in page
    assert f"bring the record, below, {100 * (views.mean - center.mean):.2f} points" in page
    assert f"94% on a GPU within a minute, missed by {100 * (0.94 - views.mean):.1f} points" in page
    cells = table_row("README.md", "experiment=record")
    tested = f"{center.mean:.4f}; six views {views.mean:.4f} {interval}, n = {views.n}"
    assert cells[1:4] == ["18", f"{val.mean:.4f}", tested]
    assert f"{alone['seconds']:.0f} s" in cells[-1]


def test_the_record_on_two_cores_is_that_of_its_file() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/record-two-cores.csv")
    views, center = estimate(frame["test/acc_shifted_mirror"]), estimate(frame["test/acc"])
    seconds, epochs, n = frame["seconds"], frame["epochs"].max(), len(frame)
    interval = f"[{views.low:.4f}, {views.high:.4f}]"
    minutes = f"{seconds.min() / 60:.0f} to {seconds.max() / 60:.0f} minutes"
    page = re.sub(r"\s+", " ", text("docs/ladder.md"))
    assert f"over {epochs:.0f} epochs (`trainer.max_epochs={epochs:.0f}`) classifies" in page
    assert f"**{views.mean:.2%} of the test images {interval}** with six views, {center.mean:.2%} with one" in page
    assert f"with one [{center.low:.4f}, {center.high:.4f}], n = {n} ([file]" in page
    assert f"missed by {100 * (0.925 - views.mean):.1f} points. On two cores" in page
    assert f"It takes {minutes} of training and validation" in page
    assert f"18 epochs would take {seconds.max() / epochs * 18 / 60:.0f} at the speed of the slowest run" in page
    header = text("conf/experiment/record.yaml").replace("\n# ", " ")
    said = (
        f"{epochs:.0f} epochs take {minutes}: {views.mean:.2%} {interval} with six views, {center.mean:.2%} with one,"
    )
    assert f"{said} n = {n}." in header
    cells = table_row("README.md", f"the same, `trainer.max_epochs={epochs:.0f}`")
    tested = f"{center.mean:.4f}; six views {views.mean:.4f} {interval}, n = {n}"
    assert cells[1:4] == [f"{epochs:.0f}", f"{frame['val/acc'].mean():.4f}", tested]
    assert cells[-1].strip("| ") == f"2 CPU cores, {minutes.removesuffix('utes')}"


def test_the_runs_in_the_tutorials_time_are_those_of_their_file() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/tutorials-time.csv").query("counts")
    val, center, views = (estimate(frame[name]) for name in ("val/acc", "test/acc", "test/acc_shifted_mirror"))
    interval = f"[{views.low:.4f}, {views.high:.4f}]"
    shortest, longest = (f"{seconds / 60:.0f}" for seconds in (frame["seconds"].min(), frame["seconds"].max()))
    minutes = longest if shortest == longest else f"{shortest} to {longest}"
    page = re.sub(r"\s+", " ", text("docs/ladder.md"))
    epochs = re.findall(r"padding=2 trainer.max_epochs=(\d+) data.test_crops=6` classifies", page)
    assert f"{frame['epochs'].max():.0f}" == epochs[0]
    assert (
        f"classifies **{views.mean:.2%} of the test images {interval}** with six views, {center.mean:.2%} with" in page
    )
    assert f"with one [{center.low:.4f}, {center.high:.4f}], n = {views.n}, in {minutes} minutes of training" in page
    cells = table_row("README.md", "rung=batch_size")
    assert cells[1:4] == [
        epochs[0],
        f"{val.mean:.4f}",
        f"{center.mean:.4f}; six views {views.mean:.4f} {interval}, n = {views.n}",
    ]
    assert cells[-1].strip("| ") == f"2 CPU cores, {minutes} min"
    by_epoch = pd.read_csv(REPOSITORY / "docs/results/ladder/tutorials-time-epochs.csv").groupby("epoch").mean()
    gain = f"{100 * (by_epoch['val/acc'][9] - by_epoch['val/acc'][7]):+.2f}".replace("-", "−")
    assert f"validation accuracy changes by {gain} points while training error falls to " in page
    assert f"falls to {100 * (1 - by_epoch['train/acc'][9]):.1f}% ([file](results/ladder/tutorials-time-epochs" in page
    speeds = pd.read_csv(REPOSITORY / "docs/results/ladder/machines.csv").query("recipe == 'tutorial' and threads == 2")
    speed = speeds[["images_per_second 1", "images_per_second 2"]].iloc[-1].mean()
    assert f"makes its recipe {30 * 45_000 / speed / 60:.0f} minutes long" in page


def test_the_tables_of_the_ladder_are_those_of_its_report() -> None:
    page, report = text("docs/ladder.md"), text("docs/results/ladder/h100/report.md")
    tables = report.partition("## Ladder")[2].partition("![")[0].strip().split("\n\n")[1:]
    assert len(tables) == 2
    for table in tables:
        assert table in page
    first, second = (
        {cells[0].strip(): cells[3].strip() for cells in (line.split("|")[1:] for line in table.splitlines())}
        for table in tables
    )
    prose = re.sub(r"\s+", " ", page.partition("## The record")[0].partition("- **The network")[2])
    assert f"{first['full_resolution'].split()[0]} points in the first order and" in prose
    assert f"and {second['plateau_full_resolution'].split()[0]} in the second" in prose
    gains = {rung: float(step.split()[0].replace("−", "-")) for rung, step in first.items() if step[:1] in "+−"}
    gains.pop("test: 6 views")
    architecture = sum(
        gains.pop(rung) for rung in ("norm_everywhere", "full_resolution", "width", "whitening", "gelu", "late_pooling")
    )
    training = sum(gains.values())
    assert f"bring {architecture:.1f} points together, and everything about training {training:.1f}; in the" in prose
    steps = [
        float(step.split()[0].replace("−", "-"))
        for step in (first["norm_everywhere"], first["full_resolution"], second["plateau_norm_everywhere"],
                     second["plateau_full_resolution"])
    ]  # fmt: skip
    other = architecture - sum(steps[:2]) + sum(steps[2:])
    assert f"in the second, {other:.1f} and {training + architecture - other:.1f}." in prose
    for step in (first["crop_flip"], second["full_resolution"], second["unaugmented_full_resolution"], first["cutout"]):
        assert step in prose
    assert f"{first['late_pooling']} points" in prose
    for rung in ("optimizer", "label_smoothing", "schedule", "norm_everywhere"):
        assert f"{first[rung].split()[0]} points" in prose
    assert f"{second['plateau_norm_everywhere'].split()[0]} on the tutorial's recipe" in prose
    rows = pd.read_csv(REPOSITORY / "docs/results/ladder/h100/results.csv").query("counts")
    means = rows.groupby("rung")["test/acc"].mean()
    by_seed = rows.pivot_table("val/acc", "seed", "rung")
    on_validation = estimate(100 * (by_seed["cutout"] - by_seed["label_smoothing"]))
    said = f"{on_validation.mean:.2f} [{on_validation.low:.2f}, +{on_validation.high:.2f}]".replace("-", "−")
    assert f"on validation images {said}" in prose
    tutorial = estimate(pd.read_csv(REPOSITORY / "docs/results/claims/tutorial-full.csv")["test/acc"])
    assert tutorial.n == 5
    assert f"with all 30 epochs five seeds have {tutorial.mean:.2%} on" in page
    assert f"gains {100 * (means['norm_everywhere'] - means['tutorial']):.1f} points" in prose
    assert f"the [ladder](ladder.md) has it at {first['late_pooling'].split()[0][1:4]} points (n = 3)" in ladder_pages()
    assert len(means) == 19
    assert all(found == {1, 2, 3} for found in rows.groupby("rung")["seed"].agg(set))


def test_what_a_step_of_the_ladder_costs_is_that_of_its_file() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/speed.csv", keep_default_na=False)
    frame["device"] = frame["device"].str.partition(" ")[0]
    rates = frame.set_index(["device", "rung", "compile"])[["images_per_second 2", "images_per_second 3"]]
    means = rates.groupby(level=[0, 1, 2]).mean().mean(axis=1)
    page = text("docs/ladder.md").partition("## What it costs")[2]
    cpu, gpu = (means[device].xs("null", level="compile") for device in ("cpu", "cuda"))
    preset = yaml.safe_load(text("conf/experiment/ladder.yaml"))
    rungs = preset["hydra"]["sweeper"]["params"]["rung"].replace(" ", "").split(",")
    assert [*cpu.index] == sorted(rungs[:16])  # the first order
    for rung, rate in cpu.items():
        on_gpu = f"{round(gpu[rung], -2):,.0f} | {16 * 45_000 / gpu[rung]:.0f} s" if rung in gpu else "– | –"
        assert f"| `{rung}` | {on_gpu} | {round(rate, -1):,.0f} | {16 * 45_000 / rate / 60:.0f} min |" in page
    slower = cpu["full_resolution"] / cpu["late_pooling"]
    days = rates.loc["cpu"].xs("null", level="compile").mean(axis=1)
    falls = [1 - days[rung].iloc[1] / days[rung].iloc[0] for rung in ("tutorial", "width", "late_pooling")]
    assert (round(min(falls), 2), round(max(falls), 2)) == (0.03, 0.05)
    muon, gelu = (cpu[before] / cpu[rung] for before, rung in (("cutout", "optimizer"), ("whitening", "gelu")))
    assert 1.18 < muon < muon / (1 - max(falls)) < 1.27  # cutout on the slower day
    assert 1.10 < gelu * (1 - max(falls)) < gelu < 1.18  # gelu on the slower day
    assert "On the CPU Muon adds a fifth to a quarter to the rung before it, and GELU a tenth to a sixth" in page
    assert gpu["norm_everywhere"] < gpu["full_resolution"] < gpu["tutorial"] < gpu["late_pooling"] == gpu.max()
    assert (
        f"it grows by a factor of {439 / 53:.1f} per image, and the images per second fall by one of {slower:.1f}."
        in page
    )
    earlier = pd.read_csv(REPOSITORY / "docs/results/ladder/record_16_epochs/results.csv")["images_per_second"]
    assert f"two at a time, trained {earlier.min():.0f} to {earlier.max():.0f} images/s on one thread each" in page
    here = pd.read_csv(REPOSITORY / "docs/results/ladder/machines.csv").set_index(["recipe", "threads"])
    speeds = here[["images_per_second 1", "images_per_second 2"]].mean(axis=1)
    then, now = speeds.loc["tutorial", 2]
    assert re.search(rf"1,145 images/s for the tutorial's network trains {then:.0f},\sand today's {now:.0f} \(", page)
    one, two = (speeds.loc["batch_size", threads].item() for threads in (1, 2))
    assert f"here one thread trains {one:.0f}, and two {two:.0f}." in page
    cpu, gpu = (means[device].xs("default", level="compile") for device in ("cpu", "cuda"))
    assert (
        f"{round(gpu['tutorial'], -2):,.0f} images/s for `tutorial`, and {round(gpu['regularization'], -2):,.0f}"
        in page
    )
    tutorial, width = (days[rung].iloc[0] for rung in ("tutorial", "width"))
    said = f"on the CPU {round(cpu['tutorial'], -1):,.0f} for `tutorial` and {round(cpu['width'], -1):,.0f} for `width`"
    assert f"{said}, which had {round(tutorial, -1):,.0f} and {round(width, -1):,.0f} without it that day." in page


def test_the_results_of_a_ladder_are_those_of_its_trials(tmp_path: Path) -> None:
    for name in ("h100", "record"):
        folder = REPOSITORY / "docs/results/ladder" / name
        with tarfile.open(folder / "trials.tar.gz") as archive:
            archive.extractall(tmp_path / name, filter="data")
        (study,) = (tmp_path / name).iterdir()
        table = tabulate([study])
        assert report(table) == (folder / "report.md").read_text(encoding="utf-8")
        found, committed = results_frame(table), pd.read_csv(folder / "results.csv")
        places = ["run_dir", "data_source"]  # where they were trained, and without directories in the file
        made = pd.read_csv(io.StringIO(found.drop(columns=places).to_csv(index=False)))
        pd.testing.assert_frame_equal(made, committed.drop(columns=places))


def test_what_the_ladder_says_of_training_is_so() -> None:
    """Training accuracy and learning rate after the last epoch, from the trials."""
    last: dict[str, list[dict[str, str]]] = {}
    best: dict[str, list[dict[str, str]]] = {}
    with tarfile.open(REPOSITORY / "docs/results/ladder/h100/trials.tar.gz") as archive:
        study = json.load(archive.extractfile("ladder/study.json") or io.BytesIO())
        for trial in study["trials"].values():
            file = archive.extractfile(f"ladder/{trial['run_dir']}/metrics.csv") or io.BytesIO()
            rows = [*csv.DictReader(io.TextIOWrapper(file, encoding="utf-8"))]
            last.setdefault(trial["overrides"]["rung"], []).append(rows[-1])
            best.setdefault(trial["overrides"]["rung"], []).append(max(rows, key=lambda row: float(row["val/acc"])))

    def accuracies(rung: str) -> list[float]:
        return [float(row["train/acc"]) for row in last[rung]]

    page = re.sub(r"\s+", " ", ladder_pages())
    assert accuracies("unaugmented_full_resolution") == [1.0] * 3
    assert "which without them classifies all of its training images" in page
    assert [float(row["lr"]) for row in last["plateau_full_resolution"]] == pytest.approx([1e-6] * 3)
    tested = best["plateau_full_resolution"]
    assert [float(row["lr"]) for row in tested] == pytest.approx([1e-4] * 3)
    assert {int(row["epoch"]) for row in tested} == {10, 11, 12}
    said = (
        "its plateau schedule had lowered the learning rate once by the epochs that were tested, 10 to 12, and to 10⁻⁶"
    )
    assert said in page
    less = 100 * (np.mean(accuracies("late_pooling")) - np.mean(accuracies("regularization")))
    assert f"has {less:.1f} points less of training accuracy than `late_pooling`" in page


def test_the_accuracy_of_the_run_that_had_the_gpu_to_itself_is_that_of_its_file() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/search-h100.csv")
    (run,) = (row for _, row in frame.iterrows() if not pd.isna(row["test/acc"]))
    said = f"({run['seconds']:.0f} seconds; {run['test/acc_shifted_mirror']:.2%} of the test images with six views, "
    assert f"{said}{run['test/acc']:.2%} with one)" in re.sub(r"\s+", " ", ladder_pages())


@pytest.mark.parametrize(("file", "epochs"), [("search", (4, 8, 12, 16)), ("search-h100", (8, 16, 24, 30))])
def test_the_search_for_the_record_recipe_is_that_of_its_files(file: str, epochs: tuple[int, ...]) -> None:
    for _, run in pd.read_csv(REPOSITORY / f"docs/results/ladder/{file}.csv").iterrows():
        shown = ["" if pd.isna(run[f"val/acc {epoch}"]) else f"{run[f'val/acc {epoch}']:.2%}" for epoch in epochs]
        row = [run["recipe"], f"{run['length']} epochs", *shown, f"{run['train/acc']:.2%}"]
        assert f"| {' | '.join(row)} |" in ladder_pages()


def test_the_limits_of_the_copy_are_those_of_their_file() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/airbench-recipe.csv").dropna(subset="val_acc_six_views")
    (theirs, ours) = zip(frame["val_acc"], frame["val_acc_six_views"], strict=True)
    page = re.sub(r"\s+", " ", ladder_pages())
    said = f"{theirs[0]:.2%} of the validation images of the JPEG copy with one view and {theirs[1]:.2%} with six"
    assert said in page
    assert f"comes to {ours[0]:.2%}, and {ours[1]:.2%} with six views (n = 1)" in page
    search = pd.read_csv(REPOSITORY / "docs/results/ladder/search.csv").set_index("recipe")
    short = search.loc["as the recipe, crops by 2 pixels, no cutout", "val/acc 8"]
    whole = search.loc["the recipe (seed 1 of the results)", "val/acc 16"]
    assert f"{short:.2%} after 8 epochs (crops by 2 pixels, no cutout, as there) and {whole:.2%} after 16" in page
    control = pd.read_csv(REPOSITORY / "docs/results/ladder/search-h100.csv").set_index("recipe")["val/acc 16"]
    base = control["batches of 512, rate 0.07, decay 0.028"]
    decay = search.loc["as the recipe, decay 0.1", "val/acc 16"] - whole
    adamw, sgd, cutmix = (
        control[f"the same, {name}"] - base
        for name in ("AdamW at 0.003, decay 0.05", "SGD at 0.2, decay 0.0005", "cutmix instead of cutout")
    )
    shown = [f"(−{-100 * change:.1f}" for change in (decay, adamw, sgd, cutmix)]
    said = "Five times the weight decay {} points), AdamW {}), SGD {}) and cutmix {})".format(*shown)
    assert said in page
    behind = theirs[0] - control["that control, SGD at 0.2, decay 0.0005"]
    assert f"at 88% after 16 epochs, is {100 * behind:.1f} points behind the same convolutions" in page


def test_speeds_of_shared_and_single_gpu_runs_are_those_of_their_results() -> None:
    shared = pd.read_csv(REPOSITORY / "docs/results/claims/tutorial-full.csv")["images_per_second"].median()
    found = json.loads(text("docs/results/bench-h100-gpu.json"))
    alone = found["loops, batch 128, eager"]["images_per_second"]["project"]
    page = re.sub(r"\s+", " ", text("docs/studies.md"))
    assert f"one run of the tutorial's recipe trains {round(alone, -2):,.0f} images/s" in page
    assert f"five of them at the same time about {round(shared, -3):,.0f} images/s each" in page


def test_the_cost_of_weights_in_bf16_is_that_of_its_file() -> None:
    frame = pd.read_csv(REPOSITORY / "docs/results/precision-lab.csv").pivot_table("test/acc", "seed", "precision")
    found = estimate(100 * (frame["bf16-true"] - frame["bf16-mixed"]))
    page = re.sub(r"\s+", " ", text("docs/training.md"))
    assert f"{frame['bf16-true'].mean():.2%} of the test images" in page
    assert f"{frame['bf16-mixed'].mean():.2%} with `bf16-mixed`" in page
    interval = f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}] points, n = {found.n}"
    assert interval.replace("-", "−") in page


def test_the_front_page_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 150


def test_the_run_of_ten_epochs_is_the_committed_one():
    frame = pd.read_csv(REPOSITORY / "docs/results/ladder/late-pooling-10-epochs.csv")
    page = re.sub(r"\s+", " ", ladder_pages())
    assert f"{100 * frame['val/acc'].iloc[-1]:.2f}% of the validation images after ten epochs" in page
    assert f"It took {frame['epoch_seconds'].sum() / 60:.0f} minutes of one thread" in page


def interval(values: pd.Series, digits: str = ".2f") -> str:
    found = estimate(values)
    return f"{found.mean:{digits}} [{found.low:{digits}}, {found.high:{digits}}]"


def pooling_errors(study: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the test errors in percent by norm layer and pooling, and the reduction by overlapping pooling."""
    frame = read_evidence(REPOSITORY / f"docs/results/claims/{study}.csv")
    errors = 100 * frame.pivot_table("test/error", SEED, ["factor model/norm", "factor model/pool"])
    return errors, errors.xs("non_overlapping", axis=1, level=1) - errors.xs("overlapping", axis=1, level=1)


def test_the_results_page_has_the_effects_of_norm_and_pooling() -> None:
    page = re.sub(r"\s+", " ", text("docs/results/README.md"))
    errors, reduction = pooling_errors("norm_x_pool-full")
    against = {other: estimate((errors[other] - errors["batch"]).mean(axis=1)) for other in ("lrn", "none")}
    lrn, none = (f"{found.mean:.2f} %s [{found.low:.2f}, {found.high:.2f}]" for found in against.values())
    said = f"by {lrn % 'points against LRN'} and by {none % 'against none'}, and overlapping pooling by "
    assert f"BatchNorm lowers the error {said}{interval(reduction.mean(axis=1))}." in page
    _, reduction = pooling_errors("norm_x_pool-lab")
    batch = interval(reduction["batch"]).replace(" [", " points [")
    said = f"({batch}) than to the one with LRN ({interval(reduction['lrn'])});"
    assert f"with BatchNorm {said} to the one without normalization it brings {interval(reduction['none'])}." in page


def test_the_plateau_of_the_papers_initialization_is_that_of_its_files() -> None:
    page = text("docs/paper-network.md")
    start = pd.read_csv(REPOSITORY / "docs/results/plateau/start.csv").groupby(["initialization", "input"])
    logits, units = (start[name].mean() for name in
                     ("std of a logit", "std of a unit of fc7, relative to the mean"))  # fmt: skip
    frame = pd.read_csv(REPOSITORY / "docs/results/plateau/steps.csv")
    assert set(frame["logits"]) == {10}
    assert "model.num_classes=10" in page
    keys = ["experiment", "initialization", "input", "lr", "steps"]
    assert frame.groupby(keys)["seed"].agg(sorted).map(lambda seeds: seeds == [1, 2, 3]).all()
    means = frame.groupby(keys)[["train/loss", "train/acc"]].mean()
    loss, accuracy = means["train/loss"], means["train/acc"]
    for initialization, scale in logits.index:
        row = f"| `{initialization}` | {scale.replace('0-255', '0–255, less the mean')} |"
        assert f"{row} {logits[initialization, scale]:.2g} | {units[initialization, scale]:.2g} |\n" in page
        run = ("paper_imagenet", initialization, scale, 0.001)
        cells = [f"loss {loss[*run, steps]:.3f}, acc {accuracy[*run, steps]:.3f}" for steps in (100, 160)]
        assert f"{row} {' | '.join(cells)} |\n" in page
    page = re.sub(r"\s+", " ", page)
    fast, slow = (("paper_imagenet", "released_code", "0-255", rate) for rate in (0.005, 0.001))
    said = f"is {loss[*fast, 20]:.1f} in the first 20 steps and {loss[*fast, 80]:.2f} in steps 61–80"
    assert f"{said}, where 0.001 has {loss[*slow, 20]:.1f} and {loss[*slow, 80]:.2f}." in page
    said = f"it is at {loss[*fast, 160]:.2f} and an accuracy of {accuracy[*fast, 160]:.3f}, still behind."
    assert said in page
    assert loss[*slow, 160] < loss[*fast, 160]
    learned = [f"{value:.3f}" for value in loss["imagenet_2012"]]
    assert f"training loss {', '.join(learned[:-1])} and {learned[-1]} in steps 1–60, 61–120, … 241–300" in page


def test_errors_of_the_authors_networks_are_those_of_their_files() -> None:
    page = "docs/paper-network.md"
    for row in pd.read_csv(REPOSITORY / "docs/results/cuda_convnet.csv").to_dict("records"):
        views = row["test/error_ten_crop"]
        measured = f"{row['test/error']:.1%} after {row['epochs']} epochs"
        if not np.isnan(views):
            measured = f"{views:.1%} after {row['epochs']} epochs, ten crops"
        assert table_row(page, f"`{row['network']}`")[3:] == [measured, f"{row['parameters']:,}"]
    frame = read_evidence(REPOSITORY / "docs/results/claims/lrn_cuda_convnet.csv")
    errors = frame.loc[frame["factor model/norm"] == "lrn_cifar", "test/error_ten_crop"]
    found = estimate(100 * errors)
    measured = f"{found.mean:.1f}% [{found.low:.1f}, {found.high:.1f}] after 30 epochs, ten crops, n = {found.n}"
    assert table_row(page, "`cuda_convnet_11pct`")[3] == measured


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ("relu_vs_tanh_2012", "it takes tanh"),
        ("relu_vs_tanh_unit_variance", "tanh takes"),
        ("relu_vs_tanh", "tanh takes"),
    ],
)
def test_the_results_page_has_the_ratios_of_tanh_to_relu(study: str, words: str) -> None:
    frame = read_evidence(REPOSITORY / f"docs/results/claims/{study}.csv")
    epochs = frame.pivot_table("epochs_to(train/error, 0.25)", SEED, "factor model/activation")
    ratio = estimate(np.log(epochs["tanh"] / epochs["relu"])).transformed(np.exp)
    said = f"{words} {ratio.mean:.2f} times as many epochs [{ratio.low:.2f}, {ratio.high:.2f}], n = {ratio.n}"
    assert said in re.sub(r"\s+", " ", text("docs/results/README.md"))


def test_the_results_page_has_the_ratios_of_tanh_to_relu_at_several_errors() -> None:
    folder = REPOSITORY / "docs/results/relu_vs_tanh_unit_variance"
    curves = pd.read_csv(folder / "epochs.csv").groupby(["study", "activation", "lr", "seed"])["train/error"].agg(list)
    frame = pd.DataFrame([
        {**dict(zip(curves.index.names, run, strict=True)), "training_error": error,
         "epochs": epochs_to(errors, error, start=0.9)}
        for run, errors in curves.items() for error in (0.5, 0.4, 0.3, 0.25)
    ])  # fmt: skip
    fastest = frame.groupby(["study", "training_error", "activation"])["epochs"].min().unstack()
    searched = (fastest["tanh"] / fastest["relu"])["relu_vs_tanh_unit_variance_rates"]
    frame = frame[frame["study"] != "relu_vs_tanh_unit_variance_rates"]
    epochs = frame.pivot_table("epochs", ["study", "training_error", "seed"], "activation")
    ratios = np.log(epochs["tanh"] / epochs["relu"])
    for error in (0.5, 0.4, 0.3, 0.25):
        unit, raw = (estimate(ratios[study, error]).transformed(np.exp) for study in
                     ("relu_vs_tanh_unit_variance", "relu_vs_tanh_2012"))  # fmt: skip
        assert (unit.n, raw.n) == (5, 2)
        assert table_row("docs/results/README.md", f"| {error:.0%} | ")[1:] == [
            f"{unit.mean:.2f} times [{unit.low:.2f}, {unit.high:.2f}]", f"{searched[error]:.2f} times",
            f"{raw.mean:.2f} times",
        ]  # fmt: skip
    for study in ("relu_vs_tanh_unit_variance", "relu_vs_tanh_2012"):
        claimed = read_evidence(REPOSITORY / f"docs/results/claims/{study}.csv")
        claimed = claimed.pivot_table("epochs_to(train/error, 0.25)", SEED, "factor model/activation")
        for seed, found in epochs.loc[study, 0.25].iterrows():
            assert dict(found) == pytest.approx(dict(claimed.loc[seed]), abs=1e-4)
    share = pd.read_csv(folder / "saturation.csv").groupby("study")["saturated"]
    page = re.sub(r"\s+", " ", text("docs/results/README.md"))
    assert f"after 33 and 37 epochs {share.mean()['relu_vs_tanh_2012']:.1%} of its outputs are beyond ±0.98" in page
    low, high = (share.agg(end)["relu_vs_tanh_unit_variance"] for end in ("min", "max"))
    assert f"on unit variance {100 * low:.0f}% to {high:.0%} (five seeds;" in page
    rates = [yaml.safe_load(text(f"conf/experiment/relu_vs_tanh_{name}.yaml"))["rates"] for name in
             ("unit_variance", "2012")]  # fmt: skip
    relu, tanh = (rates[0][name] / rates[1][name] for name in ("torch.nn.ReLU", "torch.nn.Tanh"))
    assert f"lower for ReLU by a factor of {relu:g} and for tanh by one of {tanh:g}" in page
