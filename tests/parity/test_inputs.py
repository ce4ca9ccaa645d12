"""What goes into the decoder: prompt ids, tile grids, tile pixels and visual embeddings."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from encoder_service.tiling import TilingOptions, normalize, plan_tiles
from tests.parity.conftest import Model
from tests.parity.reference import MAX_TILES
from tests.parity.scenarios import SCENARIOS, Scenario

WITH_PICTURES = [scenario for scenario in SCENARIOS if scenario.pictures]
all_scenarios = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
picture_scenarios = pytest.mark.parametrize("scenario", WITH_PICTURES, ids=lambda scenario: scenario.name)


@all_scenarios
def test_prompt_ids_equal_the_reference(model: Model, scenario: Scenario) -> None:
    prompt = model.pair.prompt(scenario)
    expected = model.reference.input(scenario)
    assert prompt.token_ids == expected.token_ids
    tokens_per_tile = model.pair.vision.preprocessing.tokens_per_tile
    assert [place.length for place in prompt.placeholders] == [
        tokens_per_tile * count for count in expected.num_tiles
    ]


@picture_scenarios
def test_tiles_equal_the_processors(model: Model, scenario: Scenario) -> None:
    """The pixels are the same integers; the processor normalises in one step, which rounds differently."""
    expected = model.reference.input(scenario).pixel_values
    tiles = torch.cat([model.pair.tiles(picture) for picture in scenario.pictures])
    settings = model.pair.vision.preprocessing
    assert expected is not None and len(tiles) == len(expected)
    torch.testing.assert_close(
        normalize(tiles, settings.mean, settings.std, torch.float32), expected, atol=1e-5, rtol=0
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    assert torch.equal(tiles, ((expected * std + mean) * 255).round().to(torch.uint8))


@picture_scenarios
def test_visual_embeds_equal_the_towers(model: Model, scenario: Scenario) -> None:
    embeds = torch.cat([model.pair.embeds(picture) for picture in scenario.pictures])
    expected = model.reference.visual_embeds(scenario).view(embeds.shape)
    assert expected.abs().mean() > 0.1  # the comparison means something
    torch.testing.assert_close(embeds, expected, atol=1e-4, rtol=0)


def test_2000_random_sizes_get_the_processors_grids() -> None:
    """A third are multiples of a quarter tile, where several grids have exactly the same aspect ratio."""
    source = random.Random(11)
    options = TilingOptions(1, MAX_TILES, use_thumbnail=True)
    for number in range(2000):
        step = 112 if number % 3 == 0 else 1
        width, height = (step * source.randint(1, 4000 // step) for _ in range(2))
        plan = plan_tiles(width, height, options, 448)
        expected = get_optimal_tiled_canvas((height, width), (448, 448), 1, MAX_TILES)
        assert (plan.columns, plan.rows) == tuple(expected), (width, height)
        assert plan.has_thumbnail is (plan.columns * plan.rows > 1)
