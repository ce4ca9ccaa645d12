"""Blocks: who holds them, which are free, and which hold a known prefix."""

import pytest

from llm_service.block_manager import BlockManager
from llm_service.sampling_params import SamplingParams
from llm_service.sequence import QueueRank, Sequence, SequenceGroup, VisualTile
from tests.llm_service.fakes import PLACEHOLDER, Tile, layout


def make_sequence(parts, salt=b""):
    token_ids, tiles = layout(parts)
    group = SequenceGroup(0, QueueRank(0, 0), token_ids, tiles, SamplingParams(), frozenset(), 8, salt)
    return Sequence(group, 0)


def compute(blocks, sequence, num_tokens):
    before = sequence.num_computed_tokens
    assert blocks.allocate(sequence, before + num_tokens)
    sequence.num_computed_tokens += num_tokens
    blocks.publish(sequence)


def computed(blocks, parts, salt=b""):
    """A sequence whose whole prompt is in the cache, and its blocks free again."""
    sequence = make_sequence(parts, salt)
    compute(blocks, sequence, sequence.num_tokens)
    blocks.free(sequence)
    return sequence


def test_allocation_covers_the_tokens_and_no_more():
    blocks = BlockManager(8, 4)
    sequence = make_sequence([9])
    assert blocks.allocate(sequence, 5) and len(sequence.block_table) == 2
    assert blocks.allocate(sequence, 8) and len(sequence.block_table) == 2
    assert blocks.allocate(sequence, 3) and len(sequence.block_table) == 2
    assert blocks.num_free_blocks == 6
    blocks.check([sequence])


def test_an_allocation_that_fails_changes_nothing():
    blocks = BlockManager(2, 4)
    sequence = make_sequence([12])
    assert blocks.allocate(sequence, 4)
    assert not blocks.allocate(sequence, 12)
    assert len(sequence.block_table) == 1 and blocks.num_free_blocks == 1
    blocks.check([sequence])


def test_a_cached_prefix_is_shared_until_both_have_freed_it():
    blocks = BlockManager(8, 4)
    first, second = make_sequence([10]), make_sequence([10])
    compute(blocks, first, 10)
    assert blocks.attach_cached_prefix(second) == 8
    assert second.block_table == first.block_table[:2]
    blocks.check([first, second])
    blocks.free(first)
    assert blocks.num_free_blocks == 6
    blocks.free(second)
    assert blocks.num_free_blocks == 8
    blocks.check([])


def test_only_full_blocks_are_shared():
    blocks = BlockManager(8, 4)
    computed(blocks, [7])
    assert blocks.num_cached_tokens(make_sequence([7])) == 4
    assert blocks.num_cached_tokens(make_sequence([4])) == 0, "one token is always left to compute"


def test_a_block_is_found_only_after_it_was_computed():
    blocks = BlockManager(8, 4)
    sequence = make_sequence([12])
    assert blocks.allocate(sequence, 12)
    compute(blocks, sequence, 3)
    assert blocks.num_cached_tokens(make_sequence([12])) == 0
    compute(blocks, sequence, 6)
    assert blocks.num_cached_tokens(make_sequence([12])) == 8


def test_a_block_with_a_token_that_is_not_known_yet_is_not_found():
    blocks = BlockManager(8, 4)
    sequence = make_sequence([7])
    compute(blocks, sequence, 7)
    sequence.num_pending_tokens = 1
    compute(blocks, sequence, 1)
    assert sequence.num_published_blocks == 1
    sequence.num_pending_tokens = 0
    sequence.append(30)
    blocks.publish(sequence)
    longer = make_sequence([9])
    longer.token_ids[7] = 30
    assert blocks.num_cached_tokens(longer) == 8 and blocks.num_cached_tokens(make_sequence([9])) == 4


def test_the_end_of_a_prefix_is_reused_before_its_beginning():
    blocks = BlockManager(3, 4)
    computed(blocks, [12])
    other = make_sequence([4], salt=b"other")
    assert blocks.allocate(other, 4)
    assert blocks.num_cached_tokens(make_sequence([13])) == 8


def test_a_reused_block_is_not_found_under_its_old_prefix():
    blocks = BlockManager(2, 4)
    computed(blocks, [8])
    computed(blocks, [8], salt=b"other")
    assert blocks.num_cached_tokens(make_sequence([9])) == 0
    assert blocks.num_cached_tokens(make_sequence([9], salt=b"other")) == 8
    blocks.check([])


@pytest.mark.parametrize(
    ("parts", "shared"),
    [
        ([6, Tile("cat", 6), 8], 16),
        ([6, Tile("dog", 6), 8], 4),
        ([5, Tile("cat", 6), 9], 4),  # the same picture a position earlier
        ([6, Tile("cat", 3), Tile("cat", 3), 8], 8),  # rows 0 and 1 in the second block, as before
        ([6, Tile("cat", 6), Tile("dog", 4), 4], 12),
    ],
)
def test_a_block_is_shared_only_under_the_same_pictures_at_the_same_places(parts, shared):
    blocks = BlockManager(32, 4)
    computed(blocks, [6, Tile("cat", 6), 8])
    assert blocks.num_cached_tokens(make_sequence(parts)) == shared


def test_placeholder_ids_without_a_picture_share_nothing_with_a_picture():
    blocks = BlockManager(8, 4)
    computed(blocks, [Tile("cat", 8), 1])
    text = make_sequence([9])
    text.token_ids[:8] = [PLACEHOLDER] * 8
    assert blocks.num_cached_tokens(text) == 0


def test_tile_keys_that_concatenate_to_the_same_bytes_are_told_apart():
    blocks = BlockManager(8, 4)
    for keys in [(b"ab", b"c"), (b"a", b"bc")]:
        tiles = tuple(VisualTile(key, 2 * i, 2) for i, key in enumerate(keys))
        group = SequenceGroup(
            0, QueueRank(0, 0), [PLACEHOLDER] * 4 + [9], tiles, SamplingParams(), frozenset(), 8
        )
        sequence = Sequence(group, 0)
        assert blocks.num_cached_tokens(sequence) == 0
        compute(blocks, sequence, 5)


def test_salts_are_worlds_apart():
    blocks = BlockManager(8, 4)
    computed(blocks, [9], salt=b"one")
    assert blocks.num_cached_tokens(make_sequence([9], salt=b"two")) == 0
    assert blocks.num_cached_tokens(make_sequence([9])) == 0
    assert blocks.num_cached_tokens(make_sequence([9], salt=b"one")) == 8


def test_two_that_computed_the_same_at_once_keep_their_own_blocks():
    blocks = BlockManager(8, 4)
    first, second = make_sequence([9]), make_sequence([9])
    compute(blocks, first, 9)
    compute(blocks, second, 9)
    assert not set(first.block_table) & set(second.block_table)
    blocks.check([first, second])
    blocks.free(first)
    assert blocks.num_cached_tokens(make_sequence([9])) == 8


def test_reset_forgets_prefixes_and_keeps_blocks_in_use():
    blocks = BlockManager(8, 4)
    sequence = make_sequence([9])
    compute(blocks, sequence, 9)
    blocks.reset_prefix_cache()
    assert blocks.num_cached_tokens(make_sequence([9])) == 0
    blocks.check([sequence])
    blocks.free(sequence)
    blocks.check([])


def test_without_prefix_caching_nothing_is_found():
    blocks = BlockManager(8, 4, enable_prefix_caching=False)
    computed(blocks, [9])
    assert blocks.num_cached_tokens(make_sequence([9])) == 0
    assert blocks.attach_cached_prefix(make_sequence([9])) == 0


def test_check_notices_a_lost_block():
    blocks = BlockManager(4, 4)
    sequence = make_sequence([9])
    assert blocks.allocate(sequence, 9)
    with pytest.raises(AssertionError, match="reference counts"):
        blocks.check([])
