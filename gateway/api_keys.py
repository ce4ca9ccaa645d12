"""API keys: only their SHA-256 is kept, and a look-up takes as long for a wrong key as for a right one."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A plain hash protects only what cannot be guessed.
MIN_KEY_CHARS = 20
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_LINE = re.compile(r"(\S{1,64})\s+([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class ApiKey:
    name: str  # for logs
    digest: bytes  # SHA-256 of the key


class KeyRing:
    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> ApiKey | None:
        """Looks at every key, whichever it is."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def hash_keys(text: str) -> tuple[str, ...]:
    """SHA-256 in hexadecimal of keys that are separated by commas.

    Raises:
        ValueError: one is too short; the message does not contain it.
    """
    keys = [key.strip() for key in text.split(",") if key.strip()]
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_CHARS:
            raise ValueError(f"API key {number} has fewer than {MIN_KEY_CHARS} characters")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def load_keys(path: str, hashes: Sequence[str]) -> KeyRing:
    """Those of the file, if there is one, and those that were given by their hashes.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line or a hash is not well-formed, or a name comes twice.
    """
    keys = _read(Path(path)) if path else []
    for number, digest in enumerate(hashes, 1):
        if not _HASH.fullmatch(digest):
            raise ValueError(f"api_key_hashes: number {number} is not a SHA-256 in hexadecimal")
        keys.append(ApiKey(f"setting-{number}", bytes.fromhex(digest)))
    if len({key.name for key in keys}) < len(keys):
        raise ValueError("api_keys_file: two keys have the same name")
    return KeyRing(keys)


def _read(path: Path) -> list[ApiKey]:
    keys = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"api_keys_file: line {number} is not a name and a SHA-256 in hexadecimal")
        keys.append(ApiKey(match[1], bytes.fromhex(match[2])))
    return keys
