"""Installation: the wheel carries conf/, and trains, sweeps and evaluates in a fresh environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import NO_FIGURES, PATIENCE, REPOSITORY, SHORT_RUN

pytestmark = pytest.mark.slow

UV = Path(sys.executable).with_name("uv")


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command without this checkout's environment and return its stdout."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "HYDRA"))
    }
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from a copy of the sources, as a checkout has them that somebody works in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("alexnet_pl", "conf"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    (source / "conf" / "local" / "default.yaml").write_text("# @package _global_\ndata_dir: /private\n")
    call(UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the commands in an environment with nothing but the wheel and its dependencies."""
    environment = tmp_path_factory.mktemp("fresh") / "env"
    call(UV, "venv", "--python", sys.executable, environment, cwd=REPOSITORY)
    python = environment / Path(sys.executable).parent.name / "python"
    install = [UV, "pip", "install", "--python", python, "--constraint", REPOSITORY / "requirements.lock", wheel]
    try:
        call(*install, "--offline", cwd=REPOSITORY)  # links what make setup has downloaded
    except AssertionError:
        call(*install, cwd=REPOSITORY)
    return python.parent


def test_the_wheel_has_every_option_and_no_private_settings(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("alexnet_pl/conf/")}
    options = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "conf").rglob("*.yaml")}
    expected = {f"alexnet_pl/{name}" for name in options - {"conf/local/default.yaml"}}
    assert packed == {*expected, "alexnet_pl/conf/__init__.py"}


def test_an_installed_package_trains_sweeps_and_evaluates_with_own_options(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "tiny.yaml").write_text("defaults: [lenet5, _self_]\nfc_widths: [32, 16]\n")
    short = ["--config-dir", "mine", *SHORT_RUN[1:], NO_FIGURES]
    where = call(commands / "python", "-c", "import alexnet_pl; print(alexnet_pl.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(commands.parent)
    call(commands / "alexnet", "train", *short, "model=tiny", "hydra.run.dir=run", cwd=tmp_path)
    assert "identical to the metrics in result.json" in call(commands / "alexnet", "evaluate", "run", cwd=tmp_path)
    swept = call(commands / "alexnet", "train", "-m", *short, "model=tiny,lenet5", "study=s", cwd=tmp_path)
    assert "study s: 2 done, 0 running, 0 failed, 0 left" in swept
    assert (tmp_path / "multirun" / "s" / "report.md").is_file()
