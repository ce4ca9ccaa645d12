"""The step: numbers to the runner, tokens back, and what a failed step leaves behind."""

import json
import time

import jsonschema
import pytest
import torch

from llm_service.attention.flash import FlashBackend
from llm_service.attention.sdpa import SdpaBackend
from llm_service.engine import MAX_OVERLAPPED_TOKENS, build_step_input
from llm_service.grammar import Grammar, GrammarVocabulary, probe
from llm_service.grammar_compiler import grammar_vocabulary
from llm_service.messages import VisualRows
from llm_service.response_format import FormatKind, ResponseFormat, grammar_text
from llm_service.sampling_params import SamplingParams
from llm_service.sequence import FinishReason, QueueRank, SequenceGroup
from llm_service.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.llm_service.attention.flash_written_out import WRITTEN_OUT
from tests.llm_service.attention.steps import CPU
from tests.llm_service.fakes import PLACEHOLDER, VOCAB_SIZE, Tile, World, alone, outputs
from tests.llm_service.front_end import EOS_ID, make_tokenizer
from tests.llm_service.real_world import live_and_compare, load
from tests.llm_service.schemas import SCHEMAS


def test_the_step_input_lists_sequence_after_sequence():
    world = World(budget=16)
    world.add([2, Tile("a"), 3], max_tokens=4)
    world.step(deliver=True)
    text = world.add([20])
    world.step()
    step = world.runner.steps[-1]
    assert step.token_ids == [PLACEHOLDER] * 4 + [8, 9, 10] + text.prompt_token_ids[:9]
    assert step.query_lens == [7, 9] and step.context_lens == [9, 9]
    assert [len(table) for table in step.block_tables] == [3, 3]
    assert step.visual_rows == [VisualRows(0, world.store.slot_of(b"a"), 0, 4)]
    assert step.logits_positions == [6], "the second one's prompt goes on"


def test_visual_rows_of_a_chunk_begin_and_end_inside_tiles():
    world = World(budget=6, block_size=4)
    world.add([1, Tile("a", 4), Tile("b", 8), 1])
    world.step(deliver=True)
    a, b = world.store.slot_of(b"a"), world.store.slot_of(b"b")
    world.step()
    assert world.runner.steps[-1].visual_rows == [VisualRows(0, a, 0, 4), VisualRows(4, b, 0, 2)]
    world.step()
    assert world.runner.steps[-1].visual_rows == [VisualRows(0, b, 2, 6)]


def test_a_step_past_a_missing_tile_is_a_programmers_error():
    world = World()
    group = world.add([1, Tile("a")])
    schedule = world.scheduler.schedule()
    schedule.add(group.sequences[0], 3)
    with pytest.raises(AssertionError, match="missing visual token"):
        build_step_input(schedule, world.store)


def test_progress_carries_the_first_steps_time_and_the_cached_tokens():
    world = World()
    group = world.add([6], max_tokens=3)
    results = [world.engine.step() for _ in range(3)]
    progress = [result.progress[0] for result in results]
    assert len({item.clock.scheduled_ns for item in progress}) == 1
    assert [token.token_id for item in progress for token in item.tokens] == outputs(group)[0]
    assert not world.engine.has_work


@pytest.mark.parametrize("overlap", [False, True])
def test_progress_tells_what_was_computed_before_the_last_tile_had_come(overlap):
    world = World(overlap=overlap)
    late, text = world.add([9, Tile("a"), 2], max_tokens=2), world.add([9], max_tokens=2)
    world.step()
    began = time.monotonic_ns()
    world.step()  # computes nothing of the prompt
    world.deliver_all()
    clocks = {}
    while world.engine.has_work:
        result = world.engine.step()
        clocks |= {item.sequence: item.clock for item in result.progress}
    clock = clocks[late.sequences[0]]
    assert 0 < clock.overlap_ns <= began - clock.scheduled_ns
    assert text.sequences[0] not in clocks or clocks[text.sequences[0]].overlap_ns == 0


def test_a_prefill_chunk_gives_no_progress():
    world = World(budget=4)
    world.add([6])
    result = world.engine.step()
    assert result.has_computed and result.progress == []


def test_logprobs_are_those_of_the_models_logits():
    world = World()
    params = SamplingParams(temperature=0.0, logprobs=2)
    world.engine.add(SequenceGroup(0, QueueRank(0, 0), [5, 6], (), params, frozenset(), 1))
    token = world.engine.step().progress[0].tokens[0]
    assert token.top[0] == (token.token_id, token.logprob) and len(token.top) == 2
    assert token.top[0][1] > token.top[1][1]


def test_a_seed_gives_the_same_text_whatever_else_runs_and_through_preemption():
    expected = alone([6], max_tokens=8, seed=11)
    world = World(num_blocks=6, max_model_len=24)
    world.add([7], max_tokens=12, seed=1)
    seeded = world.add([6], max_tokens=8, seed=11)
    world.finish()
    assert world.scheduler.num_preemptions > 0
    assert outputs(seeded) == expected != alone([6], max_tokens=8, seed=12)


def test_after_a_failed_step_everything_can_be_aborted_and_the_engine_goes_on():
    world = World()
    group, waiting = world.add([6], n=2), world.add([2, Tile("a")])
    world.step()
    world.runner.num_failures = 1
    with pytest.raises(RuntimeError, match="no kernel"):
        world.engine.step()
    for failed in (group, waiting):
        world.close(failed)
    world.scheduler.reset_prefix_cache()
    world.assert_all_free()
    again = world.add([6], n=2)
    world.finish()
    assert outputs(again) == alone([6], n=2)


def test_the_fake_model_tells_pictures_and_prefixes_apart():
    """Else the comparisons of these tests would prove nothing."""
    texts = [
        alone(parts, max_tokens=6)
        for parts in ([3, Tile("a"), 2], [3, Tile("b"), 2], [2, Tile("a"), 3], [9], [3, Tile("a"), 3])
    ]
    assert len({tuple(text[0]) for text in texts}) == len(texts)


def test_a_step_without_logits_is_possible():
    world = World(budget=4)
    world.add([9])
    world.step()
    assert world.runner.steps[-1].logits_positions == []
    assert world.runner.forward(world.runner.steps[-1]).shape == torch.Size([0, VOCAB_SIZE])


class TestGrammars:
    """Some requests are held to a grammar, beside others that are not."""

    def letters(self, *choices):
        vocabulary = grammar_vocabulary(make_tokenizer(), VOCAB_SIZE)
        form = ResponseFormat(FormatKind.CHOICE, choices=choices)
        return Grammar(grammar_text(form.rule(), strips_leading_space=False), vocabulary)

    def texts(self, group):
        tokenizer = make_tokenizer()
        return [tokenizer.decode(token_ids) for token_ids in outputs(group)]

    @pytest.mark.parametrize("overlap", [False, True])
    def test_every_choice_keeps_to_it_and_others_do_not_notice(self, overlap):
        world = World(overlap=overlap)
        options = {"stops": frozenset({EOS_ID}), "n": 3, "seed": 4}
        held = world.add([6], 30, grammar=self.letters("the cat", "an owl", "no"), **options)
        free = world.add([9], 8, seed=2)
        world.finish()
        assert set(self.texts(held)) <= {"the cat", "an owl", "no"}
        assert [s.finish_reason for s in held.sequences] == [FinishReason.STOP] * 3
        assert outputs(free) == alone([9], 8, seed=2)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_preemption_keeps_its_place(self, overlap):
        options = {"stops": frozenset({EOS_ID}), "seed": 4}
        grammar = self.letters("abcdefghijklmnop", "qrstuvwxyzabcdef")
        world = World(num_blocks=8, max_model_len=32, overlap=overlap)
        groups = [world.add([6], 20, grammar=grammar, **options) for _ in range(3)]
        world.finish()
        assert world.scheduler.num_preemptions > 0
        expected = alone([6], 20, grammar=grammar, **options)
        assert [outputs(group) for group in groups] == [expected] * 3
        assert self.texts(groups[0])[0] in ("abcdefghijklmnop", "qrstuvwxyzabcdef")

    def test_a_stop_token_of_the_caller_ends_it_earlier(self):
        stop = make_tokenizer().encode_plain("c")[0]
        world = World()
        group = world.add([6], 20, grammar=self.letters("abcd"), stops=frozenset({EOS_ID, stop}))
        world.finish()
        assert self.texts(group) == ["abc"]

    def test_min_tokens_choose_the_longer_answer(self):
        world = World()
        options = {"stops": frozenset({EOS_ID}), "min_tokens": 4}
        group = world.add([6], 20, grammar=self.letters("k", "kkkk"), **options)
        world.finish()
        assert self.texts(group) == ["kkkk"]

    def test_one_is_waited_for_while_steps_overlap(self):
        world = World(overlap=True)
        group = world.add([6], 20, grammar=self.letters("abcd"), stops=frozenset({EOS_ID}))
        world.finish()
        assert self.texts(group) == ["abcd"] and world.late_launcher.most_under_way == 1

    @pytest.mark.parametrize("overlap", [False, True])
    def test_a_grammar_that_takes_too_much_ends_its_request_only(self, overlap):
        world = World(overlap=overlap)
        schema = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(3000)}}
        tokens = [bytes([byte]) for byte in range(32, 32 + 60)] + [b"", b"", b"{", b"}"]
        vocabulary = GrammarVocabulary(tokens, lambda text: [])
        form = ResponseFormat(FormatKind.JSON_SCHEMA, json.dumps(schema))
        grammar = Grammar(grammar_text(form.rule(), strips_leading_space=False), vocabulary)
        group = world.add([6], 20, n=2, seed=1, grammar=grammar, stops=frozenset({60}))
        free = world.add([9], 6)
        failed = []
        while world.engine.has_work:
            failed += world.engine.step().failed
        world.close(group)
        assert failed == [group.group_id]
        assert {s.finish_reason for s in group.sequences} == {FinishReason.ABORT}
        assert outputs(free) == alone([9], 6)
        world.assert_all_free()


@pytest.mark.parametrize("overlap", [False, True])
def test_random_text_of_a_real_model_fulfils_every_schema(tmp_path, overlap):
    folder = make_checkpoint(tmp_path, "qwen3", "hf")
    model, tokenizer = load(folder, CPU), load_tokenizer(folder)
    stop = tokenizer.token_id("<|im_end|>")
    vocabulary = grammar_vocabulary(tokenizer, model.config.vocab_size)
    num_blocks = 640 // model.backend.block_size  # not enough for all
    world = model.world(overlap=overlap, num_blocks=num_blocks, max_num_seqs=24, max_model_len=640)
    groups = []
    for seed, schema in enumerate(SCHEMAS):
        rule = ResponseFormat(FormatKind.JSON_SCHEMA, json.dumps(schema)).rule()
        probe(grammar_text(rule, strips_leading_space=False))
        grammar = Grammar(grammar_text(rule, strips_leading_space=False), vocabulary)
        groups.append(world.add([4], 600, seed=seed, stops=frozenset({stop}), grammar=grammar))
    world.finish(max_steps=6000)
    for schema, group in zip(SCHEMAS, groups, strict=True):
        text = tokenizer.decode(outputs(group)[0])
        assert group.sequences[0].finish_reason is FinishReason.STOP, (schema, text)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert len(SCHEMAS) >= 50 and world.scheduler.num_preemptions > 0


class TestOverlap:
    def test_the_next_step_is_launched_before_the_tokens_are_read(self):
        world = World(overlap=True)
        group = world.add([6], max_tokens=4)
        known = []
        while world.engine.has_work:
            world.step()
            known.append(len(outputs(group)[0]))
        assert known == [0, 1, 2, 3, 4] and outputs(group) == alone([6], max_tokens=4)
        assert world.late_launcher.most_under_way == 2
        assert [step.token_ids for step in world.runner.steps[1:]] == [[i] for i in outputs(group)[0][:3]]
        world.assert_all_free()

    def test_a_token_under_way_is_named_by_its_row(self):
        world = World(overlap=True)
        short, long = world.add([6], max_tokens=1), world.add([7], max_tokens=3)
        world.engine.launch()
        world.engine.collect()
        schedule = world.scheduler.schedule()
        row_of = {short.sequences[0]: 0, long.sequences[0]: 1}
        step = build_step_input(schedule, world.store, row_of)
        assert step.token_ids == [-2], "the other one's only token is under way"

    def test_no_step_runs_for_one_that_reaches_the_end_of_the_context(self):
        world = World(overlap=True, max_model_len=8)
        group = world.add([6], max_tokens=9)
        world.finish()
        assert len(outputs(group)[0]) == 2 and len(world.runner.steps) == 2

    def test_what_was_computed_behind_a_stop_token_is_dropped(self):
        free = alone([6], max_tokens=6)[0]
        stop = next(place for place in range(1, 6) if free[place] not in free[:place])
        world = World(overlap=True)
        group = world.add([6], max_tokens=6, stops=frozenset({free[stop]}))
        results = []
        while world.engine.has_work:
            results.append(world.engine.step())
        assert outputs(group) == [free[: stop + 1]]
        assert sum(len(result.progress) for result in results) == stop + 1
        assert len(world.runner.steps) == stop + 2
        world.assert_all_free()

    @pytest.mark.parametrize(
        "option", [{"presence_penalty": -2.0}, {"min_tokens": 3, "stops": frozenset(range(50))}]
    )
    def test_one_that_needs_its_tokens_is_waited_for(self, option):
        world = World(overlap=True)
        group = world.add([6], max_tokens=3, **option)
        world.finish()
        assert outputs(group) == alone([6], max_tokens=3, **option)
        assert world.late_launcher.most_under_way == 1

    def test_long_steps_are_waited_for_so_that_the_next_one_misses_nothing(self):
        world = World(overlap=True, num_blocks=1024, budget=4096)
        world.add([MAX_OVERLAPPED_TOKENS], max_tokens=2)
        world.add([Tile("a"), 1], max_tokens=1)
        assert len(world.engine.step().progress) == 1, "a tile could come while it runs"

    def test_a_prompt_that_waits_for_tiles_goes_on_with_all_that_came_during_the_step(self):
        world = World(overlap=True)
        group = world.add([2, Tile("a"), Tile("b"), Tile("c"), Tile("d"), 1], max_tokens=2)
        world.step()
        chunks = []
        for arrived in ([0], [1, 2], [3]):
            for tile_index in arrived:
                world.deliver_tile(group, tile_index)
            chunks.append(list(world.step().values()))
            if arrived != [3]:
                assert world.late_launcher.most_under_way == 1
        num_tokens = [tile.num_tokens for tile in group.tiles]
        assert chunks == [[num_tokens[0]], [num_tokens[1] + num_tokens[2]], [num_tokens[3] + 1]]
        world.finish()
        assert world.late_launcher.most_under_way == 2, "decodes still overlap"

    def test_behind_a_chunk_that_misses_a_tile_nothing_is_launched_before_it_ends(self):
        world = World(overlap=True)
        group = world.add([2, Tile("a"), Tile("b"), 1], max_tokens=2)
        assert world.engine.step().has_computed
        assert not world.late_launcher.under_way, "it was not left running"
        assert group.sequences[0].num_computed_tokens == 2

    def test_long_steps_without_pictures_are_not_waited_for(self):
        texts = []
        for overlap in (False, True):
            world = World(overlap=overlap, num_blocks=1024, budget=MAX_OVERLAPPED_TOKENS)
            groups = [world.add([MAX_OVERLAPPED_TOKENS], max_tokens=2) for _ in range(2)]
            assert len(world.engine.step().progress) == (0 if overlap else 1)
            world.finish()
            texts.append([outputs(group) for group in groups])
        assert texts[0] == texts[1] and world.late_launcher.most_under_way == 2

    def test_a_slot_that_a_running_step_reads_is_not_granted_before_it_has_ended(self):
        world = World(overlap=True, num_slots=1)
        first = world.add([Tile("cat"), 2], max_tokens=8)
        world.step(deliver=True)
        second = world.add([Tile("dog"), 2], max_tokens=2)
        launched = world.engine.launch()
        assert world.store.slot_of(b"cat") is not None and launched.grants == []
        world.engine.collect()
        assert world.engine.launch().grants == [], "the tile is evicted, its slot is being read"
        grants = world.engine.collect().grants
        assert [(grant.group_id, grant.slot) for grant in grants] == [(second.group_id, 0)]
        assert not first.is_finished

    def test_a_held_grant_ends_with_its_request(self):
        world = World(overlap=True, num_slots=1)
        first = world.add([Tile("cat"), 2], max_tokens=8)
        world.step(deliver=True)
        second = world.add([Tile("dog"), 2], max_tokens=2)
        world.engine.step()
        world.engine.launch()
        world.close(second)
        assert world.engine.collect().grants == []
        world.finish()
        assert outputs(first) == alone([Tile("cat"), 2], max_tokens=8)

    def test_an_abort_with_tokens_under_way_frees_everything(self):
        world = World(overlap=True)
        group = world.add([6], n=2)
        for _ in range(2):
            world.step()
        world.engine.launch()
        world.close(group)
        assert world.engine.collect().progress == []
        while world.engine.has_work:
            assert world.engine.step().progress == []
        world.assert_all_free()

    def test_after_a_failed_step_the_ones_under_way_are_abandoned(self):
        world = World(overlap=True)
        group = world.add([6])
        world.step()
        world.runner.num_failures = 1
        with pytest.raises(RuntimeError, match="no kernel"):
            world.step()
        world.engine.abandon_steps()
        world.close(group)
        world.scheduler.reset_prefix_cache()
        world.assert_all_free()
        again = world.add([6])
        world.finish()
        assert outputs(again) == alone([6])


@pytest.mark.slow
def test_a_thousand_random_steps_that_overlap_give_the_tokens_of_undisturbed_runs(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", "hf")
    live_and_compare(load(folder, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [SdpaBackend(CPU, block_size=256), FlashBackend(WRITTEN_OUT)], ids=["sdpa", "flash-attn"]
)
def test_blocks_of_256_tokens_give_the_tokens_of_undisturbed_runs(tmp_path, backend):
    folder = make_checkpoint(tmp_path, "qwen3", "hf")
    # A decode rarely needs another block of this size: preemptions are few.
    live_and_compare(load(folder, CPU, backend), scale=32, min_preemptions=2)
