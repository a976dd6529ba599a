"""What the README tells a reader to paste works when pasted."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_model_variant_example_works(tmp_path: Path):
    """In a copy of the checkout: the block writes two files under conf/ and sweeps over them."""
    section = README.split("## Adding a model variant")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1)
    for name in ("conf", "alexnet_pl"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "train.py", tmp_path)
    script = block.replace(".venv/bin/python", sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-e"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder ") == 2
    # Half the width: about a quarter of the parameters of convolutions and fully connected layers.
    counts = [int(count.replace(",", "")) for count in re.findall(r"AlexNet, ([\d,]+) parameters", done.stdout)]
    assert counts == [5_427_066, 5_427_066]


@pytest.mark.slow
def test_the_study_example_works(tmp_path: Path):
    """Word for word, but for the data and the length."""
    (line,) = set(
        re.findall(r"^\.venv/bin/python (train\.py -m study=my_study [^#\n]*?) *(?:#.*)?$", README, re.MULTILINE)
    )
    command = f"{sys.executable} {REPOSITORY}/{line.split('  ')[0]} data=digits trainer=smoke"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "study my_study: 6 done, 0 running, 0 failed, 0 left" in done.stdout
    assert "alexnet_bn instead of alexnet_lrn (model)" in (tmp_path / "multirun" / "my_study" / "report.md").read_text()


def test_every_file_and_folder_it_names_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / path).exists(), path
