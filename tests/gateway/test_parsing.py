"""What is wrong with a body is said with its path, in words of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.errors import RequestError
from gateway.parsing import (
    COUNT_ABOVE_BYTES,
    COUNT_ALL_ABOVE_BYTES,
    MAX_CONTAINERS,
    parse_request,
)
from gateway.schema import ChatCompletionRequest, unknown_keys

USER = {"role": "user", "content": "hi"}


def _tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", **function}}


TOOL = _tool()


def _parse(body: dict[str, Any]) -> ChatCompletionRequest:
    return parse_request(json.dumps(body).encode(), ChatCompletionRequest)


def _fault(body: bytes | dict[str, Any]) -> tuple[str, str | None, str]:
    """(code, param, message)"""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        parse_request(raw, ChatCompletionRequest)
    error = caught.value
    assert (
        "pydantic" not in error.message and "Input should" not in error.message and "#" not in error.message
    )
    assert error.status == 400
    return error.error_code, error.field, error.message


def _part(part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("body", [b"", b"{", b'{"messages":}', b"\xff", b'{"model":"\\ud800"}', b"[" * 5000])
def test_what_is_not_json_is_invalid_json(body: bytes) -> None:
    code, param, message = _fault(body)
    assert (code, param) == ("invalid_json", None)
    assert message.startswith("The request body is not valid JSON (line 1 column ")


def _filled(unit: bytes, num_bytes: int, key: bytes = b"x") -> bytes:
    """A chat of that length, nearly all of it in one array."""
    units = b",".join([unit] * (num_bytes // (len(unit) + 1)))
    return b'{"messages":[{"role":"user","content":"hi"}],"' + key + b'":[' + units + b"]}"


@pytest.mark.parametrize(
    "body",
    [
        _filled(b"[]", COUNT_ABOVE_BYTES + 100),
        _filled(b'{"a":{}}', COUNT_ABOVE_BYTES + 100),
        b'{"messages":[' + b",".join([json.dumps(USER).encode()] * (MAX_CONTAINERS + 1)) + b"]}",
        _filled(b"0", COUNT_ALL_ABOVE_BYTES + 100),
    ],
    ids=["arrays", "objects", "messages", "numbers"],
)
def test_a_large_body_of_small_elements_is_refused_before_it_is_read(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body, ChatCompletionRequest)
    assert (caught.value.status, caught.value.error_code) == (413, "request_too_large")


def test_a_large_body_of_large_elements_is_read() -> None:
    text = '{"row": [1, 2, 3]}, ' * 20_000  # JSON as text, and a picture
    url = "data:image/png;base64," + "A" * (COUNT_ALL_ABOVE_BYTES + 4)
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    assert len(_parse({"messages": [{"role": "user", "content": parts}]}).messages) == 1


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"3", b"null"])
def test_a_body_must_be_an_object(body: bytes) -> None:
    assert _fault(body) == ("invalid_type", None, "The request body must be a JSON object.")


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"messages": []}, "invalid_value", "messages", "must not be empty"),
        (
            {"mm_processor_kwargs": {"max_pixels": 9}},
            "invalid_value",
            "mm_processor_kwargs.max_pixels",
            "is not",
        ),
        (
            {"mm_processor_kwargs": {"min_dynamic_patch": 3, "max_dynamic_patch": 2}},
            "invalid_value",
            "mm_processor_kwargs",
            "at most 2",
        ),
        (
            {"mm_processor_kwargs": {"max_dynamic_patch": 0}},
            "invalid_value",
            "mm_processor_kwargs.max_dynamic_patch",
            "at least 1",
        ),
        ({"mm_processor_kwargs": 1}, "invalid_type", "mm_processor_kwargs", "an object"),
        ({"media_io_kwargs": {"image": {}}}, "invalid_value", "media_io_kwargs.image", "is not"),
        ({"messages": None}, "invalid_type", "messages", "must be an array"),
        ({"messages": "hi"}, "invalid_type", "messages", "must be an array"),
        ({"messages": [3]}, "invalid_type", "messages.0", "must be an object"),
        ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages.0.role", "Missing"),
        (
            {"messages": [USER, {"role": "robot", "content": "x"}]},
            "invalid_value",
            "messages.1.role",
            "must be one of 'system', 'developer', 'user', 'assistant', 'tool' or 'function'",
        ),
        ({"messages": [{"role": 3, "content": "x"}]}, "invalid_value", "messages.0.role", "must be one of"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "invalid_value",
            "messages.0.content",
            "a string or an array",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
            "missing_required_parameter",
            "messages.0.tool_calls.0.function",
            "Missing",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
            "unsupported_parameter",
            "messages.0.tool_calls",
            "belongs in assistant messages",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
                ]
            },
            "invalid_type",
            "messages.0.tool_calls.0.function.arguments",
            "a string",
        ),
        ({"tools": {}}, "invalid_type", "tools", "an array"),
        ({"tools": [TOOL] * 129}, "invalid_value", "tools", "at most 128"),
        ({"tools": [{"type": "custom"}]}, "invalid_value", "tools.0.type", "must be 'function'"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools.0.function", "Missing"),
        ({"tools": [_tool(name="a b")]}, "invalid_value", "tools.0.function.name", "must match"),
        ({"tools": [_tool(name="a" * 65)]}, "invalid_value", "tools.0.function.name", "must match"),
        ({"tools": [TOOL, _tool(parameters=[])]}, "invalid_type", "tools.1.function.parameters", "an object"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice", "needs 'tools'"),
        ({"tools": [TOOL], "tool_choice": "any"}, "invalid_value", "tool_choice", "must be one of"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "unsupported_value", "tool_choice", "must be"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function"}},
            "missing_required_parameter",
            "tool_choice.function",
            "Missing",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "invalid_value",
            "tool_choice.allowed_tools.tools",
            "must not be empty",
        ),
        ({"functions": [{}]}, "unsupported_parameter", "functions", "Use 'tools'"),
        ({"function_call": "auto"}, "unsupported_parameter", "function_call", "Use 'tool_choice'"),
        ({"response_format": "json"}, "unsupported_response_format", "response_format.type", "json_schema"),
        (
            {"response_format": {"type": "structural_tag"}},
            "unsupported_response_format",
            "response_format.type",
            "'json_object'",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
            "Missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
            "Missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "invalid_value",
            "response_format.json_schema.name",
            "must match",
        ),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs", "must have one of"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "invalid_value",
            "structured_outputs",
            "must have one of",
        ),
        (
            {"structured_outputs": {"grammar": "root ::= x"}},
            "unsupported_parameter",
            "structured_outputs.grammar",
            "not supported",
        ),
        ({"structured_outputs": {"xml": "a"}}, "invalid_value", "structured_outputs.xml", "not supported"),
        ({"guided_choice": []}, "invalid_value", "guided_choice", "must not be empty"),
        ({"guided_choice": ["a", ""]}, "invalid_value", "guided_choice.1", "must not be empty"),
        ({"guided_json": 3}, "invalid_value", "guided_json", "must be a JSON Schema"),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "invalid_value",
            "guided_regex",
            "cannot be combined with 'response_format'",
        ),
        ({"regex": "a", "json_schema": "{}"}, "invalid_value", "json_schema", "combined with 'regex'"),
        (
            {"reasoning_effort": "huge"},
            "invalid_value",
            "reasoning_effort",
            "must be one of 'none', 'minimal'",
        ),
        ({"enable_thinking": "yes"}, "invalid_type", "enable_thinking", "true or false"),
        (
            {"chat_template_kwargs": {"tokenize": False}},
            "invalid_value",
            "chat_template_kwargs.tokenize",
            "not supported",
        ),
        ({"model": 3}, "invalid_type", "model", "must be a string"),
        ({"temperature": "1"}, "invalid_type", "temperature", "must be a number"),
        ({"temperature": 2.5}, "invalid_value", "temperature", "must be at most 2"),
        ({"temperature": -1}, "invalid_value", "temperature", "must be at least 0"),
        ({"temperature": float("nan")}, "invalid_value", "temperature", "must be a finite number"),
        ({"top_p": 0}, "invalid_value", "top_p", "must be greater than 0"),
        ({"top_k": -2}, "invalid_value", "top_k", "must be at least -1"),
        ({"top_k": 1.5}, "invalid_type", "top_k", "must be an integer"),
        ({"min_p": 1.1}, "invalid_value", "min_p", "at most 1"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty", "greater than 0"),
        ({"presence_penalty": 3}, "invalid_value", "presence_penalty", "at most 2"),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty", "at least -2"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias", "token ids as keys"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias", "token ids as keys"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5", "at most 100"),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias", "must be an object"),
        ({"seed": 2**63}, "invalid_value", "seed", "less than"),
        ({"n": 0}, "invalid_value", "n", "at least 1"),
        ({"n": 129}, "invalid_value", "n", "at most 128"),
        ({"n": True}, "invalid_type", "n", "an integer"),
        ({"stop": ""}, "invalid_value", "stop", "empty string"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop", "at most 16"),
        ({"stop": ["a", 3]}, "invalid_type", "stop.1", "a string"),
        ({"stop": 3}, "invalid_type", "stop", "an array"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids.0", "at least 0"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", "at least 1"),
        ({"max_completion_tokens": -5}, "invalid_value", "max_completion_tokens", "at least 1"),
        ({"max_tokens": 10**30}, "invalid_value", "max_tokens", "at most"),
        ({"min_tokens": -1}, "invalid_value", "min_tokens", "at least 0"),
        ({"ignore_eos": "yes"}, "invalid_type", "ignore_eos", "true or false"),
        ({"stream": 1}, "invalid_type", "stream", "true or false"),
        ({"stream_options": 3}, "invalid_type", "stream_options", "an object"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options", "'stream'"),
        ({"logprobs": 3}, "invalid_type", "logprobs", "true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs", "at most 20"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs", "needs 'logprobs'"),
        ({"cache_salt": ""}, "invalid_value", "cache_salt", "must not be empty"),
        ({"cache_salt": "é" * 600}, "invalid_value", "cache_salt", "at most 1024 bytes"),
        ({"priority": 2**31}, "invalid_value", "priority", "less than"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], code: str, param: str, words: str) -> None:
    found_code, found_param, message = _fault({"messages": [USER], **fields})
    assert (found_code, found_param) == (code, param)
    assert words in message and param in message


def test_missing_messages_are_named() -> None:
    assert _fault({})[:2] == ("missing_required_parameter", "messages")


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        ({"type": "text", "text": 3}, "invalid_type", "messages.0.content.0.text"),
        ({"type": "text"}, "missing_required_parameter", "messages.0.content.0.text"),
        ({"type": "image_url"}, "missing_required_parameter", "messages.0.content.0.image_url"),
        (
            {"type": "image_url", "image_url": {}},
            "missing_required_parameter",
            "messages.0.content.0.image_url.url",
        ),
        ({"type": "image_url", "image_url": 3}, "invalid_type", "messages.0.content.0.image_url"),
        (
            {"type": "image_url", "image_url": {"url": 3}},
            "invalid_type",
            "messages.0.content.0.image_url.url",
        ),
        (
            {"type": "image_url", "image_url": {"url": "x", "detail": "best"}},
            "invalid_value",
            "messages.0.content.0.image_url.detail",
        ),
        (
            {"type": "image_url", "image_url": {"url": "x", "max_dynamic_patch": 0}},
            "invalid_value",
            "messages.0.content.0.image_url.max_dynamic_patch",
        ),
        ({"type": "input_audio"}, "unsupported_content_part", "messages.0.content.0.type"),
        ({"type": "video_url"}, "missing_required_parameter", "messages.0.content.0.video_url"),
        (
            {"type": "video_url", "video_url": {"url": "x", "num_frames": 0}},
            "invalid_value",
            "messages.0.content.0.video_url.num_frames",
        ),
        (
            {"type": "video_url", "video_url": {"url": "x", "fps": 0}},
            "invalid_value",
            "messages.0.content.0.video_url.fps",
        ),
        ({"type": "file", "file": {}}, "missing_required_parameter", "messages.0.content.0.file.file_data"),
        ({"type": "file", "file": {"file_id": "f"}}, "unsupported_value", "messages.0.content.0.file"),
        ({"type": "input_file", "file_id": "f"}, "unsupported_value", "messages.0.content.0"),
        ({"type": "input_file"}, "missing_required_parameter", "messages.0.content.0.file_data"),
        ({"type": "input_file", "file_url": 1}, "invalid_type", "messages.0.content.0.file_url"),
        ({"type": ["text"]}, "unsupported_content_part", "messages.0.content.0.type"),
        ({"something": 1}, "unsupported_content_part", "messages.0.content.0.type"),
        ("text", "invalid_type", "messages.0.content.0"),
    ],
)
def test_a_bad_part_is_named(part: Any, code: str, param: str) -> None:
    found_code, found_param, message = _fault(_part(part))
    assert (found_code, found_param) == (code, param)
    if code == "unsupported_content_part":
        assert "text, image_url" in message


@pytest.mark.parametrize(
    "part",
    [
        {"text": "hi"},
        {"type": "input_text", "text": "hi"},
        {"type": "text", "text": "hi", "prompt_cache_breakpoint": {}},
        {"image_url": {"url": "data:"}},
        {"type": "image_url", "image_url": "data:"},
        {"type": "image_url", "image_url": {"url": "data:", "detail": None, "nframe": 8}, "uuid": "x"},
        {"type": "input_image", "image_url": "data:", "detail": "auto"},
    ],
)
def test_accepted_shapes_of_parts(part: dict[str, Any]) -> None:
    assert len(_parse(_part(part)).messages[0].content or "") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{}]},
        {"chat_template": "{{ x }}"},
        {"continue_final_message": True},
        {"guided_grammar": "root ::= x"},
        {"guided_anything": "x"},
        {"ebnf": "root ::= x"},
        {"prediction": {"type": "content"}},
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"bad_words": ["x"]},
        {"input_ids": [1]},
        {"kv_transfer_params": {}},
        {"prompt_logprobs": 0},
    ],
)
def test_what_would_silently_change_the_answer_is_refused(fields: dict[str, Any]) -> None:
    [key] = fields
    code, param, message = _fault({"messages": [USER], **fields})
    assert (code, param) == ("unsupported_parameter", key)
    assert f"'{key}'" in message


def test_values_that_ask_for_nothing_are_accepted() -> None:
    fields: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "continue_final_message": False,
        "chat_template": None,
        "guided_json": None,
        "prediction": None,
        "stop": None,
        "temperature": None,
        "stream_options": {},
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "top_logprobs": 0,
    }
    assert unknown_keys(_parse({"messages": [USER], **fields}).model_extra or {}) == []


def test_unknown_keys_are_kept_apart() -> None:
    parsed = _parse({"messages": [USER], "new_in_2027": 1, "user": "x", "tools": []})
    assert unknown_keys(parsed.model_extra or {}) == ["new_in_2027"]
