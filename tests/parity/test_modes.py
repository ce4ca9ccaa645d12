"""48 greedy tokens equal transformers', whatever way the scheduler takes to them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from llm_service.sequence import SequenceGroup, SequenceStatus
from tests.parity.conftest import Model
from tests.parity.local_pair import NUM_TOKENS, Delivery, EncoderDead, LocalEngine, Tile, outputs
from tests.parity.scenarios import SCENARIOS, TEXT_ONLY, Scenario
from tests.parity.test_inputs import WITH_PICTURES, all_scenarios, picture_scenarios

# How far apart the requests of a batch arrive, in steps: into prefills and into decodes of the others.
ARRIVAL_GAPS = (0, 1, 3, 0, 7, 2)


class RandomDelays:
    """Lets one tile through now and then, in no particular order."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, under_way: Sequence[Tile]) -> Sequence[Tile]:
        if not under_way or self._random.random() < 0.6:
            return ()
        return (self._random.choice(under_way),)


def submit_staggered(engine: LocalEngine, order: Sequence[Scenario]) -> list[SequenceGroup]:
    groups = []
    for scenario, gap in zip(order, ARRIVAL_GAPS, strict=True):
        for _ in range(gap):
            engine.step()
        groups.append(engine.submit(scenario))
    return groups


def assert_answers(model: Model, order: Sequence[Scenario], groups: Sequence[SequenceGroup]) -> None:
    for scenario, group in zip(order, groups, strict=True):
        assert outputs(group) == [model.reference.tokens(scenario, NUM_TOKENS)], scenario.name


def test_the_answers_depend_on_the_pictures_and_do_not_repeat_themselves(model: Model) -> None:
    """Otherwise equal tokens would prove little."""
    answers = [model.reference.tokens(scenario, NUM_TOKENS) for scenario in SCENARIOS]
    assert len({tuple(answer) for answer in answers}) == len(SCENARIOS)
    assert min(len(set(answer)) for answer in answers) > NUM_TOKENS // 2


@all_scenarios
def test_alone(model: Model, scenario: Scenario) -> None:
    engine = model.pair.engine()
    assert engine.answer(scenario) == model.reference.tokens(scenario, NUM_TOKENS)


def test_batched_with_all_others(model: Model) -> None:
    engine = model.pair.engine()
    groups = submit_staggered(engine, SCENARIOS)
    engine.step()  # grants the last one's tiles
    engine.step()
    assert len(engine.engine.scheduler.running) == len(SCENARIOS)
    engine.run()
    assert_answers(model, SCENARIOS, groups)


@pytest.mark.parametrize("chunk", [16, 64])
@all_scenarios
def test_prefill_in_chunks(model: Model, scenario: Scenario, chunk: int) -> None:
    engine = model.pair.engine(long_prefill_token_threshold=chunk)
    group = engine.submit(scenario)
    computed = [0]
    while engine.engine.has_work:
        engine.step()
        computed.append(group.sequences[0].num_computed_tokens)
    assert max(after - before for before, after in zip(computed, computed[1:], strict=False)) <= chunk
    assert_answers(model, [scenario], [group])


@pytest.mark.parametrize("budget", [16, 64])
def test_batched_under_a_small_budget(model: Model, budget: int) -> None:
    """Decodes and several partial prefills share every step."""
    engine = model.pair.engine(max_num_batched_tokens=budget, max_num_seqs=8)
    order = SCENARIOS[::-1]
    groups = submit_staggered(engine, order)
    engine.run()
    assert_answers(model, order, groups)


@all_scenarios
def test_prefix_cache_cold_and_warm(model: Model, scenario: Scenario) -> None:
    engine = model.pair.engine()
    cold = engine.submit(scenario)
    engine.run()
    num_encoded = engine.num_encoded
    engine.encoder_is_alive = False  # nothing may be asked of it again
    warm = engine.submit(scenario)
    engine.run()
    assert_answers(model, [scenario, scenario], [cold, warm])
    assert cold.sequences[0].num_cached_tokens == 0
    block_size = model.pair.backend.block_size
    num_full_blocks = (len(warm.prompt_token_ids) - 1) // block_size
    assert warm.sequences[0].num_cached_tokens == num_full_blocks * block_size > 0
    assert num_encoded == len(cold.tiles)


@picture_scenarios
def test_stored_tiles_serve_where_the_kv_cache_does_not(model: Model, scenario: Scenario) -> None:
    engine = model.pair.engine(enable_prefix_caching=False)
    first = engine.submit(scenario)
    engine.run()
    engine.encoder_is_alive = False
    second = engine.submit(scenario)
    engine.run()
    assert_answers(model, [scenario, scenario], [first, second])
    assert second.sequences[0].num_cached_tokens == 0


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["recomputed", "prefix_cached"])
@all_scenarios
def test_preempted_after_its_tiles_were_consumed_and_the_encoder_has_died(
    model: Model, scenario: Scenario, prefix_caching: bool
) -> None:
    """An older request grows until the blocks run out; this one gives its own up and comes back."""
    num_older_tokens = 80
    block_size = model.pair.backend.block_size
    lengths = [len(model.pair.prompt(each).token_ids) for each in (TEXT_ONLY, scenario)]
    num_blocks = max(
        sum(-(-(length + NUM_TOKENS // 2) // block_size) for length in lengths),
        -(-(lengths[0] + num_older_tokens) // block_size),
    )
    engine = model.pair.engine(num_kv_blocks=num_blocks, enable_prefix_caching=prefix_caching)
    # Salted, or the two would share the blocks of the system message and never run short.
    older = engine.submit(TEXT_ONLY, max_tokens=num_older_tokens, cache_salt=b"other")
    group = engine.submit(scenario)
    sequence = group.sequences[0]
    while not sequence.num_output_tokens:
        engine.step()
    engine.encoder_is_alive = False
    while sequence.status is not SequenceStatus.WAITING:
        assert not sequence.is_finished, "it was never preempted"
        engine.step()
    assert engine.num_preemptions == 1 and 0 < sequence.num_output_tokens < NUM_TOKENS
    engine.runner.slots_read.clear()
    engine.run()
    assert_answers(model, [scenario], [group])
    assert outputs(older) == [model.reference.tokens(TEXT_ONLY, num_older_tokens)]
    if not prefix_caching:
        assert len(set(engine.runner.slots_read)) == len(group.tiles)


@pytest.mark.parametrize("seed", range(2))
def test_tiles_arriving_one_at_a_time_with_any_delays(model: Model, seed: int) -> None:
    """In a batch that also has too few blocks and a small budget, so that everything happens at once."""
    order = random.Random(seed).sample(SCENARIOS, len(SCENARIOS))
    engine = model.pair.engine(num_kv_blocks=24, max_num_batched_tokens=32, max_num_seqs=8)
    groups = submit_staggered(engine, order)
    engine.run(RandomDelays(seed))
    assert engine.num_preemptions > 0
    assert_answers(model, order, groups)


def test_a_visual_store_with_fewer_slots_than_tiles(model: Model) -> None:
    """Tiles are evicted before everybody has read them, and granted again."""
    engine = model.pair.engine(visual_store_gib=6 * 1024 / 2**30, enable_prefix_caching=False)
    assert engine.capacity.num_slots == 6
    groups = [engine.submit(scenario) for scenario in WITH_PICTURES]
    engine.run(RandomDelays(3))
    assert_answers(model, WITH_PICTURES, groups)


@all_scenarios
def test_two_greedy_choices_are_the_same(model: Model, scenario: Scenario) -> None:
    engine = model.pair.engine()
    group = engine.submit(scenario, n=2)
    engine.run()
    assert outputs(group) == [model.reference.tokens(scenario, NUM_TOKENS)] * 2


def all_but(withheld: int) -> Delivery:
    return lambda tiles: [tile for tile in tiles if tile.grant.tile_index != withheld]


@picture_scenarios
def test_a_withheld_tile_is_computed_up_to_and_no_further(model: Model, scenario: Scenario) -> None:
    """Whichever it is: the first, one in the middle, the last; it finishes when the tile comes."""
    num_tiles = sum(model.pair.plan(picture).num_tiles for picture in scenario.pictures)
    for withheld in sorted({0, num_tiles // 2, num_tiles - 1}):
        engine = model.pair.engine()
        group = engine.submit(scenario)
        while engine.step(all_but(withheld)):
            pass
        for _ in range(3):
            assert not engine.step(all_but(withheld))
        sequence = group.sequences[0]
        assert sequence.num_computed_tokens == group.tiles[withheld].offset
        assert [tile.grant.tile_index for tile in engine.under_way] == [withheld]
        engine.run()
        assert_answers(model, [scenario], [group])


@picture_scenarios
def test_an_encoder_that_died_too_early_is_noticed(model: Model, scenario: Scenario) -> None:
    """The harness itself: a request that still needs a tile does not get by without the encoder."""
    engine = model.pair.engine()
    engine.encoder_is_alive = False
    engine.submit(scenario)
    with pytest.raises(EncoderDead):
        engine.run()
