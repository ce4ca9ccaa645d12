"""Ranges of every sampling field, and the trip over the engine's socket."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from llm_service.sampling_params import SamplingParams
from protos.errors import InvalidRequest

VOCAB_SIZE = 100


def test_defaults_are_valid() -> None:
    SamplingParams().validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    "good",
    [
        {"max_tokens": 1, "min_tokens": 1},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_p": 1e-6},
        {"top_k": -1},
        {"top_k": 1_000_000},
        {"min_p": 1.0},
        {"repetition_penalty": 2.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logit_bias": {0: -100.0, 99: 100.0}},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"n": 128},
        {"stop": tuple("abcdefghijklmnop")},
        {"stop_token_ids": (0, 99)},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
)
def test_values_at_the_bounds_are_valid(good: dict[str, Any]) -> None:
    SamplingParams(**good).validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("max_tokens", 0, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("temperature", -0.1, "[0, 2]"),
        ("temperature", 2.1, "[0, 2]"),
        ("temperature", math.nan, "[0, 2]"),
        ("temperature", math.inf, "[0, 2]"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.1, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("top_k", -2, "at least 1"),
        ("min_p", -0.1, "[0, 1]"),
        ("min_p", 1.1, "[0, 1]"),
        ("min_p", math.nan, "[0, 1]"),
        ("repetition_penalty", 0.0, "(0, 2]"),
        ("repetition_penalty", 2.5, "(0, 2]"),
        ("repetition_penalty", math.nan, "(0, 2]"),
        ("presence_penalty", -2.1, "[-2, 2]"),
        ("presence_penalty", math.inf, "[-2, 2]"),
        ("frequency_penalty", 2.1, "[-2, 2]"),
        ("frequency_penalty", math.nan, "[-2, 2]"),
        ("logit_bias", {100: 1.0}, "[0, 99]"),
        ("logit_bias", {-1: 1.0}, "[0, 99]"),
        ("logit_bias", {5: 100.5}, "[-100, 100]"),
        ("logit_bias", {5: math.nan}, "[-100, 100]"),
        ("seed", 2**63, "9223372036854775807]"),
        ("seed", -(2**63) - 1, "[-9223372036854775808"),
        ("n", 0, "[1, 128]"),
        ("n", 129, "[1, 128]"),
        ("stop", tuple("abcdefghijklmnopq"), "at most 16"),
        ("stop", ("a", ""), "not be empty"),
        ("stop_token_ids", (100,), "[0, 99]"),
        ("stop_token_ids", (-1,), "[0, 99]"),
        ("logprobs", -1, "[0, 20]"),
        ("logprobs", 21, "[0, 20]"),
    ],
)
def test_values_outside_are_refused_by_field_and_bound(name: str, value: Any, bound: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value}).validate(VOCAB_SIZE)
    assert caught.value.field == f"sampling.{name}"
    assert bound in caught.value.message


def test_min_tokens_over_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most max_tokens") as caught:
        SamplingParams(max_tokens=3, min_tokens=4).validate(VOCAB_SIZE)
    assert caught.value.field == "sampling.min_tokens"


def test_params_cross_a_socket_as_msgpack() -> None:
    params = SamplingParams(logit_bias={7: -1.5}, stop=("a", "b"), stop_token_ids=(3,), seed=-5, logprobs=2)
    encoded = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(encoded, type=SamplingParams) == params


def test_params_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]
