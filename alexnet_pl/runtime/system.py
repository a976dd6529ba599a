"""System information (device, versions, commit, cores) and glibc's allocator.

By default every block above 32 MB (the gradient of fc7 has 67 MB) goes back to the system when it is freed, and its
pages are faulted in and zeroed again in the next step: a sixth of a CPU step of the tutorial's network. Other C
libraries are left alone, and so are GPUs, for which torch keeps freed memory itself.
"""

import ctypes
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_pl import __version__

if TYPE_CHECKING:
    import torch


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_GLIBC_MMAP_THRESHOLD, _GLIBC_TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20  # what its dynamic adjustment arrives at


def raise_malloc_thresholds() -> bool:
    """Keep freed blocks of up to 1 GB for the next step. False where the C library is not glibc."""
    return _set(2**30, 2**31 - 1)


def restore_malloc_thresholds() -> bool:
    """Undo :func:`raise_malloc_thresholds`: as a program that has not heard of it runs."""
    done = _set(_GLIBC_MMAP_THRESHOLD, _GLIBC_TRIM_THRESHOLD)
    if done:
        ctypes.CDLL(None).malloc_trim(0)
    return done


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap_threshold) and mallopt(_M_TRIM_THRESHOLD, trim_threshold))


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
    root = Path(__file__).resolve().parents[2]
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


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
