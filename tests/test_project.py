"""Project files: every config option composes, the lock file, the make targets, continuous integration, packaging."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import REPOSITORY, config
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from setuptools import find_packages

GROUPS = sorted(
    path.relative_to(REPOSITORY / "conf").with_suffix("")
    for path in (REPOSITORY / "conf").rglob("*.yaml")
    if path.parent.name not in ("conf", "claims")  # claims are no options: tests/studies/test_claims.py
)

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", GROUPS, ids=str)
def test_every_option_composes_and_is_instantiated(option: Path, tmp_path: Path) -> None:
    above = ["augment=crop_flip_color"] if option.parent.name == "color" else []
    above += ["data.resize_size=80"] if option.parent.name == "experiment" else []  # larger than the input
    cfg = config(*above, f"{option.parent}={option.name}", "model.image_size=70", run_dir=tmp_path)
    for part in ("model", "data", "augment", "loss", "optimizer", "scheduler", "callbacks", "logger", "trainer"):
        if cfg.get(part) is None and part == "scheduler":
            continue  # an experiment may leave it out
        overrides = {"precision": "32-true", "logger": False} if part == "trainer" else {}
        if option.name in ("mlflow", "wandb") and importlib.util.find_spec(option.name) is None:
            with pytest.raises(InstantiationException, match=f"pip install 'alexnet_pl\\[{option.name}\\]'"):
                instantiate(cfg.logger)
            continue
        assert instantiate(cfg[part], **overrides) is not None


def test_the_tutorial_experiment_is_the_tutorials_run() -> None:
    cfg = config("experiment=tutorial", "data.root=/nowhere")
    assert cfg.model._target_ == "alexnet_pl.models.AlexNet"
    assert cfg.model.norm._target_ == "torch.nn.BatchNorm2d"
    assert (cfg.model.image_size, cfg.data.batch_size, cfg.data.val_fraction) == (50, 128, 0.1)
    assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("torch.optim.Adam", 1e-3)
    assert (cfg.scheduler.factor, cfg.scheduler.patience, cfg.trainer.max_epochs) == (0.1, 2, 30)
    assert list(cfg.data.mean) == list(cfg.data.std) == [0.5] * 3


# --- dependencies and packaging -------------------------------------------------------------------------------------


def test_the_lock_file_has_hashes_and_names_no_host() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    pins = re.findall(r"^([a-z0-9._-]+)==([^ ]+)(.*?)(?=^\S)", lock + "\nend", re.MULTILINE | re.DOTALL)
    assert len(pins) > 50
    assert all("--hash=sha256:" in rest for _, _, rest in pins)
    assert "://" not in lock
    assert "index-url" not in lock
    expected = {"torch", "torchvision", "lightning", "hydra-core", "pytest", "ruff", "mypy", "import-linter", "uv"}
    assert expected <= {name for name, _, _ in pins}


def test_every_package_is_listed() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted([*find_packages(str(REPOSITORY), include=["alexnet_pl*"]), "alexnet_pl.conf"])


def test_templates_and_type_marker_are_packaged() -> None:
    package = REPOSITORY / "alexnet_pl"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["alexnet_pl"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packaged == others
    assert package / "py.typed" in packaged


@pytest.mark.parametrize(
    ("package", "minimum"), [("filelock", (4, 2, 1)), ("fsspec", (2026, 9)), ("hydra-core", (1, 3, 8))]
)
def test_lower_bounds_exclude_vulnerable_versions(package: str, minimum: tuple[int, ...]) -> None:
    (bound,) = [
        found[1] for line in PYPROJECT["project"]["dependencies"] if (found := re.match(rf"{package}>=([\d.]+)", line))
    ]
    assert tuple(map(int, bound.split("."))) >= minimum


# --- make and continuous integration --------------------------------------------------------------------------------


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    targets = phony[1].replace("\\", "").split()
    assert len(targets) > 15
    for target in targets:
        assert re.search(rf"^  make {target} +\S", listed, re.MULTILINE), target


@pytest.mark.parametrize("path", [".github/workflows/check.yaml", ".ci/run"])
def test_continuous_integration_runs_existing_targets(path: str) -> None:
    used = re.findall(r"(?:run: |^)make ([a-z-]+)", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert {"test-faults", "test-slow", "test-browser", "test-lowest", "quickstart"} <= set(used)
    assert set(used) <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize(
    ("report", "status", "said", "code"),
    [
        ("No known vulnerabilities found", 0, "no known vulnerabilities", 0),
        ("Found 2 known vulnerabilities in 1 package\nNameless 1.0 CVE-1", 1, "Nameless 1.0 CVE-1", 2),  # 2 is make's
        ("a lot\nConnection refused", 1, "the audit failed: Connection refused", 0),
        ("x could not be audited: x\ny could not be audited: y", 0, "the index has no data for 2 packages", 0),
    ],
)
def test_the_audit_fails_only_on_vulnerabilities(
    tmp_path: Path, report: str, status: int, said: str, code: int
) -> None:
    (tmp_path / "report").write_text(report)
    (tmp_path / "uv").write_text(f"#!/bin/sh\ncat '{tmp_path}/report'\nexit {status}\n")
    (tmp_path / "uv").chmod(0o755)
    command = ["make", "--old-file=setup", "audit", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert said in done.stdout
    assert done.returncode == code


def test_set_up_is_done_once() -> None:
    if not (REPOSITORY / ".venv" / ".installed").exists():
        pytest.skip("not running from the .venv that make sets up")
    planned = subprocess.run(
        ["make", "--dry-run", "setup"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "pip install" not in planned


@pytest.mark.slow
def test_the_table_of_faults_shows_the_worst_outcome_per_row(tmp_path: Path) -> None:
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
