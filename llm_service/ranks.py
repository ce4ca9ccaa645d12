"""Rank 0's side and the others' side of a tensor-parallel engine: one StepInput to all, then they compute."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from llm_service.frame_socket import READ_BYTES, FrameDecoder, encode_frame
from llm_service.messages import StepInput
from llm_service.model_runner import ModelRunner

CONNECT_TIMEOUT_S = 300.0


class RankSetup(msgspec.Struct, frozen=True, tag=True):
    """What rank 0 decided for all; the visual store's file descriptor comes along."""

    num_blocks: int
    num_slots: int
    slot_tokens: int


class RankServer:
    """Rank 0's connections to the other ranks."""

    def __init__(self, path: Path, num_others: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(num_others)
        self._listener.settimeout(CONNECT_TIMEOUT_S)
        self._num_others = num_others
        self._connections: list[socket.socket] = []

    def send_setup(self, setup: RankSetup, fd: int) -> None:
        """Wait for every other rank and tell it what was decided."""
        for _ in range(self._num_others):
            connection, _ = self._listener.accept()
            frame = encode_frame(setup)
            socket.send_fds(connection, [frame], [fd])
            self._connections.append(connection)
        self._listener.close()

    def send_step(self, step: StepInput) -> None:
        frame = encode_frame(step)
        for connection in self._connections:
            connection.sendall(frame)

    def close(self) -> None:
        """End the other ranks: their steps are over."""
        self._listener.close()
        for connection in self._connections:
            connection.close()


class ParallelRunner:
    """Rank 0's runner: hands the step to the other ranks and computes its own share of it."""

    def __init__(self, runner: ModelRunner, ranks: RankServer) -> None:
        self._runner = runner
        self._ranks = ranks

    def forward(self, step: StepInput) -> torch.Tensor:
        self._ranks.send_step(step)
        return self._runner.forward(step)


class RankClient:
    """Another rank's connection to rank 0."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(CONNECT_TIMEOUT_S)
        self._connection.connect(str(path))
        self._decoder = FrameDecoder(RankSetup | StepInput)

    def receive_setup(self) -> tuple[RankSetup, int]:
        """(setup, file descriptor of the visual store)"""
        data, fds, _, _ = socket.recv_fds(self._connection, READ_BYTES, 1)
        while True:
            for message in self._decoder.feed(data):
                return message, fds[0]  # what came behind it stays in the decoder
            data = self._receive()

    def steps(self) -> Iterator[StepInput]:
        """Steps until rank 0 closes the connection."""
        self._connection.settimeout(None)
        yield from self._decoder.feed(b"")
        while data := self._connection.recv(READ_BYTES):
            yield from self._decoder.feed(data)

    def _receive(self) -> bytes:
        data = self._connection.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError("rank 0 is gone")
        return data
