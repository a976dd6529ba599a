"""result.json and the table at the end of a run: what was measured, on what, with which versions."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_pl import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "scikit-learn")


def package_versions() -> dict[str, str]:
    """Versions of Python, this project and the packages that a figure may depend on."""
    return {
        "python": platform.python_version(),
        "alexnet_pl": __version__,
        **{package: version(package) for package in PACKAGES},
    }


def git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` behind it where tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def device_name(device: "torch.device") -> str:
    """Such as ``cuda (NVIDIA H100 80GB HBM3)`` or ``cpu (AMD EPYC, 2 cores)``."""
    if device.type == "cuda":
        import torch  # here: who only reads results does not wait for it

        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({_cpu_model()}, {len(_usable_cores())} cores)"
    return device.type


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> range | set[int]:
    return os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    os.replace(scratch, path)


def finished_result(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that has finished; None of one that has not, or whose result.json is damaged."""
    try:
        result = json.loads((run_dir / "result.json").read_text())
        return result if result["status"] == "finished" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def results_table(result: dict[str, Any]) -> str:
    """Loss, accuracy and error of validation and test, as aligned text.

    Validation figures are those of the best epoch, test figures those of its checkpoint: with the centre of the images,
    and with ten views where the run had them.
    """
    lines = [f"{'':12}{'loss':>10}{'top-1 acc':>12}{'top-1 err':>12}{'top-5 acc':>12}{'top-5 err':>12}"]
    for label, split, views in (("validation", "val", ""), ("test", "test", ""), ("  10 views", "test", "_10views")):
        if f"{split}/acc{views}" in result:
            loss, top1, top5 = (result[f"{split}/{name}{views}"] for name in ("loss", "acc", "acc_top5"))
            lines.append(f"{label:12}{loss:10.4f}{top1:12.4f}{1 - top1:12.4f}{top5:12.4f}{1 - top5:12.4f}")
    return "\n".join(lines)
