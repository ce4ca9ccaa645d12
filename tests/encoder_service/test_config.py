from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from encoder_service.config import EncoderConfig


def test_the_defaults_are_valid_and_listen_where_language_models_look() -> None:
    config = EncoderConfig()
    assert (config.server.host, config.server.port) == ("127.0.0.1", 50051)
    assert (config.dtype, config.device, config.load_format) == ("auto", "auto", "auto")


def test_every_setting_of_its_own_says_what_it_is() -> None:
    nested = ["server", "image_limits", "container_limits", "fetch_limits"]
    assert [field.name for field in fields(EncoderConfig) if "help" not in field.metadata] == nested


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int4"}, r"dtype must be one of auto, .*, got 'int4'"),
        ({"load_format": "pickle"}, r"load_format must be one of auto, dummy, got 'pickle'"),
        ({"device": "tpu"}, r"device must be auto, cpu or cuda, got 'tpu'"),
        ({"max_batch_tiles": -1}, r"max_batch_tiles must be >= 0, got -1"),
        ({"first_batch_tiles": -1}, r"first_batch_tiles must be >= 0, got -1"),
        ({"decode_workers": 0}, r"decode_workers must be >= 1, got 0"),
        ({"pixel_budget_mib": -1}, r"pixel_budget_mib must be >= 1, got -1"),
        ({"host_cache_mib": -1}, r"host_cache_mib must be >= 0, got -1"),
        ({"device_cache_mib": -1}, r"device_cache_mib must be >= 0, got -1"),
        ({"max_streams": -5}, r"max_streams must be >= 1, got -5"),
        ({"max_media": 0}, r"max_media must be >= 1, got 0"),
        ({"max_stream_bytes": 0}, r"max_stream_bytes must be >= 1, got 0"),
        ({"max_tiles": 0}, r"max_tiles must be >= 1, got 0"),
        ({"num_threads": -2}, r"num_threads must be >= 0, got -2"),
        ({"upload_timeout_s": 0.0}, r"upload_timeout_s must be > 0, got 0.0"),
        ({"upload_timeout_s": float("nan")}, r"upload_timeout_s must be > 0, got nan"),
        ({"idle_timeout_s": -1.0}, r"idle_timeout_s must be > 0, got -1.0"),
        ({"forward_timeout_s": 0.0}, r"forward_timeout_s must be > 0, got 0.0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**values)


def test_caches_may_be_switched_off() -> None:
    config = EncoderConfig(host_cache_mib=0, device_cache_mib=0)
    assert (config.host_cache_mib, config.device_cache_mib) == (0, 0)
