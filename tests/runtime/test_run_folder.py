"""The lock on a run directory, and the readers of its files."""

import shutil
import subprocess
import sys

import pytest

from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.run_folder import run_lock

HOLD = """
import sys, time
from pathlib import Path
from alexnet_pl.runtime.run_folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_second_process_is_refused_until_the_first_is_gone(tmp_path):
    run_dir = tmp_path / "runs" / "new"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as raised, run_lock(run_dir):
            pass
        reason = f"run_dir={run_dir} is in use by another process (pid {holder.pid})."
        assert str(raised.value) == f"{reason} Wait until it ends, or start a new run."
    finally:
        holder.kill()
        holder.wait()
    with run_lock(run_dir):
        pass
    assert [*run_dir.iterdir()] == []


def test_removed_run_directory_is_no_second_error(tmp_path):
    with run_lock(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
    assert not (tmp_path / "run").exists()
