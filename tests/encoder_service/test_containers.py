"""Videos and documents through real decoder processes: what comes out, and what hostile files can do."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import numpy as np
import pytest
from PIL import Image

from encoder_service.container_limits import ContainerLimits
from encoder_service.containers import CORRUPT, Containers
from encoder_service.decode_job import Answer, StoredPart
from encoder_service.decoder_processes import DecoderProcesses
from protos.errors import InvalidRequest
from protos.media import FrameSampling, MediaKind
from tests.media_files import bare_pdf, number_to_grey, numbered_frames, pdf, video

FIELD = "media[3].data"
MP4 = video(numbered_frames(20, (160, 120)))
WEBM = video(numbered_frames(20, (160, 120)), format="webm", codec="libvpx-vp9")
PDF = pdf([Image.new("RGB", (200, 100), "red")])


@pytest.fixture
async def containers() -> AsyncIterator[Containers]:
    made = Containers(ContainerLimits(open_timeout_s=20))
    yield made
    made.close()


async def images(containers: Containers, kind: MediaKind, data: bytes) -> list[Image.Image]:
    format, parts = await containers.open(kind, data, FrameSampling(4), FIELD)
    return (await containers.read(format, data, parts, FIELD)).images()


@pytest.mark.parametrize("data", [MP4, WEBM])
async def test_frames_come_as_pictures(containers: Containers, data: bytes) -> None:
    pictures = await images(containers, MediaKind.VIDEO, data)
    assert [picture.size for picture in pictures] == [(160, 120)] * 4
    means = [np.asarray(picture).mean() for picture in pictures]
    assert means == pytest.approx([number_to_grey(number, 20) for number in (2, 7, 12, 16)], abs=3)


async def test_pages_come_as_pictures(containers: Containers) -> None:
    [page] = await images(containers, MediaKind.DOCUMENT, PDF)
    assert page.size == (400, 200) and page.getpixel((200, 100)) == pytest.approx((255, 0, 0), abs=3)


async def test_content_decides_what_a_file_is(containers: Containers) -> None:
    for kind, data in ((MediaKind.VIDEO, PDF), (MediaKind.DOCUMENT, MP4), (MediaKind.VIDEO, b"")):
        with pytest.raises(InvalidRequest, match="^this is not a"):
            await containers.open(kind, data, FrameSampling(), FIELD)
    assert not containers.processes.pids  # none was bothered


async def test_broken_files_are_refused_in_our_words_and_end_no_process(containers: Containers) -> None:
    """Files of every kind with random bytes changed, cut out and put in."""
    source = random.Random(7)
    seeds = [(MediaKind.VIDEO, MP4), (MediaKind.VIDEO, WEBM), (MediaKind.DOCUMENT, bare_pdf(num_pages=2))]
    await images(containers, *seeds[0])
    before, refusals = containers.processes.pids, 0
    for number in range(120):
        kind, data = seeds[number % len(seeds)]
        try:
            await images(containers, kind, broken(data, source))
        except InvalidRequest as error:
            assert error.field == FIELD
            refusals += 1
    assert refusals > 30 and containers.processes.pids == before


def broken(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice([1, 3, 20])):
        place = source.randrange(len(changed))
        end = place + source.choice([0, 1, 4, 30])
        changed[place:end] = source.randbytes(source.choice([0, 1, 4, 30]))
    return bytes(changed)


class TakenOver(DecoderProcesses):
    """Its process says what a hostile file made it say."""

    parts: tuple[StoredPart, ...] = ()

    async def open(self, *_: object) -> Answer:
        return Answer(self.parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), CORRUPT),
        ((StoredPart(10, 10, 0, ()),) * 5, CORRUPT),  # more than were asked for
        ((StoredPart(10_000, 10_000, 0, ()),), "a part is 10000 x 10000 pixels"),
    ],
)
async def test_answers_are_checked_as_if_a_client_had_sent_them(
    parts: tuple[StoredPart, ...], message: str
) -> None:
    limits = ContainerLimits()
    processes = TakenOver(limits)
    processes.parts = parts
    with pytest.raises(InvalidRequest) as caught:
        await Containers(limits, processes).open(MediaKind.VIDEO, MP4, FrameSampling(4), FIELD)
    assert caught.value.message.startswith(message)
