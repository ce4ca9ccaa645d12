"""A process that decodes videos and documents for the encoder, one job at a time, under limits of its own.

Whatever a file does to it, it can only end: it has no socket but the one to its parent, can write no file,
and ends when its parent does.
"""

from __future__ import annotations

import mmap
import os
import resource
import select
import socket
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from encoder_service.decode_job import MAX_PACKET_BYTES, READY, Answer, Job, StoredPart, Undecodable
from encoder_service.pdf_file import open_document, read_pages
from encoder_service.video_file import open_video, read_frames

CORRUPT = "the file is truncated, corrupt or of an unsupported kind"
TOO_MUCH_MEMORY = "the file takes more memory to decode than is allowed"


def main(parent_fd: int, memory_mib: int) -> None:
    parent = socket.socket(fileno=parent_fd)
    threading.Thread(target=_end_with_parent, args=(parent_fd,), daemon=True).start()
    _limit_resources(memory_mib << 20)
    parent.send(READY)
    while True:
        packet, fds, _, _ = socket.recv_fds(parent, MAX_PACKET_BYTES, 2)
        if not packet:
            return
        parent.send(_answer(Job.from_packet(packet), fds).to_packet())


def _end_with_parent(parent_fd: int) -> None:
    hangup = select.poll()
    hangup.register(parent_fd, select.POLLHUP)
    hangup.poll()
    os._exit(1)


def _limit_resources(memory_bytes: int) -> None:
    """What importing took is not counted."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    _lower(resource.RLIMIT_AS, in_use + memory_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NOFILE, 64)


def _lower(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def _limit_cpu(seconds: float) -> None:
    """For this job; the kernel ends the process that takes more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


def _answer(job: Job, fds: list[int]) -> Answer:
    _limit_cpu(job.cpu_s)
    try:
        with open(fds[0], "rb") as file:
            if job.parts:
                _read(job, file, fds[1])
                return Answer(job.parts)
            return Answer(tuple(_open(job, file)))
    except Undecodable as error:
        return Answer(problem=str(error), detail=repr(error.__cause__ or error))
    except MemoryError:
        return Answer(problem=TOO_MUCH_MEMORY)
    except Exception as error:  # libraries raise nearly anything on bad input
        return Answer(problem=CORRUPT, detail=repr(error))
    finally:
        for fd in fds[1:]:
            os.close(fd)


def _open(job: Job, file: BinaryIO) -> list[StoredPart]:
    if job.format == "pdf":
        return open_document(file, job.limits)
    return open_video(file, job.format, job.sampling, job.limits)


def _read(job: Job, file: BinaryIO, output_fd: int) -> None:
    """The parts' pixels, one behind the other, into the shared memory."""
    with mmap.mmap(output_fd, sum(part.num_bytes for part in job.parts)) as output:
        start = 0
        for part, pixels in zip(job.parts, _pixels(job, file), strict=True):
            if pixels.shape != (part.height, part.width, 3):
                raise Undecodable(CORRUPT)
            target = np.frombuffer(output, np.uint8, part.num_bytes, start).reshape(pixels.shape)
            target[...] = pixels
            start += part.num_bytes
            del target  # or the map could not be closed


def _pixels(job: Job, file: BinaryIO) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    if job.format == "pdf":
        return read_pages(file, job.parts)
    return read_frames(file, job.format, job.parts, job.limits)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
