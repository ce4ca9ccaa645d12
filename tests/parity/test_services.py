"""The same tokens through the services: pictures over gRPC, tiles over gRPC, an engine behind a socket."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from llm_service.config import EngineConfig
from llm_service.sequence import Sequence
from tests.parity.conftest import Model, Models
from tests.parity.local_pair import NUM_TOKENS, LocalEngine
from tests.parity.scenarios import MANY_TILES, ONE_TILE, SCENARIOS, TEXT_ONLY, Scenario
from tests.parity.services import (
    ANSWER_TIMEOUT_S,
    LanguageModel,
    ScriptedEncoder,
    hosted,
    running_encoder,
    running_language_model,
)
from tests.parity.test_inputs import all_scenarios, picture_scenarios

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Pair:
    """Both services of one model, running."""

    def __init__(self, model: Model, encoder: ScriptedEncoder, language_model: LanguageModel) -> None:
        self.model = model
        self.encoder = encoder
        self.language_model = language_model
        self.block_size = model.pair.backend.block_size
        self.tokens_per_tile = model.pair.vision.preprocessing.tokens_per_tile

    async def assert_answers(self, scenario: Scenario, num_tokens: int = NUM_TOKENS) -> None:
        answer = await self.language_model.ask(scenario, num_tokens)
        assert answer.token_ids == [self.model.reference.tokens(scenario, num_tokens)], scenario.name


@asynccontextmanager
async def watched_pair(
    model: Model, engine: LocalEngine, folder: Path, initial_credit: int = 4
) -> AsyncIterator[Pair]:
    """The engine's loop runs on a thread of this process, where its scheduler can be read."""
    with hosted(engine, folder) as path:
        async with (
            running_encoder(model.folder) as encoder,
            running_language_model(
                model.folder, (encoder.target,), engine_socket=path, initial_credit=initial_credit
            ) as language_model,
        ):
            yield Pair(model, encoder, language_model)


@pytest.fixture
def any_model(models: Models) -> Model:
    return models("qwen3", "chat")


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[("qwen2", "hf"), ("internlm2", "chat")], ids="-".join
)
async def pair(request: pytest.FixtureRequest, models: Models) -> AsyncIterator[Pair]:
    """One of each format, its engine a process of its own."""
    model = models(*request.param)
    async with (
        running_encoder(model.folder) as encoder,
        running_language_model(model.folder, (encoder.target,)) as language_model,
    ):
        yield Pair(model, encoder, language_model)


@all_scenarios
async def test_alone(pair: Pair, scenario: Scenario) -> None:
    answer = await pair.language_model.ask(scenario, NUM_TOKENS, cache_salt=b"alone")
    assert answer.token_ids == [pair.model.reference.tokens(scenario, NUM_TOKENS)]
    given = pair.model.reference.input(scenario)
    assert answer.usage.prompt_tokens == len(given.token_ids)
    assert answer.usage.visual_tokens == pair.tokens_per_tile * sum(given.num_tiles)
    assert answer.usage.completion_tokens == NUM_TOKENS


async def test_batched_with_all_others(pair: Pair) -> None:
    async def ask_later(scenario: Scenario, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await pair.assert_answers(scenario)

    await asyncio.gather(*(ask_later(scenario, 0.01 * number) for number, scenario in enumerate(SCENARIOS)))


@all_scenarios
async def test_prefix_cache_cold_and_warm(pair: Pair, scenario: Scenario) -> None:
    expected = [pair.model.reference.tokens(scenario, NUM_TOKENS)]
    salt = b"cold and warm"
    cold = await pair.language_model.ask(scenario, NUM_TOKENS, cache_salt=salt)
    calls = pair.encoder.num_calls
    warm = await pair.language_model.ask(scenario, NUM_TOKENS, cache_salt=salt)
    assert cold.token_ids == warm.token_ids == expected
    num_full_blocks = (cold.usage.prompt_tokens - 1) // pair.block_size
    assert warm.usage.cached_tokens == pair.block_size * num_full_blocks > 0
    assert pair.encoder.num_calls == calls, "the picture's content was known"


async def test_another_cache_salt_shares_nothing(pair: Pair) -> None:
    for salt in (b"one tenant", b"another"):
        tiles = pair.encoder.num_tiles
        answer = await pair.language_model.ask(MANY_TILES, NUM_TOKENS, cache_salt=salt)
        assert answer.token_ids == [pair.model.reference.tokens(MANY_TILES, NUM_TOKENS)]
        assert answer.usage.cached_tokens == 0
        assert pair.encoder.num_tiles - tiles == 13


@all_scenarios
async def test_two_greedy_choices_are_the_same_text(pair: Pair, scenario: Scenario) -> None:
    answer = await pair.language_model.ask(scenario, NUM_TOKENS, n=2)
    expected = pair.model.reference.tokens(scenario, NUM_TOKENS)
    assert answer.token_ids == [expected] * 2
    assert answer.texts == [pair.model.reference.tokenizer.decode(expected)] * 2
    assert answer.usage.completion_tokens == 2 * NUM_TOKENS


@pytest.mark.parametrize("initial_credit", [0, 4, 100])
async def test_any_initial_credit(any_model: Model, tmp_path: Path, initial_credit: int) -> None:
    """Tiles come asked for, unasked for, or both."""
    engine = any_model.pair.engine()
    async with watched_pair(any_model, engine, tmp_path, initial_credit) as pair:
        for scenario in SCENARIOS:
            await pair.assert_answers(scenario)


@pytest.mark.parametrize("chunk", [16, 64])
async def test_prefill_in_chunks_while_tiles_come_late(any_model: Model, tmp_path: Path, chunk: int) -> None:
    engine = any_model.pair.engine(long_prefill_token_threshold=chunk)
    async with watched_pair(any_model, engine, tmp_path) as pair:
        pair.encoder.max_delay_s = 0.03
        await asyncio.gather(*(pair.assert_answers(scenario) for scenario in SCENARIOS))


async def test_a_visual_store_with_fewer_slots_than_tiles(any_model: Model, tmp_path: Path) -> None:
    """Two slots for 37 tiles: each is granted when there is room, and again when it had to go."""
    engine = any_model.pair.engine(visual_store_gib=1e-9, enable_prefix_caching=False)
    assert engine.capacity.num_slots == 2
    async with watched_pair(any_model, engine, tmp_path) as pair:
        await asyncio.gather(*(pair.assert_answers(scenario) for scenario in SCENARIOS))


@picture_scenarios
async def test_preempted_after_its_tiles_were_consumed_and_the_encoder_has_died(
    any_model: Model, tmp_path: Path, scenario: Scenario
) -> None:
    """A request of higher priority comes when the encoder is gone, and grows until the blocks run out."""
    num_urgent_tokens = 80
    lengths = [len(any_model.pair.prompt(each).token_ids) for each in (TEXT_ONLY, scenario)]
    block_size = any_model.pair.backend.block_size
    num_blocks = sum(-(-(length + NUM_TOKENS // 2) // block_size) for length in lengths)
    engine = any_model.pair.engine(num_kv_blocks=num_blocks, enable_prefix_caching=False)
    gate = _Gate(engine)
    async with watched_pair(any_model, engine, tmp_path) as pair:
        ask, reference = pair.language_model.ask, any_model.reference
        preempted = asyncio.create_task(ask(scenario, NUM_TOKENS))
        await gate.tiles_are_consumed.wait()
        num_tiles = pair.encoder.num_tiles
        engine.runner.slots_read.clear()
        await pair.encoder.die()
        gate.encoder_is_dead.set()
        urgent = await ask(TEXT_ONLY, num_urgent_tokens, priority=-1)
        answer = await preempted
    assert urgent.token_ids == [reference.tokens(TEXT_ONLY, num_urgent_tokens)]
    assert answer.token_ids == [reference.tokens(scenario, NUM_TOKENS)]
    assert engine.num_preemptions > 0
    assert len(set(engine.runner.slots_read)) == pair.encoder.num_tiles == num_tiles


class _Gate:
    """Holds the engine up when the request has its first token, and then until a second request is there."""

    def __init__(self, engine: LocalEngine) -> None:
        self.tiles_are_consumed = asyncio.Event()
        self.encoder_is_dead = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._scheduler = engine.engine.scheduler
        engine.runner.before_forward = self._wait

    def _wait(self) -> None:
        """On the engine's thread."""
        if not any(sequence.num_output_tokens for sequence in self._scheduler.running):
            return
        self._loop.call_soon_threadsafe(self.tiles_are_consumed.set)
        assert self.encoder_is_dead.wait(ANSWER_TIMEOUT_S)
        if len(self._scheduler.groups) < 2:
            time.sleep(0.05)


async def test_a_withheld_tile_holds_up_its_own_request_only(any_model: Model, tmp_path: Path) -> None:
    engine = any_model.pair.engine()
    scheduler = engine.engine.scheduler
    withheld = 7
    async with watched_pair(any_model, engine, tmp_path) as pair:
        pair.encoder.withheld_tile = withheld
        held_up = asyncio.create_task(pair.language_model.ask(MANY_TILES, NUM_TOKENS))
        await pair.encoder.is_withholding.wait()
        (group,) = scheduler.groups.values()
        sequence, offset = group.sequences[0], group.tiles[withheld].offset
        await asyncio.wait_for(_until_computed(sequence, offset), 10)
        # Others run on meanwhile, pictures of their own included, and it does not move.
        for scenario in (TEXT_ONLY, ONE_TILE, TEXT_ONLY):
            await pair.assert_answers(scenario)
            assert sequence.num_computed_tokens == offset
        assert not held_up.done()
        pair.encoder.release.set()
        answer = await held_up
        assert answer.token_ids == [any_model.reference.tokens(MANY_TILES, NUM_TOKENS)]


async def _until_computed(sequence: Sequence, num_tokens: int) -> None:
    while sequence.num_computed_tokens < num_tokens:
        await asyncio.sleep(0.005)


async def test_two_ranks_over_gloo_give_the_tokens_of_one(models: Models) -> None:
    model = models("qwen3", "hf")
    engine = EngineConfig(device="cpu", num_threads=1, kv_cache_gib=0.01, tensor_parallel_size=2)
    async with (
        running_encoder(model.folder) as encoder,
        running_language_model(model.folder, (encoder.target,), engine) as language_model,
    ):
        pair = Pair(model, encoder, language_model)
        await pair.assert_answers(MANY_TILES)
        await asyncio.gather(*(pair.assert_answers(scenario) for scenario in SCENARIOS))
