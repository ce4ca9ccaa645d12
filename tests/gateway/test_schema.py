"""What valid bodies come to mean; refusals, as a client hears them, are in test_parsing.py."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.schema import (
    MAX_STOP_STRINGS,
    ChatCompletionRequest,
    FilePart,
    ImagePart,
    InputFilePart,
    RefusalPart,
    SamplingFields,
    TextPart,
    ThinkingPart,
    VideoPart,
    refused_key,
    unknown_keys,
)


def part_of(part: dict[str, Any]) -> Any:
    body = {"messages": [{"role": "user", "content": [part]}]}
    content = ChatCompletionRequest.model_validate(body).messages[0].content
    assert isinstance(content, list)
    return content[0]


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "output_text", "text": "a"}, TextPart),
        ({"type": "refusal", "refusal": "no"}, RefusalPart),
        ({"type": "thinking", "thinking": "hm", "signature": "x"}, ThinkingPart),
        ({"type": "input_image", "image_url": "u"}, ImagePart),
        ({"type": "video_url", "video_url": {"url": "u"}}, VideoPart),
        ({"video_url": "u"}, VideoPart),
        ({"type": "file", "file": {"file_data": "d", "filename": "f", "file_id": None}}, FilePart),
        ({"type": "input_file", "file_data": "d", "filename": "f"}, InputFilePart),
        ({"text": "both keys", "image_url": "u"}, TextPart),
        ({"type": "image_url", "text": "the type decides", "image_url": "u"}, ImagePart),
    ],
)
def test_parts_are_told_apart(part: dict[str, Any], kind: type) -> None:
    assert type(part_of(part)) is kind


def test_options_of_a_picture_are_read_where_its_api_puts_them() -> None:
    chat = part_of({"type": "image_url", "image_url": {"url": "u", "detail": "low", "max_dynamic_patch": 6}})
    assert (chat.image.url, chat.image.detail, chat.image.max_dynamic_patch) == ("u", "low", 6)
    responses = part_of({"type": "input_image", "image_url": "u", "detail": "high"})
    assert (responses.image.url, responses.image.detail, responses.image.max_dynamic_patch) == (
        "u",
        "high",
        None,
    )


@pytest.mark.parametrize(
    ("stop", "parsed"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([], []), (None, None), (["x"] * MAX_STOP_STRINGS,) * 2],
)
def test_one_stop_string_is_a_list_of_one(stop: Any, parsed: Any) -> None:
    assert SamplingFields(stop=stop).stop == parsed


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("temperature", 0, 2),
        ("top_k", -1, 2**31 - 1),
        ("min_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("seed", -(2**63), 2**63 - 1),
        ("n", 1, 128),
        ("max_tokens", 1, 2**32 - 1),
        ("priority", -(2**31), 2**31 - 1),
    ],
)
def test_both_ends_of_a_range_belong_to_it(field: str, least: int, most: int) -> None:
    for value in (least, most):
        assert getattr(SamplingFields.model_validate({field: value}), field) == value
    for value in (least - 1, most + 1):
        with pytest.raises(ValidationError):
            SamplingFields.model_validate({field: value})


@pytest.mark.parametrize("field", ["top_p", "repetition_penalty"])
def test_zero_does_not_belong_to_a_range_that_starts_above_it(field: str) -> None:
    assert SamplingFields.model_validate({field: 1e-9})
    with pytest.raises(ValidationError):
        SamplingFields.model_validate({field: 0})


@pytest.mark.parametrize("key", ["٣", "²", "+1", " 1", "1.0", "", "4294967296", "00000000001"])
def test_what_only_looks_like_a_token_id_is_none(key: str) -> None:
    with pytest.raises(ValidationError):
        SamplingFields(logit_bias={key: 1})


def test_the_largest_token_id_is_one() -> None:
    assert SamplingFields(logit_bias={"0": -100, "4294967295": 100}).logit_bias


def test_a_salt_is_measured_in_bytes() -> None:
    assert SamplingFields(cache_salt="é" * 512).cache_salt
    with pytest.raises(ValidationError):
        SamplingFields(cache_salt="é" * 513)


def test_the_first_key_at_fault_is_the_one_named() -> None:
    assert refused_key({"user": "x", "tools": [], "regex": "a", "ebnf": "b"}) == "regex"
    assert refused_key({"user": "x", "tools": [], "guided_regex": None, "brand_new": 1}) is None


def test_a_key_is_unknown_only_if_it_is_neither_refused_nor_ignored() -> None:
    extra = {"store": True, "tools": [], "guided_new": None, "brand_new": 1, "Tools": []}
    assert unknown_keys(extra) == ["brand_new", "Tools"]


def test_options_of_a_video_are_those_of_other_servers() -> None:
    url = {"url": "u", "num_frames": 16, "fps": 1, "start_s": 2, "end_s": 4.5, "max_dynamic_patch": 2}
    assert part_of({"type": "video_url", "video_url": url}).video_url.model_dump() == url
    body = {"messages": [{"role": "user", "content": "a"}], "media_io_kwargs": {"video": {"num_frames": 4}}}
    kwargs = ChatCompletionRequest.model_validate(body).media_io_kwargs
    assert kwargs is not None and kwargs.video is not None and kwargs.video.num_frames == 4
    with pytest.raises(ValidationError):
        ChatCompletionRequest.model_validate(body | {"media_io_kwargs": {"image": {"mode": "L"}}})
