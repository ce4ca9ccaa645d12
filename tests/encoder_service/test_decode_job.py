"""Packets between the encoder and its decoder processes."""

from __future__ import annotations

import json

import pytest

from encoder_service.container_limits import MAX_PARTS, ContainerLimits
from encoder_service.decode_job import MAX_PACKET_BYTES, Answer, Job, StoredPart, Undecodable, check_size
from protos.media import FrameSampling

PARTS = (StoredPart(64, 48, 0.125, (2048, 0, 3)), StoredPart(1, 2, 0.0, (7,)))


def test_a_job_arrives_as_it_was_sent() -> None:
    job = Job("mov", ContainerLimits(max_pages=3), FrameSampling(4, fps=0.5, start_s=1), PARTS, 2.5)
    assert Job.from_packet(job.to_packet()) == job


def test_an_answer_arrives_as_it_was_sent() -> None:
    answer = Answer(PARTS, "a problem", "a detail")
    assert Answer.from_packet(answer.to_packet()) == answer


def test_the_largest_answer_fits_a_packet() -> None:
    part = StoredPart(16_384, 16_384, 123_456.789012345678, (2**53, 2**53, 3))
    assert len(Answer((part,) * MAX_PARTS).to_packet()) < MAX_PACKET_BYTES


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"parts": 3, "problem": "", "detail": ""}',
        b'{"parts": [[1]], "problem": "", "detail": ""}',
        b'{"parts": [["x", 1, 1]], "problem": "", "detail": ""}',
        b'{"parts": [[0, 1, 1]], "problem": "", "detail": ""}',
        b'{"parts": [[1, -1, 1]], "problem": "", "detail": ""}',
        b'{"parts": [[1, 1, NaN]], "problem": "", "detail": ""}',
        b'{"parts": [[Infinity, 1, 1]], "problem": "", "detail": ""}',
        b"[" * 100_000,
        json.dumps({"parts": [[1, 1, 0]] * (MAX_PARTS + 1), "problem": "", "detail": ""}).encode(),
    ],
)
def test_what_is_no_answer_is_refused(packet: bytes) -> None:
    with pytest.raises(ValueError):
        Answer.from_packet(packet)


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ((0, 5), "an empty picture"),
        ((3001, 3000), "at most 9000000 pixels are decoded"),
        ((2001, 10), "the longer side may be at most 200 times the shorter one"),
    ],
)
def test_sizes_beyond_the_limits_are_named(size: tuple[int, int], problem: str) -> None:
    with pytest.raises(Undecodable, match=f"^page 3 is {size[0]} x {size[1]} pixels: {problem}$"):
        check_size("page 3", *size, ContainerLimits())
