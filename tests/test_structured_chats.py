"""Tools, formats and thinking through the official client, with the demo model, at temperature 1."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from deploy.embedded import embedded_checkpoint
from tests.llm_service.schemas import SCHEMAS, closed
from tests.llm_service.test_grammar import HOSTILE
from tests.processes import Stack

MODEL = "tessera-demo"
USER: Any = [{"role": "user", "content": "Say something."}]
AT = closed({"at": {"enum": ["cat", "dog"]}})
LOOK: Any = {"type": "function", "function": {"name": "look", "description": "Look", "parameters": AT}}
GO: Any = {"type": "function", "function": {"name": "go", "parameters": closed({"far": {"type": "boolean"}})}}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(embedded_checkpoint(), "--served-model-name", MODEL, "--num-kv-blocks", "2048") as running:
        yield running
    logs = [line for service in (running.llm, running.gateway) for line in service.log]
    assert not any("Traceback" in line for line in logs), logs


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def answer(client: openai.OpenAI, seed: int = 0, **fields: Any) -> Any:
    fields = {"max_tokens": 600, "temperature": 1, **fields}
    return client.chat.completions.create(model=MODEL, messages=USER, seed=seed, **fields).choices[0]


def as_format(schema: object) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def test_fifty_schemas_at_once_are_always_fulfilled(client: openai.OpenAI) -> None:
    def ask(number: int) -> Any:
        return answer(client, number, response_format=as_format(SCHEMAS[number]))

    assert len(SCHEMAS) >= 50
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(len(SCHEMAS))))
    for schema, choice in zip(SCHEMAS, answers, strict=True):
        assert choice.finish_reason == "stop", (schema, choice)
        jsonschema.validate(json.loads(choice.message.content), schema)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Thing(BaseModel):
    colour: Colour
    size: int | None
    name: str = Field(max_length=8)


class Scene(BaseModel):
    things: list[Thing] = Field(max_length=2)
    background: Thing | Colour


def test_a_model_of_pydantic_is_parsed_whole_and_streamed(client: openai.OpenAI) -> None:
    completions = client.chat.completions
    options: Any = {"temperature": 1.0, "seed": 3, "max_tokens": 600}
    whole = completions.parse(model=MODEL, messages=USER, response_format=Scene, **options)
    scene = whole.choices[0].message.parsed
    assert isinstance(scene, Scene)
    with completions.stream(model=MODEL, messages=USER, response_format=Scene, **options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == scene


def test_any_object_a_pattern_and_a_choice(client: openai.OpenAI) -> None:
    # An object of any depth may take long: one that was cut is none.
    found = answer(client, 1, response_format={"type": "json_object"}, max_tokens=2000)
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)
    pattern = r"[A-Z][a-z]{2,5} is (red|blue)\."
    for extra in ({"structured_outputs": {"regex": pattern}}, {"guided_regex": pattern}, {"regex": pattern}):
        assert re.fullmatch(pattern, answer(client, extra_body=extra).message.content)
    for name in ({"structured_outputs": {"choice": ["猫", "dog"]}}, {"guided_choice": ["猫", "dog"]}):
        assert answer(client, extra_body=name).message.content in ("猫", "dog")
    text = client.completions.create(
        model=MODEL, prompt="A cat is", max_tokens=50, extra_body={"guided_json": AT, "temperature": 1}
    )
    jsonschema.validate(json.loads(text.choices[0].text), AT)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_that_must_come_comes_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    fields: Any = {"tools": [LOOK], "tool_choice": choice, "parallel_tool_calls": False, "seed": 5}
    whole = answer(client, **fields)
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content, call.function.name) == ("tool_calls", None, "look")
    jsonschema.validate(json.loads(call.function.arguments), AT)
    with client.chat.completions.stream(
        model=MODEL, messages=USER, temperature=1, max_tokens=600, **fields
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    (streamed,) = final.message.tool_calls or ()
    assert (streamed.function.name, streamed.function.arguments) == ("look", call.function.arguments)


def test_several_calls_have_ids_of_their_own_and_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    for seed in range(8):
        calls = answer(client, seed, tools=[LOOK, GO], tool_choice="required").message.tool_calls
        assert len({call.id for call in calls}) == len(calls)
        for call in calls:
            schema = {"look": LOOK, "go": GO}[call.function.name]["function"]["parameters"]
            jsonschema.validate(json.loads(call.function.arguments), schema)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "go"}}]}
    for seed in range(3):
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        calls = answer(client, seed, tools=[LOOK, GO], tool_choice=choice).message.tool_calls
        assert {call.function.name for call in calls} == {"go"}


def test_a_conversation_goes_on_behind_its_calls(client: openai.OpenAI) -> None:
    """The whole loop of an agent; tools that may be called leave an ordinary answer alone."""
    called = answer(client, tools=[LOOK], tool_choice="required", parallel_tool_calls=False).message
    (call,) = called.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"seen": "a red circle"}'}
    messages: Any = [*USER, called.model_dump(exclude_none=True), result]
    found = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[LOOK], temperature=0, max_tokens=20
    )
    assert found.choices[0].message.content and found.choices[0].finish_reason in ("stop", "length")
    without = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[LOOK], tool_choice="none", temperature=0, max_tokens=20
    )
    plain = client.chat.completions.create(model=MODEL, messages=USER, temperature=0, max_tokens=20)
    assert without.choices[0].message.content == plain.choices[0].message.content
    assert without.usage is not None and plain.usage is not None
    assert without.usage.prompt_tokens == plain.usage.prompt_tokens


def test_thinking_is_told_apart_and_a_format_holds_behind_it(client: openai.OpenAI) -> None:
    asked = [{"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}]
    prompts = set()
    for extra in (*asked, {"reasoning_effort": "low"}):
        body = {"guided_choice": ["yes", "no"], **extra}
        found = client.chat.completions.create(
            model=MODEL, messages=USER, temperature=1, max_tokens=400, extra_body=body
        )
        (choice,) = found.choices
        assert choice.finish_reason == "length" or choice.message.content in ("yes", "no")
        assert "<think>" not in (choice.message.content or "")
        prompts.add(found.usage.prompt_tokens if found.usage else 0)
    quiet = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=1, extra_body={"reasoning_effort": "none"}
    )
    # The model is asked to think in the same words, whichever way the request says it.
    assert len(prompts) == 1 and quiet.usage is not None and quiet.usage.prompt_tokens < min(prompts)


def test_hostile_schemas_are_refused_while_others_are_answered(client: openai.OpenAI) -> None:
    """How long that takes, test_structured_answers.py says."""

    def refused(**fields: Any) -> str:
        with pytest.raises(openai.BadRequestError) as error:
            answer(client, **fields)
        return str(error.value.param)

    def attack() -> set[str]:
        bad = {"type": "function", "function": {"name": "f", "parameters": HOSTILE["exploding product"]}}
        params = {refused(response_format=as_format(hostile)) for hostile in HOSTILE.values()}
        return params | {
            refused(tools=[LOOK, bad], tool_choice={"type": "function", "function": {"name": "f"}})
        }

    with ThreadPoolExecutor(1) as thread:
        attacking, num_answers = thread.submit(attack), 0
        while not attacking.done():
            assert answer(client, max_tokens=2).finish_reason
            num_answers += 1
    assert attacking.result() == {"response_format.json_schema.schema", "tools.1.function.parameters"}
    assert num_answers > 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [LOOK, LOOK]}, "tools"),
        (
            {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "go"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [LOOK], "tool_choice": "required", "response_format": as_format(AT)}, "response_format"),
        ({"response_format": as_format({"type": "strng"})}, "response_format.json_schema.schema"),
        ({"response_format": as_format(AT), "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex"),
        ({"extra_body": {"guided_json": "{"}}, "guided_json"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        answer(client, **fields)
    assert str(refused.value.param).startswith(param), refused.value
