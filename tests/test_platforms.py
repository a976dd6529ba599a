"""Platforms: the package imports and trains without the modules, signals and functions that Windows lacks."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE, REPOSITORY


@pytest.mark.parametrize("program", ["import", pytest.param("train", marks=pytest.mark.slow)])
def test_without_posix(program: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tests" / "no_posix.py"), program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
