"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

_FREED = """
import ctypes, re, threading
from saejax import allocator

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

if {keep}:
    assert allocator.keep_freed_memory()

def use():
    blocks = [ctypes.create_string_buffer(2**25) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 2**25)

before = resident()
use()
here = resident() - before
thread = threading.Thread(target=use)
thread.start()
thread.join()
print(here, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept(keep):
    code = _FREED.format(keep=keep)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, with_a_thread = (int(size) for size in run.stdout.split())
    assert (alone > 2**27) == keep
    # What one thread freed serves another: no second block of memory is touched.
    assert (2**27 < with_a_thread < 2**28 + 2**26) == keep
