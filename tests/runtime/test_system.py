"""System information and terminal output."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import NO_FIGURES, REPOSITORY

from alexnet_pl.runtime import system
from alexnet_pl.runtime.system import device_name, git_commit, package_versions, usable_cores

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
"""A locale whose encoding is ASCII, without Python's remedies."""


def test_cores_are_those_of_the_affinity():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " \
           "from alexnet_pl.runtime.system import usable_cores; print(usable_cores())"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert usable_cores() == len(os.sched_getaffinity(0))


def test_device_name():
    assert re.fullmatch(rf"cpu \(.+, {usable_cores()} cores\)", device_name(torch.device("cpu")))
    assert device_name(torch.device("meta")) == "meta"


def test_versions():
    assert package_versions()["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert package_versions().keys() == {"python", "alexnet_pl", *system.PACKAGES}


def test_commit(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(system, "__file__", str(tmp_path / "alexnet_pl" / "runtime" / "system.py"))
    assert git_commit() is None
    (tmp_path / "größe").touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    assert re.fullmatch("[0-9a-f]{40}", git_commit())
    git("config", "core.quotepath", "off")
    (tmp_path / "größe").write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}-dirty", git_commit())
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


SAY = """
from alexnet_pl.runtime.logging import StdoutHandler, make_output_safe
make_output_safe()
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[StdoutHandler()])
print("2 × cpu", "\\udcff")
logging.info("größe")
print("größe", file=sys.stderr)
"""


@pytest.mark.parametrize("locale", ["ascii", "utf-8"])
def test_output_survives_the_locale(locale, tmp_path):
    environment = ASCII if locale == "ascii" else {"PYTHONUTF8": "1"}
    (tmp_path / "say.py").write_text(SAY, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "say.py"], env={**os.environ, **environment}, capture_output=True)
    assert done.returncode == 0, done.stderr
    expected = "2 ? cpu ?\ngr??e\n" if locale == "ascii" else "2 × cpu ?\ngröße\n"
    assert done.stdout.decode("utf-8") == expected
    assert b"Logging error" not in done.stderr


@pytest.mark.parametrize("command", [["-m", "alexnet_pl", "--help"], ["-m", "alexnet_pl", "evaluate", "--help"],
                                     ["-m", "alexnet_pl", "train", "--help"], ["train.py", "--help"]])  # fmt: skip
def test_help_survives_an_ascii_locale(command):
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env={**os.environ, **ASCII}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200


@pytest.mark.slow
def test_run_survives_an_ascii_locale(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "model=lenet5", "data=digits", "trainer=smoke",
         "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}/run", NO_FIGURES],
        cwd=tmp_path, env={**os.environ, **ASCII, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "top-1 acc" in done.stdout
    assert "Logging error" not in done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
    assert "×" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
