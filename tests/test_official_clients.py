"""The official clients of OpenAI and Anthropic against real processes that serve the demo model.

Every asserted answer is one the model is certain of.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import openai
import pydantic
import pytest

from deploy.demo import PICTURE as CAFE
from deploy.embedded import embedded_checkpoint
from tests.pictures import data_uri
from tests.processes import Stack, wait_idle

MODEL = "org/demo"  # ids with a slash break what forgets to encode them
SAY = "What does the sign say?"
SIGN = "CAFE TESSERA"
# The client has no parameter for it.
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
GREETING = "Hello! I am Tessera's demo model. Ask me about a picture."


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(embedded_checkpoint(), "--served-model-name", MODEL, "--num-kv-blocks", "2048") as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def claude(stack: Stack) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(stack: Stack) -> Iterator[None]:
    yield
    wait_idle(stack.llm)


def _chat_parts(**options: Any) -> list[Any]:
    url = data_uri(CAFE.read_bytes(), "image/jpeg")
    parts = [{"type": "image_url", "image_url": {"url": url, **options}}, {"type": "text", "text": SAY}]
    return [{"role": "user", "content": parts}]


def _response_items() -> list[Any]:
    url = data_uri(CAFE.read_bytes(), "image/jpeg")
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": SAY}]
    return [{"role": "user", "content": parts}]


def _claude_messages() -> list[Any]:
    data = base64.b64encode(CAFE.read_bytes()).decode()
    source = {"type": "base64", "media_type": "image/jpeg", "data": data}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": SAY}]}]


def test_models_are_retrieved_by_their_encoded_id(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_and_its_stream_helper_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=_chat_parts(), temperature=0)
    options: Any = {"include_usage": True}
    with client.chat.completions.stream(
        model=MODEL, messages=_chat_parts(), temperature=0, stream_options=options
    ) as stream:
        final = stream.get_final_completion()
    assert whole.choices[0].message.content == final.choices[0].message.content == SIGN
    assert whole.usage is not None and final.usage is not None
    assert whole.usage.total_tokens == final.usage.total_tokens


def test_a_picture_may_go_without_its_thumbnail(client: openai.OpenAI) -> None:
    usages = [
        client.chat.completions.create(
            model=MODEL, messages=_chat_parts(use_thumbnail=use), max_tokens=1, temperature=0
        ).usage
        for use in (True, False)
    ]
    tokens = [usage.prompt_tokens for usage in usages if usage is not None]
    assert tokens[0] - tokens[1] == 64


def _ask(client: openai.OpenAI, parts: list[Any] | None = None, **fields: Any) -> Any:
    """The greedy answer, its own parameters and others alike."""
    messages = parts or [{"role": "user", "content": "Hello"}]
    body = {"temperature": 0, **fields}
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=body)


def test_options_for_all_pictures_are_those_of_each(client: openai.OpenAI) -> None:
    def image_tokens(kwargs: dict[str, Any] | None = None, **options: Any) -> int:
        answer = _ask(client, _chat_parts(**options), max_tokens=1, mm_processor_kwargs=kwargs)
        tokens: int = answer.usage.prompt_tokens_details.image_tokens
        return tokens

    one, whole = image_tokens(detail="low"), image_tokens()
    assert one == 64 and whole > 3 * one
    assert image_tokens({"dynamic_image_size": False}) == image_tokens({"max_dynamic_patch": 1}) == one
    few = image_tokens(max_dynamic_patch=2)
    assert one < few < whole
    assert (
        image_tokens({"max_dynamic_patch": 2})
        == image_tokens({"max_dynamic_patch": 1}, max_dynamic_patch=2)
        == few
    )
    assert image_tokens({"use_thumbnail": False}) == whole - 64
    assert image_tokens({"max_dynamic_patch": 1}, detail="high") == whole


def test_what_ends_an_answer(client: openai.OpenAI) -> None:
    assert _ask(client).choices[0].message.content == GREETING
    cut = _ask(client, max_tokens=500, max_completion_tokens=3)
    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (3, "length")
    stopped = _ask(client, stop=["nowhere", "demo"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (GREETING.partition("demo")[0], "stop")
    kept = _ask(client, stop="demo", include_stop_str_in_output=True).choices[0]
    assert kept.message.content == GREETING.partition("demo")[0] + "demo"
    long = _ask(client, ignore_eos=True, max_tokens=40)
    assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (40, "length")
    assert _ask(client, min_tokens=30, max_tokens=31).usage.completion_tokens >= 30
    beyond = _ask(client, max_tokens=16384)  # more than the context has left
    assert (beyond.choices[0].message.content, beyond.choices[0].finish_reason) == (GREETING, "stop")


def test_tokens_are_forbidden_and_end_answers(client: openai.OpenAI, stack: Stack) -> None:
    first = httpx.post(f"{stack.url}/tokenize", json={"prompt": "Hello!", "add_special_tokens": False})
    ids = first.json()["tokens"]
    biased = _ask(client, logit_bias={str(token): -100 for token in ids}, max_tokens=4)
    assert not biased.choices[0].message.content.startswith("Hello")
    ended = _ask(client, stop_token_ids=ids[-1:]).choices[0]
    assert ended.finish_reason == "stop" and len(ended.message.content) < len(GREETING)


def test_seeds_repeat_choices_and_choices_differ(client: openai.OpenAI) -> None:
    def choices(seed: int) -> list[str]:  # behind the greeting the model is certain of nothing
        answer = _ask(client, temperature=2, seed=seed, n=3, max_tokens=60, ignore_eos=True)
        return [choice.message.content for choice in answer.choices]

    assert choices(1) == choices(1) != choices(2)
    assert len(set(choices(1))) == 3


def test_what_has_no_influence_is_accepted(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "store": True,
        "metadata": {"team": "a"},
        "user": "me",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {},
        "service_tier": "auto",
        "verbosity": "low",
        "modalities": ["text"],
        "priority": 0,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1.0,
        "spaces_between_special_tokens": True,
        "skip_special_tokens": True,
        "request_id": "r",
        "session_id": 1,
        "cache_salt": "s",
        "n": None,
        "stop": None,
        "stream_options": None,
        "logprobs": None,
        "max_tokens": None,
    }
    answer = _ask(client, **fields)
    assert answer.choices[0].message.content == GREETING and answer.service_tier == "default"


def test_responses_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input=_response_items(), temperature=0)
    with client.responses.stream(model=MODEL, input=_response_items(), temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert whole.output_text == final.output_text == "".join(deltas) == SIGN
    assert whole.status == final.status == "completed"
    assert whole.usage is not None and final.usage is not None
    assert whole.usage.total_tokens == final.usage.total_tokens


def test_a_response_to_a_text(client: openai.OpenAI) -> None:
    assert client.responses.create(model=MODEL, input="Hello", temperature=0).output_text == GREETING


def test_a_completion_goes_on_as_the_chat_does(client: openai.OpenAI, stack: Stack) -> None:
    """The template's own ids as a prompt give the chat's answer."""
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    ids = httpx.post(f"{stack.url}/tokenize", json=body).json()["tokens"]
    whole = client.completions.create(model=MODEL, prompt=ids, max_tokens=40, temperature=0, logprobs=1)
    stream = client.completions.create(model=MODEL, prompt=ids, max_tokens=40, temperature=0, stream=True)
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in stream) == GREETING
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and "".join(logprobs.tokens or ()).startswith(GREETING)
    assert whole.usage is not None and whole.usage.prompt_tokens == len(ids)


def test_completions_of_several_texts_with_echo(client: openai.OpenAI) -> None:
    texts = ["The sign says", "The door has the number"]
    answer = client.completions.create(model=MODEL, prompt=texts, max_tokens=4, temperature=0, n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith(texts[choice.index // 2]) for choice in answer.choices)


def test_messages_whole_and_streamed_agree(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model=MODEL, max_tokens=40, messages=_claude_messages(), **GREEDY)
    with claude.messages.stream(model=MODEL, max_tokens=40, messages=_claude_messages(), **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    (block,) = whole.content
    assert block.type == "text" and block.text == text == SIGN
    assert whole.stop_reason == final.stop_reason == "end_turn"
    assert whole.usage.output_tokens == final.usage.output_tokens


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "Hello"}], _claude_messages()])
def test_tokens_are_counted_as_they_are_used(claude: anthropic.Anthropic, messages: list[Any]) -> None:
    count = claude.messages.count_tokens(model=MODEL, messages=messages)
    usage = claude.messages.create(model=MODEL, max_tokens=1, messages=messages).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


COLORS = ("red", "green", "blue", "yellow")
PAINT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"enum": list(COLORS)}},
    "required": ["color"],
    "additionalProperties": False,
}
FUNCTION: Any = {"type": "function", "name": "paint", "parameters": PAINT_SCHEMA, "strict": True}
TOOL: Any = {"name": "paint", "description": "Paints.", "input_schema": PAINT_SCHEMA}


class Paint(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    color: Literal["red", "green", "blue", "yellow"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "paint"}])
def test_a_response_calls_a_function_and_goes_on_with_its_output(client: openai.OpenAI, choice: Any) -> None:
    """Streamed and whole; the demo model knows no tools, so that its next answer is any text."""
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": [FUNCTION]}
    items = _response_items()
    whole = client.responses.create(input=items, tool_choice=choice, **settings)
    with client.responses.stream(input=items, tool_choice=choice, **settings) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    calls = [item for answer in (whole, final) for item in answer.output if item.type == "function_call"]
    assert len(calls) == 2 and calls[0].arguments == calls[1].arguments == "".join(pieces)
    assert json.loads(calls[0].arguments)["color"] in COLORS and calls[0].name == "paint"
    output = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "painted"}
    answer = client.responses.create(input=[*items, *whole.output, output], **settings)
    assert answer.output_text and answer.status == "completed"


def test_a_response_without_a_call_is_what_it_was(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input=_response_items(), temperature=0, tools=[FUNCTION], tool_choice="none"
    )
    assert answer.output_text == SIGN and [item.type for item in answer.output] == ["message"]


def test_a_response_fulfils_a_schema(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input=_response_items(), text_format=Paint)
    assert isinstance(parsed.output_parsed, Paint)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
def test_a_message_uses_a_tool_and_goes_on_with_its_result(claude: anthropic.Anthropic, choice: Any) -> None:
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "tools": [TOOL], **GREEDY}
    messages = _claude_messages()
    whole = claude.messages.create(messages=messages, tool_choice=choice, **settings)
    with claude.messages.stream(messages=messages, tool_choice=choice, **settings) as stream:
        final = stream.get_final_message()
    first, second = (block for answer in (whole, final) for block in answer.content)
    assert first.type == second.type == "tool_use" and first.input == second.input
    assert whole.stop_reason == final.stop_reason == "tool_use"
    assert first.name == "paint" and dict(first.input)["color"] in COLORS  # type: ignore[call-overload]
    result = {"type": "tool_result", "tool_use_id": first.id, "content": "painted"}
    turns = [{"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(messages=[*messages, *turns], **settings)
    assert answer.stop_reason == "end_turn" and answer.content[0].type == "text"


def test_a_message_fulfils_a_schema(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.parse(
        model=MODEL, max_tokens=200, messages=_claude_messages(), output_format=Paint, **GREEDY
    )
    assert isinstance(answer.parsed_output, Paint)


def test_tokens_of_tools_are_counted_as_they_are_used(claude: anthropic.Anthropic) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": _claude_messages(), "tools": [TOOL]}
    usage = claude.messages.create(max_tokens=1, **request).usage
    count = claude.messages.count_tokens(**request).input_tokens
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    del request["tools"]
    assert claude.messages.count_tokens(**request).input_tokens < count


def test_schemas_that_cannot_be_enforced_are_named(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]}
    function: Any = {**FUNCTION, "parameters": schema}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="hi", tools=[function], tool_choice="required")
    assert caught.value.param == "tools.0.parameters"
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="hi", text=text)
    assert caught.value.param == "text.format.schema"
    with pytest.raises(anthropic.BadRequestError, match="schema"):
        claude.messages.create(
            model=MODEL,
            max_tokens=9,
            messages=[{"role": "user", "content": "hi"}],
            output_config={"format": {"type": "json_schema", "schema": schema}},
        )


def test_a_model_that_shall_not_think_answers(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    settings: dict[str, Any] = {"model": MODEL, "thinking": {"type": "disabled"}, **GREEDY}
    (block,) = claude.messages.create(max_tokens=40, messages=_claude_messages(), **settings).content
    response = client.responses.create(
        model=MODEL, input=_response_items(), temperature=0, reasoning={"effort": "none"}
    )
    assert block.type == "text" and block.text == response.output_text == SIGN


def test_a_model_that_shall_think_is_asked_to(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """Upstream's system prompt for it is longer than none."""
    counts = {}
    for kind in ("disabled", "enabled"):
        thinking: Any = {"type": kind, "budget_tokens": 1024}
        counts[kind] = claude.messages.count_tokens(
            model=MODEL, messages=_claude_messages(), thinking=thinking
        ).input_tokens
    assert counts["enabled"] > counts["disabled"] + 100
    response = client.responses.create(
        model=MODEL, input=_response_items(), max_output_tokens=1, reasoning={"effort": "low"}
    )
    assert response.usage is not None and response.usage.input_tokens == counts["enabled"]


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    answer = claude.messages.create(
        model=MODEL, max_tokens=40, messages=messages, stop_sequences=["demo"], **GREEDY
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "demo")


def test_what_is_too_long_is_a_bad_request(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    text = "word " * 60_000
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.responses.create(model=MODEL, input=text)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt=text)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        claude.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": text}])


def test_ids_go_back_to_their_text(stack: Stack) -> None:
    text = "Ein Café, ☕ und 1.20!"
    ids = httpx.post(f"{stack.url}/tokenize", json={"prompt": text}).json()
    back = httpx.post(f"{stack.url}/detokenize", content=json.dumps({"tokens": ids["tokens"]})).json()
    assert back == {"prompt": text} and ids["count"] == len(ids["tokens"])


def test_ids_beyond_the_vocabulary_are_refused(stack: Stack, client: openai.OpenAI) -> None:
    refused = httpx.post(f"{stack.url}/detokenize", json={"tokens": [2**31]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[2**31])
    assert caught.value.param == "prompt"


URL = "https://example.org/a"


def test_urls_are_refused_by_default_and_named(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """The encoder's refusal, through all three services."""
    image, file = {"type": "input_image", "image_url": URL}, {"type": "input_file", "file_url": URL}
    for part, place, code in (
        (image, "image_url", "invalid_image_url"),
        (file, "file_url", "invalid_file_url"),
    ):
        items: list[Any] = [{"role": "user", "content": [part]}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=MODEL, input=items)
        assert (caught.value.param, caught.value.code) == (f"input.0.content.0.{place}", code)
    for kind in ("image", "document"):
        blocks: list[Any] = [{"type": kind, "source": {"type": "url", "url": URL}}]
        messages: list[Any] = [{"role": "user", "content": blocks}]
        with pytest.raises(anthropic.BadRequestError, match="not enabled"):
            claude.messages.create(model=MODEL, max_tokens=1, messages=messages)
        with pytest.raises(anthropic.BadRequestError, match="not enabled"):
            claude.messages.count_tokens(model=MODEL, messages=messages)
