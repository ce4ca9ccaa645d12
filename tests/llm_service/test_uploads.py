"""Uploaded media are kept within budgets and for a time."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from llm_service.config import UploadConfig
from llm_service.uploads import MIN_COUNTED_BYTES, UploadStore
from protos.errors import InvalidRequest, Overloaded

MIB = 1 << 20


def store(**fields: Any) -> UploadStore:
    limits = {"max_upload_bytes": 4 * MIB, "max_uploads_mib": 4, "max_caller_uploads_mib": 3}
    return UploadStore(UploadConfig(**limits | fields))


def put(uploads: UploadStore, letter: bytes, mib: int = 1, caller: str = "a", salt: bytes = b"") -> bytes:
    upload = uploads.begin(caller, salt, mib * MIB)
    try:
        for _ in range(mib):
            upload.add(letter * MIB)
        return upload.finish()
    finally:
        upload.abandon()


async def test_an_upload_is_found_by_its_sha256_under_its_salt() -> None:
    uploads = store()
    digest = put(uploads, b"x", 2, salt=b"tenant")
    assert digest == hashlib.sha256(b"x" * 2 * MIB).digest()
    assert uploads.get(b"tenant", digest) == b"x" * 2 * MIB
    assert uploads.get(b"", digest) is None and uploads.get(b"tenant", bytes(32)) is None


async def test_a_file_that_comes_twice_takes_its_room_once() -> None:
    uploads = store()
    assert put(uploads, b"x") == put(uploads, b"x")
    assert uploads.num_bytes == MIB


async def test_what_was_used_makes_room_the_longest_unused_first() -> None:
    uploads = store(max_caller_uploads_mib=4)
    digests = [put(uploads, letter) for letter in (b"a", b"b", b"c", b"d")]
    for place in (1, 0, 2):
        assert uploads.get(b"", digests[place])
    put(uploads, b"e")
    assert [uploads.get(b"", digest) is not None for digest in digests] == [True, False, True, True]


async def test_what_waits_for_its_request_is_not_dropped() -> None:
    uploads = store(max_caller_uploads_mib=4)
    digests = [put(uploads, letter) for letter in (b"a", b"b", b"c", b"d")]
    with pytest.raises(Overloaded) as caught:
        put(uploads, b"e")
    assert caught.value.retry_after_s
    assert all(uploads.get(b"", digest) for digest in digests)


async def test_one_caller_cannot_take_all_the_room() -> None:
    uploads = store()
    put(uploads, b"x", 3, caller="greedy")
    with pytest.raises(Overloaded):
        put(uploads, b"y", caller="greedy")
    assert put(uploads, b"z", caller="modest")


async def test_uploads_on_their_way_count_and_leave_nothing() -> None:
    uploads = store()
    upload = uploads.begin("a", b"", 4 * MIB)
    upload.add(bytes(3 * MIB))
    with pytest.raises(Overloaded):
        put(uploads, b"y", 2, caller="b")
    assert uploads.num_bytes == 3 * MIB
    upload.abandon()
    assert uploads.num_bytes == 0


async def test_tiny_uploads_count_as_what_keeping_them_costs() -> None:
    uploads = store(max_caller_uploads_mib=1)
    for number in range(MIB // MIN_COUNTED_BYTES):
        upload = uploads.begin("a", b"", 1)
        upload.add(bytes([number]))
        upload.finish()
    assert uploads.num_bytes == MIB
    with pytest.raises(Overloaded):
        uploads.begin("a", b"", 1)
    assert put(uploads, b"x", caller="b")


async def test_an_upload_that_has_not_begun_to_arrive_counts() -> None:
    uploads = store(max_caller_uploads_mib=1)
    begun = [uploads.begin("a", b"", MIB) for _ in range(MIB // MIN_COUNTED_BYTES)]
    with pytest.raises(Overloaded):
        uploads.begin("a", b"", MIB)
    for upload in begun:
        upload.abandon()
    assert uploads.num_bytes == 0


@pytest.mark.parametrize("mib", [0, 2])
async def test_one_upload_has_a_limit_and_is_not_empty(mib: int) -> None:
    uploads = store(max_upload_bytes=MIB)
    with pytest.raises(InvalidRequest) as caught:
        put(uploads, b"x", mib)
    assert caught.value.field == "num_bytes" and uploads.num_bytes == 0


async def test_an_upload_has_the_length_that_was_announced() -> None:
    uploads = store()
    upload = uploads.begin("a", b"", 3)
    upload.add(b"ab")
    with pytest.raises(InvalidRequest, match="fewer"):
        upload.finish()
    with pytest.raises(InvalidRequest, match="more"):
        upload.add(b"cd")
    upload.abandon()
    assert uploads.num_bytes == 0


async def test_time_forgets_and_use_renews() -> None:
    uploads = store(upload_ttl_s=0.2)
    digest = put(uploads, b"x")
    loop = asyncio.get_running_loop()
    started = loop.time()
    while uploads.num_bytes:
        assert loop.time() - started < 20
        await asyncio.sleep(0.01)
    assert loop.time() - started >= 0.19
    assert uploads.get(b"", digest) is None
