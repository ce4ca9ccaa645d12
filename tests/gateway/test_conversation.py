"""Chat messages to turns."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from gateway.conversation import (
    UPLOAD_ABOVE_BYTES,
    Call,
    Clip,
    Document,
    MediaDefaults,
    MediaLimits,
    Picture,
    Text,
    Turn,
    is_upload,
    media_limits,
    read_conversation,
)
from gateway.errors import RequestError
from gateway.model_info import ModelInfo
from gateway.schema import ChatMessage, MmProcessorKwargs, VideoOptions
from tests.pictures import data_uri

LIMITS = MediaLimits(max_images=2, max_bytes=100, max_tiles=12)
PIXEL = "data:image/png;base64,AAAA"


def _messages(*messages: dict[str, Any]) -> list[ChatMessage]:
    return [ChatMessage.model_validate(message) for message in messages]


def _user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(**fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": PIXEL, **fields}}


async def _fault(*messages: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        await read_conversation(_messages(*messages), LIMITS)
    return caught.value.error_code, caught.value.field


async def test_web_urls_are_kept_for_the_encoder() -> None:
    url = "https://example.org/a"
    parts = (_image(url=url), {"type": "video_url", "video_url": url})
    [turn] = await read_conversation(_messages(_user(*parts)), LIMITS)
    picture, clip = turn.parts
    assert isinstance(picture, Picture) and isinstance(clip, Clip)
    assert (picture.url, picture.data, clip.url, clip.data) == (url, b"", url, b"")
    assert not is_upload(clip)


async def test_neighbouring_texts_are_joined_and_pictures_separate_them() -> None:
    [turn] = await read_conversation(
        _messages(_user(_text("a"), _text("b"), _image(), _text("c"), _text("d"))), LIMITS
    )
    assert [part.text if isinstance(part, Text) else part.data for part in turn.parts] == [
        "a\nb",
        bytes(3),
        "c\nd",
    ]
    assert [part.param for part in turn.parts] == [
        f"messages.0.content.{i}" for i in ("0.text", "2", "3.text")
    ]


async def test_roles_and_empty_assistant_turns() -> None:
    turns = await read_conversation(
        _messages(
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}, {"type": "thinking"}]},
        ),
        LIMITS,
    )
    assert [(turn.role, [part.text for part in turn.parts if isinstance(part, Text)]) for turn in turns] == [
        ("system", ["be brief"]),
        ("user", [""]),
        ("assistant", [""]),
        ("assistant", ["no"]),
    ]


@pytest.mark.parametrize("content", [None, []])
@pytest.mark.parametrize("role", ["user", "system"])
async def test_only_an_assistant_may_say_nothing(role: str, content: Any) -> None:
    fault = await _fault({"role": role, "content": content})
    assert fault == ("missing_required_parameter", "messages.0.content")


@pytest.mark.parametrize("role", ["system", "assistant", "developer"])
async def test_pictures_belong_in_user_messages(role: str) -> None:
    fault = await _fault({"role": role, "content": [_text("a"), _image()]})
    assert fault == ("unsupported_content_part", "messages.0.content.1")


async def test_pictures_are_counted_over_all_messages_and_before_they_are_read() -> None:
    broken = {"type": "image_url", "image_url": {"url": "nonsense"}}
    assert await _fault(_user(broken, _image()), _user(_image())) == ("too_many_images", "messages")


@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        ({}, (None, None)),
        ({"detail": "auto"}, (None, None)),
        ({"detail": "low"}, (1, 1)),
        ({"detail": "high"}, (None, None)),
        ({"detail": "original"}, (None, None)),
        ({"max_dynamic_patch": 4}, (None, 4)),
        ({"max_dynamic_patch": 4, "detail": "high"}, (None, 4)),
        ({"max_dynamic_patch": 4, "detail": "low"}, (1, 4)),
        ({"min_dynamic_patch": 3, "detail": "low"}, (3, 3)),
        ({"min_dynamic_patch": 2, "max_dynamic_patch": 2}, (2, 2)),
    ],
)
async def test_tiling_of_a_picture(fields: dict[str, Any], bounds: tuple[int | None, int | None]) -> None:
    [turn] = await read_conversation(_messages(_user(_image(**fields))), LIMITS)
    [picture] = turn.parts
    assert isinstance(picture, Picture)
    assert (picture.min_tiles, picture.max_tiles) == bounds


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_dynamic_patch": 13}, "max_dynamic_patch"),
        ({"min_dynamic_patch": 5, "max_dynamic_patch": 4}, "min_dynamic_patch"),
        ({"min_dynamic_patch": 13, "detail": "high"}, "min_dynamic_patch"),
    ],
)
async def test_impossible_tilings_are_named(fields: dict[str, Any], param: str) -> None:
    assert await _fault(_user(_image(**fields))) == (
        "invalid_value",
        f"messages.0.content.0.image_url.{param}",
    )


async def test_a_url_given_as_a_string_is_named_as_it_stands() -> None:
    fault = await _fault(_user({"type": "image_url", "image_url": "nonsense"}))
    assert fault == ("invalid_image_url", "messages.0.content.0.image_url")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (2, 6, False)),
        ({"detail": "auto"}, (2, 6, False)),
        ({"detail": "low"}, (1, 1, False)),
        ({"detail": "high"}, (None, None, False)),
        ({"detail": "original", "max_dynamic_patch": 3}, (None, 3, False)),
        ({"max_dynamic_patch": 8}, (2, 8, False)),
        ({"max_dynamic_patch": 1, "use_thumbnail": True}, (1, 1, True)),
        ({"min_dynamic_patch": 9}, (9, 9, False)),
        ({"min_dynamic_patch": 1, "max_dynamic_patch": 12}, (1, 12, False)),
    ],
)
async def test_what_a_picture_leaves_open_the_request_says(
    fields: dict[str, Any], expected: tuple[int | None, int | None, bool]
) -> None:
    options = MmProcessorKwargs(min_dynamic_patch=2, max_dynamic_patch=6, use_thumbnail=False)
    [turn] = await read_conversation(
        _messages(_user(_image(**fields))), LIMITS, MediaDefaults(picture=options)
    )
    [picture] = turn.parts
    assert isinstance(picture, Picture)
    assert (picture.min_tiles, picture.max_tiles, picture.use_thumbnail) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dynamic_image_size": False}, (None, 1)),
        ({"dynamic_image_size": True}, (None, None)),
        ({"dynamic_image_size": True, "max_dynamic_patch": 4}, (None, 4)),
        ({"min_dynamic_patch": 3}, (3, None)),
    ],
)
async def test_options_for_all_pictures(options: Any, expected: tuple[int | None, int | None]) -> None:
    defaults = MediaDefaults(picture=MmProcessorKwargs(**options))
    [turn] = await read_conversation(_messages(_user(_image())), LIMITS, defaults)
    [picture] = turn.parts
    assert isinstance(picture, Picture) and (picture.min_tiles, picture.max_tiles) == expected


async def test_too_many_tiles_for_all_pictures_are_named() -> None:
    defaults = MediaDefaults(picture=MmProcessorKwargs(max_dynamic_patch=13))
    with pytest.raises(RequestError) as caught:
        await read_conversation(_messages(_user(_image(max_dynamic_patch=1))), LIMITS, defaults)
    assert caught.value.field == "mm_processor_kwargs.max_dynamic_patch"


async def test_input_image_has_its_detail_beside_the_url() -> None:
    part = {"type": "input_image", "image_url": PIXEL, "detail": "low"}
    [turn] = await read_conversation(_messages(_user(part)), LIMITS)
    place = "messages.0.content.0"
    assert turn == Turn("user", (Picture(bytes(3), place, f"{place}.image_url", 1, 1),))


def test_the_tighter_limit_holds_and_zero_is_no_limit() -> None:
    model = ModelInfo("m", 10, max_images=3, max_media_bytes=50, max_tiles=6, encoders_ready=1)
    assert media_limits(model, 8, 40) == MediaLimits(3, 40, 6)
    silent = ModelInfo("m", 10, max_images=0, max_media_bytes=0, max_tiles=0, encoders_ready=1)
    assert media_limits(silent, 8, 40) == MediaLimits(8, 40, 0)


def _video(data: bytes = b"mp4", **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_uri(data, "video/mp4"), **fields}}


def _file(data: bytes = b"pdf", **fields: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": data_uri(data, "application/pdf"), **fields}}


PLACE = "messages.0.content.0"


async def test_videos_and_files_keep_their_options_and_places() -> None:
    beside = {"type": "input_file", "file_data": "cGRm"}
    video = _video(num_frames=4, fps=0.5, start_s=1, end_s=2, max_dynamic_patch=3)
    limits = MediaLimits(max_images=3, max_bytes=100, max_tiles=12)
    [turn] = await read_conversation(_messages(_user(video, _file(max_dynamic_patch=2), beside)), limits)
    assert turn.parts == (
        Clip(b"mp4", PLACE, f"{PLACE}.video_url.url", 3, 4, 0.5, 1, 2),
        Document(b"pdf", "messages.0.content.1", "messages.0.content.1.file.file_data", 2),
        Document(b"pdf", "messages.0.content.2", "messages.0.content.2.file_data"),
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (16, 2.0)), ({"num_frames": 4}, (4, None)), ({"fps": 1.0}, (None, 1.0))],
)
async def test_a_videos_own_options_win(given: dict[str, Any], expected: tuple[Any, Any]) -> None:
    defaults = VideoOptions(num_frames=16, fps=2.0)
    [turn] = await read_conversation(_messages(_user(_video(**given))), LIMITS, MediaDefaults(video=defaults))
    [clip] = turn.parts
    assert isinstance(clip, Clip) and (clip.num_frames, clip.fps) == expected


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        (_video(bytes(110)), "video_file_too_large", f"{PLACE}.video_url.url"),
        (_file(bytes(110)), "file_too_large", f"{PLACE}.file.file_data"),
        (_video(start_s=2, end_s=2), "invalid_value", f"{PLACE}.video_url.end_s"),
        (_video(max_dynamic_patch=13), "invalid_value", f"{PLACE}.video_url.max_dynamic_patch"),
        (_file(max_dynamic_patch=13), "invalid_value", f"{PLACE}.file.max_dynamic_patch"),
    ],
)
async def test_what_is_wrong_with_a_video_or_file_is_named(part: Any, code: str, param: str) -> None:
    assert await _fault(_user(part)) == (code, param)


@pytest.mark.parametrize("part", [_video(), _file()])
async def test_videos_and_files_belong_in_user_messages_and_are_counted(part: dict[str, Any]) -> None:
    fault = await _fault({"role": "assistant", "content": [part]})
    assert fault == ("unsupported_content_part", PLACE)
    assert await _fault(_user(part, _image(), part)) == ("too_many_images", "messages")


async def test_large_videos_go_apart_and_leave_the_request_its_room() -> None:
    limits = MediaLimits(3, UPLOAD_ABOVE_BYTES + 2000, 12, max_upload_bytes=2 * UPLOAD_ABOVE_BYTES)
    large, small = _video(bytes(UPLOAD_ABOVE_BYTES + 1)), _file(bytes(UPLOAD_ABOVE_BYTES))
    [turn] = await read_conversation(_messages(_user(large, small, _video(bytes(2001)))), limits)
    first, second, third = turn.parts
    assert [is_upload(part) for part in turn.parts] == [True, False, True]  # no room is left for the third
    assert isinstance(first, Clip) and first.upload == hashlib.sha256(first.data).digest()


@pytest.mark.parametrize("max_upload_bytes", [0, UPLOAD_ABOVE_BYTES])
async def test_what_is_too_large_to_go_apart_goes_with_the_request(max_upload_bytes: int) -> None:
    limits = MediaLimits(3, 3 * UPLOAD_ABOVE_BYTES, 12, max_upload_bytes)
    large = _video(bytes(UPLOAD_ABOVE_BYTES + 1))
    [turn] = await read_conversation(_messages(_user(large)), limits)
    assert not is_upload(turn.parts[0])


def _call(number: int) -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": f"f{number}", "arguments": "{}"}}


def _result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": f"r{number}"}


async def test_calls_and_answers_of_tools_are_turns() -> None:
    assistant = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [_call(1)]}
    turns = await read_conversation(_messages(assistant, _result(1)), LIMITS)
    assert turns == (
        Turn("assistant", (Text("", "messages.0.content"),), (Call("f1", "{}"),)),
        Turn("tool", (Text("r1", "messages.1.content"),)),
    )


async def test_the_older_form_of_a_call() -> None:
    assistant = {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}
    turns = await read_conversation(
        _messages(assistant, {"role": "function", "name": "f", "content": "r"}), LIMITS
    )
    assert turns[0].calls == (Call("f", "{"),) and turns[1].role == "tool"


@pytest.mark.parametrize(
    ("ids", "order"), [((2, 1), (1, 2)), ((1, 2), (1, 2)), ((2, 7), (2, 7)), ((2,), (2,))]
)
async def test_answers_of_tools_come_in_the_order_of_their_calls(
    ids: tuple[int, ...], order: tuple[int, ...]
) -> None:
    """An answer to no known call leaves all where they are."""
    assistant = {"role": "assistant", "tool_calls": [_call(1), _call(2)]}
    messages = _messages(assistant, *map(_result, ids), {"role": "user", "content": "and?"})
    turns = await read_conversation(messages, LIMITS)
    texts = [part.text for turn in turns for part in turn.parts if isinstance(part, Text)]
    assert texts == ["", *(f"r{number}" for number in order), "and?"]
    assert turns[1].param == f"messages.{1 + ids.index(order[0])}"


async def test_a_tool_says_something_and_shows_no_pictures() -> None:
    for content, code in ((None, "missing_required_parameter"), ([_image()], "unsupported_content_part")):
        with pytest.raises(RequestError) as refused:
            await read_conversation(_messages({"role": "tool", "content": content}), LIMITS)
        assert refused.value.error_code == code
