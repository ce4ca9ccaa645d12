"""The fingerprint tells checkpoints and settings apart and does not depend on how files are cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from protos import tensor_pb2
from protos.checkpoint import Checkpoint, CheckpointFormat, open_checkpoint
from protos.fingerprint import SAMPLE_BYTES, FingerprintBase, content_hash, language_digest
from tests.protos.folders import CONFIG, write_folder

FLOAT32, BFLOAT16 = tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_BFLOAT16
SAMPLED = "vision_model.encoder.layers.0.mlp.fc1.weight"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        SAMPLED: torch.randn(100, 40, generator=generator),
        "vision_model.embeddings.class_embedding": torch.randn(1, 1, 8, generator=generator),
        "mlp1.0.bias": torch.randn(3, generator=generator),
        "language_model.lm_head.weight": torch.randn(9, 8, generator=generator),
    }


def fingerprint(checkpoint: Checkpoint) -> bytes:
    return FingerprintBase(checkpoint).fingerprint(FLOAT32, FLOAT32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(str(write_folder(tmp_path / "original", [tensors()])))


def changed(checkpoint: Checkpoint, folder: Path, **changes: Any) -> bytes:
    """The fingerprint after `changes` to config.json."""
    return fingerprint(dataclasses.replace(checkpoint, config={**checkpoint.config, **changes}))


def test_it_is_32_bytes_and_stable(checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = open_checkpoint(str(write_folder(tmp_path / "again", [tensors()])))
    assert len(fingerprint(checkpoint)) == 32
    assert fingerprint(again) == fingerprint(checkpoint)


def test_it_does_not_depend_on_sharding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    items = sorted(tensors().items(), reverse=True)
    shards: list[Mapping[str, torch.Tensor]] = [dict(items[:1]), dict(items[1:3]), dict(items[3:])]
    sharded = open_checkpoint(str(write_folder(tmp_path / "sharded", shards)))
    assert fingerprint(sharded) == fingerprint(checkpoint)


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_one_flipped_bit_of_a_sampled_tensor_changes_it(checkpoint: Checkpoint, place: str) -> None:
    before = fingerprint(checkpoint)
    entry = checkpoint.tensors[SAMPLED]
    middle = entry.start + (entry.end - entry.start - SAMPLE_BYTES) // 2
    position = {"start": entry.start, "middle": middle, "end": entry.end - 1}[place]
    content = bytearray(entry.file.read_bytes())
    content[position] ^= 1
    entry.file.write_bytes(content)
    assert fingerprint(checkpoint) != before


@pytest.mark.parametrize(
    "name", ["vision_model.embeddings.class_embedding", "mlp1.0.bias"], ids=["one sample", "shorter than one"]
)
def test_every_byte_of_a_small_tensor_counts(checkpoint: Checkpoint, name: str) -> None:
    before = fingerprint(checkpoint)
    entry = checkpoint.tensors[name]
    original = entry.file.read_bytes()
    for position in range(entry.start, entry.end):
        content = bytearray(original)
        content[position] ^= 0x80
        entry.file.write_bytes(content)
        assert fingerprint(checkpoint) != before


def test_the_language_model_does_not_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = tensors() | {"language_model.lm_head.weight": torch.zeros(11, 8)}
    assert fingerprint(open_checkpoint(str(write_folder(tmp_path / "other", [other])))) == fingerprint(
        checkpoint
    )


def test_shape_and_stored_dtype_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reshaped = tensors() | {SAMPLED: tensors()[SAMPLED].view(40, 100)}
    stored = tensors() | {"mlp1.0.bias": tensors()["mlp1.0.bias"].view(torch.int32)}
    for name, variant in (("reshaped", reshaped), ("stored", stored)):
        folder = write_folder(tmp_path / name, [variant])
        assert fingerprint(open_checkpoint(str(folder))) != fingerprint(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"force_image_size": 448},
        {"max_dynamic_patch": 6},
        {"min_dynamic_patch": 2},
        {"use_thumbnail": False},
        {"ps_version": "v1"},
        {"downsample_ratio": 0.25},
    ],
    ids=str,
)
def test_preprocessing_settings_count(checkpoint: Checkpoint, tmp_path: Path, change: dict[str, Any]) -> None:
    assert changed(checkpoint, tmp_path, **change) != fingerprint(checkpoint)


def test_settings_of_the_language_model_do_not_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert changed(checkpoint, tmp_path, template="Hermes-2") == fingerprint(checkpoint)


def test_compute_dtype_and_payload_encoding_count_and_are_not_confused(checkpoint: Checkpoint) -> None:
    base = FingerprintBase(checkpoint)
    pairs = [(a, b) for a in (FLOAT32, BFLOAT16) for b in (FLOAT32, BFLOAT16)]
    assert len({base.fingerprint(*pair) for pair in pairs}) == 4


def test_the_content_hash_depends_on_every_input() -> None:
    fingerprints = b"\0" * 32, b"\1" * 32
    hashes = [
        content_hash(data, least, most, thumbnail, fingerprint)
        for data in (b"picture", b"picturf", b"")
        for least, most in ((1, 12), (1, 1), (11, 2))
        for thumbnail in (False, True)
        for fingerprint in fingerprints
    ]
    assert len(set(hashes)) == len(hashes) and {len(value) for value in hashes} == {32}


def test_a_file_that_shrank_is_read_without_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    save_file({"mlp1.0.bias": torch.zeros(64)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(write_folder(folder, [{"mlp1.0.bias": torch.zeros(64)}])))
    whole = fingerprint(checkpoint)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    assert fingerprint(checkpoint) != whole


class TestLanguageDigest:
    def test_settings_shapes_and_bytes_count_and_the_vision_half_does_not(self, tmp_path: Path) -> None:
        lm_head = torch.ones(9, 8)
        zeros = {SAMPLED: torch.zeros(100, 40)}
        digests = [
            digest_of(tmp_path / str(number), tensors() | changes, settings)
            for number, (changes, settings) in enumerate(
                [
                    ({}, {"a": 1}),
                    (zeros, {"a": 1}),
                    ({"language_model.lm_head.weight": lm_head}, {"a": 1}),
                    ({"language_model.lm_head.weight": lm_head.half()}, {"a": 1}),
                    ({"language_model.lm_head.weight": lm_head.view(8, 9)}, {"a": 1}),
                    ({}, {"a": 2}),
                ]
            )
        ]
        assert digests[0] == digests[1] and len(set(digests)) == 5 and len(digests[0]) == 32

    def test_without_weights_on_disk_the_settings_count(self, tmp_path: Path) -> None:
        """As with --load-format dummy."""
        digests = [
            language_digest(Checkpoint(tmp_path, {"llm_config": {"a": value}}, CheckpointFormat.CHAT, {}))
            for value in (1, 1, 2)
        ]
        assert digests[0] == digests[1] != digests[2]


def digest_of(folder: Path, weights: Mapping[str, torch.Tensor], settings: dict[str, Any]) -> bytes:
    config = CONFIG | {"llm_config": settings}
    return language_digest(open_checkpoint(str(write_folder(folder, [weights], config))))
