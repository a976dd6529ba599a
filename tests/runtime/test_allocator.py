"""glibc's allocator keeps freed memory for the next step."""

import subprocess
import sys

import pytest

from alexnet_pl.runtime.system import raise_malloc_thresholds

FAULTS = """
import ctypes, resource, sys
from alexnet_pl.runtime.system import raise_malloc_thresholds, restore_malloc_thresholds
change = {"keep": raise_malloc_thresholds, "return": restore_malloc_thresholds}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for name in sys.argv[1:]:
    assert change[name]()
for repeat in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**27)  # 128 MB, 32,768 pages
    ctypes.memset(block, 1, 2**27)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not raise_malloc_thresholds(), reason="the C library is not glibc")
def test_freed_memory_is_kept_until_the_thresholds_are_restored():
    def faults(*changes: str) -> int:
        command = [sys.executable, "-c", FAULTS, *changes]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100
    assert faults("keep", "return") > 1000  # fewer than 32,768 with huge pages
