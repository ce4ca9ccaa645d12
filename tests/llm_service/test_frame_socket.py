"""Frames over a stream: whatever the pieces, the same messages; whatever the garbage, an orderly end."""

import random
import socket

import msgspec
import pytest

from llm_service.frame_socket import MAX_FRAME_BYTES, FrameDecoder, FrameSocket, encode_frame
from llm_service.messages import AbortChoice, AbortRequest, AddRequest, PromptTile, TileStored, ToEngine
from llm_service.sampling_params import SamplingParams

MESSAGES = [
    AddRequest(
        7,
        list(range(300)),
        [PromptTile(b"\x00key", 3, 4)],
        SamplingParams(logit_bias={3: -1.5}, stop=("a", "é"), seed=-(2**63)),
        [1, 2],
        16,
        -3,
        b"salt",
    ),
    TileStored(7, 2),
    AbortChoice(7, 1),
    AbortRequest(2**40),
]


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield FrameSocket(ours, ToEngine), theirs
    ours.close()
    theirs.close()


def test_messages_survive_a_split_at_every_byte():
    stream = b"".join(encode_frame(message) for message in MESSAGES)
    for cut in range(len(stream) + 1):
        decoder = FrameDecoder(ToEngine)
        assert [*decoder.feed(stream[:cut]), *decoder.feed(stream[cut:])] == MESSAGES


def test_messages_survive_byte_by_byte_and_random_pieces():
    stream = b"".join(encode_frame(message) for message in MESSAGES * 5)
    rng = random.Random(1)
    for longest in (1, 3, 700):
        decoder, received, start = FrameDecoder(ToEngine), [], 0
        while start < len(stream):
            end = start + rng.randint(1, longest)
            received += decoder.feed(stream[start:end])
            start = end
        assert received == MESSAGES * 5


def test_messages_behind_the_one_that_was_taken_stay_in_the_decoder():
    decoder = FrameDecoder(ToEngine)
    stream = b"".join(encode_frame(message) for message in MESSAGES)
    assert next(iter(decoder.feed(stream))) == MESSAGES[0]
    assert list(decoder.feed(b"")) == MESSAGES[1:]


@pytest.mark.parametrize(
    "garbage",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        (1).to_bytes(4, "little") + b"\xc1",
        (0).to_bytes(4, "little"),
        (3).to_bytes(4, "little") + msgspec.msgpack.encode({}) + b"\x00\x00",
        encode_frame(SamplingParams()),  # a struct, but no message
        encode_frame(TileStored(1, 1)).replace(b"TileStored", b"TileStoned"),
    ],
)
def test_garbage_is_a_broken_connection(pair, garbage):
    ours, theirs = pair
    theirs.sendall(encode_frame(MESSAGES[1]) + garbage)
    with pytest.raises(ConnectionAbortedError, match="malformed frame"):
        ours.receive()
        ours.receive()


def test_random_garbage_never_raises_anything_else():
    rng = random.Random(2)
    for _ in range(2000):
        body = rng.randbytes(rng.randint(0, 40))
        stream = rng.choice([body, len(body).to_bytes(4, "little") + body])
        try:
            for message in FrameDecoder(ToEngine).feed(stream):
                assert isinstance(message, ToEngine)
        except (msgspec.DecodeError, ValueError):
            pass


def test_a_mutated_frame_never_raises_anything_else():
    rng = random.Random(3)
    frame = encode_frame(MESSAGES[0])
    for _ in range(2000):
        mutated = bytearray(frame)
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            list(FrameDecoder(ToEngine).feed(bytes(mutated)))
        except (msgspec.DecodeError, ValueError):
            pass


def test_receive_returns_what_is_there_and_does_not_wait(pair):
    ours, theirs = pair
    assert ours.receive() == []
    frame = encode_frame(MESSAGES[1])
    theirs.sendall(frame + frame[:5])
    assert ours.receive() == [MESSAGES[1]]
    theirs.sendall(frame[5:])
    assert ours.receive() == [MESSAGES[1]]


def test_a_peer_that_closed_is_a_reset(pair):
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ConnectionResetError):
        ours.receive()
    with pytest.raises(ConnectionError):
        ours.send(MESSAGES[1])


def test_what_a_slow_peer_does_not_take_is_kept_in_order(pair):
    ours, theirs = pair
    sent = [AddRequest(i, [i] * 5000, [], SamplingParams(), [], 1, 0, b"") for i in range(200)]
    for message in sent:
        ours.send(message)
    assert ours.has_unsent and not ours.flush()
    decoder, received = FrameDecoder(ToEngine), []
    while len(received) < len(sent):
        received += decoder.feed(theirs.recv(50_000))
        ours.flush()
    assert received == sent and not ours.has_unsent


def test_a_peer_that_dies_with_unsent_data_is_noticed(pair):
    ours, theirs = pair
    while not ours.has_unsent:
        ours.send(MESSAGES[0])
    theirs.close()
    with pytest.raises(ConnectionError):
        ours.flush()
