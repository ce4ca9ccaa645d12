"""Limits of videos and documents refuse what makes no sense."""

from __future__ import annotations

from dataclasses import fields

import pytest

from encoder_service.container_limits import MAX_PARTS, ContainerLimits


@pytest.mark.parametrize("name", [entry.name for entry in fields(ContainerLimits)])
def test_every_limit_is_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        ContainerLimits(**{name: 0})


@pytest.mark.parametrize("name", ["max_video_frames", "max_pages"])
def test_more_parts_than_an_answer_can_hold_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be <= {MAX_PARTS}"):
        ContainerLimits(**{name: MAX_PARTS + 1})
