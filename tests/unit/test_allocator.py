"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

_FREED = """
import ctypes, re
from saejax import allocator

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

if {keep}:
    assert allocator.keep_freed_memory()
before = resident()
block = ctypes.create_string_buffer(2**28)
ctypes.memset(block, 1, 2**28)
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept(keep):
    code = _FREED.format(keep=keep)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(run.stdout) > 2**27) == keep
