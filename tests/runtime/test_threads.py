"""OpenMP threads sleep after a short wait, unless the user or the process has decided otherwise."""

import os
import subprocess
import sys

import pytest
from helpers import PATIENCE

from alexnet_pl.runtime.threads import SPIN_COUNT, WAIT_VARIABLES, wait_briefly


@pytest.fixture
def before_torch(monkeypatch):
    for name in WAIT_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")


def test_threads_wait_briefly_by_default(before_torch):
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_what_the_user_has_set_stays(name, before_torch, monkeypatch):
    monkeypatch.setenv(name, "ACTIVE" if name == "OMP_WAIT_POLICY" else "1000")
    before = dict(os.environ)
    wait_briefly()
    assert dict(os.environ) == before


def test_environment_stays_once_torch_is_loaded(before_torch, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", os)
    wait_briefly()
    assert not set(WAIT_VARIABLES) & set(os.environ)


def test_importing_the_package_first_decides_what_openmp_reads():
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", "import alexnet_pl, torch"],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has an OpenMP library that does not show its settings")
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr
