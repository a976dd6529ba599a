"""Training command: what ``resume`` accepts, and what a study records when ``alexnet train`` runs it."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from alexnet_pl.cli.train import add_or_set, check_options, main, overrides_last
from alexnet_pl.config.resolvers import run_folder
from alexnet_pl.runtime.errors import ConfigError


def test_a_new_run_gets_the_new_directory_and_a_resumed_one_its_own(tmp_path):
    assert run_folder(None, "runs/new") == "runs/new"
    assert run_folder(str(tmp_path), "runs/new") == str(tmp_path)


def test_resume_says_which_directory_a_checkpoint_belongs_to(tmp_path):
    run = tmp_path / "lr=0.1"
    (run / "checkpoints").mkdir(parents=True)
    for path in (run / "checkpoints/latest.ckpt", run / "train.log"):
        path.touch()
        with pytest.raises(ConfigError, match="expected a run directory") as caught:
            run_folder(str(path), "runs/new")
        assert str(caught.value).endswith(f"Use resume='{run}'")
    for wrong in ("nowhere", "x" * 256):
        with pytest.raises(ConfigError, match=f"resume={wrong} not found. Give the directory of a run"):
            run_folder(wrong, "runs/new")


@pytest.mark.slow
def test_a_study_records_the_command_that_was_given(tmp_path):
    overrides = ["-m", "model=lenet5", "trainer=smoke", "callbacks.dashboard.figures=false", "study=s", "seed=1"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "alexnet_pl", "train", *overrides],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no warnings of Python, Hydra or Lightning either
    assert "has already finished" in done.stdout
    study = json.loads((tmp_path / "multirun/s/study.json").read_text())
    assert {entry["command"] for entry in study["commands"]} == {" ".join(["alexnet train", *overrides])}


@pytest.mark.parametrize(
    ("arguments", "sorted_"),
    [
        ("model=a,b -m seed=1", "-m model=a,b seed=1"),
        ("model=a --config-dir x=y -m ~scheduler seed=1", "--config-dir x=y -m model=a ~scheduler seed=1"),
        ("a=1 --info defaults-tree b=2", "--info defaults-tree a=1 b=2"),
        ("-m model=a study=s", "-m model=a study=s"),
        ("a=1 --info b=2", "--info=all a=1 b=2"),
        ("-i ~scheduler", "--info=all ~scheduler"),
        ("a=1 --info", "--info=all a=1"),
        ("--experimental-rerun lr=1/config.pickle a=1", "--experimental-rerun lr=1/config.pickle a=1"),
    ],
)
def test_options_may_stand_between_overrides(arguments, sorted_):
    assert overrides_last(arguments.split()) == sorted_.split()


def test_alexnet_train_and_train_py_compose_the_same_config(tmp_path):
    from helpers import REPOSITORY

    overrides = ["model=lenet5", "run_dir=x", "--cfg", "job"]
    commands = ([sys.executable, str(REPOSITORY / "train.py")], [sys.executable, "-m", "alexnet_pl", "train"])
    printed = [
        subprocess.run([*command, *overrides], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    assert printed[0] == printed[1]
    assert "LeNet5" in printed[0]
    assert len((REPOSITORY / "train.py").read_text().splitlines()) <= 6


@pytest.mark.parametrize(
    ("override", "passed_on"),
    [
        ("+trainer.accumulate_grad_batches=16", "++trainer.accumulate_grad_batches=16"),
        ("++trainer.max_steps=3", "++trainer.max_steps=3"),
        ("trainer.max_steps=3", "trainer.max_steps=3"),
        ("+experiment=tutorial", "+experiment=tutorial"),
        ("+model/norm=lrn", "+model/norm=lrn"),
        ("+x=a.b", "+x=a.b"),
        ("data.root=a+b.c=d", "data.root=a+b.c=d"),
    ],
)
def test_a_plus_before_a_key_of_a_section_also_sets_one_that_exists(override, passed_on):
    assert add_or_set(override) == passed_on


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--multrun model=lenet5", "--multrun is invalid: no such option. Did you mean --multirun?"),
        ("--seed=3", "--seed is invalid: no such option. Overrides have no dashes: seed=VALUE."),
        ("--data.root /x", "--data.root is invalid: no such option. Overrides have no dashes: data.root=VALUE."),
        ("-x", "-x is invalid: no such option. Overrides have no dashes: x=VALUE."),
        ("--cfg jobs", "argument --cfg/-c: invalid choice: 'jobs'"),
        ("-m model=lenet5 --cfg job", "--multirun and --cfg are invalid together: expected one of them."),
        ("--run --cfg job", "--run and --cfg are invalid together: "),
        ("--info seed=1 -m", "--multirun and --info are invalid together: "),
        ("--resolve", "--resolve is invalid without --cfg: expected --cfg job --resolve."),
        ("--cfg hydra --resolve", "--resolve is invalid with --cfg hydra, which lacks the keys that Hydra's refer to: "
         "expected --cfg all --resolve."),
        ("--cfg hydra -p hydra.sweep --resolve", "--resolve is invalid with --cfg hydra, which lacks the keys that "
         "Hydra's refer to: expected --cfg all --resolve -p hydra.sweep."),
        ("--shell-completion", "--shell-completion is invalid: expected install=SHELL or uninstall=SHELL with it"),
        ("--shell-completion install=tcsh", "--shell-completion is invalid: expected install=SHELL"),
        ("--experimental-rerun NOFILE", "--experimental-rerun=NOFILE not found: expected a job's config.pickle."),
        ("--config-dir", "argument --config-dir/-cd: expected one argument."),
    ],
)  # fmt: skip
def test_an_unknown_option_is_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["alexnet"])
    with pytest.raises(SystemExit) as refused:
        main(words.split())
    shown = capsys.readouterr()
    assert refused.value.code == 2
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    "words", ["-m model=a,b", "--cfg job --resolve a=1", "-cd x a=1", "--info", "--info a=1", "-sc install=bash"]
)
def test_hydras_own_options_are_known(words):
    check_options(overrides_last(words.split()))


@pytest.mark.parametrize("words", ["model=alexnet_bn scale=lab", "experiment=record"])
def test_a_config_is_printed_with_its_references_resolved(words):
    command = [sys.executable, "-m", "alexnet_pl", "train", "--cfg", "job", "--resolve", *words.split()]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown = yaml.safe_load(run.stdout)
    assert shown["model"]["channels"] == ([48, 128, 192, 192, 128] if "lab" in words else [64, 128, 256, 384, 512])
    assert "${" not in run.stdout


def test_a_list_of_options_is_refused_before_hydra_merges_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["alexnet"])
    with pytest.raises(SystemExit) as refused:
        main(["data=[digits,mnist]", "model=lenet5"])
    assert refused.value.code == 2
    assert capsys.readouterr().err == (
        "error: data=[digits,mnist] is invalid: expected one option, because several would be merged into one. To "
        "train with every one of them: -m data=digits,mnist, or alexnet_pl.study. Lists are for augment, callbacks and "
        "logger.\n"
    )
