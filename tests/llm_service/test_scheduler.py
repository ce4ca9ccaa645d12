"""The scheduler as stories: who runs, who waits, who gives way, and that nothing is ever lost."""

import pytest

from llm_service.sequence import FinishReason, SequenceStatus
from tests.llm_service.fakes import Tile, World, alone, num_granted, outputs
from tests.llm_service.random_life import RandomLife

WAITING, RUNNING = SequenceStatus.WAITING, SequenceStatus.RUNNING


def statuses(*groups):
    return [group.sequences[0].status for group in groups]


class TestBudget:
    def test_a_long_prompt_is_computed_in_chunks_of_the_budget(self):
        world = World(budget=8)
        group = world.add([20])
        assert [list(world.step().values()) for _ in range(3)] == [[8], [8], [4]]
        assert group.sequences[0].num_output_tokens == 1

    def test_decodes_and_prefill_chunks_share_the_budget_decodes_first(self):
        world = World(budget=8)
        first = world.add([6], max_tokens=10)
        world.step()
        second = world.add([20], salt=b"another")
        counts = world.step()
        assert counts[first.sequences[0]] == 1 and counts[second.sequences[0]] == 7

    def test_several_prefills_run_in_one_step_the_oldest_first(self):
        world = World(budget=8)
        old, young = world.add([12]), world.add([12], salt=b"another")
        assert world.step() == {old.sequences[0]: 8}
        assert world.step() == {old.sequences[0]: 4, young.sequences[0]: 4}

    def test_the_long_prefill_threshold_leaves_budget_for_those_behind(self):
        world = World(budget=16, threshold=4)
        first, second = world.add([12]), world.add([3])
        assert world.step() == {first.sequences[0]: 4, second.sequences[0]: 3}

    def test_no_more_than_max_num_seqs_are_computed_together(self):
        world = World(max_num_seqs=2)
        groups = [world.add([4], max_tokens=3) for _ in range(5)]
        while world.engine.has_work:
            assert len(world.step()) <= 2
        assert [outputs(group) for group in groups] == [outputs(groups[0])] * 5

    def test_a_sequence_that_waits_for_a_tile_leaves_its_place_to_text(self):
        world = World(max_num_seqs=1)
        picture, text = world.add([4, Tile("cat"), 2]), world.add([4])
        world.step()
        assert world.step() == {text.sequences[0]: 4}
        world.finish()
        assert outputs(picture) == alone([4, Tile("cat"), 2])


class TestBlocks:
    def test_second_request_waits_when_blocks_run_out(self):
        world = World(num_blocks=4, max_model_len=16)
        first, second = world.add([12], max_tokens=2), world.add([9], max_tokens=2)
        world.step()
        assert statuses(first, second) == [RUNNING, WAITING]
        world.step()
        assert first.is_finished
        world.step()
        assert statuses(second) == [RUNNING]
        world.finish()

    def test_a_small_request_behind_does_not_overtake_one_that_waits_for_blocks(self):
        world = World(num_blocks=4, max_model_len=16)
        world.add([12], max_tokens=3)
        world.add([9])
        small = world.add([2])
        world.step()
        assert statuses(small) == [WAITING]

    def test_nothing_is_reserved_for_tokens_not_yet_made(self):
        world = World(num_blocks=4, max_model_len=16)
        world.add([4], max_tokens=12)
        world.step()
        assert world.blocks.num_free_blocks == 3

    def test_a_prompt_that_fills_the_whole_cache_finishes(self):
        world = World(num_blocks=4, max_model_len=16)
        group = world.add([15], max_tokens=5)
        world.finish()
        assert group.sequences[0].finish_reason is FinishReason.LENGTH
        assert group.sequences[0].num_tokens == 16


class TestPreemption:
    def test_the_youngest_gives_way_and_is_recomputed_to_the_same_text(self):
        world = World(num_blocks=6, max_model_len=24)
        groups = [world.add([6 + i], max_tokens=8) for i in range(3)]
        world.finish()
        assert world.scheduler.num_preemptions > 0
        assert [outputs(g) for g in groups] == [alone([6 + i], max_tokens=8) for i in range(3)]

    def test_the_oldest_is_never_preempted(self):
        world = World(num_blocks=6, max_model_len=24)
        oldest = world.add([8], max_tokens=12)
        for i in range(3):
            world.add([5 + i], max_tokens=8)
        computed = 0
        while not oldest.is_finished:
            world.step()
            now = oldest.sequences[0].num_computed_tokens
            assert now > computed or oldest.is_finished
            computed = now
        world.finish()

    def test_a_text_only_one_gives_way_before_a_younger_one_with_a_picture(self):
        world = World(num_blocks=6, max_model_len=24, prefix_caching=False)
        oldest = world.add([7], max_tokens=12)
        text = world.add([6], max_tokens=8)
        picture = world.add([3, Tile("cat")], max_tokens=8)
        world.step(deliver=True)
        while world.scheduler.num_preemptions == 0:
            world.step(deliver=True)
        assert statuses(oldest, text, picture) == [RUNNING, WAITING, RUNNING]
        world.finish()

    def test_a_preempted_one_reads_its_tiles_again_from_the_store(self):
        world = World(num_blocks=5, max_model_len=20, prefix_caching=False)
        world.add([7], max_tokens=10)
        parts = [2, Tile("cat"), 1]
        picture = world.add(parts, max_tokens=6)
        world.finish()
        assert world.scheduler.num_preemptions > 0
        assert world.granted == [(picture.group_id, 0)]
        assert outputs(picture) == alone(parts, max_tokens=6)

    def test_a_decode_scheduled_in_this_step_gives_way_to_an_older_prefill(self):
        world = World(num_blocks=4, max_model_len=16, budget=6, prefix_caching=False)
        old = world.add([3, Tile("cat"), 6], max_tokens=2)
        young = world.add([7], max_tokens=6)
        while young.sequences[0].num_output_tokens == 0:
            world.step()
        world.deliver_all()
        world.step()
        while world.scheduler.num_preemptions == 0:
            world.step(deliver=True)
        assert statuses(young) == [WAITING] and not young.sequences[0].block_table
        world.finish()
        assert outputs(old) == alone([3, Tile("cat"), 6], max_tokens=2)
        assert outputs(young) == alone([7], max_tokens=6)

    def test_the_youngest_keeps_its_blocks_and_waits_when_there_is_nobody_behind_it(self):
        """Giving them up itself, it would come back in the same step, compute the same again, and so on."""
        world = World(num_blocks=4, max_model_len=16, threshold=4)
        picture, text = world.add([5, Tile("cat"), 2]), world.add([10], salt=b"another")
        for _ in range(4):
            world.step()
        assert text.sequences[0].num_computed_tokens == 8
        assert world.step() == {} and world.scheduler.num_preemptions == 0
        world.finish()
        assert outputs(picture) == alone([5, Tile("cat"), 2]) and outputs(text) == alone([10])

    def test_priorities_go_before_arrival(self):
        world = World(budget=4)
        low = world.add([4], max_tokens=1, priority=5)
        high = world.add([4], max_tokens=1, priority=-5)
        world.step()
        assert high.is_finished and not low.is_finished
        world.finish()

    def test_a_younger_one_with_priority_preempts_when_blocks_run_out(self):
        world = World(num_blocks=4, max_model_len=16, prefix_caching=False)
        low = world.add([6], max_tokens=8, priority=1)
        high = world.add([7], max_tokens=8, priority=0)
        while world.scheduler.num_preemptions == 0:
            world.step()
        assert statuses(low, high) == [WAITING, RUNNING]
        world.finish()


class TestTiles:
    def test_a_sequence_stops_right_before_the_first_missing_visual_token(self):
        world = World()
        parts = [3, Tile("a"), 2, Tile("b"), 5]
        picture, text = world.add(parts), world.add([6], max_tokens=9)
        world.step()
        world.deliver_tile(picture, 0)
        for _ in range(4):
            counts = world.step()
            assert picture.sequences[0].num_computed_tokens == picture.tiles[1].offset
            assert counts[text.sequences[0]] >= 1
        world.deliver_tile(picture, 1)
        world.finish()
        assert outputs(picture) == alone(parts) and outputs(text) == alone([6], max_tokens=9)

    @pytest.mark.parametrize("withheld", range(4))
    def test_whichever_tile_is_withheld_the_engine_gets_up_to_it(self, withheld):
        world = World(budget=7)
        parts = [2, Tile("a"), Tile("b"), 1, Tile("c"), Tile("d"), 3]
        group = world.add(parts)
        world.step()
        for index in range(4):
            if index != withheld:
                world.deliver_tile(group, index)
        for _ in range(6):
            world.step()
        assert group.sequences[0].num_computed_tokens == group.tiles[withheld].offset
        world.finish()
        assert outputs(group) == alone(parts)

    def test_a_step_that_computes_nothing_still_grants(self):
        world = World()
        group = world.add([Tile("cat"), 2])
        result = world.engine.step()
        assert not result.has_computed and [g.group_id for g in result.grants] == [group.group_id]
        assert group.sequences[0].status is WAITING and not group.sequences[0].block_table

    def test_grants_follow_the_queue(self):
        world = World(num_slots=3)
        world.add([1, Tile("a"), Tile("b")])
        world.add([1, Tile("c"), Tile("d")], priority=-1)
        world.step()
        assert world.granted == [(1, 0), (1, 1), (0, 0)]
        world.finish()

    def test_the_oldest_prefill_obtains_slots_from_a_store_full_of_younger_tiles(self):
        world = World(num_slots=2)
        young_parts, old_parts = [1, Tile("a"), Tile("b"), 1], [1, Tile("c"), Tile("d"), 1]
        young = world.add(young_parts, priority=1)
        world.step()
        assert world.granted == [(0, 0), (0, 1)]
        world.deliver_tile(young, 1)  # tile 0 is granted still, tile 1 stored and unread
        old = world.add(old_parts, priority=0)
        world.step()
        assert world.granted[2:] == [(1, 0)]
        world.finish()
        assert world.granted.count((0, 1)) == 2, "the evicted tile is granted again"
        assert outputs(old) == alone(old_parts) and outputs(young) == alone(young_parts)

    def test_a_slot_taken_by_an_older_one_is_not_read_any_more_in_that_step(self):
        world = World(num_slots=1)
        young = world.add([1, Tile("a"), 1], priority=1, max_tokens=5)
        world.step(deliver=True)
        old = world.add([1, Tile("b"), 1], priority=0)
        assert world.step() == {old.sequences[0]: 1}  # and not the tile that gave way
        assert world.granted == [(0, 0), (1, 0)]
        world.finish()
        assert world.granted == [(0, 0), (1, 0), (0, 0)]
        assert outputs(young) == alone([1, Tile("a"), 1], max_tokens=5)

    def test_a_slot_read_in_one_step_may_be_granted_in_the_next(self):
        world = World(num_slots=1)
        world.add([1, Tile("a"), 1], max_tokens=5)
        world.step(deliver=True)
        world.add([1, Tile("b"), 1], salt=b"another")
        world.step()  # reads a
        assert world.granted == [(0, 0)]
        world.step()
        assert world.granted == [(0, 0), (1, 0)]
        world.finish()

    def test_the_same_picture_twice_in_one_prompt_is_granted_once(self):
        world = World()
        parts = [2, Tile("cat"), 3, Tile("cat"), 1]
        group = world.add(parts)
        world.finish()
        assert world.granted == [(0, 0)]
        other = [2, Tile("cat"), 3, Tile("dog"), 1]
        assert outputs(group) == alone(parts) != alone(other)

    def test_two_requests_with_one_picture_fetch_it_once(self):
        world = World()
        first, second = world.add([1, Tile("cat"), 2]), world.add([3, Tile("cat"), 1])
        world.finish()
        assert world.granted == [(0, 0)]
        assert outputs(first) == alone([1, Tile("cat"), 2]) and outputs(second) == alone([3, Tile("cat"), 1])

    def test_when_the_fetching_one_is_aborted_the_other_gets_the_grant(self):
        world = World()
        first, second = world.add([1, Tile("cat"), 2]), world.add([3, Tile("cat"), 1])
        world.step()
        world.close(first)
        world.step()
        assert world.granted == [(0, 0), (1, 0)]
        world.finish()
        assert outputs(second) == alone([3, Tile("cat"), 1])

    @pytest.mark.parametrize("num_slots", [1, 2, 3])
    def test_a_store_smaller_than_one_requests_tiles_still_finishes(self, num_slots):
        world = World(num_slots=num_slots)
        parts = [1, *(Tile(f"t{i}") for i in range(6)), 2]
        group, other = world.add(parts), world.add([2, Tile("t3"), Tile("x"), 1])
        world.finish()
        assert outputs(group) == alone(parts) and outputs(other) == alone([2, Tile("t3"), Tile("x"), 1])

    def test_tiles_that_came_out_of_order_give_way_to_the_one_that_is_needed_first(self):
        """A preempted request starts again at tile 0 while its last tiles fill the store."""
        world = World(num_blocks=7, max_model_len=28, num_slots=2, prefix_caching=False)
        oldest = world.add([11], max_tokens=17)
        parts = [1, Tile("a"), Tile("b"), Tile("c"), Tile("d"), 1]
        picture = world.add(parts, max_tokens=2)
        world.step(deliver=True)
        world.step()  # reads a and b
        world.step()  # grants c and d
        assert [grant.tile_index for grant in world.grants] == [2, 3]
        while world.scheduler.num_preemptions == 0:
            world.step()
        world.deliver_all()
        world.finish()
        assert outputs(picture) == alone(parts, max_tokens=2)
        assert outputs(oldest) == alone([11], max_tokens=17)

    def test_one_that_waits_for_blocks_takes_them_from_a_younger_one_that_waits_for_slots(self):
        """Else each would hold what the other needs, forever."""
        world = World(num_blocks=4, max_model_len=16, num_slots=1)
        old_parts, young_parts = [Tile("a"), 9], [9, Tile("b"), 1]
        old, young = world.add(old_parts, max_tokens=2), world.add(young_parts, max_tokens=2)
        world.step()  # the old one waits for its tile at once, the young one takes three of four blocks
        assert young.sequences[0].num_computed_tokens == 9
        world.finish()
        assert outputs(old) == alone(old_parts, max_tokens=2)
        assert outputs(young) == alone(young_parts, max_tokens=2)

    def test_places_full_of_sequences_that_wait_for_slots_do_not_lock_out_the_oldest(self):
        world = World(max_num_seqs=1, num_slots=1)
        old, young = world.add([Tile("a"), 3]), world.add([3, Tile("b"), 1])
        world.step()
        assert statuses(old, young) == [WAITING, RUNNING]
        world.finish()

    def test_a_tile_evicted_while_half_read_is_granted_again(self):
        world = World(num_slots=1, budget=3, prefix_caching=False)
        parts = [1, Tile("a", 8), 1]
        group = world.add(parts)
        world.step(deliver=True)
        world.step()
        assert group.sequences[0].num_computed_tokens == 4, "in the middle of the tile"
        assert world.store.evict_least_needed(lambda key: (0, 0))
        assert world.step() == {}
        world.finish()
        assert world.granted == [(0, 0), (0, 0)]
        assert outputs(group) == alone(parts)

    def test_without_a_prefix_cache_choices_at_different_tiles_do_not_block_each_other(self):
        world = World(num_slots=1, num_blocks=8, max_model_len=24, budget=6, prefix_caching=False)
        parts = [3, Tile("a"), Tile("b"), Tile("c"), 1]
        groups = [world.add(parts, n=2, seed=3), world.add([2, *parts[1:]], n=2, seed=3)]
        world.finish()
        assert outputs(groups[0]) == alone(parts, n=2, seed=3)
        assert outputs(groups[1]) == alone([2, *parts[1:]], n=2, seed=3)

    def test_a_slot_granted_to_a_finished_request_is_nobody_elses_until_it_is_closed(self):
        """Its front end may be writing it, for it has not heard of the end yet."""
        world = World(num_slots=1)
        group = world.add([2, Tile("a")], n=2)
        world.step()
        for sequence in group.sequences:
            world.scheduler.finish(sequence, FinishReason.ABORT)
        other = world.add([1, Tile("b")])
        world.step()
        assert world.granted == [(0, 0)]
        world.close(group)
        world.step()
        assert world.granted == [(0, 0), (1, 0)]
        world.finish()
        assert outputs(other) == alone([1, Tile("b")])


class TestEncodingOverlap:
    PARTS = [2, Tile("a"), Tile("b"), 1, Tile("c"), 3]

    def test_without_it_a_prompt_is_begun_when_all_its_tiles_are_there(self):
        world = World(encoding_overlap=False)
        group, text = world.add(self.PARTS), world.add([4])
        for tile_index in (2, 0, 1):
            world.step()
            assert group.sequences[0].num_computed_tokens == 0
            world.deliver_tile(group, tile_index)
        assert text.sequences[0].num_output_tokens == 3
        assert world.step()[group.sequences[0]] == len(group.prompt_token_ids)
        world.finish()
        assert outputs(group) == alone(self.PARTS)

    def test_a_chunk_too_small_to_be_worth_a_step_waits_for_the_tile_behind_it(self):
        world = World(min_overlap_tokens=7)
        group = world.add(self.PARTS)
        sequence = group.sequences[0]
        world.step()
        world.deliver_tile(group, 0)
        world.step()
        assert sequence.num_computed_tokens == 0  # 2 + 4 tokens are there
        world.deliver_tile(group, 1)
        assert world.step() == {sequence: group.tiles[2].offset}
        world.deliver_tile(group, 2)
        assert world.step() == {sequence: 7}
        world.finish()
        assert outputs(group) == alone(self.PARTS)

    @pytest.mark.parametrize(("together", "computed"), [(4, 6), (6, 6), (7, 0), (0, 0)])
    def test_unless_it_is_set_what_comes_together_is_worth_a_step(self, together, computed):
        world = World(min_overlap_tokens=0)
        group = world.add(self.PARTS, arrival_tokens=together)
        sequence = group.sequences[0]
        world.step()
        world.deliver_tile(group, 0)
        world.step()
        assert sequence.num_computed_tokens == computed  # two of text and four of the tile are there
        world.finish()
        assert outputs(group) == alone(self.PARTS)

    @pytest.mark.parametrize("is_wanted", [False, True])
    def test_where_encoders_share_the_gpu_only_if_that_is_wanted(self, is_wanted):
        world = World(overlap_on_shared_gpu=is_wanted)
        shared, apart = world.add(self.PARTS, takes_turns=True), world.add(self.PARTS)
        world.step()
        world.deliver_tile(shared, 0)
        world.step()
        assert bool(shared.sequences[0].num_computed_tokens) == is_wanted
        assert apart.sequences[0].num_computed_tokens
        world.finish()
        assert outputs(shared) == outputs(apart) == alone(self.PARTS)

    def test_the_end_of_a_prompt_is_never_too_small(self):
        world = World(min_overlap_tokens=7)
        group = world.add([Tile("a"), 1])
        world.step()
        world.deliver_all()
        assert world.step() == {group.sequences[0]: 5}

    @pytest.mark.parametrize("options", [{"encoding_overlap": False}, {"min_overlap_tokens": 100}])
    @pytest.mark.parametrize("num_slots", [1, 2, 3])
    def test_nobody_waits_for_a_tile_that_has_no_slot(self, num_slots, options):
        world = World(num_slots=num_slots, **options)
        parts = [1, *(Tile(f"t{i}") for i in range(6)), 2]
        group, other = world.add(parts), world.add([2, Tile("t3"), Tile("x"), 1])
        world.finish()
        assert outputs(group) == alone(parts) and outputs(other) == alone([2, Tile("t3"), Tile("x"), 1])


class TestPrefixCache:
    def test_the_same_prompt_is_read_from_the_cache_and_answers_the_same(self):
        world = World()
        first = world.add([14])
        world.finish()
        second = world.add([14])
        assert list(world.step().values()) == [2]
        world.finish()
        assert [g.sequences[0].num_cached_tokens for g in (first, second)] == [0, 12]
        assert outputs(first) == outputs(second)

    def test_one_token_is_always_left_to_compute(self):
        world = World()
        world.add([8])
        world.finish()
        again = world.add([8])
        world.finish()
        assert again.sequences[0].num_cached_tokens == 4

    def test_prompts_that_differ_only_in_the_picture_share_nothing_behind_it(self):
        world = World()
        cat = world.add([4, Tile("cat"), 8])
        world.finish()
        dog, cat_again = world.add([4, Tile("dog"), 8]), world.add([4, Tile("cat"), 8])
        world.finish()
        assert dog.sequences[0].num_cached_tokens == 4
        assert cat_again.sequences[0].num_cached_tokens == 12
        assert outputs(cat_again) == outputs(cat) and outputs(dog) == alone([4, Tile("dog"), 8])
        assert outputs(dog) != outputs(cat)

    def test_a_cached_picture_is_not_asked_for_again(self):
        world = World(num_slots=1)
        world.add([2, Tile("cat"), 6])
        world.add([2, Tile("dog"), 6])  # takes the only slot
        world.finish()
        world.add([2, Tile("cat"), 6])
        world.finish()
        assert world.granted == [(0, 0), (1, 0)]

    def test_another_salt_shares_nothing(self):
        world = World()
        world.add([14], salt=b"one")
        world.finish()
        other = world.add([14], salt=b"two")
        world.finish()
        assert other.sequences[0].num_cached_tokens == 0

    def test_without_prefix_caching_nothing_is_read(self):
        world = World(prefix_caching=False)
        world.add([14])
        world.finish()
        again = world.add([14], n=2)
        world.finish()
        assert [sequence.num_cached_tokens for sequence in again.sequences] == [0, 0]

    def test_generated_text_is_cached_too(self):
        world = World()
        first = world.add([6], max_tokens=7)
        world.finish()
        follow_up = world.add([6])
        world.engine.abort(follow_up.group_id)
        conversation = [*first.sequences[0].token_ids, 7]
        follow_up = world.add([len(conversation)])
        follow_up.sequences[0].token_ids[:] = conversation
        world.step()
        assert follow_up.sequences[0].num_cached_tokens == 12
        world.finish()


class TestChoices:
    def test_the_prompt_of_n_choices_is_computed_once(self):
        world = World()
        group = world.add([17], n=3, seed=7, max_tokens=5)
        assert list(world.step().values()) == [17]
        world.step()
        assert world.runner.steps[-1].query_lens == [1, 1, 1]
        world.finish()
        assert outputs(group) == alone([17], n=3, seed=7, max_tokens=5)
        assert len({tuple(tokens) for tokens in outputs(group)}) == 3

    def test_choices_share_the_tiles_even_of_a_tiny_store(self):
        world = World(num_slots=1, num_blocks=16)
        parts = [3, Tile("a"), Tile("b"), Tile("c"), 1]
        group = world.add(parts, n=3, seed=7)
        world.finish()
        assert outputs(group) == alone(parts, n=3, seed=7)

    def test_when_the_first_choice_is_aborted_in_its_prefill_only_one_other_goes_on_with_the_prompt(self):
        world = World(budget=8)
        group = world.add([16], n=3, seed=7)
        world.step()
        world.engine.abort_choice(group.group_id, 0)
        world.scheduler.check()
        assert world.step() == {group.sequences[1]: 8}  # the others are in the cache
        world.finish()
        assert outputs(group) == [[], *alone([16], n=3, seed=7)[1:]]

    def test_one_choice_ends_and_its_siblings_go_on(self):
        world = World()
        group = world.add([6, Tile("cat")], n=2, max_tokens=6)
        for _ in range(4):
            world.step(deliver=True)
        world.engine.abort_choice(group.group_id, 1)
        world.engine.abort_choice(group.group_id, 1)
        world.finish()
        assert group.sequences[0].num_output_tokens == 6
        assert group.sequences[1].finish_reason is FinishReason.ABORT


class TestAborts:
    def abort(self, world, group):
        world.engine.abort(group.group_id)
        world.scheduler.check()
        world.close(group)
        assert group.sequences[0].finish_reason is FinishReason.ABORT
        world.assert_all_free()
        world.close(group)  # twice is once

    def test_while_waiting(self):
        world = World()
        self.abort(world, world.add([6]))

    def test_in_the_middle_of_the_prefill(self):
        world = World(budget=4)
        group = world.add([10])
        world.step()
        self.abort(world, group)

    def test_while_waiting_for_a_tile_with_its_slot_granted(self):
        world = World()
        group = world.add([6, Tile("cat"), 2])
        world.step()
        assert num_granted(world.store) == 1
        self.abort(world, group)

    def test_before_anything_was_computed_but_a_slot_is_granted(self):
        world = World()
        group = world.add([Tile("cat"), 2])
        world.step()
        self.abort(world, group)

    def test_with_a_stored_tile_that_nobody_has_read(self):
        world = World(num_slots=1)
        group = world.add([6, Tile("cat"), 2])
        world.step(deliver=True)
        self.abort(world, group)
        other = world.add([6, Tile("dog"), 2])
        world.finish()
        assert outputs(other) == alone([6, Tile("dog"), 2])

    def test_while_decoding(self):
        world = World()
        group = world.add([6, Tile("cat"), 2], n=2)
        for _ in range(3):
            world.step(deliver=True)
        assert group.sequences[0].num_output_tokens > 0
        self.abort(world, group)

    def test_while_preempted(self):
        world = World(num_blocks=5, max_model_len=20)
        oldest, victim = world.add([7], max_tokens=12), world.add([6], max_tokens=8)
        while world.scheduler.num_preemptions == 0:
            world.step()
        world.engine.abort(oldest.group_id)
        self.abort(world, victim)

    def test_a_tile_that_arrives_after_the_abort_is_ignored(self):
        world = World()
        group = world.add([Tile("cat"), 2])
        world.step()
        world.close(group)
        world.scheduler.tile_stored(group.group_id, 0)
        world.assert_all_free()


class TestEnds:
    def test_max_tokens(self):
        world = World()
        group = world.add([6], max_tokens=3)
        world.finish()
        assert group.sequences[0].num_output_tokens == 3
        assert group.sequences[0].finish_reason is FinishReason.LENGTH

    def test_max_model_len(self):
        world = World(max_model_len=9)
        group = world.add([6], max_tokens=30)
        world.finish()
        assert group.sequences[0].num_tokens == 9
        assert group.sequences[0].finish_reason is FinishReason.LENGTH

    def test_a_stop_token_ends_the_text_and_is_its_last_token(self):
        free = alone([6], max_tokens=6)[0]
        world = World()
        group = world.add([6], max_tokens=6, stops=frozenset({free[2]}))
        world.finish()
        assert outputs(group) == [free[: free.index(free[2]) + 1]]
        assert group.sequences[0].finish_reason is FinishReason.STOP

    @pytest.mark.parametrize("min_tokens", [1, 3])
    def test_no_stop_token_comes_before_min_tokens(self, min_tokens):
        free = alone([6], max_tokens=1)[0]
        world = World()
        group = world.add([6], max_tokens=6, stops=frozenset(free), min_tokens=min_tokens)
        world.finish()
        assert free[0] not in group.sequences[0].output_token_ids[:min_tokens]

    def test_a_stop_token_at_max_tokens_is_a_stop(self):
        free = alone([6], max_tokens=2)[0]
        world = World()
        group = world.add([6], max_tokens=2, stops=frozenset({free[1]}))
        world.finish()
        assert group.sequences[0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_random_life_changes_no_answer_and_loses_nothing(seed, overlap):
    life = RandomLife(seed, overlap=overlap)
    life.live(120)
    life.world.finish(max_steps=1500)
    assert life.assert_all_as_alone() > 5


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_256_tokens_change_no_answer_either(seed, overlap):
    def alone_in_large_blocks(**options):
        return World(**{**options, "block_size": 256})

    life = RandomLife(seed, make_reference=alone_in_large_blocks, block_size=256, scale=32, overlap=overlap)
    life.live(120)
    life.world.finish(max_steps=1500)
    assert life.assert_all_as_alone() > 5
