"""Values to protobuf and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.completions_schema import CompletionRequest
from gateway.conversation import Call, Clip, Document, Picture, Text, Turn
from gateway.errors import RequestError
from gateway.events import CallDelta, Delta, Finished, Part, Started, Timings, TokenLogprob, Usage
from gateway.parsing import parse_request
from gateway.schema import ChatCompletionRequest
from gateway.translate import (
    event_from_proto,
    generate_request,
    model_info_from_proto,
    param_of,
    prompt_param_of,
    prompt_request,
    upload_messages,
    uploads_of,
)
from protos import encoder_pb2
from protos import language_model_pb2 as pb
from protos.errors import ModelError
from protos.options import MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES
from tests.gateway.scripted import default_info, delta, finished, started, usage

PLACE = "messages.1.content"
TURNS = (
    Turn("system", (Text("s", "messages.0.content"),)),
    Turn(
        "user",
        (
            Text("a\nb", f"{PLACE}.0.text"),
            Picture(b"png", f"{PLACE}.2", f"{PLACE}.2.image_url.url", 1, 6),
            Picture(b"jpg", f"{PLACE}.3", f"{PLACE}.3.image_url"),
        ),
    ),
)


def _chat(**fields: Any) -> ChatCompletionRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_request(json.dumps(body).encode(), ChatCompletionRequest)


def _sampling(**fields: Any) -> pb.SamplingParams:
    return generate_request(_chat(**fields), TURNS, "id").sampling


def test_messages_become_parts_in_order() -> None:
    request = generate_request(_chat(priority=-3, cache_salt="é"), TURNS, "id-1")
    assert (request.request_id, request.priority, request.cache_salt) == ("id-1", -3, "é".encode())
    assert [message.role for message in request.messages] == ["system", "user"]
    text, first, second = request.messages[1].parts
    assert text.text == "a\nb"
    assert (first.image.data, first.image.tiling.min_tiles, first.image.tiling.max_tiles) == (b"png", 1, 6)
    assert second.image.data == b"jpg"
    assert not second.image.tiling.HasField("max_tiles") and not second.image.tiling.HasField("min_tiles")


def test_urls_go_as_they_are() -> None:
    url = "https://example.org/a"
    picture = Picture(b"", "p", "p.image_url.url", url=url)
    clip = Clip(b"", "q", "q.video_url.url", url=url, num_frames=2)
    request = generate_request(_chat(), (Turn("user", (picture, clip)),), "id")
    image, video = (part for part in request.messages[0].parts)
    assert image.image.url == video.video.url == url
    assert (image.image.WhichOneof("source"), video.video.WhichOneof("source")) == ("url", "url")
    assert video.video.sampling.num_frames == 2


def test_fields_that_were_not_given_stay_unset() -> None:
    assert _sampling() == pb.SamplingParams()
    assert _sampling(temperature=None, stop=None, n=None) == pb.SamplingParams()


@pytest.mark.parametrize("name", ["temperature", "top_k", "min_p"])
def test_a_zero_is_not_left_out(name: str) -> None:
    assert _sampling(**{name: 0}).HasField(name)


def test_every_sampling_field_arrives() -> None:
    fields: dict[str, Any] = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": -(2**63),
        "n": 3,
        "stop_token_ids": [7, 8],
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    expected = pb.SamplingParams(**fields, stop=["END"], logit_bias={5: -100.0, 6: 1.5}, logprobs=4)
    extra = {"stop": "END", "logit_bias": {"5": -100, "6": 1.5}, "logprobs": True, "top_logprobs": 4}
    assert _sampling(**fields, **extra) == expected


def test_the_newer_and_the_other_names_of_fields() -> None:
    assert _sampling(max_tokens=5, max_completion_tokens=6).max_tokens == 6
    assert _sampling(min_new_tokens=3).min_tokens == 3
    assert _sampling(min_new_tokens=3, min_tokens=0).min_tokens == 0
    assert list(_sampling(stop=["a", "b"]).stop) == ["a", "b"]


def test_a_request_beyond_one_message_is_too_large() -> None:
    turns = (Turn("user", (Text("a" * MAX_MESSAGE_BYTES, "messages.0.content"),)),)
    with pytest.raises(RequestError) as caught:
        generate_request(_chat(), turns, "id")
    assert (caught.value.status, caught.value.error_code) == (413, "request_too_large")


@pytest.mark.parametrize("text", ["a", "\u20ac"])
def test_a_request_as_large_as_one_message_is_not_too_large(text: str) -> None:
    def turns(num_bytes: int) -> tuple[Turn, ...]:
        texts = (Text(text, PLACE), Picture(bytes(num_bytes), PLACE, PLACE))
        return (Turn("user", texts),)

    num_left = MAX_MESSAGE_BYTES - generate_request(_chat(), turns(MAX_MESSAGE_BYTES // 2), "id").ByteSize()
    largest = MAX_MESSAGE_BYTES // 2 + num_left
    assert generate_request(_chat(), turns(largest), "id").ByteSize() == MAX_MESSAGE_BYTES
    with pytest.raises(RequestError, match="larger"):
        generate_request(_chat(), turns(largest + 1), "id")


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("messages", "messages"),
        ("messages[1]", "messages.1"),
        ("messages[1].role", "messages.1.role"),
        ("messages[1].parts", "messages.1.content"),
        ("messages[0].parts[0]", "messages.0.content"),
        ("messages[1].parts[0].text", "messages.1.content.0.text"),
        ("messages[1].parts[1]", "messages.1.content.2"),
        ("messages[1].parts[1].image", "messages.1.content.2.image_url.url"),
        ("messages[1].parts[1].image.data", "messages.1.content.2.image_url.url"),
        ("messages[1].parts[2].image.data", "messages.1.content.3.image_url"),
        ("messages[1].parts[1].image.tiling.max_tiles", "messages.1.content.2.image_url.max_dynamic_patch"),
        ("messages[1].parts[1].image.tiling.min_tiles", "messages.1.content.2.image_url.min_dynamic_patch"),
        ("messages[1].parts[9].image", "messages.1.content"),
        ("messages[9].parts[0]", "messages.9.content"),
        ("sampling.temperature", "temperature"),
        ("sampling.stop[3]", "stop"),
        ("sampling.logit_bias[17]", "logit_bias"),
        ("sampling.max_tokens", "max_tokens"),
        ("sampling.min_tokens", "min_new_tokens"),
        ("sampling.logprobs", "top_logprobs"),
        ("cache_salt", "cache_salt"),
        ("priority", "priority"),
        ("prompt_token_ids", None),
        ("media[0].data", None),
        ("", None),
    ],
)
def test_fields_of_the_call_are_named_as_the_body_names_them(field: str, param: str | None) -> None:
    assert param_of(field, _chat(min_new_tokens=3), TURNS) == param


def test_the_name_that_the_client_used_is_the_one_it_hears() -> None:
    assert param_of("sampling.max_tokens", _chat(max_completion_tokens=3), TURNS) == "max_completion_tokens"
    assert param_of("sampling.min_tokens", _chat(min_tokens=3), TURNS) == "min_tokens"


def test_events_come_back_as_values() -> None:
    top = pb.Logprob(token_id=2, logprob=-2.0, text="b", raw=b"b")
    entry = pb.TokenLogprobs(token=pb.Logprob(token_id=1, logprob=-1.0, text="a", raw=b"a"), top=[top])
    values = [
        event_from_proto(event)
        for event in (
            started(5),
            delta("a", index=1, num_tokens=3, logprobs=[entry]),
            finished(1, pb.FINISH_REASON_LENGTH),
            finished(0),
            usage(10, 4, 2, 6),
        )
    ]
    assert values == [
        Started(5),
        Delta(1, "a", 3, (TokenLogprob("a", -1.0, b"a", (TokenLogprob("b", -2.0, b"b"),)),)),
        Finished(1, "length"),
        Finished(0, "stop"),
        Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=2, image_tokens=6),
    ]


def test_what_was_cut_and_how_long_it_took() -> None:
    part = encoder_pb2.PartLayout(width=640, height=480, columns=4, rows=3, has_thumbnail=True, num_tiles=13)
    begun = started(5)
    begun.started.media.add(parts=[part])
    assert event_from_proto(begun) == Started(5, ((Part(640, 480, 4, 3, True, 13),),))
    end = usage()
    nanoseconds = {name: number * 10**6 for number, name in enumerate(_STAGES, 1)}
    end.usage.timings.CopyFrom(pb.GenerateTimings(**nanoseconds))
    assert event_from_proto(end) == Usage(7, 2, timings=Timings(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))


_STAGES = ("layout_ns", "encode_ns", "queue_ns", "prefill_ns", "decode_ns", "total_ns")


def test_an_event_of_another_contract_is_an_error() -> None:
    with pytest.raises(ModelError):
        event_from_proto(pb.GenerateResponse())


def test_what_the_model_says_about_itself() -> None:
    info = model_info_from_proto(default_info(encoders_ready=3))
    assert (info.id, info.max_model_len, info.max_images) == ("org/tiny-vl", 4096, 4)
    assert (info.max_media_bytes, info.max_tiles, info.encoders_ready) == (4 << 20, 12, 3)


MEDIA = (
    Turn(
        "user",
        (
            Clip(b"mp4", f"{PLACE}.0", f"{PLACE}.0.video_url.url", 2, 4, 0.5, 1.0, 2.0),
            Clip(b"large", f"{PLACE}.1", f"{PLACE}.1.video_url.url", upload=b"digest"),
            Document(b"pdf", f"{PLACE}.2", f"{PLACE}.2.file.file_data", 3),
            Document(b"huge", f"{PLACE}.3", f"{PLACE}.3.file.file_data", upload=b"other"),
            Document(b"huge", f"{PLACE}.4", f"{PLACE}.4.file_data", upload=b"other"),  # an input_file
        ),
    ),
)


def test_videos_and_documents_become_parts() -> None:
    first, second, third, fourth, _ = generate_request(_chat(), MEDIA, "id").messages[0].parts
    sampling = encoder_pb2.FrameSampling(num_frames=4, fps=0.5, start_s=1.0, end_s=2.0)
    assert first.video.data == b"mp4" and first.video.sampling == sampling
    assert first.video.tiling.max_tiles == 2
    assert second.video == pb.Video(
        upload=b"digest", tiling=encoder_pb2.TilingOptions(), sampling=encoder_pb2.FrameSampling()
    )
    assert (third.document.data, third.document.tiling.max_tiles) == (b"pdf", 3)
    assert fourth.document == pb.Document(upload=b"other", tiling=encoder_pb2.TilingOptions())
    assert uploads_of(MEDIA) == [b"large", b"huge"]


def test_an_upload_is_cut_into_messages() -> None:
    data = bytes(range(256)) * 5000
    first, *others = upload_messages(data, b"salt")
    assert (first.cache_salt, first.num_bytes) == (b"salt", len(data))
    assert b"".join(message.data for message in others) == data
    assert max(len(message.data) for message in others) == MAX_CHUNK_BYTES


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("messages[0].parts[0].video.data", "0.video_url.url"),
        ("messages[0].parts[1].video.upload", "1.video_url.url"),
        ("messages[0].parts[0].video.sampling.num_frames", "0.video_url.num_frames"),
        ("messages[0].parts[0].video.sampling.end_s", "0.video_url.end_s"),
        ("messages[0].parts[0].video.tiling.max_tiles", "0.video_url.max_dynamic_patch"),
        ("messages[0].parts[2].document.data", "2.file.file_data"),
        ("messages[0].parts[2].document.tiling.max_tiles", "2.file.max_dynamic_patch"),
        ("messages[0].parts[4].document.tiling.max_tiles", "4.max_dynamic_patch"),
    ],
)
def test_fields_of_media_are_paths_into_the_body(field: str, param: str) -> None:
    assert param_of(field, _chat(), MEDIA) == f"{PLACE}.{param}"


LOOK = {"name": "look", "description": "Looks", "parameters": {"type": "object", "title": "é"}}
TOOLS = [{"type": "function", "function": LOOK}, {"type": "function", "function": {"name": "stop"}}]
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]},
}


def _tools(**fields: Any) -> pb.ToolUse:
    request = generate_request(_chat(**fields), TURNS, "id")
    assert request.HasField("tools")
    return request.tools


def test_tools_travel_with_their_schemas() -> None:
    look, stop = _tools(tools=TOOLS).tools
    assert (look.name, look.description) == ("look", "Looks")
    assert look.parameters == '{"type": "object", "title": "é"}'
    assert stop == pb.Tool(name="stop")


@pytest.mark.parametrize(
    ("choice", "use"),
    [
        (None, pb.ToolUse(choice=pb.TOOL_CHOICE_AUTO)),
        ("auto", pb.ToolUse(choice=pb.TOOL_CHOICE_AUTO)),
        ("none", pb.ToolUse(choice=pb.TOOL_CHOICE_NONE)),
        ("required", pb.ToolUse(choice=pb.TOOL_CHOICE_REQUIRED)),
        (TOOLS[1], pb.ToolUse(choice=pb.TOOL_CHOICE_NAMED, name="stop")),
        (ALLOWED, pb.ToolUse(choice=pb.TOOL_CHOICE_REQUIRED, allowed=["stop"])),
    ],
)
def test_every_choice_of_tools(choice: Any, use: pb.ToolUse) -> None:
    found = _tools(tools=TOOLS, tool_choice=choice)
    found.ClearField("tools")
    assert found == use


@pytest.mark.parametrize(("parallel", "single"), [(None, False), (True, False), (False, True)])
def test_calls_that_may_not_be_parallel_are_one(parallel: bool | None, single: bool) -> None:
    assert _tools(tools=TOOLS, parallel_tool_calls=parallel).single_call is single


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [], "tool_choice": "auto"}])
def test_without_tools_nothing_is_said_of_them(fields: dict[str, Any]) -> None:
    request = generate_request(_chat(**fields), TURNS, "id")
    assert not request.HasField("tools")
    assert not request.HasField("response_format") and not request.HasField("thinking")


def test_calls_of_earlier_turns_travel() -> None:
    turn = Turn("assistant", (Text("", "messages.0.content"),), (Call("look", '{"a": 1}'),))
    (message,) = generate_request(_chat(), (turn,), "id").messages
    assert list(message.tool_calls) == [pb.ToolCall(name="look", arguments='{"a": 1}')]
    turn = Turn("assistant", (), (Call("look", "a" * MAX_MESSAGE_BYTES),))
    with pytest.raises(RequestError, match="larger"):
        generate_request(_chat(), (turn,), "id")


@pytest.mark.parametrize(
    ("fields", "wire"),
    [
        ({"response_format": {"type": "json_object"}}, pb.ResponseFormat(json_object=pb.JsonObject())),
        ({"guided_json": {"a": "é"}}, pb.ResponseFormat(json_schema='{"a": "é"}')),
        ({"structured_outputs": {"regex": "a+"}}, pb.ResponseFormat(regex="a+")),
        ({"guided_choice": ["a", "b"]}, pb.ResponseFormat(choice=pb.TextChoice(texts=["a", "b"]))),
    ],
)
def test_formats_travel_with_chats_and_prompts(fields: dict[str, Any], wire: pb.ResponseFormat) -> None:
    assert generate_request(_chat(**fields), TURNS, "id").response_format == wire
    completion = parse_request(json.dumps({"prompt": "a", **fields}).encode(), CompletionRequest)
    assert prompt_request(completion, [1], "id").response_format == wire
    [key] = fields
    assert str(prompt_param_of("response_format.x", completion)).startswith(key)


@pytest.mark.parametrize(
    ("fields", "enabled"),
    [
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True}, False),
        ({"chat_template_kwargs": {}, "reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, True),
        ({"reasoning_effort": "max", "enable_thinking": False}, False),
    ],
)
def test_thinking_is_asked_for_or_not(fields: dict[str, Any], enabled: bool) -> None:
    request = generate_request(_chat(**fields), TURNS, "id")
    assert request.HasField("thinking") and request.thinking.enabled is enabled


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("tools.tools", "tools"),
        ("tools.tools[1].name", "tools.1.function.name"),
        ("tools.tools[0].parameters", "tools.0.function.parameters"),
        ("tools.name", "tool_choice.function.name"),
        ("tools.allowed[2]", "tool_choice.allowed_tools.tools.2.function.name"),
        ("tools.allowed", "tool_choice"),
        ("response_format", "guided_regex"),
        ("response_format.regex", "guided_regex"),
    ],
)
def test_fields_of_tools_and_formats_are_paths_into_the_body(field: str, param: str) -> None:
    assert param_of(field, _chat(guided_regex="a"), TURNS) == param


def test_a_message_that_was_moved_is_named_by_its_own_place() -> None:
    turns = (Turn("user", ()), Turn("tool", (), param="messages.2"), Turn("tool", (), param="messages.1"))
    assert param_of("messages[1].role", _chat(), turns) == "messages.2.role"


def test_thoughts_and_calls_come_back_as_values() -> None:
    event = delta("a")
    event.delta.reasoning = "hm"
    event.delta.tool_calls.add(index=1, name="look")
    event.delta.tool_calls.add(index=1, arguments="{}")
    calls = (CallDelta(1, "", "look"), CallDelta(1, "{}"))
    assert event_from_proto(event) == Delta(0, "a", 1, (), "hm", calls)
    assert event_from_proto(finished(0, pb.FINISH_REASON_TOOL_CALLS)) == Finished(0, "tool_calls")
