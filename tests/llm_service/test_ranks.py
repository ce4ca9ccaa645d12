"""Setup and steps from rank 0 to another rank, however the bytes arrive."""

import os
import socket
import threading

import pytest
import torch

from llm_service.frame_socket import encode_frame
from llm_service.messages import StepInput, VisualRows
from llm_service.ranks import ParallelRunner, RankClient, RankServer, RankSetup

SETUP = RankSetup(num_blocks=5, num_slots=2, slot_tokens=4)
STEP = StepInput([1, 2], [2], [2], [[0]], [VisualRows(0, 1, 0, 1)], [1])


class EchoRunner:
    def forward(self, step):
        return torch.tensor(step.token_ids)


def test_every_rank_gets_setup_descriptor_and_steps_until_rank_zero_ends(tmp_path):
    path = tmp_path / "ranks.sock"
    server = RankServer(path, 2)
    received = []

    def other_rank():
        client = RankClient(path)
        setup, fd = client.receive_setup()
        content = os.pread(fd, 5, 0)
        os.close(fd)
        received.append((setup, content, list(client.steps())))

    others = [threading.Thread(target=other_rank) for _ in range(2)]
    for thread in others:
        thread.start()
    shared = tmp_path / "shared"
    shared.write_bytes(b"tiles")
    with shared.open("rb") as file:
        server.send_setup(SETUP, file.fileno())
    runner = ParallelRunner(EchoRunner(), server)
    assert runner.forward(STEP).tolist() == [1, 2]
    runner.forward(STEP)
    server.close()
    for thread in others:
        thread.join(10)
    assert received == [(SETUP, b"tiles", [STEP, STEP])] * 2


@pytest.mark.parametrize("cut", [1, 5, None])
def test_a_step_that_comes_together_with_the_setup_is_not_lost(tmp_path, cut):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "ranks.sock"))
    listener.listen(1)
    client = RankClient(tmp_path / "ranks.sock")
    connection, _ = listener.accept()
    stream = encode_frame(SETUP) + encode_frame(STEP)
    socket.send_fds(connection, [stream[:cut]], [listener.fileno()])
    if cut is not None:
        connection.sendall(stream[cut:])
    setup, fd = client.receive_setup()
    os.close(fd)
    assert setup == SETUP
    steps = client.steps()
    assert next(steps) == STEP
    connection.close()
    assert list(steps) == []
    listener.close()


def test_a_rank_whose_rank_zero_dies_before_the_setup_says_so(tmp_path):
    server = RankServer(tmp_path / "ranks.sock", 1)
    client = RankClient(tmp_path / "ranks.sock")
    server.close()
    with pytest.raises(ConnectionError):
        client.receive_setup()
