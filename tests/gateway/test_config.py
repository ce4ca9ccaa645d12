"""GatewayConfig."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from gateway.config import GatewayConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70000),
        ("llm", ()),
        ("llm", ("a:1", "")),
        ("max_body_bytes", 0),
        ("max_images", 0),
        ("request_timeout_s", 0),
        ("model_timeout_s", -1),
        ("keepalive_s", 0),
        ("shutdown_grace_s", -1),
    ],
)
def test_a_bad_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        GatewayConfig(**{field: value})


def test_every_flag_has_a_help_text() -> None:
    assert all(
        field.metadata["help"] for field in fields(GatewayConfig) if field.name not in ("llm_tls", "access")
    )
