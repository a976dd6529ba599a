"""OpenMP threads sleep while they wait, unless the user or the process has decided otherwise."""

import os
import subprocess
import sys

import pytest
from helpers import PATIENCE

from alexnet_pl.runtime.threads import WAIT_VARIABLES, wait_passively


@pytest.fixture
def before_torch(monkeypatch):
    for name in WAIT_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")


def test_threads_sleep_by_default(before_torch):
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_what_the_user_has_set_stays(name, before_torch, monkeypatch):
    monkeypatch.setenv(name, "ACTIVE" if name == "OMP_WAIT_POLICY" else "1000")
    before = dict(os.environ)
    wait_passively()
    assert dict(os.environ) == before


def test_environment_stays_once_torch_is_loaded(before_torch, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", os)
    wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_importing_the_package_first_decides_what_openmp_reads():
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", "import alexnet_pl, torch"],
        env={**environment, "OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this torch has an OpenMP library that does not show its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
