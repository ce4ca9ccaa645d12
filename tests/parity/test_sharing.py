"""What two requests share through the caches: the same picture everything, another one nothing behind it."""

from __future__ import annotations

import pytest

from tests.parity.conftest import Model
from tests.parity.local_pair import NUM_TOKENS, outputs
from tests.parity.scenarios import Picture, Scenario, Turn, picture

BEFORE = "Look at this picture of the house near the lake: "


def question(shown: Picture) -> Scenario:
    return Scenario("question", (Turn("user", (BEFORE, shown, "What is in the picture? Describe it.")),))


FIRST = question(picture(120, 60, seed=52))
OTHER = question(picture(120, 60, seed=53))


@pytest.fixture
def num_tokens_before_the_picture(model: Model) -> int:
    """In whole blocks: what two prompts with different pictures may share."""
    offset = model.pair.prompt(FIRST).placeholders[0].offset
    return offset // model.pair.backend.block_size * model.pair.backend.block_size


def test_prompts_that_differ_only_in_the_picture_share_the_text_before_it_only(
    model: Model, num_tokens_before_the_picture: int
) -> None:
    assert model.pair.prompt(FIRST) == model.pair.prompt(OTHER)  # token ids cannot tell them apart
    engine = model.pair.engine()
    for scenario in (FIRST, OTHER, FIRST):
        expected = model.reference.tokens(scenario, NUM_TOKENS)
        group = engine.submit(scenario)
        engine.run()
        assert outputs(group) == [expected]
        if scenario is OTHER:
            assert group.sequences[0].num_cached_tokens == num_tokens_before_the_picture > 0
            assert expected != model.reference.tokens(FIRST, NUM_TOKENS)
    assert group.sequences[0].num_cached_tokens > num_tokens_before_the_picture


def test_pictures_that_differ_do_not_share_while_both_run(model: Model) -> None:
    engine = model.pair.engine()
    groups = [engine.submit(scenario) for scenario in (FIRST, OTHER, FIRST, OTHER)]
    engine.run()
    first, other = (model.reference.tokens(scenario, NUM_TOKENS) for scenario in (FIRST, OTHER))
    assert [outputs(group) for group in groups] == [[first], [other], [first], [other]]
    assert engine.num_encoded == 2 * len(groups[0].tiles)  # the second pair found the tiles under way


def test_pictures_that_swap_places_share_nothing_behind_the_first(model: Model) -> None:
    """Same files, same sizes, same ids: only the order differs."""
    red, blue = picture(120, 60, seed=52), picture(120, 60, seed=53)
    engine = model.pair.engine()
    for order in ((red, blue), (blue, red)):
        scenario = Scenario("order", (Turn("user", (BEFORE, order[0], "or ", order[1], "which?")),))
        group = engine.submit(scenario)
        engine.run()
        assert outputs(group) == [model.reference.tokens(scenario, NUM_TOKENS)]
    offset = model.pair.prompt(scenario).placeholders[0].offset
    assert group.sequences[0].num_cached_tokens <= offset
    assert engine.num_encoded == len(group.tiles)  # the visual tokens themselves are the same


def test_another_cache_salt_shares_nothing(model: Model) -> None:
    engine = model.pair.engine()
    for salt in (b"", b"tenant", b"other tenant"):
        num_encoded = engine.num_encoded
        group = engine.submit(FIRST, cache_salt=salt)
        engine.run()
        assert outputs(group) == [model.reference.tokens(FIRST, NUM_TOKENS)]
        assert group.sequences[0].num_cached_tokens == 0
        assert engine.num_encoded == num_encoded + len(group.tiles)
