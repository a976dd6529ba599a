"""glibc's memory allocator, told to keep what training frees and asks for again in every step.

By default every block above 32 MB (the gradient of fc7 has 67 MB) goes back to the system when it is freed, and its
pages are faulted in and zeroed again in the next step: a sixth of a CPU step of the tutorial's network. The arithmetic
is not touched. Other C libraries are left alone, and so are GPUs, for which torch keeps freed memory itself.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_GLIBC_MMAP_THRESHOLD, _GLIBC_TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20  # what its dynamic adjustment arrives at


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 1 GB for the next step. False where the C library is not glibc."""
    return _set(2**30, 2**31 - 1)


def return_freed_memory() -> bool:
    """Undo :func:`keep_freed_memory`: as a program that has not heard of it runs."""
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
