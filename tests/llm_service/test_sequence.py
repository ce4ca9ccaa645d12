"""Bookkeeping of one choice."""

from llm_service.sampling_params import SamplingParams
from llm_service.sequence import QueueRank, Sequence, SequenceGroup
from tests.llm_service.fakes import Tile, layout


def make_group(parts):
    token_ids, tiles = layout(parts)
    return SequenceGroup(0, QueueRank(0, 0), token_ids, tiles, SamplingParams(), frozenset(), 8)


def test_text_token_ids_leave_the_visual_positions_out():
    group = make_group([2, Tile("a", 3), Tile("b", 2), 1, Tile("c", 4)])
    assert len(group.prompt_token_ids) == 12
    assert group.text_token_ids() == [2, 3, 9]
    assert make_group([3]).text_token_ids() == [2, 3, 4]


def test_tiles_between_are_those_with_a_position_inside():
    sequence = Sequence(make_group([2, Tile("a", 3), Tile("b", 2), 3]), 0)
    keys = {
        (start, end): b"".join(tile.key for tile in sequence.tiles_between(start, end))
        for start in range(10)
        for end in range(start + 1, 11)
    }
    assert keys[0, 2] == b"" and keys[0, 3] == b"a" and keys[4, 5] == b"a"
    assert keys[4, 6] == b"ab" and keys[5, 6] == b"b" and keys[6, 10] == b"b"
    assert keys[7, 10] == b"" and keys[0, 10] == b"ab"


def test_a_sequence_decodes_when_only_its_newest_token_is_missing_from_the_cache():
    sequence = Sequence(make_group([3]), 0)
    sequence.num_computed_tokens = 2
    assert not sequence.is_decoding, "one token of the prompt is missing, but it is the prompt's"
    sequence.num_computed_tokens = 3
    sequence.append(7)
    assert sequence.is_decoding
    sequence.num_computed_tokens = 0  # preempted
    assert not sequence.is_decoding
    assert sequence.token_ids == [2, 3, 4, 7] and sequence.output_token_ids == [7]


def test_choices_do_not_share_their_token_lists():
    group = make_group([3])
    first, second = Sequence(group, 0), Sequence(group, 1)
    first.append(7)
    assert second.token_ids == group.prompt_token_ids == [2, 3, 4]


def test_rank_is_priority_then_arrival_then_choice():
    group = make_group([3])
    assert QueueRank(0, 1) < QueueRank(0, 2) < QueueRank(1, 0)
    assert Sequence(group, 0).rank < Sequence(group, 1).rank
