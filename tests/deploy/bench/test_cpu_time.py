"""CPU time is that of the processes named."""

from __future__ import annotations

import os
import time

from deploy.bench.cpu_time import cpu_seconds


def test_work_counts_and_sleep_does_not() -> None:
    before_s, own_s = cpu_seconds([os.getpid()]), time.process_time()
    while time.process_time() < own_s + 0.2:
        pass
    after_s = cpu_seconds([os.getpid()])
    assert 0.15 <= after_s - before_s <= 0.5
    assert cpu_seconds([]) == 0
