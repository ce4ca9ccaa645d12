"""However much is wrong with a body, one fault is found."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.completions_schema import CompletionRequest, DetokenizeBody, TokenizeBody
from gateway.messages_schema import MessagesRequest
from gateway.responses_schema import ResponsesRequest
from gateway.schema import MAX_BIASES, ChatCompletionRequest
from gateway.strict_model import StrictModel

MANY: list[Any] = [None] * 1000
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatCompletionRequest, {"messages": MANY}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": MANY}]}),
        (ChatCompletionRequest, {"messages": USER, "stop": MANY}),
        (ChatCompletionRequest, {"messages": USER, "stop_token_ids": MANY}),
        (ChatCompletionRequest, {"messages": USER, "logit_bias": dict.fromkeys(map(str, range(9000)), 101)}),
        (CompletionRequest, {"prompt": [1, *MANY]}),
        (CompletionRequest, {"prompt": ["a", *MANY[:100]]}),
        (CompletionRequest, {"prompt": [[None], *[[None]] * 100]}),
        (TokenizeBody, {"messages": MANY}),
        (DetokenizeBody, {"tokens": MANY}),
        (ResponsesRequest, {"input": MANY}),
        (ResponsesRequest, {"input": [{"role": "user", "content": MANY}]}),
        (MessagesRequest, {"max_tokens": 1, "messages": MANY}),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": MANY}]}),
        (MessagesRequest, {"max_tokens": 1, "messages": USER, "system": MANY}),
    ],
)
def test_a_list_of_nothing_but_faults_has_one(kind: type[StrictModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() == 1


def test_biases_up_to_their_limit_are_read() -> None:
    bias = dict.fromkeys(map(str, range(MAX_BIASES)), 1.0)
    assert ChatCompletionRequest.model_validate({"messages": USER, "logit_bias": bias}).logit_bias == bias
