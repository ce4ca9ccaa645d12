"""What a conversation is known by: requests with the same key want the same KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from gateway.conversation import Medium, Text, Turn

# Of a medium its length and so much of either end: telling it from most others costs no pass over megabytes.
MEDIUM_SAMPLE_BYTES = 16 << 10
# Of a prompt that is no conversation.
PROMPT_SAMPLE_TOKENS = 64


def conversation_key(turns: Sequence[Turn], cache_salt: str = "", cache_key: str = "") -> bytes:
    """Same for all turns of a conversation: made from its beginning, up to the first user message.

    `cache_key` is the client's own word for what belongs together.  No content hash: conversations that
    happen to have the same key share a language model, not a cache.
    """
    digest = hashlib.blake2b(digest_size=32)
    _add(digest, cache_salt.encode(), cache_key.encode())
    for turn in turns:
        _add(digest, turn.role.encode())
        for part in turn.parts:
            _add(digest, *_sample(part))
        if turn.role == "user":
            break
    return digest.digest()


def prompt_key(prompt: Sequence[int], cache_salt: str = "", cache_key: str = "") -> bytes:
    """The same for the token ids of a finished prompt: made from its beginning."""
    digest = hashlib.blake2b(digest_size=32)
    _add(digest, cache_salt.encode(), cache_key.encode())
    _add(digest, *(token.to_bytes(4, "little") for token in prompt[:PROMPT_SAMPLE_TOKENS]))
    return digest.digest()


def _sample(part: Text | Medium) -> tuple[bytes, ...]:
    if isinstance(part, Text):
        return (b"text", part.text.encode("utf-8", "surrogatepass"))
    if part.url:
        return (b"url", part.url.encode())
    length = len(part.data).to_bytes(8, "little")
    return (b"medium", length, part.data[:MEDIUM_SAMPLE_BYTES], part.data[-MEDIUM_SAMPLE_BYTES:])


def _add(digest: hashlib.blake2b, *values: bytes) -> None:
    for value in values:
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
