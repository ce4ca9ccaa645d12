"""Media that were uploaded apart from the requests that name them, for a while and within budgets.

Knows nothing about gRPC; a caller is any string.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass

from llm_service.config import UploadConfig
from protos.errors import InvalidRequest, Overloaded

RETRY_AFTER_S = 5.0
# Of what is held, a medium counts as at least this: entries cost memory, too, and a budget of bytes alone
# would let a caller keep millions of them.
MIN_COUNTED_BYTES = 64 << 10

UploadKey = tuple[bytes, bytes]  # (cache salt, SHA-256): who does not know the salt does not find it


@dataclass(eq=False)
class _Stored:
    data: bytes
    caller: str
    expiry: asyncio.TimerHandle
    was_used: bool = False

    @property
    def counted_bytes(self) -> int:
        return max(len(self.data), MIN_COUNTED_BYTES)


class UploadStore:
    """Room is made by forgetting what a request has used, the longest unused first.

    What still waits for its request stays until its time is over.
    """

    def __init__(self, config: UploadConfig) -> None:
        self.config = config
        self._stored: OrderedDict[UploadKey, _Stored] = OrderedDict()  # longest unused first
        self._arriving: set[Upload] = set()
        self._bytes_of: Counter[str] = Counter()  # counted bytes by caller, of what is stored or arrives

    @property
    def num_bytes(self) -> int:
        """Counted, those that still arrive included."""
        return self._bytes_of.total()

    def begin(self, caller: str, cache_salt: bytes, num_bytes: int) -> Upload:
        """Raises InvalidRequest for more bytes than one upload may have, or none; Overloaded."""
        if not 1 <= num_bytes <= self.config.max_upload_bytes:
            message = f"num_bytes is {num_bytes}, must be in [1, {self.config.max_upload_bytes}]"
            raise InvalidRequest(message, field="num_bytes")
        self.make_room(caller, MIN_COUNTED_BYTES)
        upload = Upload(self, caller, cache_salt, num_bytes)
        self._arriving.add(upload)
        self._count(caller, upload.counted_bytes)
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
        own_bytes = self._bytes_of[caller]
        self._forget_used(own_bytes + num_bytes - (self.config.max_caller_uploads_mib << 20), caller)
        self._forget_used(self.num_bytes + num_bytes - (self.config.max_uploads_mib << 20), None)

    def grow(self, upload: Upload, num_bytes: int) -> None:
        """It counts as that much more.  Raises Overloaded."""
        self.make_room(upload.caller, num_bytes)
        self._count(upload.caller, num_bytes)

    def put(self, upload: Upload, data: bytes, digest: bytes) -> None:
        self.leave(upload)
        key = (upload.cache_salt, digest)
        self._forget(key)
        stored = self._stored[key] = _Stored(data, upload.caller, self._expire_later(key))
        self._count(stored.caller, stored.counted_bytes)

    def leave(self, upload: Upload) -> None:
        """Idempotent."""
        if upload in self._arriving:
            self._arriving.remove(upload)
            self._count(upload.caller, -upload.counted_bytes)

    def _count(self, caller: str, num_bytes: int) -> None:
        """Callers that have nothing are forgotten: a stranger may have many addresses."""
        self._bytes_of[caller] += num_bytes
        if not self._bytes_of[caller]:
            del self._bytes_of[caller]

    def _expire_later(self, key: UploadKey) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_later(self.config.upload_ttl_s, self._forget, key)

    def _forget(self, key: UploadKey) -> None:
        stored = self._stored.pop(key, None)
        if stored is not None:
            stored.expiry.cancel()
            self._count(stored.caller, -stored.counted_bytes)

    def _forget_used(self, num_bytes: int, caller: str | None) -> None:
        """At least so many bytes, of that caller or of any."""
        if num_bytes <= 0:
            return
        for key, stored in list(self._stored.items()):
            if num_bytes > 0 and stored.was_used and caller in (None, stored.caller):
                num_bytes -= stored.counted_bytes
                self._forget(key)
        if num_bytes > 0:
            raise Overloaded("there is no room for another upload", retry_after_s=RETRY_AFTER_S)


class Upload:
    """One medium on its way.  Whoever begins it calls `finish` or `abandon`."""

    def __init__(self, store: UploadStore, caller: str, cache_salt: bytes, announced: int) -> None:
        self.caller = caller
        self.cache_salt = cache_salt
        self._announced = announced
        self._store = store
        # One buffer and a running hash: small pieces cost no more than their bytes, and a large medium
        # does not hold up the event loop at its end.
        self._data = bytearray()
        self._hash = hashlib.sha256()

    @property
    def num_bytes(self) -> int:
        return len(self._data)

    @property
    def counted_bytes(self) -> int:
        return max(len(self._data), MIN_COUNTED_BYTES)

    def add(self, piece: bytes) -> None:
        """Raises InvalidRequest beyond what was announced, Overloaded where there is no room."""
        num_bytes = self.num_bytes + len(piece)
        if num_bytes > self._announced:
            raise InvalidRequest("more bytes came than were announced", field="data")
        self._store.grow(self, max(num_bytes - self.counted_bytes, 0))
        self._data += piece
        self._hash.update(piece)

    def finish(self) -> bytes:
        """What requests name it by: its SHA-256.  Raises InvalidRequest where bytes are missing."""
        if self.num_bytes != self._announced:  # a caller that left looks like one that is done
            raise InvalidRequest("fewer bytes came than were announced", field="data")
        digest = self._hash.digest()
        self._store.put(self, bytes(self._data), digest)
        return digest

    def abandon(self) -> None:
        """Idempotent; after `finish` nothing happens."""
        self._store.leave(self)
