"""Slots of the visual store: free, granted, stored."""

import pytest

from llm_service.visual_store import VisualStore
from tests.llm_service.fakes import num_granted


def stored(store, key, group_id):
    slot = store.grant(key, group_id)
    store.store(key, group_id)
    return slot


def test_a_granted_tile_is_not_readable_until_it_is_stored():
    store = VisualStore(2)
    slot = store.grant(b"a", 1)
    assert slot is not None and store.slot_of(b"a") is None and num_granted(store) == 1
    store.store(b"a", 1)
    assert store.slot_of(b"a") == slot and num_granted(store) == 0
    assert store.slot_of(b"b") is None


def test_no_two_tiles_share_a_slot_and_a_full_store_grants_nothing():
    store = VisualStore(2)
    slots = {stored(store, b"a", 1), stored(store, b"b", 1)}
    assert slots == {0, 1}
    assert store.grant(b"c", 1) is None
    store.check({1})


def test_tiles_of_ended_groups_are_a_cache_and_die_least_recently_used_first():
    store = VisualStore(2)
    stored(store, b"a", 1)
    stored(store, b"b", 1)
    store.leave(1)
    assert store.join(b"a", 2), "a hit"
    store.leave(2)
    assert store.grant(b"c", 3) is not None
    assert store.slot_of(b"a") is not None and store.slot_of(b"b") is None


def test_a_tile_that_a_living_group_uses_is_not_taken_for_the_cache():
    store = VisualStore(1)
    stored(store, b"a", 1)
    assert store.join(b"a", 2)
    store.leave(1)
    assert store.grant(b"b", 3) is None
    store.leave(2)
    assert store.grant(b"b", 3) is not None


def test_a_slot_is_in_use_until_its_last_group_has_left_and_its_grant_is_void():
    store = VisualStore(3)
    stored(store, b"a", 1)
    store.join(b"a", 2)
    store.grant(b"b", 2)
    assert store.num_in_use == 2
    store.leave(1)
    assert store.num_in_use == 2
    store.leave(2)
    assert store.num_in_use == 1, "the front end may still write b"
    store.revoke(2)
    assert store.num_in_use == 0
    store.join(b"a", 3)
    assert store.num_in_use == 1
    store.evict_least_needed(lambda key: (1.0, 0))
    assert store.num_in_use == 0
    store.check(set())


def test_a_tile_that_comes_behind_its_group_is_cache_at_once():
    store = VisualStore(1)
    store.grant(b"a", 1)
    store.leave(1)
    store.store(b"a", 1)
    assert store.num_in_use == 0 and store.slot_of(b"a") is not None
    store.check(set())


def test_hits_and_grants_are_counted_once_a_group():
    store = VisualStore(2)
    stored(store, b"a", 1)
    for group_id in (1, 2, 2, 3):
        assert store.join(b"a", group_id)
    assert not store.join(b"b", 2)
    assert (store.num_hits, store.num_grants) == (2, 1)
    store.grant(b"b", 2)
    assert store.grant(b"c", 3) is None
    assert (store.num_hits, store.num_grants) == (2, 2)


def test_joining_counts_on_whoever_fetches_the_tile():
    store = VisualStore(2)
    assert not store.join(b"a", 2)
    store.grant(b"a", 1)
    assert store.join(b"a", 2)
    store.leave(1)
    store.revoke(1)
    assert not store.join(b"a", 2), "nobody fetches it any more"
    store.check({2})


def test_a_granted_slot_outlives_its_group_until_the_grant_is_revoked():
    store = VisualStore(1)
    store.grant(b"a", 1)
    store.leave(1)
    assert store.grant(b"b", 2) is None, "group 1's front end may still be writing"
    store.revoke(1)
    assert store.grant(b"b", 2) is not None


def test_revoking_leaves_stored_tiles_and_others_grants_alone():
    store = VisualStore(3)
    stored(store, b"a", 1)
    store.grant(b"b", 1)
    store.grant(b"c", 2)
    store.revoke(1)
    assert store.slot_of(b"a") is not None and num_granted(store) == 1


def test_only_the_owner_of_a_grant_may_store():
    store = VisualStore(1)
    store.grant(b"a", 1)
    with pytest.raises(AssertionError, match="without a grant"):
        store.store(b"a", 2)


def test_the_least_needed_is_evicted_and_none_means_hands_off():
    store = VisualStore(4)
    for key in (b"a", b"b", b"c"):
        stored(store, key, 1)
    store.grant(b"granted", 1)
    penalties = {b"a": (2.0, 0), b"b": (2.0, 7), b"c": None, b"granted": (9.0, 0)}
    assert store.evict_least_needed(penalties.get)
    assert store.slot_of(b"b") is None and store.slot_of(b"a") is not None
    assert store.evict_least_needed(penalties.get)
    assert not store.evict_least_needed(penalties.get)
    assert store.slot_of(b"c") is not None and num_granted(store) == 1
    store.check({1})


def test_check_notices_users_that_have_ended():
    store = VisualStore(1)
    stored(store, b"a", 1)
    with pytest.raises(AssertionError, match="has ended"):
        store.check(set())


def test_a_store_has_at_least_one_slot():
    with pytest.raises(ValueError, match="num_slots must be >= 1, got 0"):
        VisualStore(0)
