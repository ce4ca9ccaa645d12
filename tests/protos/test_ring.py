"""A ring's file: who may open it, what is refused, and that nothing of it stays."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protos.ring import PAGE_BYTES, Ring, RingGeometry, RingRefused, sweep

GEOMETRY = RingGeometry(num_slots=3, slot_bytes=2 * PAGE_BYTES)
STALE = "tessera-ring-" + "0" * 32


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    created = Ring.create(tmp_path, GEOMETRY)
    yield created
    created.unlink()
    created.close()


def open_again(ring: Ring, folder: Path) -> Ring:
    return Ring.open(folder, ring.path.name, ring.nonce, ring.geometry)


def mappings_of(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(name)


class TestSharing:
    def test_what_one_writes_the_other_reads_also_without_a_name(self, ring: Ring, tmp_path: Path) -> None:
        other = open_again(ring, tmp_path)
        ring.unlink()
        assert list(tmp_path.iterdir()) == []
        for slot in range(GEOMETRY.num_slots):
            with other.slot(slot) as memory:
                memory[:] = bytes([slot + 1]) * GEOMETRY.slot_bytes
        for slot in range(GEOMETRY.num_slots):
            with ring.slot(slot) as memory:
                assert bytes(memory) == bytes([slot + 1]) * GEOMETRY.slot_bytes
        other.close()

    def test_nobody_else_may_open_the_file(self, ring: Ring) -> None:
        assert ring.path.stat().st_mode & 0o777 == 0o600

    def test_a_view_outlives_close(self, ring: Ring) -> None:
        view = ring.slot(0)
        view[:3] = b"abc"
        ring.close()
        assert bytes(view[:3]) == b"abc"

    def test_a_hundred_rings_leave_neither_descriptors_nor_mappings(self, tmp_path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            ours = Ring.create(tmp_path, GEOMETRY)
            theirs = open_again(ours, tmp_path)
            ours.unlink()
            theirs.close()
            ours.close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert mappings_of(str(tmp_path)) == 0


def rewrite(ring: Ring, offset: int, data: bytes) -> None:
    with ring.path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def replace_by_link(ring: Ring) -> None:
    target = ring.path.with_name("target")
    ring.path.rename(target)
    ring.path.symlink_to(target)


def replace_by_fifo(ring: Ring) -> None:
    ring.path.unlink()
    os.mkfifo(ring.path, 0o600)


TAMPERED: dict[str, Callable[[Ring], object]] = {
    "gone": lambda ring: ring.path.unlink(),
    "a symbolic link": replace_by_link,
    "a pipe": replace_by_fifo,
    "open to others": lambda ring: ring.path.chmod(0o644),
    "too short": lambda ring: os.truncate(ring.path, GEOMETRY.file_bytes - 1),
    "too long": lambda ring: os.truncate(ring.path, GEOMETRY.file_bytes + 1),
    "empty": lambda ring: os.truncate(ring.path, 0),
    "another magic": lambda ring: rewrite(ring, 0, b"x"),
    "another nonce": lambda ring: rewrite(ring, 16, bytes(16)),
    "other slots": lambda ring: rewrite(ring, 32, b"\x09"),
}


class TestRefusals:
    @pytest.mark.parametrize("kind", TAMPERED)
    def test_another_file_than_was_announced(self, ring: Ring, tmp_path: Path, kind: str) -> None:
        TAMPERED[kind](ring)
        with pytest.raises(RingRefused):
            open_again(ring, tmp_path)

    @pytest.mark.parametrize("name", ["", ".", "..", "../{}", "/{}", "./{}", "{}/", "{}\n", "{}x", "\0"])
    def test_a_name_that_is_no_ring_s(self, ring: Ring, tmp_path: Path, name: str) -> None:
        inside = tmp_path / "inside"
        inside.mkdir()
        for folder in (inside, tmp_path):
            with pytest.raises(RingRefused):
                Ring.open(folder, name.format(ring.path.name), ring.nonce, GEOMETRY)

    def test_a_wrong_nonce(self, ring: Ring, tmp_path: Path) -> None:
        for nonce in (b"", ring.nonce[:-1], bytes(16)):
            with pytest.raises(RingRefused, match="nonce"):
                Ring.open(tmp_path, ring.path.name, nonce, GEOMETRY)

    @pytest.mark.parametrize("geometry", [(0, PAGE_BYTES), (1, 0), (1, PAGE_BYTES + 1), (-1, PAGE_BYTES)])
    def test_a_geometry_that_cannot_be(self, geometry: tuple[int, int]) -> None:
        with pytest.raises(RingRefused):
            RingGeometry(*geometry)

    def test_no_room_for_a_single_slot(self) -> None:
        assert RingGeometry.fitting(10 * PAGE_BYTES, PAGE_BYTES + 1) == RingGeometry(5, 2 * PAGE_BYTES)
        with pytest.raises(RingRefused):
            RingGeometry.fitting(PAGE_BYTES, PAGE_BYTES + 1)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(OSError):
            Ring.create(tmp_path / "nowhere", GEOMETRY)


FILL = """
import resource, signal, sys
from pathlib import Path
from protos.ring import Ring, RingGeometry

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    Ring.create(Path(sys.argv[1]), RingGeometry(64, 1 << 16))
except OSError:
    print("refused")
"""


def test_no_room_is_an_error_at_the_start_and_leaves_no_file(tmp_path: Path) -> None:
    """What a full /dev/shm is, too: the blocks cannot be had when the ring is made."""
    finished = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True)
    assert finished.stdout == "refused\n", finished.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


class TestSweep:
    def test_removes_what_nobody_locks_and_nothing_else(self, ring: Ring, tmp_path: Path) -> None:
        (tmp_path / STALE).write_bytes(b"")
        (tmp_path / "tessera-ring-of-somebody").write_bytes(b"")
        (tmp_path / "other").write_bytes(b"")
        assert sweep(tmp_path) == 1
        assert {path.name for path in tmp_path.iterdir()} == {
            ring.path.name,
            "tessera-ring-of-somebody",
            "other",
        }

    def test_the_lock_lives_as_long_as_the_mapping_and_no_longer(self, ring: Ring, tmp_path: Path) -> None:
        other = open_again(ring, tmp_path)
        assert sweep(tmp_path) == 0
        ring.close()
        assert sweep(tmp_path) == 1  # the other's mapping is no reason to keep the name
        other.close()

    def test_follows_no_link(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"")
        (tmp_path / STALE).symlink_to(target)
        assert sweep(tmp_path) == 0 and target.exists()

    def test_a_file_that_is_locked_elsewhere_stays(self, tmp_path: Path) -> None:
        with (tmp_path / STALE).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert sweep(tmp_path) == 0
        assert sweep(tmp_path) == 1

    def test_a_folder_that_is_not_there_is_empty(self, tmp_path: Path) -> None:
        assert sweep(tmp_path / "nowhere") == 0

    def test_a_killed_process_leaves_a_file_that_the_next_one_removes(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys; from pathlib import Path; from protos.ring import Ring, RingGeometry\n"
            "ring = Ring.create(Path(sys.argv[1]), RingGeometry(1, 4096))\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)])
        assert len(list(tmp_path.iterdir())) == 1
        assert sweep(tmp_path) == 1 and list(tmp_path.iterdir()) == []
