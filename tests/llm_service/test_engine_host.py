"""The engine's event loop over a real socket: several front ends, of which some are slow, rude or dead."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llm_service.engine_client import EngineClient
from llm_service.frame_socket import FrameDecoder, encode_frame
from llm_service.grammar_compiler import GrammarCompiler, grammar_vocabulary
from llm_service.messages import (
    AbortChoice,
    AbortRequest,
    AddRequest,
    EngineReady,
    FromEngine,
    RequestAccepted,
    SlotGrant,
    StepOutput,
    TileStored,
)
from llm_service.sampling_params import SamplingParams
from protos.errors import ContextLengthExceeded, InvalidRequest, ModelError, Overloaded, Unavailable
from tests.llm_service.fakes import (
    VOCAB_SIZE,
    ServedWorld,
    Tile,
    World,
    alone,
    generate,
    layout,
    num_granted,
    prompt_input,
    store_granted,
)
from tests.llm_service.front_end import make_tokenizer

LONG = 200  # tokens that nobody waits for


@pytest.fixture(params=[False, True], ids=["step by step", "overlapping"])
def serve(tmp_path, request):
    """Start a host around a World; at the end everything must be whole, and free."""
    served = []

    def start(world=None, **options):
        world = dataclasses.replace(world or World(), overlap=request.param)
        served.append(ServedWorld(tmp_path / f"{len(served)}.sock", world, **options))
        return served[-1]

    yield start
    for one in served:
        one.stop()
        one.world.scheduler.check()


async def until(condition, what="it"):
    """Wait for something that must come within a step or two."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, f"{what} does not come"
        await asyncio.sleep(0.002)


def add_request(request_id, parts, max_tokens=LONG, n=1):
    token_ids, _ = layout(parts)
    tiles = prompt_input(parts).tiles
    params = SamplingParams(temperature=0.0, n=n)
    return AddRequest(request_id, token_ids, tiles, params, [], max_tokens, 0, b"")


def is_idle(client):
    stats = client.stats
    return (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, client.ready.num_blocks)


async def test_two_front_ends_at_once_each_get_their_own(serve):
    served = serve(World(num_slots=2, num_blocks=16))
    first, second = [await EngineClient.connect(served.path) for _ in range(2)]
    prompts = [[3 + i, Tile(f"t{i}"), Tile("cat"), 2] for i in range(4)] + [[9], [5, Tile("cat")]]
    work = [generate(client, parts, 6) for parts in prompts for client in (first, second)]
    results = await asyncio.gather(*work)
    assert results == [alone(parts, 6) for parts in prompts for _ in range(2)]
    await until(lambda: is_idle(first) and is_idle(second))
    await first.close()
    await second.close()


async def test_no_wake_up_is_lost_between_grants_and_tiles(serve):
    """Twelve tiles through one slot: a loop that overslept each time would take six seconds."""
    client = await EngineClient.connect(serve(World(num_slots=1)).path)
    parts = [1, *(Tile(f"t{i}") for i in range(12)), 1]
    start = time.monotonic()
    assert await generate(client, parts) == alone(parts)
    assert time.monotonic() - start < 2
    await client.close()


async def test_a_request_that_waits_for_a_tile_does_not_keep_others_waiting(serve):
    client = await EngineClient.connect(serve(World(max_num_seqs=1)).path)
    prompt = prompt_input([2, Tile("cat"), 3])
    request = client.submit(prompt)
    assert isinstance(await request.next_event(), RequestAccepted)
    grant = await request.next_event()
    assert await generate(client, [6], 8) == alone([6], 8)
    assert not request.has_event()
    store_granted(request, prompt, grant)
    tokens = [(await request.next_event()).tokens[0].token_id for _ in range(4)]
    assert [tokens] == alone([2, Tile("cat"), 3])
    request.close()
    await client.close()


class TestFrontEndsThatLeave:
    async def fill(self, served, connection):
        """Requests at several stages: decoding, waiting for a tile, in the queue."""
        for request_id, parts in enumerate([[6], [5, Tile("a"), 2], [Tile("b"), 3]]):
            connection.sendall(encode_frame(add_request(request_id, parts)))
        await until(lambda: num_granted(served.world.store) == 2)

    @pytest.mark.parametrize("farewell", ["close", "shutdown", "garbage"])
    async def test_its_blocks_and_slots_come_back(self, serve, farewell):
        served = serve()
        client = await EngineClient.connect(served.path)
        connection = served.connect()
        await self.fill(served, connection)
        if farewell == "close":
            connection.close()
        elif farewell == "shutdown":
            connection.shutdown(2)
        else:
            connection.sendall(b"\xff" * 64)
        await until(served.world.is_free, "freedom")
        await until(lambda: is_idle(client), "the news")
        assert await generate(client, [5, Tile("a"), 2]) == alone([5, Tile("a"), 2])
        await client.close()

    async def test_a_process_that_is_killed_gives_everything_back(self, serve):
        served = serve()
        client = await EngineClient.connect(served.path)
        program = (
            "import socket, sys, time\n"
            "connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n"
            "connection.connect(sys.argv[1])\n"
            "connection.sendall(bytes.fromhex(sys.argv[2]))\n"
            "time.sleep(60)\n"
        )
        frames = encode_frame(add_request(0, [5, Tile("a"), 2])) + encode_frame(add_request(1, [6]))
        with subprocess.Popen([sys.executable, "-c", program, str(served.path), frames.hex()]) as process:
            await until(lambda: num_granted(served.world.store) == 1)
            os.kill(process.pid, signal.SIGKILL)
        await until(served.world.is_free, "freedom")
        await until(lambda: is_idle(client), "the news")
        await client.close()

    async def test_one_that_connects_and_leaves_at_once_harms_nobody(self, serve):
        served = serve()
        client = await EngineClient.connect(served.path)
        for _ in range(5):
            for _ in range(10):
                served.connect().close()
            assert await generate(client, [6]) == alone([6])
        await client.close()

    async def test_one_that_is_gone_before_its_answers_harms_nobody(self, serve):
        """Its requests have arrived together; the first answer finds it gone."""
        served = serve()
        client = await EngineClient.connect(served.path)
        connection = served.connect()
        assert connection.recv(1 << 16), "the greeting"
        connection.shutdown(0)  # the engine's sends fail, its reads do not
        requests = [add_request(i, [6, Tile("late")]) for i in range(5)]
        connection.sendall(b"".join(encode_frame(request) for request in requests))
        assert await generate(client, [6]) == alone([6])
        await until(served.world.is_free, "freedom")
        await client.close()
        connection.close()


class TestRefusals:
    async def test_a_full_queue(self, serve):
        served = serve(World(max_num_seqs=1, budget=16), max_waiting=2)
        client = await EngineClient.connect(served.path)
        requests = [client.submit(prompt_input([Tile("late"), 3])) for _ in range(2)]
        for request in requests:
            assert isinstance(await request.next_event(), RequestAccepted)
        with pytest.raises(Overloaded) as error:
            await generate(client, [4])
        assert error.value.retry_after_s
        for request in requests:
            request.close()
        assert await generate(client, [4]) == alone([4])
        await client.close()

    async def test_a_prompt_that_can_never_fit(self, serve):
        client = await EngineClient.connect(serve(World(max_model_len=10)).path)
        with pytest.raises(ContextLengthExceeded, match="10"):
            await generate(client, [10])
        assert await generate(client, [9], 5) == [alone([9], 1)[0]]
        await client.close()

    async def test_an_empty_prompt_which_would_wait_forever(self, serve):
        client = await EngineClient.connect(serve().path)
        with pytest.raises(InvalidRequest, match="no tokens"):
            await generate(client, [])
        await client.close()

    async def test_a_tile_larger_than_a_slot(self, serve):
        client = await EngineClient.connect(serve().path)
        with pytest.raises(InvalidRequest, match="more than 8 visual tokens"):
            await generate(client, [1, Tile("huge", 9)])
        await client.close()


class TestFailedSteps:
    async def test_fail_the_requests_in_flight_and_the_next_one_is_served(self, serve):
        served = serve()
        first, second = [await EngineClient.connect(served.path) for _ in range(2)]
        prompt = prompt_input([5, Tile("a"), 2], LONG)
        waiting = first.submit(prompt)
        assert isinstance(await waiting.next_event(), RequestAccepted)
        assert isinstance(await waiting.next_event(), SlotGrant)
        await until(lambda: not served.world.late_launcher.under_way, "the end of its step")
        served.world.runner.num_failures = 1
        with pytest.raises(ModelError, match="the model failed; see the log"):
            await generate(second, [6])
        with pytest.raises(ModelError):
            await waiting.next_event()
        assert num_granted(served.world.store) == 1, "its front end may be writing still"
        waiting.close()
        assert await generate(first, [5, Tile("a"), 2]) == alone([5, Tile("a"), 2])
        await until(lambda: is_idle(first) and is_idle(second))
        await until(served.world.is_free, "freedom")
        await first.close()
        await second.close()

    async def test_a_front_end_that_left_meanwhile_does_not_matter(self, serve):
        served = serve(World(max_num_seqs=4))
        client = await EngineClient.connect(served.path)
        connection = served.connect()
        connection.sendall(b"".join(encode_frame(add_request(i, [Tile("late"), 2])) for i in range(3)))
        await until(lambda: num_granted(served.world.store) == 1)
        connection.shutdown(0)
        served.world.runner.num_failures = 1
        with pytest.raises(ModelError):
            await generate(client, [6])
        assert await generate(client, [6]) == alone([6])
        await client.close()
        connection.close()

    async def test_several_in_a_row_end_the_engine_and_every_request_hears_of_it(self, serve):
        served = serve()
        client = await EngineClient.connect(served.path)
        served.world.runner.num_failures = 3
        for _ in range(2):
            with pytest.raises(ModelError):
                await generate(client, [6])
        with pytest.raises(Unavailable):
            await generate(client, [6])
        served.thread.join(5)
        assert isinstance(served.error, RuntimeError)
        await client.close()

    # A step that fails takes the one launched behind it along, so only here a failure is a step.
    @pytest.mark.parametrize("serve", [False], indirect=True)
    async def test_a_success_in_between_starts_the_count_again(self, serve):
        served = serve()
        client = await EngineClient.connect(served.path)
        for _ in range(3):
            served.world.runner.num_failures = 2
            for _ in range(2):
                with pytest.raises(ModelError):
                    await generate(client, [6])
            assert await generate(client, [6]) == alone([6])
        await client.close()


async def test_a_front_end_that_does_not_read_stalls_nobody_and_loses_nothing(serve):
    served = serve(World(num_blocks=2000, max_model_len=4000, max_num_seqs=64))
    client = await EngineClient.connect(served.path)
    slow = served.connect()
    slow.sendall(encode_frame(add_request(0, [6], max_tokens=1200, n=8)))
    await until(lambda: served.world.scheduler.running)
    while served.world.scheduler.running:
        start = time.monotonic()
        assert await generate(client, [6]) == alone([6])
        assert time.monotonic() - start < 2
    decoder, tokens = FrameDecoder(FromEngine), {}
    while len(tokens) < 8 or min(map(len, tokens.values())) < 1200:
        for message in decoder.feed(slow.recv(1 << 16)):
            for output in message.outputs if isinstance(message, StepOutput) else []:
                tokens.setdefault(output.index, []).extend(t.token_id for t in output.tokens)
    assert tokens[0] == tokens[7] and tokens[0][:4] == alone([6])[0]
    slow.close()
    await client.close()


async def test_one_message_a_step_carries_all_requests_of_a_front_end(serve):
    served = serve()
    connection = served.connect()
    connection.sendall(b"".join(encode_frame(add_request(i, [4 + i], 6)) for i in range(3)))
    decoder, messages = FrameDecoder(FromEngine), []
    while not any(isinstance(m, StepOutput) and m.stats.num_free_blocks == 64 for m in messages[5:]):
        messages += decoder.feed(connection.recv(1 << 16))
    connection.close()
    assert isinstance(messages[0], EngineReady)
    assert [m.request_id for m in messages if isinstance(m, RequestAccepted)] == [0, 1, 2]
    steps = [m for m in messages if isinstance(m, StepOutput) and m.outputs]
    assert [[output.request_id for output in step.outputs] for step in steps] == [[0, 1, 2]] * 6
    assert [output.finish_reason for output in steps[-1].outputs] == ["length"] * 3


async def test_messages_about_requests_that_have_ended_are_ignored(serve):
    served = serve()
    client = await EngineClient.connect(served.path)
    connection = served.connect()
    unknown = [TileStored(3, 0), AbortChoice(3, 0), AbortRequest(3)]
    for message in (*unknown, add_request(0, [4], 1), AbortRequest(0), AbortRequest(0)):
        connection.sendall(encode_frame(message))
    assert await generate(client, [6]) == alone([6])
    connection.close()
    await client.close()


async def test_request_ids_of_two_front_ends_do_not_meet(serve):
    served = serve()
    first, second = served.connect(), served.connect()
    first.sendall(encode_frame(add_request(0, [Tile("late"), 2])))
    second.sendall(encode_frame(add_request(0, [6])) + encode_frame(AbortRequest(0)))
    await until(lambda: len(served.world.scheduler.waiting) == 1)
    assert num_granted(served.world.store) == 1
    first.close()
    second.close()
    await until(served.world.is_free, "freedom")


async def test_the_end_of_the_parents_pipe_stops_the_host(serve):
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as parent:
        served = serve(parent=parent)
        client = await EngineClient.connect(served.path)
        assert await generate(client, [6]) == alone([6])
        os.close(write_end)
        await asyncio.wait_for(client.wait_closed(), 5)
        served.thread.join(5)
        assert not served.thread.is_alive() and served.error is None
        await client.close()


class TestGrammars:
    def prompt(self, text):
        return dataclasses.replace(prompt_input([6]), grammar=text)

    async def test_one_that_waits_for_its_grammar_holds_nobody_up_and_may_leave(self, serve):
        gate = threading.Event()

        def load():
            gate.wait(10)
            return grammar_vocabulary(make_tokenizer(), VOCAB_SIZE)

        compiler = GrammarCompiler(load)
        client = await EngineClient.connect(serve(grammars=compiler, max_waiting=2).path)
        leaving, staying = [client.submit(self.prompt('start: "cat"\n')) for _ in range(2)]
        too_many = client.submit(prompt_input([6]))
        with pytest.raises(Overloaded):
            await too_many.next_event()
        leaving.close()
        assert await generate(client, [9], 6) == alone([9], 6)
        gate.set()
        assert isinstance(await staying.next_event(), RequestAccepted)
        assert (await staying.next_event()).tokens[0].token_id == make_tokenizer().encode_plain("c")[0]
        assert not leaving.has_event()
        for request in (staying, too_many):
            request.close()
        await until(lambda: is_idle(client))
        await client.close()
        compiler.close()

    async def test_one_that_cannot_be_built_is_refused(self, serve):
        compiler = GrammarCompiler(lambda: grammar_vocabulary(make_tokenizer(), VOCAB_SIZE))
        client = await EngineClient.connect(serve(grammars=compiler).path)
        for text in ("start: (", "start: /(?=a)b/\n"):
            request = client.submit(self.prompt(text))
            with pytest.raises(InvalidRequest, match="cannot be enforced"):
                await request.next_event()
            request.close()
        await client.close()
        compiler.close()

    async def test_an_engine_without_grammars_says_so(self, serve):
        client = await EngineClient.connect(serve().path)
        request = client.submit(self.prompt('start: "a"\n'))
        with pytest.raises(InvalidRequest, match="response formats"):
            await request.next_event()
        request.close()
        await client.close()
