"""Media that were uploaded apart from the requests that name them, for a while and within budgets.

Knows nothing about gRPC; a caller is any string.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from llm_service.config import UploadConfig
from protos.errors import InvalidRequest, Overloaded

RETRY_AFTER_S = 5.0

UploadKey = tuple[bytes, bytes]  # (cache salt, SHA-256): who does not know the salt does not find it


@dataclass(eq=False)
class _Stored:
    data: bytes
    caller: str
    expiry: asyncio.TimerHandle
    was_used: bool = False


class UploadStore:
    """Room is made by forgetting what a request has used, the longest unused first.

    What still waits for its request stays until its time is over.
    """

    def __init__(self, config: UploadConfig) -> None:
        self.config = config
        self._stored: OrderedDict[UploadKey, _Stored] = OrderedDict()  # longest unused first
        self._arriving: set[Upload] = set()

    @property
    def num_bytes(self) -> int:
        """Held, those that still arrive included."""
        return _total(self._stored.values()) + sum(upload.num_bytes for upload in self._arriving)

    def begin(self, caller: str, cache_salt: bytes, num_bytes: int) -> Upload:
        """Raises InvalidRequest for more bytes than one upload may have, or none."""
        if not 1 <= num_bytes <= self.config.max_upload_bytes:
            message = f"num_bytes is {num_bytes}, must be in [1, {self.config.max_upload_bytes}]"
            raise InvalidRequest(message, field="num_bytes")
        upload = Upload(self, caller, cache_salt, num_bytes)
        self._arriving.add(upload)
        return upload

    def get(self, cache_salt: bytes, digest: bytes) -> bytes | None:
        """The medium, which is kept for a whole `upload_ttl_s` again; None: never here, or forgotten."""
        key = (cache_salt, digest)
        stored = self._stored.get(key)
        if stored is None:
            return None
        stored.expiry.cancel()
        stored.expiry = self._expire_later(key)
        stored.was_used = True
        self._stored.move_to_end(key)
        return stored.data

    def make_room(self, caller: str, num_bytes: int) -> None:
        """Raises Overloaded."""
        own = [upload for upload in self._arriving if upload.caller == caller]
        stored = [stored for stored in self._stored.values() if stored.caller == caller]
        own_bytes = _total(stored) + sum(upload.num_bytes for upload in own)
        self._forget_used(own_bytes + num_bytes - (self.config.max_caller_uploads_mib << 20), caller)
        self._forget_used(self.num_bytes + num_bytes - (self.config.max_uploads_mib << 20), None)

    def put(self, upload: Upload, data: bytes) -> bytes:
        """Its digest."""
        self.leave(upload)
        digest = hashlib.sha256(data).digest()
        key = (upload.cache_salt, digest)
        self._forget(key)
        self._stored[key] = _Stored(data, upload.caller, self._expire_later(key))
        return digest

    def leave(self, upload: Upload) -> None:
        self._arriving.discard(upload)

    def _expire_later(self, key: UploadKey) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_later(self.config.upload_ttl_s, self._forget, key)

    def _forget(self, key: UploadKey) -> None:
        stored = self._stored.pop(key, None)
        if stored is not None:
            stored.expiry.cancel()

    def _forget_used(self, num_bytes: int, caller: str | None) -> None:
        """At least so many bytes, of that caller or of any."""
        for key, stored in list(self._stored.items()):
            if num_bytes <= 0:
                return
            if stored.was_used and caller in (None, stored.caller):
                num_bytes -= len(stored.data)
                self._forget(key)
        if num_bytes > 0:
            raise Overloaded("there is no room for another upload", retry_after_s=RETRY_AFTER_S)


class Upload:
    """One medium on its way.  Whoever begins it calls `finish` or `abandon`."""

    def __init__(self, store: UploadStore, caller: str, cache_salt: bytes, announced: int) -> None:
        self.caller = caller
        self.cache_salt = cache_salt
        self.num_bytes = 0
        self._announced = announced
        self._store = store
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Raises InvalidRequest beyond what was announced, Overloaded where there is no room."""
        if self.num_bytes + len(piece) > self._announced:
            raise InvalidRequest("more bytes came than were announced", field="data")
        self._store.make_room(self.caller, len(piece))
        self._pieces.append(piece)
        self.num_bytes += len(piece)

    def finish(self) -> bytes:
        """What requests name it by: its SHA-256.  Raises InvalidRequest where bytes are missing."""
        if self.num_bytes != self._announced:  # a caller that left looks like one that is done
            raise InvalidRequest("fewer bytes came than were announced", field="data")
        data = b"".join(self._pieces)
        self._pieces.clear()
        return self._store.put(self, data)

    def abandon(self) -> None:
        self._pieces.clear()
        self._store.leave(self)


def _total(stored: Iterable[_Stored]) -> int:
    return sum(len(entry.data) for entry in stored)
