"""Faults around the folder a run writes into."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

START_TOGETHER = f"""
import os, runpy, sys
import alexnet_pl.training  # loaded once for all: the runs then start within milliseconds of each other

runs = []
for _ in range(8):
    if (run := os.fork()) == 0:
        runpy.run_path({str(REPOSITORY / "train.py")!r}, run_name="__main__")
        sys.exit()
    runs.append(run)
print("statuses", [os.waitpid(run, 0)[1] for run in runs])
"""


@pytest.mark.fault("8 runs started in the same second", "8 folders, each with a finished run")
def test_runs_started_together_have_folders_of_their_own(tmp_path: Path):
    settings = ("model=lenet5", "data=digits", "trainer=smoke", "trainer.accelerator=cpu")
    started = subprocess.run(
        [sys.executable, "-u", "-c", START_TOGETHER, *settings],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"statuses {[0] * 8}" in started.stdout, started.stderr
    folders = set(re.findall(r"^run folder (.*)$", started.stdout, re.MULTILINE))
    assert len(folders) == 8
    assert all((Path(folder) / "result.json").is_file() for folder in folders)
