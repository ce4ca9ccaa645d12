"""A ring's memory: who is given it, what they can do with it, what is refused, and that nothing stays."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from select import select

import pytest

from protos import ring as module
from protos.ring import NONCE_BYTES, PAGE_BYTES, Ring, RingGeometry, RingReader, RingRefused

GEOMETRY = RingGeometry(num_slots=3, slot_bytes=2 * PAGE_BYTES)
NONCE = bytes(range(NONCE_BYTES))
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
PATIENCE_S = 5.0


@pytest.fixture
def ring() -> Iterator[Ring]:
    created = Ring.create(GEOMETRY)
    yield created
    created.close()


@pytest.fixture
def reader(ring: Ring) -> Iterator[RingReader]:
    received = receive(ring)
    yield received
    received.close()


def receive(ring: Ring, geometry: RingGeometry = GEOMETRY) -> RingReader:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(hand_over, ring)
        return RingReader.receive(ring.name, geometry)


def hand_over(ring: Ring) -> None:
    select([ring.socket], [], [], PATIENCE_S)
    ring.hand_over()


def connect(ring: Ring) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE_S)
    connection.connect(f"\0{ring.name}")
    return connection


def receive_by_hand(ring: Ring) -> tuple[bytes, list[int]]:
    with connect(ring) as connection:
        ring.hand_over()
        message, fds, _, _ = socket.recv_fds(connection, 2 * NONCE_BYTES, 2)
    return message, list(fds)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:tessera-ring (deleted)")


class TestSharing:
    def test_a_reader_sees_what_the_owner_writes(self, ring: Ring, reader: RingReader) -> None:
        for slot in range(GEOMETRY.num_slots):
            ring.slot(slot)[:] = bytes([slot + 1]) * GEOMETRY.slot_bytes
        for slot in range(GEOMETRY.num_slots):
            assert bytes(reader.slot(slot)) == bytes([slot + 1]) * GEOMETRY.slot_bytes

    def test_a_reader_sees_it_also_after_the_owner_has_closed(self, ring: Ring, reader: RingReader) -> None:
        ring.slot(2)[:3] = b"abc"
        ring.close()
        assert bytes(reader.slot(2)[:3]) == b"abc"

    def test_a_reader_that_comes_later_sees_the_same(self, ring: Ring, reader: RingReader) -> None:
        ring.slot(0)[:3] = b"abc"
        ring.advance(0)
        later = [receive(ring) for _ in range(3)]
        reader.close()
        later.append(receive(ring))
        for each in later:
            assert (bytes(each.slot(0)[:3]), each.sequence(0)) == (b"abc", 1)
            each.close()

    def test_a_reader_knows_the_owners_nonce_which_no_other_ring_has(
        self, ring: Ring, reader: RingReader
    ) -> None:
        other = Ring.create(GEOMETRY)
        other.close()
        assert reader.nonce == ring.nonce != other.nonce
        assert ring.name != other.name

    def test_a_reader_sees_the_sequence_of_the_slot_that_has_advanced(
        self, ring: Ring, reader: RingReader
    ) -> None:
        ring.advance(1)
        ring.advance(1)
        ring.advance(2)
        assert [reader.sequence(slot) for slot in range(GEOMETRY.num_slots)] == [0, 2, 1]

    def test_the_numbers_of_many_slots_lie_outside_of_them(self) -> None:
        geometry = RingGeometry(PAGE_BYTES // 8 + 1, PAGE_BYTES)
        ring = Ring.create(geometry)
        ring.slot(0)[:] = b"\xff" * PAGE_BYTES
        ring.advance(geometry.num_slots - 1)
        assert ring.sequence(geometry.num_slots - 1) == 1
        assert bytes(ring.slot(0)) == b"\xff" * PAGE_BYTES
        ring.close()


class TestReadersMay:
    def test_not_write_to_a_slot(self, reader: RingReader) -> None:
        assert reader.slot(0).readonly
        with pytest.raises(TypeError, match="read-only"):
            reader.slot(0)[:1] = b"x"

    def test_not_write_with_the_descriptor(self, ring: Ring) -> None:
        message, (fd,) = receive_by_hand(ring)
        assert message == ring.nonce
        with pytest.raises(PermissionError):
            mmap.mmap(fd, GEOMETRY.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        os.close(fd)

    @pytest.mark.parametrize("num_bytes", [0, GEOMETRY.num_bytes - 1, GEOMETRY.num_bytes + 1])
    def test_not_resize_it(self, ring: Ring, num_bytes: int) -> None:
        _, (fd,) = receive_by_hand(ring)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, num_bytes)
        os.close(fd)


class TestClose:
    def test_a_view_outlives_it(self, ring: Ring) -> None:
        view = ring.slot(0)
        view[:3] = b"abc"
        ring.close()
        assert bytes(view[:3]) == b"abc"

    def test_a_readers_view_outlives_it(self, ring: Ring, reader: RingReader) -> None:
        view = reader.slot(0)
        reader.close()
        ring.slot(0)[:3] = b"abc"
        assert bytes(view[:3]) == b"abc"

    def test_nothing_is_handed_over_after_it(self, ring: Ring) -> None:
        ring.close()
        ring.hand_over()
        with pytest.raises(RingRefused, match="no process"):
            RingReader.receive(ring.name, GEOMETRY)

    def test_may_be_repeated_and_closes_no_descriptor_of_others(self, ring: Ring) -> None:
        ring.close()
        others = os.pipe()
        ring.close()
        for fd in others:
            os.close(fd)

    def test_fifty_rings_leave_neither_descriptors_nor_mappings(self) -> None:
        descriptors, mappings = num_descriptors(), num_mappings()
        for _ in range(50):
            ring = Ring.create(GEOMETRY)
            reader = receive(ring)
            assert num_mappings() == mappings + 2
            reader.close()
            ring.close()
        assert (num_descriptors(), num_mappings()) == (descriptors, mappings)


class TestHandOver:
    def test_does_nothing_where_nobody_waits(self, ring: Ring) -> None:
        assert not ring.socket.getblocking()
        ring.hand_over()

    def test_gives_nothing_to_a_client_that_has_gone(self, ring: Ring) -> None:
        connect(ring).close()
        before = num_descriptors()
        ring.hand_over()
        assert num_descriptors() == before
        receive(ring).close()

    def test_serves_one_client_after_the_other(self, ring: Ring) -> None:
        with connect(ring) as first, connect(ring) as second:
            ring.hand_over()
            assert first.recv(NONCE_BYTES) == ring.nonce
            assert select([second], [], [], 0) == ([], [], [])
            ring.hand_over()
            assert second.recv(NONCE_BYTES) == ring.nonce

    def test_gives_nothing_to_another_user(self, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_peer_user", lambda connection: os.geteuid() + 1)
        assert receive_by_hand(ring) == (b"", [])


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """The name under which the first client gets that answer."""
    name = f"tessera-ring-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, ThreadPoolExecutor(1) as thread:
        listener.settimeout(PATIENCE_S)
        listener.bind(f"\0{name}")
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

        serving = thread.submit(serve)
        yield name
        serving.result()


@contextmanager
def memory(seals: int = SEALS) -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, GEOMETRY.num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    yield fd
    os.close(fd)


def giving(message: bytes, *fds: int) -> Callable[[socket.socket], object]:
    return lambda connection: socket.send_fds(connection, [message], fds)


def assert_refused(name: str, match: str) -> None:
    with pytest.raises(RingRefused, match=match):
        RingReader.receive(name, GEOMETRY)


HEX = "0123456789abcdef" * 2
NO_NAMES = [
    "",
    ".",
    "/x",
    "tessera-ring-",
    f"tessera-ring-{HEX[1:]}",
    f"tessera-ring-{HEX}0",
    f"tessera-ring-{HEX}\n",
    f"tessera-ring-{HEX.upper()}",
    f"\0tessera-ring-{HEX}",
    f"/tessera-ring-{HEX}",
]


class TestRefusals:
    def test_a_name_under_which_nobody_listens(self) -> None:
        assert_refused(f"tessera-ring-{HEX}", "no process")

    @pytest.mark.parametrize("name", NO_NAMES)
    def test_a_name_that_is_no_rings(self, name: str) -> None:
        assert_refused(name, "such a name")

    @pytest.mark.parametrize("announced", [(2, 2 * PAGE_BYTES), (4, 2 * PAGE_BYTES), (3, PAGE_BYTES)])
    def test_another_size_than_was_announced(self, ring: Ring, announced: tuple[int, int]) -> None:
        before = num_descriptors()
        with pytest.raises(RingRefused, match="another size"):
            receive(ring, RingGeometry(*announced))
        assert num_descriptors() == before

    def test_another_users(self, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_peer_user", lambda connection: os.geteuid() + 1)
        assert_refused(ring.name, "another user")

    def test_an_owner_that_refuses_us(self) -> None:
        with listening(socket.socket.close) as name:
            assert_refused(name, "something else")

    def test_no_descriptor(self) -> None:
        with listening(giving(NONCE)) as name:
            assert_refused(name, "something else")

    def test_a_short_nonce(self) -> None:
        with memory() as fd, listening(giving(NONCE[:-1], fd)) as name:
            assert_refused(name, "something else")

    @pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
    def test_memory_that_could_be_resized(self, seals: int) -> None:
        with memory(seals) as fd, listening(giving(NONCE, fd)) as name:
            assert_refused(name, "taken away")

    def test_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(GEOMETRY.num_bytes))
        with path.open("rb") as file, listening(giving(NONCE, file.fileno())) as name:
            assert_refused(name, "cannot be mapped|taken away")

    def test_a_pipe(self) -> None:
        reading, writing = os.pipe()
        with listening(giving(NONCE, reading)) as name:
            assert_refused(name, "another size")
        os.close(reading)
        os.close(writing)

    def test_a_process_that_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "HANDOVER_TIMEOUT_S", 0.1)
        with listening(lambda connection: connection.recv(1)) as name:
            started = time.monotonic()
            assert_refused(name, "no process")
        assert 0.1 <= time.monotonic() - started < 1.5

    def test_leave_no_descriptor(self) -> None:
        with memory(seals=0) as fd:
            before = num_descriptors()
            for message in (NONCE, NONCE[:-1]):
                with listening(giving(message, fd)) as name:
                    assert_refused(name, "taken away|something else")
            assert num_descriptors() == before


def test_of_two_descriptors_only_the_first_is_taken() -> None:
    with memory() as fd, memory(seals=0) as other:
        os.pwrite(fd, b"abc", GEOMETRY.first_slot)
        before = num_descriptors()
        with listening(giving(NONCE, fd, other)) as name:
            reader = RingReader.receive(name, GEOMETRY)
        assert (bytes(reader.slot(0)[:3]), reader.nonce) == (b"abc", NONCE)
        reader.close()
        assert num_descriptors() == before


class TestGeometry:
    @pytest.mark.parametrize("geometry", [(0, PAGE_BYTES), (1, 0), (1, PAGE_BYTES + 1), (-1, PAGE_BYTES)])
    def test_one_that_cannot_be(self, geometry: tuple[int, int]) -> None:
        with pytest.raises(RingRefused):
            RingGeometry(*geometry)

    def test_as_many_slots_as_there_is_room_for(self) -> None:
        fitting = RingGeometry.fitting(11 * PAGE_BYTES, PAGE_BYTES + 1, most_slots=100)
        assert fitting == RingGeometry(5, 2 * PAGE_BYTES)

    def test_no_more_slots_than_asked_for(self) -> None:
        assert RingGeometry.fitting(10 * PAGE_BYTES, PAGE_BYTES, most_slots=3) == RingGeometry(3, PAGE_BYTES)

    @pytest.mark.parametrize(("payload_bytes", "most_slots"), [(PAGE_BYTES + 1, 1), (PAGE_BYTES, 0), (0, 1)])
    def test_not_a_single_slot(self, payload_bytes: int, most_slots: int) -> None:
        with pytest.raises(RingRefused):
            RingGeometry.fitting(PAGE_BYTES, payload_bytes, most_slots)


CREATE_AND_DIE = """
import os, signal
from protos.ring import Ring, RingGeometry

print(Ring.create(RingGeometry(3, 8192)).name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class TestNothing:
    def test_is_shared_on_other_systems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "memfd_create")
        with pytest.raises(OSError, match="Linux"):
            Ring.create(GEOMETRY)

    def test_is_left_where_there_is_not_enough_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(fd: int, offset: int, num_bytes: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        before = num_descriptors()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            Ring.create(GEOMETRY)
        assert num_descriptors() == before

    def test_is_left_of_an_owner_that_was_killed(self) -> None:
        died = subprocess.run([sys.executable, "-c", CREATE_AND_DIE], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        name = died.stdout.strip()
        assert name not in Path("/proc/net/unix").read_text()
        assert_refused(name, "no process")
