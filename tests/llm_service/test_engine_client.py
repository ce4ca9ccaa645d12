"""A front end's side of the connection, against a real host."""

import asyncio
import gc
import os
import socket

import pytest
import torch

from llm_service.engine_client import EngineClient
from llm_service.frame_socket import encode_frame
from llm_service.messages import RequestAccepted, SequenceOutput, SlotGrant
from protos.errors import ModelError, Unavailable
from tests.llm_service.fakes import (
    UNWRITTEN,
    ServedWorld,
    Tile,
    World,
    alone,
    generate,
    num_granted,
    prompt_input,
    store_granted,
)


@pytest.fixture
async def served(tmp_path):
    served = ServedWorld(tmp_path / "engine.sock", World())
    yield served
    served.stop()


@pytest.fixture
async def client(served):
    client = await EngineClient.connect(served.path)
    yield client
    await client.close()


async def next_output(request):
    while not isinstance(event := await asyncio.wait_for(request.next_event(), 5), SequenceOutput):
        pass
    return event


async def granted(request):
    assert isinstance(await request.next_event(), RequestAccepted)
    grant = await asyncio.wait_for(request.next_event(), 5)
    assert isinstance(grant, SlotGrant)
    return grant


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def test_the_engine_says_what_it_is(client, served):
    assert (client.ready.num_blocks, client.ready.block_size, client.ready.num_slots) == (64, 4, 16)
    assert client.memory.rows(0, 0, 8).dtype is torch.int64
    assert client.stats.num_free_blocks == 64


async def test_many_requests_at_once_each_get_their_own_answer(client):
    prompts = [[1 + i % 7, Tile(f"t{i % 5}"), i] for i in range(24)]
    results = await asyncio.gather(*(generate(client, parts, 3 + len(parts)) for parts in prompts))
    assert results == [alone(parts, 3 + len(parts)) for parts in prompts]


async def test_accepted_comes_first_and_the_finish_reason_with_the_last_token(client):
    request = client.submit(prompt_input([6], 3))
    events = [await request.next_event() for _ in range(4)]
    assert isinstance(events[0], RequestAccepted)
    assert [event.finish_reason for event in events[1:]] == [None, None, "length"]
    assert not request.has_event()
    request.close()


async def test_a_closed_request_writes_no_slot_any_more(client, served):
    prompt = prompt_input([2, Tile("cat")])
    request = client.submit(prompt)
    grant = await granted(request)
    client.memory.write(grant.slot, torch.full((8, 1), UNWRITTEN))
    request.close()
    request.close()
    store_granted(request, prompt, grant)
    assert client.memory.rows(grant.slot, 0, 8).eq(UNWRITTEN).all()
    await until(served.world.is_free)


async def test_a_closed_client_writes_no_slot_any_more(client, served):
    prompt = prompt_input([2, Tile("cat")])
    request = client.submit(prompt)
    grant = await granted(request)
    await client.close()
    await until(served.world.is_free)
    served.world.memory.write(grant.slot, torch.full((8, 1), UNWRITTEN))
    store_granted(request, prompt, grant)
    assert served.world.memory.rows(grant.slot, 0, 8).eq(UNWRITTEN).all()


async def test_abort_of_one_choice_leaves_the_other_running(client, served):
    request = client.submit(prompt_input([6], 60, n=2))
    await next_output(request)
    request.abort_choice(1)
    last = {}
    while 0 not in last or last[0].finish_reason is None:
        output = await next_output(request)
        last[output.index] = output
    assert last[0].finish_reason == "length"
    assert 1 not in last or last[1].finish_reason is None
    await until(lambda: not served.world.scheduler.groups)
    request.close()


async def test_aborting_every_choice_frees_all_and_the_slots_with_close(client, served):
    prompt = prompt_input([6, Tile("late")], 60, n=2)
    request = client.submit(prompt)
    await granted(request)
    for index in range(2):
        request.abort_choice(index)
    await until(lambda: not served.world.scheduler.groups)
    assert num_granted(served.world.store) == 1
    request.close()
    await until(served.world.is_free)


async def test_stats_fall_back_to_zero_after_aborts(client, served):
    requests = [client.submit(prompt_input([6 + i, Tile("late")], 60)) for i in range(5)]
    await until(lambda: client.stats.num_running == 5 and client.stats.num_free_blocks < 64)
    for request in requests:
        request.close()
    await until(
        lambda: (
            (client.stats.num_running, client.stats.num_waiting, client.stats.num_free_blocks) == (0, 0, 64)
        )
    )


async def test_an_error_posted_from_elsewhere_comes_behind_what_is_queued(client):
    request = client.submit(prompt_input([6], 2))
    await next_output(request)
    await next_output(request)
    request.post(ModelError("elsewhere"))
    with pytest.raises(ModelError, match="elsewhere"):
        await request.next_event()
    request.close()


async def test_when_the_engine_ends_every_request_hears_and_new_ones_are_refused(tmp_path):
    served = ServedWorld(tmp_path / "engine.sock", World())
    client = await EngineClient.connect(served.path)
    request = client.submit(prompt_input([2, Tile("late")]))
    await granted(request)
    served.stop()
    with pytest.raises(Unavailable) as error:
        await asyncio.wait_for(request.next_event(), 5)
    assert error.value.retry_after_s
    await asyncio.wait_for(client.wait_closed(), 5)
    with pytest.raises(Unavailable):
        client.submit(prompt_input([6]))
    request.close()
    await client.close()


async def test_an_idle_engine_gives_signs_of_life(client):
    await until(lambda: client.num_messages >= 2)


async def test_while_the_engine_stalls_requests_fail_and_new_ones_are_refused(client):
    request = client.submit(prompt_input([1, Tile("never")]))  # waits for its tile
    client.set_stalled(True)
    with pytest.raises(Unavailable, match="no progress"):
        while True:
            await asyncio.wait_for(request.next_event(), 5)
    request.close()
    with pytest.raises(Unavailable, match="no progress"):
        client.submit(prompt_input([5]))
    client.set_stalled(False)
    assert await generate(client, [5]) == alone([5])


async def test_an_engine_that_talks_nonsense_is_left(tmp_path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "engine.sock"))
    listener.listen(1)
    connecting = asyncio.create_task(EngineClient.connect(tmp_path / "engine.sock"))
    connection, _ = await asyncio.to_thread(listener.accept)
    other = ServedWorld(tmp_path / "other.sock", World())
    greeting = encode_frame(other.ready)
    socket.send_fds(connection, [greeting[:7]], [other.world.memory.fd])
    connection.sendall(greeting[7:])
    client = await connecting
    request = client.submit(prompt_input([6]))
    connection.sendall(b"\xff" * 8)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(request.next_event(), 5)
    assert client.is_closed
    assert await asyncio.to_thread(connection.recv, 1 << 16), "the request"
    assert await asyncio.to_thread(connection.recv, 1 << 16) == b"", "and the end"
    request.close()
    await client.close()
    connection.close()
    listener.close()
    other.stop()


async def test_nobody_listening_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        await EngineClient.connect(tmp_path / "nobody.sock")


async def test_an_engine_that_hangs_up_at_once_is_an_os_error(tmp_path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "engine.sock"))
    listener.listen(1)
    connecting = asyncio.create_task(EngineClient.connect(tmp_path / "engine.sock"))
    (await asyncio.to_thread(listener.accept))[0].close()
    with pytest.raises(OSError):
        await connecting
    listener.close()


async def test_connections_leak_no_descriptors(served):
    async def visit():
        client = await EngineClient.connect(served.path)
        assert await generate(client, [3, Tile("cat")]) == alone([3, Tile("cat")])
        await client.close()
        del client
        await asyncio.sleep(0)

    await visit()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        await visit()
    await until(lambda: gc.collect() >= 0 and len(os.listdir("/proc/self/fd")) <= before)
