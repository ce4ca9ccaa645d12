"""The thresholds really change what glibc does with large temporaries."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Allocates and frees 40 MiB again and again (more than glibc adapts itself to); counts faulted pages.
FAULTS = """
import resource, sys
from protos.malloc import tune_malloc
if sys.argv[1] == "tuned":
    assert tune_malloc()
b"x" * (40 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b"x" * (40 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    output = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True, text=True)
    return int(output.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_tuned_process_keeps_its_heap() -> None:
    assert faults("untuned") > 10 * (faults("tuned") + 1)
