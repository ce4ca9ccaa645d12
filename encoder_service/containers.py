"""Videos and documents to parts and pictures, through decoder processes.  Parses nothing of a file."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from encoder_service.container_limits import ContainerLimits
from encoder_service.decode_job import Answer, Job, StoredPart, Undecodable, check_size
from encoder_service.decoder_processes import DecoderProcesses, SharedFile
from protos.errors import InvalidRequest
from protos.media import FrameSampling, MediaKind

CORRUPT = "the file is truncated, corrupt or of an unsupported kind"
# ISO/IEC 14496-12: a type behind the length; the others begin MOV files from before the type existed.
_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_MATROSKA = b"\x1a\x45\xdf\xa3"
# Readers accept it anywhere there (ISO 32000-1, annex H.3).
_PDF, _PDF_WITHIN = b"%PDF-", 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartPixels:
    """Decoded parts in memory that a process has filled."""

    memory: mmap.mmap
    parts: tuple[StoredPart, ...]

    def images(self) -> list[Image.Image]:
        """RGB, in order; copies."""
        images, start = [], 0
        with memoryview(self.memory) as view:
            for part in self.parts:
                pixels = view[start : start + part.num_bytes]
                images.append(Image.frombytes("RGB", (part.width, part.height), pixels))
                start += part.num_bytes
        return images


class Containers:
    def __init__(self, limits: ContainerLimits, processes: DecoderProcesses | None = None) -> None:
        self._limits = limits
        self.processes = processes or DecoderProcesses(limits)

    def close(self) -> None:
        self.processes.close()

    async def open(
        self, kind: MediaKind, data: bytes, sampling: FrameSampling, field: str
    ) -> tuple[str, tuple[StoredPart, ...]]:
        """Format, and the sampled frames of a video or all pages of a document, from headers alone.

        Raises:
            InvalidRequest: not a supported file, corrupt, beyond a limit, or too slow to read.
            Overloaded: others take all processes.
        """
        format = _sniff(kind, data)
        if format is None:
            known = "a PDF document" if kind is MediaKind.DOCUMENT else "an MP4, MOV, WebM or Matroska video"
            raise InvalidRequest(f"this is not {known}", field=field)
        job = Job(format, self._limits, sampling, (), self._limits.open_timeout_s)
        answer = await self.processes.open(job, data, field)
        _check(answer, field)
        most = self._limits.max_pages if kind is MediaKind.DOCUMENT else sampling.num_frames
        try:
            for part in answer.parts:
                check_size("a part", part.width, part.height, self._limits)
        except Undecodable as error:
            raise InvalidRequest(str(error), field=field) from None
        if not 1 <= len(answer.parts) <= most:
            raise InvalidRequest(CORRUPT, field=field)
        return format, answer.parts

    async def read(self, format: str, data: bytes, parts: Sequence[StoredPart], field: str) -> PartPixels:
        """Pixels of parts that `open` told of.

        Raises:
            InvalidRequest: they are corrupt, or too slow to decode.
        """
        job = Job(format, self._limits, FrameSampling(), tuple(parts), self._limits.decode_timeout_s)
        output = SharedFile(sum(part.num_bytes for part in parts))
        try:
            _check(await self.processes.read(job, data, output, field), field)
            return PartPixels(output.map(), job.parts)
        finally:
            output.close()


def _check(answer: Answer, field: str) -> None:
    if answer.problem:
        log.info("%s: %s (%s)", field, answer.problem, answer.detail)
        raise InvalidRequest(answer.problem, field=field)


def _sniff(kind: MediaKind, data: bytes) -> str | None:
    """Content decides, whatever a client calls it; None is neither of the supported formats."""
    if kind is MediaKind.DOCUMENT:
        return "pdf" if _PDF in data[:_PDF_WITHIN] else None
    if data[4:8] in _MOV_BOXES:
        return "mov"
    return "matroska" if data.startswith(_MATROSKA) else None
