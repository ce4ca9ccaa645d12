"""Slots in memory that two processes of one host share: the file, what proves it, and how its name goes away.

Knows nothing about tiles, streams or gRPC; who may write which slot is agreed elsewhere.
"""

from __future__ import annotations

import fcntl
import hmac
import logging
import mmap
import os
import re
import secrets
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY_DIR = "/dev/shm"
PAGE_BYTES = 4096
NONCE_BYTES = 16
# Mapping also fills the page tables: without it the first use of a slot costs 512 page faults.
_MAP_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
_MAGIC = b"tessera.v1.ring\0"
_HEADER = struct.Struct("<16s16sQQ")  # magic, nonce, number of slots, bytes of a slot; a page with zeros
_PREFIX = "tessera-ring-"
_NAME = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{32}")

log = logging.getLogger(__name__)


class RingRefused(ValueError):
    """It is not the file that was announced; the text is safe to send to whoever announced it."""


@dataclass(frozen=True)
class RingGeometry:
    num_slots: int
    slot_bytes: int  # a multiple of a page

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.slot_bytes < 1 or self.slot_bytes % PAGE_BYTES:
            raise RingRefused(f"no ring has {self.num_slots} slots of {self.slot_bytes} bytes")

    @property
    def file_bytes(self) -> int:
        return PAGE_BYTES + self.num_slots * self.slot_bytes

    @classmethod
    def fitting(cls, total_bytes: int, payload_bytes: int) -> RingGeometry:
        """As many slots for such payloads as fit; RingRefused where not even one does."""
        slot_bytes = -(-payload_bytes // PAGE_BYTES) * PAGE_BYTES
        return cls(total_bytes // max(slot_bytes, 1), slot_bytes)


class Ring:
    """A mapped ring.  Its creator holds a lock on the file for as long as it is mapped there."""

    def __init__(self, fd: int, path: Path, nonce: bytes, geometry: RingGeometry) -> None:
        """The descriptor stays the caller's: the mapping has its own."""
        self.path = path
        self.nonce = nonce
        self.geometry = geometry
        self._map = mmap.mmap(fd, geometry.file_bytes, flags=_MAP_FLAGS)

    @classmethod
    def create(cls, folder: Path, geometry: RingGeometry) -> Ring:
        """A new file that only this user may open.

        Raises:
            OSError: the folder is not there, or full.
        """
        path = folder / (_PREFIX + secrets.token_hex(16))
        nonce = secrets.token_bytes(NONCE_BYTES)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink == 0:  # a sweep came between the two calls
                raise FileNotFoundError(f"{path} was removed by another process")
            # Reserving now turns a full folder into an error here instead of a SIGBUS under load.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, geometry.file_bytes)
            else:
                os.ftruncate(fd, geometry.file_bytes)
            os.pwrite(fd, _HEADER.pack(_MAGIC, nonce, geometry.num_slots, geometry.slot_bytes), 0)
            return cls(fd, path, nonce, geometry)
        except BaseException:
            _unlink(path)
            raise
        finally:
            os.close(fd)

    @classmethod
    def open(cls, folder: Path, name: str, nonce: bytes, geometry: RingGeometry) -> Ring:
        """The file that another process of this user made in `folder`.

        Raises:
            RingRefused: it is not there, or not that file.
        """
        if _NAME.fullmatch(name) is None:
            raise RingRefused("no ring has such a name")
        path = folder / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise RingRefused("the ring's file cannot be opened here") from error
        try:
            _check(fd, nonce, geometry)
            return cls(fd, path, nonce, geometry)
        except OSError as error:
            raise RingRefused("the ring's file cannot be mapped here") from error
        finally:
            os.close(fd)

    def unlink(self) -> None:
        """Remove the name; whoever has the ring mapped keeps it.  Idempotent."""
        _unlink(self.path)

    def slot(self, index: int) -> memoryview:
        """[slot_bytes], writable; must be released before `close`."""
        start = PAGE_BYTES + index * self.geometry.slot_bytes
        return memoryview(self._map)[start : start + self.geometry.slot_bytes]

    def close(self) -> None:
        """Unmap; where views are left, the mapping goes with the last of them.  Idempotent."""
        with suppress(BufferError):
            self._map.close()


def sweep(folder: Path) -> int:
    """Remove the files of processes that were killed, which are those that nobody locks; returns how many."""
    removed = 0
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, in use, or gone meanwhile
            removed += _NAME.fullmatch(path.name) is not None and _remove_unlocked(path)
    if removed:
        log.info("removed %d rings of processes that have gone", removed)
    return removed


def _remove_unlocked(path: Path) -> bool:
    """Raises OSError where somebody holds the lock."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()  # still under the lock: a creator looks for its name when it has it
        return True
    finally:
        os.close(fd)


def _check(fd: int, nonce: bytes, geometry: RingGeometry) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RingRefused("the ring's file is not one of this user alone")
    header = os.pread(fd, _HEADER.size, 0)
    if status.st_size != geometry.file_bytes or len(header) != _HEADER.size:
        raise RingRefused("the ring's file has another size than was announced")
    magic, found, num_slots, slot_bytes = _HEADER.unpack(header)
    if (magic, num_slots, slot_bytes) != (_MAGIC, geometry.num_slots, geometry.slot_bytes):
        raise RingRefused("the ring's file has another header than was announced")
    if not hmac.compare_digest(found, nonce):
        raise RingRefused("the ring's file has another nonce")


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
