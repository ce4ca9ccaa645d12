"""Formats, tools and thinking over gRPC, in real processes, at temperature 1; most with the demo model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import jsonschema
import pytest
from transformers import PreTrainedTokenizerFast

from deploy.embedded import embedded_checkpoint
from llm_service.call_form import INTERNLM
from protos import language_model_pb2 as pb
from protos.language_model_pb2_grpc import LanguageModelStub
from tests.checkpoints import make_checkpoint
from tests.llm_service.schemas import SCHEMAS
from tests.llm_service.test_grammar import HOSTILE
from tests.processes import ServiceProcess

LOOK = {
    "type": "object",
    "properties": {"at": {"enum": ["cat", "dog"]}},
    "required": ["at"],
    "additionalProperties": False,
}


@dataclass
class Answer:
    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    reason: int = pb.FINISH_REASON_UNSPECIFIED


def serve(model: str) -> Iterator[LanguageModelStub]:
    llm = ServiceProcess("llm", model, "--port", "0")
    try:
        with grpc.insecure_channel(llm.address) as channel:
            yield LanguageModelStub(channel)
    finally:
        llm.stop()
    assert not any("Traceback" in line for line in llm.log), llm.log


@pytest.fixture(scope="module")
def stub() -> Iterator[LanguageModelStub]:
    yield from serve(str(embedded_checkpoint()))


def generate(stub: LanguageModelStub, seed: int = 0, max_tokens: int = 600, **more: Any) -> Answer:
    answer = Answer()
    user = pb.Message(role="user", parts=[pb.Part(text="Say something.")])
    sampling = pb.SamplingParams(seed=seed, temperature=1.0, max_tokens=max_tokens)
    for event in stub.Generate(pb.GenerateRequest(messages=[user], sampling=sampling, **more), timeout=60):
        answer.text += event.delta.text
        answer.reasoning += event.delta.reasoning
        for delta in event.delta.tool_calls:
            if delta.name:
                assert delta.index == len(answer.calls)
                answer.calls.append([delta.name, ""])
            answer.calls[delta.index][1] += delta.arguments
        answer.reason = event.finished.reason or answer.reason
    return answer


def schema(value: object) -> pb.ResponseFormat:
    return pb.ResponseFormat(json_schema=json.dumps(value))


def test_fifty_schemas_at_once_are_always_fulfilled(stub: LanguageModelStub) -> None:
    def ask(number: int) -> Answer:
        return generate(stub, number, response_format=schema(SCHEMAS[number]))

    assert len(SCHEMAS) >= 50
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(len(SCHEMAS))))
    for wanted, answer in zip(SCHEMAS, answers, strict=True):
        assert answer.reason == pb.FINISH_REASON_STOP, (wanted, answer)
        jsonschema.validate(json.loads(answer.text), wanted)


def test_a_pattern_and_a_choice(stub: LanguageModelStub) -> None:
    pattern = r"[A-Z][a-z]{2,5} is (red|blue)\."
    assert re.fullmatch(pattern, generate(stub, response_format=pb.ResponseFormat(regex=pattern)).text)
    choice = pb.ResponseFormat(choice=pb.TextChoice(texts=["猫", "dog", "the owl"]))
    assert generate(stub, response_format=choice).text in ("猫", "dog", "the owl")


def test_hostile_schemas_are_refused_and_stall_nobody(stub: LanguageModelStub) -> None:
    def refused_in(hostile: object) -> float:
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as refused:
            generate(stub, response_format=schema(hostile))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value
        return time.monotonic() - began

    with ThreadPoolExecutor(1) as thread:
        attack = thread.submit(lambda: [refused_in(hostile) for hostile in HOSTILE.values()])
        gaps = []
        while not attack.done():
            began = time.monotonic()
            assert generate(stub, max_tokens=2).reason
            gaps.append(time.monotonic() - began)
        # On idle cores under a second each; what stalls the service takes as long as all of them.
        assert max(attack.result()) < 5 and max(gaps) < 5


@pytest.mark.parametrize("choice", [pb.TOOL_CHOICE_REQUIRED, pb.TOOL_CHOICE_NAMED])
def test_a_call_that_must_come_comes(stub: LanguageModelStub, choice: pb.ToolChoice) -> None:
    tool = pb.Tool(name="look", description="Look", parameters=json.dumps(LOOK))
    use = pb.ToolUse(tools=[tool], choice=choice, name="look", single_call=True)
    answer = generate(stub, tools=use)
    assert answer.reason == pb.FINISH_REASON_TOOL_CALLS and answer.text == ""
    ((name, arguments),) = answer.calls
    assert name == "look"
    jsonschema.validate(json.loads(arguments), LOOK)


def test_tools_that_may_be_called_leave_an_ordinary_answer_alone(stub: LanguageModelStub) -> None:
    tool = pb.Tool(name="look", parameters=json.dumps(LOOK))
    answer = generate(stub, max_tokens=20, tools=pb.ToolUse(tools=[tool]))
    assert answer.text and not answer.calls


def test_a_format_holds_behind_thoughts(stub: LanguageModelStub) -> None:
    choice = pb.ResponseFormat(choice=pb.TextChoice(texts=["yes", "no"]))
    answer = generate(stub, response_format=choice, thinking=pb.Thinking(enabled=True))
    assert answer.reason == pb.FINISH_REASON_LENGTH or answer.text in ("yes", "no")
    assert "<think>" not in answer.text


@pytest.fixture(scope="module")
def internlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModelStub]:
    """Random weights; the tokens that mark calls are special ones."""
    folder = make_checkpoint(tmp_path_factory.mktemp("internlm2"), "internlm2", "chat")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(INTERNLM.tokens)})
    tokenizer.save_pretrained(folder)
    yield from serve(str(folder))


def test_internlm2_is_made_to_call_one_of_the_allowed_tools_with_its_own_tokens(
    internlm: LanguageModelStub,
) -> None:
    tools = [pb.Tool(name=name, parameters=json.dumps(LOOK)) for name in ("look", "go", "see")]
    use = pb.ToolUse(tools=tools, choice=pb.TOOL_CHOICE_REQUIRED, single_call=True, allowed=["go", "see"])
    for seed in range(5):
        answer = generate(internlm, seed, tools=use)
        assert answer.reason == pb.FINISH_REASON_TOOL_CALLS and answer.text == ""
        ((name, arguments),) = answer.calls
        assert name in ("go", "see")
        jsonschema.validate(json.loads(arguments), LOOK)
