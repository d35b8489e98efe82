"""Freed memory stays with the process, where the C library can be told so."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from ultrathink_model.distributed.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for repeat in range(6):
    if repeat == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(48 << 20) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_memory_that_is_kept_is_not_faulted_in_again():
    counts = [
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("usual", "keep")
    ]
    assert counts[1] < counts[0] / 10
