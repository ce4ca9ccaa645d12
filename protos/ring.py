"""Slots in memory that one process writes and others of its host read, and how they get at it.

Only the owner may write: it maps the memory, seals it against other writers and against resizing, and hands
its descriptor to processes of the same user over a socket without a file, so that nothing is left of one that
is killed.  A reader may still be late, so every slot has a sequence number, which the owner changes before it
gives the slot to something else: what was copied is whole if the number is still the one that came with its
announcement (a seqlock, of which readers only see the end).  Knows nothing about tiles, streams or gRPC.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass

PAGE_BYTES = 4096
NONCE_BYTES = 16
HANDOVER_TIMEOUT_S = 2.0
_SEQUENCE_BYTES = 8
# Mapping also fills the page tables: without it the first use of a slot costs 512 page faults.
_SHARED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE of Linux 5.1: no new writable mapping, those that are there stay
_BACKLOG = 64
_PEER = struct.Struct("3i")  # ucred: process, user, group
_NAME = re.compile(r"tessera-ring-[0-9a-f]{32}")


class RingRefused(ValueError):
    """It is not the memory that was announced; the text is safe to send to whoever announced it."""


@dataclass(frozen=True)
class RingGeometry:
    """Of the memory: the sequence numbers, then the slots; each begins at a page."""

    num_slots: int
    slot_bytes: int  # a multiple of a page

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.slot_bytes < 1 or self.slot_bytes % PAGE_BYTES:
            raise RingRefused(f"no ring has {self.num_slots} slots of {self.slot_bytes} bytes")

    @property
    def first_slot(self) -> int:
        """Its offset."""
        return _pages(self.num_slots * _SEQUENCE_BYTES)

    @property
    def num_bytes(self) -> int:
        return self.first_slot + self.num_slots * self.slot_bytes

    @classmethod
    def fitting(cls, total_bytes: int, payload_bytes: int, most_slots: int) -> RingGeometry:
        """As many slots for such payloads as fit, at most so many; RingRefused where not even one does."""
        slot_bytes = _pages(payload_bytes)
        return cls(min(total_bytes // max(slot_bytes, 1), most_slots), slot_bytes)


class _Mapping:
    def __init__(self, mapped: mmap.mmap, nonce: bytes, geometry: RingGeometry) -> None:
        self.nonce = nonce  # whoever knows it has been handed the memory
        self.geometry = geometry
        self._map = mapped
        self._sequences = memoryview(mapped)[: geometry.num_slots * _SEQUENCE_BYTES].cast("Q")

    def sequence(self, slot: int) -> int:
        return self._sequences[slot]

    def slot(self, slot: int) -> memoryview:
        """[slot_bytes]; it keeps the mapping alive."""
        start = self.geometry.first_slot + slot * self.geometry.slot_bytes
        return memoryview(self._map)[start : start + self.geometry.slot_bytes]

    def close(self) -> None:
        """Unmap; where views are left, the mapping goes with the last of them.  Idempotent."""
        self._sequences.release()
        with suppress(BufferError):
            self._map.close()


class Ring(_Mapping):
    """The owner's side.  Its socket is for an event loop to watch: `hand_over` when it can be read."""

    def __init__(self, fd: int, geometry: RingGeometry) -> None:
        """Takes the descriptor over once it is made."""
        super().__init__(
            mmap.mmap(fd, geometry.num_bytes, flags=_SHARED), secrets.token_bytes(NONCE_BYTES), geometry
        )
        _seal(fd)
        self.name = f"tessera-ring-{secrets.token_hex(16)}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.bind(f"\0{self.name}")  # abstract: it is no file, and goes with the process
        self.socket.listen(_BACKLOG)
        self._fd = fd

    @classmethod
    def create(cls, geometry: RingGeometry) -> Ring:
        """New memory.

        Raises:
            OSError: there is not enough, or this system is not Linux.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("memory is shared on Linux only")
        fd = os.memfd_create("tessera-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Reserving now turns a lack of memory into an error here instead of a SIGBUS under load.
            os.posix_fallocate(fd, 0, geometry.num_bytes)
            return cls(fd, geometry)
        except BaseException:
            os.close(fd)
            raise

    def hand_over(self) -> None:
        """Give the memory to the process that has connected, if it is this user's; never blocks."""
        with suppress(OSError):  # it has gone
            connection, _ = self.socket.accept()
            with connection:
                if _peer_user(connection) == os.geteuid():
                    connection.setblocking(False)
                    socket.send_fds(connection, [self.nonce], [self._fd])

    def advance(self, slot: int) -> None:
        """What readers have been told to find there is there no more; called before it is overwritten."""
        self._sequences[slot] += 1

    def close(self) -> None:
        super().close()
        self.socket.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RingReader(_Mapping):
    """Another process's ring, mapped read-only."""

    @classmethod
    def receive(cls, name: str, geometry: RingGeometry) -> RingReader:
        """Of the process that listens under that name on this host; blocks, at most HANDOVER_TIMEOUT_S.

        Raises:
            RingRefused: it is not there, another user's, or gives something else.
        """
        if _NAME.fullmatch(name) is None:
            raise RingRefused("no ring has such a name")
        nonce, fds = _receive(name)
        try:
            if len(fds) != 1 or len(nonce) != NONCE_BYTES:
                raise RingRefused("the process with the ring gives something else")
            _check(fds[0], geometry)
            return cls(
                mmap.mmap(fds[0], geometry.num_bytes, flags=_SHARED, prot=mmap.PROT_READ), nonce, geometry
            )
        except OSError as error:
            raise RingRefused("the ring cannot be mapped here") from error
        finally:
            for fd in fds:
                os.close(fd)


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _seal(fd: int) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | _FUTURE_WRITE)
    except OSError:  # before Linux 5.1: readers could write, and are of this user and ours
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def _receive(name: str) -> tuple[bytes, list[int]]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(HANDOVER_TIMEOUT_S)
            connection.connect(f"\0{name}")
            if _peer_user(connection) != os.geteuid():
                raise RingRefused("the ring is another user's")
            nonce, fds, _, _ = socket.recv_fds(connection, NONCE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            return nonce, list(fds)
    except OSError as error:
        raise RingRefused("no process of this host gives the ring") from error


def _peer_user(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(credentials)[1])


def _check(fd: int, geometry: RingGeometry) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != geometry.num_bytes:
        raise RingRefused("the ring has another size than was announced")
    sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & sealed != sealed:
        raise RingRefused("the ring could be taken away while it is read")
