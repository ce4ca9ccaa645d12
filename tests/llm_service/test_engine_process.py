"""Real engine processes over a tiny checkpoint: the same tokens as transformers, and orderly ends."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForImageTextToText

from llm_service.config import EngineConfig
from llm_service.engine_client import EngineClient, PromptInput
from llm_service.engine_process import EngineSettings
from llm_service.engine_processes import EngineProcesses
from llm_service.messages import PromptTile, SequenceOutput, SlotGrant
from llm_service.sampling_params import SamplingParams
from protos.errors import Unavailable
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.slow

CONFIG = EngineConfig(
    dtype="float32", device="cpu", kv_cache_gib=0.02, visual_store_gib=0.001, max_model_len=512, num_threads=1
)
PROMPTS = [[7, 30, 100, 9], list(range(40, 120)), [5] * 33]
NUM_TOKENS = 24
PARENT = """
import asyncio, sys
from llm_service.config import EngineConfig
from llm_service.engine_process import EngineSettings
from llm_service.engine_processes import EngineProcesses

async def main():
    config = EngineConfig(device="cpu", kv_cache_gib=0.02, tensor_parallel_size=2, max_model_len=64)
    await EngineProcesses(sys.argv[1], config).start()
    print("started", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", "hf")


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Greedy tokens of transformers."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    return [
        model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@asynccontextmanager
async def engine(checkpoint, config=CONFIG):
    processes = EngineProcesses(str(checkpoint), config)
    try:
        await asyncio.wait_for(processes.start(), 120)
        client = await EngineClient.connect(processes.socket_path)
        yield processes, client
        await client.close()
    finally:
        await processes.stop()


def greedy(token_ids, max_tokens, tiles=()):
    return PromptInput(list(token_ids), list(tiles), SamplingParams(temperature=0.0), [], max_tokens)


async def tokens_of(client, prompt, embeds=None):
    request = client.submit(prompt)
    tokens = []
    try:
        while True:
            event = await asyncio.wait_for(request.next_event(), 60)
            if isinstance(event, SlotGrant):
                request.write_tile(event, embeds[event.tile_index])
                request.announce_tile(event)
            elif isinstance(event, SequenceOutput):
                tokens += [token.token_id for token in event.tokens]
                if event.finish_reason is not None:
                    return tokens
    finally:
        request.close()


def picture(hidden_size):
    """A prompt with two tiles of two visual tokens, and their embeddings."""
    tiles = [PromptTile(b"left", 2, 2), PromptTile(b"right", 4, 2)]
    embeds = torch.randn(2, 2, hidden_size, generator=torch.Generator().manual_seed(3))
    return greedy([7, 8, 0, 0, 0, 0, 9], NUM_TOKENS, tiles), embeds


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def wait_until_dead(pids, timeout_s):
    deadline = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "engine processes outlive their parent"
        await asyncio.sleep(0.02)


async def test_greedy_tokens_are_those_of_transformers_and_a_killed_engine_fails_all_at_once(
    checkpoint, expected
):
    async with engine(checkpoint) as (processes, client):
        alone = [await tokens_of(client, greedy(prompt, NUM_TOKENS)) for prompt in PROMPTS]
        assert alone == expected
        together = await asyncio.gather(
            *(tokens_of(client, greedy(prompt, NUM_TOKENS)) for prompt in PROMPTS * 3)
        )
        assert together == expected * 3, "batched, and from a warm prefix cache"
        requests = [client.submit(greedy(prompt, 300)) for prompt in PROMPTS]
        for request in requests:
            while not isinstance(await request.next_event(), SequenceOutput):
                pass
        [pid] = [pid for pid in children(os.getpid()) if b"engine_process" in cmdline(pid)]
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        for request in requests:
            with pytest.raises(Unavailable):
                while True:
                    await asyncio.wait_for(request.next_event(), 5)
        assert time.monotonic() - killed < 1
        await asyncio.wait_for(processes.wait(), 5)


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_two_ranks_give_the_tokens_of_one_with_and_without_a_picture(checkpoint, expected):
    results = []
    for size in (1, 2):
        config = EngineConfig(**{**CONFIG.__dict__, "tensor_parallel_size": size})
        async with engine(checkpoint, config) as (_, client):
            prompt, embeds = picture(client.ready.hidden_size)
            texts = [tokens_of(client, greedy(prompt, NUM_TOKENS)) for prompt in PROMPTS]
            results.append(await asyncio.gather(*texts, tokens_of(client, prompt, embeds)))
    assert results[0][:-1] == expected
    assert results[1] == results[0]


async def test_a_checkpoint_with_a_missing_layer_is_unavailable_and_stderr_names_it(tmp_path, capfd):
    folder = make_checkpoint(tmp_path, "qwen2", "hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    processes = EngineProcesses(str(folder), CONFIG)
    with pytest.raises(Unavailable, match="ended while it was starting"):
        await asyncio.wait_for(processes.start(), 60)
    message = capfd.readouterr().err
    assert "error: " in message and "layers.2." in message and "Traceback" not in message


async def test_settings_that_do_not_fit_are_unavailable_and_stderr_names_them(checkpoint, capfd):
    processes = EngineProcesses(str(checkpoint), EngineConfig(device="cpu", max_model_len=100_000))
    with pytest.raises(Unavailable):
        await asyncio.wait_for(processes.start(), 60)
    assert "error: max_model_len 100000 exceeds the checkpoint's 4096" in capfd.readouterr().err


async def test_engine_processes_end_with_a_parent_that_is_killed(checkpoint):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(checkpoint)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent:
        assert await asyncio.to_thread(parent.stdout.readline) == "started\n"
        ranks = children(parent.pid)
        assert len(ranks) == 2
        parent.kill()
    await wait_until_dead(ranks, 2)


def launch(checkpoint, folder, config, **options):
    """Rank 0 as a process of its own."""
    settings = EngineSettings(
        model=str(checkpoint),
        engine=config,
        rank=0,
        socket_path=str(folder / "engine.sock"),
        ranks_path=str(folder / "ranks.sock"),
        rendezvous_path=str(folder / "rendezvous"),
        log_level="INFO",
    )
    command = [sys.executable, "-m", "llm_service.engine_process"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(settings) + b"\n")
    process.stdin.flush()
    return process


async def test_an_engine_process_that_waits_for_another_rank_ends_with_its_parent(checkpoint, tmp_path):
    process = launch(checkpoint, tmp_path, EngineConfig(device="cpu", tensor_parallel_size=2))
    async with asyncio.timeout(60):
        while not (tmp_path / "rendezvous").exists():
            await asyncio.sleep(0.02)
    process.stdin.close()
    await wait_until_dead([process.pid], 2)
    assert process.wait() == 1


def limit_files():
    """No file, and no shared memory, of more than 64 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def test_too_little_shared_memory_is_one_line_that_names_the_flag(checkpoint, tmp_path):
    with launch(checkpoint, tmp_path, CONFIG, stderr=subprocess.PIPE, preexec_fn=limit_files) as process:
        message = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in message
    assert "error: visual_store_gib 0.001: " in message.splitlines()[-1]
    assert not list(tmp_path.glob("engine.sock*"))


def test_a_socket_that_cannot_be_made_is_one_line_that_names_the_flag(checkpoint, tmp_path):
    with launch(checkpoint, tmp_path / ("x" * 100), CONFIG, stderr=subprocess.PIPE) as process:
        message = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in message
    assert message.splitlines()[-1].startswith("error: engine_socket ")


async def test_a_rank_that_dies_ends_the_engine_and_fails_its_requests(checkpoint):
    config = EngineConfig(**{**CONFIG.__dict__, "tensor_parallel_size": 2})
    async with engine(checkpoint, config) as (processes, client):
        request = client.submit(greedy(PROMPTS[0], 400))
        while not isinstance(await request.next_event(), SequenceOutput):
            pass
        ranks = [pid for pid in children(os.getpid()) if b"engine_process" in cmdline(pid)]
        os.kill(max(ranks), signal.SIGKILL)
        with pytest.raises(Unavailable):
            while True:
                await asyncio.wait_for(request.next_event(), 5)
        await wait_until_dead(ranks, 5)
