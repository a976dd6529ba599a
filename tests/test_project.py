"""The files around the code: every option composes, the lock file, the make targets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, config
from hydra.utils import instantiate

GROUPS = sorted(
    path.relative_to(REPOSITORY / "conf").with_suffix("")
    for path in (REPOSITORY / "conf").rglob("*.yaml")
    if path.parent.name != "conf"
)


@pytest.mark.parametrize("option", GROUPS, ids=str)
def test_every_option_composes_and_is_instantiated(option, tmp_path):
    above = ["augment=crop_flip_color"] if option.parent.name == "color" else []
    cfg = config(*above, f"{option.parent}={option.name}", "model.image_size=70", run_dir=tmp_path)
    for part in ("model", "data", "augment", "optimizer", "scheduler", "callbacks", "logger", "trainer"):
        if cfg.get(part) is None and part == "scheduler":
            continue  # an experiment may leave it out
        overrides = {"precision": "32-true", "logger": False} if part == "trainer" else {}
        assert instantiate(cfg[part], **overrides) is not None


def test_the_tutorial_experiment_is_the_tutorials_run():
    cfg = config("experiment=tutorial", "data.root=/nowhere")
    assert cfg.model._target_ == "alexnet_pl.models.AlexNet"
    assert cfg.model.norm._target_ == "torch.nn.BatchNorm2d"
    assert (cfg.model.image_size, cfg.data.batch_size, cfg.data.val_fraction) == (50, 128, 0.1)
    assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("torch.optim.Adam", 1e-3)
    assert (cfg.scheduler.factor, cfg.scheduler.patience, cfg.trainer.max_epochs) == (0.1, 2, 30)
    assert list(cfg.data.mean) == list(cfg.data.std) == [0.5] * 3


def test_the_lock_file_has_hashes_and_names_no_host():
    lock = (REPOSITORY / "requirements.lock").read_text()
    pins = re.findall(r"^([a-z0-9._-]+)==([^ ]+)(.*?)(?=^\S)", lock + "\nend", re.MULTILINE | re.DOTALL)
    assert len(pins) > 50
    assert all("--hash=sha256:" in rest for _, _, rest in pins)
    assert "://" not in lock
    assert "index-url" not in lock
    assert {"torch", "torchvision", "lightning", "hydra-core", "pytest", "ruff", "uv"} <= {name for name, _, _ in pins}


def test_make_help_lists_the_targets():
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in (
        "setup",
        "quickstart",
        "train",
        "test",
        "test-browser",
        "lint",
        "sweep",
        "dashboard",
        "audit",
        "clean",
    ):
        assert re.search(rf"^  make {target} +\S", listed, re.MULTILINE), target


@pytest.mark.parametrize(
    ("report", "status", "said", "code"),
    [
        ("No known vulnerabilities found", 0, "no known vulnerabilities", 0),
        ("Found 2 known vulnerabilities in 1 package\nNameless 1.0 CVE-1", 1, "Nameless 1.0 CVE-1", 2),  # 2 is make's
        ("a lot\nConnection refused", 1, "the audit could not be done: Connection refused", 0),
        ("x could not be audited: x\ny could not be audited: y", 0, "the audit could not be done for 2 packages", 0),
    ],
)
def test_the_audit_fails_on_vulnerabilities_alone(tmp_path, report, status, said, code):
    (tmp_path / "report").write_text(report)
    (tmp_path / "uv").write_text(f"#!/bin/sh\ncat '{tmp_path}/report'\nexit {status}\n")
    (tmp_path / "uv").chmod(0o755)
    command = ["make", "--old-file=setup", "audit", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert said in done.stdout
    assert done.returncode == code


def test_set_up_is_done_once():
    """Touching nothing, make has nothing to install."""
    if not (REPOSITORY / ".venv" / ".installed").exists():
        pytest.skip("not running from the .venv that make sets up")
    planned = subprocess.run(
        ["make", "--dry-run", "setup"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "pip install" not in planned


def test_the_table_of_faults_shows_the_worst_of_each_row(tmp_path: Path):
    (tmp_path / "test_examples.py").write_text(
        """
import pytest

@pytest.mark.fault("flood", "boats float")
@pytest.mark.parametrize("works", [True, False])
def test_flood(works):
    assert works

@pytest.mark.fault("fire", "rain")
def test_fire():
    pass

@pytest.mark.fault("frost", "wool")
def test_frost(request):
    pytest.skip("summer")
"""
    )
    command = [sys.executable, "-m", "pytest", "-p", "faults.conftest", "-o", "markers=fault", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    rows = [re.split(r"  +", line)[:3] for line in shown.stdout.splitlines()]
    for row in (["fire", "rain", "yes"], ["flood", "boats float", "NO"], ["frost", "wool", "not tried"]):
        assert row in rows, shown.stdout
