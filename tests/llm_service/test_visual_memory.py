"""One segment, several processes: what one writes the others read, and nothing is left behind."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from llm_service.visual_memory import SHARED_MEMORY_DIR, VisualMemory


@pytest.fixture
def memory():
    memory = VisualMemory.create(3, 4, 5, torch.bfloat16)
    yield memory
    memory.close()


def test_rows_are_what_was_written(memory):
    embeds = torch.randn(4, 5)
    memory.write(1, embeds)
    assert torch.equal(memory.rows(1, 0, 4), embeds.bfloat16())
    assert torch.equal(memory.rows(1, 2, 2), embeds[2:].bfloat16())
    assert memory.rows(0, 0, 4).eq(0).all() and memory.rows(2, 0, 4).eq(0).all()


def test_a_short_tile_leaves_the_rest_of_its_slot_alone(memory):
    memory.write(2, torch.ones(4, 5))
    memory.write(2, torch.zeros(2, 5))
    assert memory.rows(2, 0, 4).sum(1).tolist() == [0, 0, 5, 5]


def test_another_mapping_of_the_descriptor_sees_the_same(memory):
    other = VisualMemory(os.dup(memory.fd), 3, 4, 5, torch.bfloat16)
    other.write(2, torch.full((4, 5), 7.0))
    other.close()
    assert memory.rows(2, 0, 4).eq(7).all()


def test_another_process_sees_the_same(memory):
    memory.write(0, torch.full((4, 5), 2.0))
    program = (
        "import sys, torch\n"
        "from llm_service.visual_memory import VisualMemory\n"
        "memory = VisualMemory(int(sys.argv[1]), 3, 4, 5, torch.bfloat16)\n"
        "memory.write(1, memory.rows(0, 0, 4) + 1)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(memory.fd)], pass_fds=[memory.fd], check=True)
    assert memory.rows(1, 0, 4).eq(3).all()


def test_the_segment_has_no_name():
    before = set(os.listdir(SHARED_MEMORY_DIR)) if SHARED_MEMORY_DIR.is_dir() else set()
    memory = VisualMemory.create(1, 1, 1, torch.float32)
    if SHARED_MEMORY_DIR.is_dir():
        new = set(os.listdir(SHARED_MEMORY_DIR)) - before
        assert not [name for name in new if name.startswith("tessera-visual-")]
    memory.close()


def test_more_memory_than_there_is_fails_at_once_and_leaks_no_descriptor():
    num_fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        VisualMemory.create(2**22, 256, 8192, torch.float32)
    assert len(os.listdir("/proc/self/fd")) == num_fds


def test_closing_lets_the_descriptors_go_but_not_the_rows_in_use():
    gc.collect()
    num_fds = len(os.listdir("/proc/self/fd"))
    memory = VisualMemory.create(1, 2, 3, torch.float32)
    memory.write(0, torch.ones(2, 3))
    rows = memory.rows(0, 0, 2)
    memory.close()
    del memory
    assert rows.sum() == 6
    del rows
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= num_fds  # what earlier tests held may have gone meanwhile
