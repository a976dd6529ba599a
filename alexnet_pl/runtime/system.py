"""System information (device, versions, commit, cores) and the allocator of the C library.

By default glibc returns every freed block above 32 MB to the system (the gradient of fc7 has 67 MB), and the next step
faults its pages in and zeroes them again: a sixth of a CPU step of the tutorial's network. Other C libraries are left
alone, and so are GPUs, for which torch keeps freed memory itself.
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

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "scikit-learn")
"""Packages that a reported number may depend on."""

NUMERICS = 2
"""Version of what a config computes. To be raised by a change after which equal configs compute other numbers."""


# --- the allocator --------------------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_GLIBC_MMAP_THRESHOLD, _GLIBC_TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20  # what its dynamic adjustment arrives at


def raise_malloc_thresholds() -> bool:
    """Keep freed blocks of up to 1 GB in the process for the next step. Return False if the C library is not glibc."""
    return _set_thresholds(2**30, 2**31 - 1)


def restore_malloc_thresholds() -> bool:
    """Undo :func:`raise_malloc_thresholds` and return free memory to the system. Return False without glibc."""
    done = _set_thresholds(_GLIBC_MMAP_THRESHOLD, _GLIBC_TRIM_THRESHOLD)
    if done:
        ctypes.CDLL(None).malloc_trim(0)
    return done


def _set_thresholds(mmap_threshold: int, trim_threshold: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap_threshold) and mallopt(_M_TRIM_THRESHOLD, trim_threshold))


# --- versions, commit, device ---------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """Return the versions of Python, this project and :data:`PACKAGES`."""
    return {
        "python": platform.python_version(),
        "alexnet_pl": __version__,
        **{package: version(package) for package in PACKAGES},
    }


def git_commit() -> str | None:
    """Return the checkout's commit, with the suffix ``-dirty`` if tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or not the checkout's owner
        return None


def _git(root: Path, *command: str) -> str:
    words = ["git", "-C", str(root), *command]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=30)
    return done.stdout.strip()


def device_name(device: "torch.device") -> str:
    """Return a name such as ``cuda (NVIDIA H100 80GB HBM3)`` or ``cpu (AMD EPYC, 2 cores)``."""
    if device.type == "cuda":
        import torch  # start-up time: commands that only read results do without

        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({_cpu_model()}, {usable_cores()} cores)"
    return device.type


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of CPU cores this process may run on: its affinity, or all where there is none to ask for."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1
