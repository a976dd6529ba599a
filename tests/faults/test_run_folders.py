"""Faults around the folder a run writes into."""

import re
from pathlib import Path

import pytest
from helpers import train_many


@pytest.mark.fault("8 runs started in the same second", "8 folders, each with a finished run")
def test_runs_started_together_have_folders_of_their_own(tmp_path: Path):
    command = ["model=lenet5", "data=digits", "trainer=smoke", "trainer.accelerator=cpu"]
    runs = train_many([command] * 8, tmp_path, at_once=True)
    assert [run.returncode for run in runs] == [0] * 8, [run.stderr for run in runs]
    folders = {Path(re.search("^run folder (.*)$", run.stdout, re.MULTILINE)[1]) for run in runs}
    assert len(folders) == 8
    assert all((folder / "result.json").is_file() for folder in folders)
