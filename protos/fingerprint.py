"""What names a checkpoint's half and what names a medium: SHA-256 over facts each process computes alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from protos import tensor_pb2
from protos.checkpoint import Checkpoint, TensorEntry
from protos.media import FrameSampling, MediaKind
from protos.preprocessing import Preprocessing

# Sampled per tensor: enough to tell a fine-tuned tensor from its parent, cheap for 200 GB.
SAMPLE_BYTES = 64
SAMPLES_PER_TENSOR = 3


class FingerprintBase:
    """The part of the fingerprint that the checkpoint fixes; read once, combined with dtypes often."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256(b"tessera.v1.fingerprint")
        digest.update(repr(astuple(Preprocessing.from_checkpoint(self._checkpoint))).encode())
        _update_with_tensors(digest, self._checkpoint, self._checkpoint.vision_names())
        return digest.digest()

    def fingerprint(self, compute_dtype: tensor_pb2.DType, payload_dtype: tensor_pb2.DType) -> bytes:
        """32 bytes: weights, preprocessing settings, compute dtype and payload encoding."""
        dtypes = f"{int(compute_dtype)}:{int(payload_dtype)}".encode()
        return hashlib.sha256(self._digest + dtypes).digest()


def language_digest(checkpoint: Checkpoint) -> bytes:
    """32 bytes: the decoder's settings and weights; the settings alone where no weights are on disk."""
    digest = hashlib.sha256(b"tessera.v1.language")
    settings = (checkpoint.section(checkpoint.language_section), checkpoint.config.get("tie_word_embeddings"))
    digest.update(json.dumps(settings, sort_keys=True).encode())
    _update_with_tensors(digest, checkpoint, checkpoint.language_names())
    return digest.digest()


def _update_with_tensors(digest: hashlib._Hash, checkpoint: Checkpoint, names: list[str]) -> None:
    entries = [(name, checkpoint.tensors[name]) for name in names]
    for name, entry in entries:
        digest.update(f"{name}:{entry.dtype}:{entry.shape};".encode())
    for sample in _samples(entries):
        digest.update(sample)


def _samples(entries: list[tuple[str, TensorEntry]]) -> Iterable[bytes]:
    """First, middle and last bytes of every tensor, in the order given (not that of the shards)."""
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        for _, entry in entries:
            if entry.file not in opened:
                opened[entry.file] = stack.enter_context(entry.file.open("rb"))
            room = max(entry.end - entry.start - SAMPLE_BYTES, 0)
            for step in range(SAMPLES_PER_TENSOR):
                opened[entry.file].seek(entry.start + room * step // (SAMPLES_PER_TENSOR - 1))
                yield opened[entry.file].read(min(SAMPLE_BYTES, entry.end - entry.start))


def content_hash(
    data: bytes,
    min_tiles: int,
    max_tiles: int,
    use_thumbnail: bool,
    fingerprint: bytes,
    kind: MediaKind = MediaKind.IMAGE,
    sampling: FrameSampling | None = None,
) -> bytes:
    """32 bytes that name the visual tokens of a medium (options resolved, nothing left to defaults)."""
    digest = hashlib.sha256(b"tessera.v1.content")
    if kind is not MediaKind.IMAGE:
        digest.update(f"{kind.value}:{astuple(sampling) if sampling is not None else ()}:".encode())
    digest.update(f"{min_tiles}:{max_tiles}:{int(use_thumbnail)}:".encode())
    digest.update(fingerprint)
    digest.update(data)
    return digest.digest()
