"""The bodies of `/v1/completions`, `/tokenize` and `/detokenize`.  Knows nothing about protobuf or HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from gateway.format_schema import FormatFields
from gateway.schema import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    ChatMessage,
    PositiveInt,
    SamplingFields,
    StreamOptions,
    TokenId,
)
from gateway.strict_model import StrictModel

# OpenAI's and vLLM's default for this endpoint.
DEFAULT_MAX_TOKENS = 16

_Ids = Annotated[list[TokenId], Field(min_length=1)]
_Text = Annotated[str, Field(min_length=1)]


def _prompt_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "#text"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, list):
        return "#many_ids"
    return "#texts" if isinstance(first, str) else "#ids"


Prompt = Annotated[
    Annotated[_Text, Tag("#text")]
    | Annotated[list[_Text], Field(max_length=MAX_CHOICES), Tag("#texts")]
    | Annotated[_Ids, Tag("#ids")]
    | Annotated[list[_Ids], Field(max_length=MAX_CHOICES), Tag("#many_ids")],
    Discriminator(
        _prompt_tag,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, an array of strings, of token ids, or of arrays of token ids",
    ),
]


class CompletionRequest(SamplingFields, FormatFields):
    """Body of `POST /v1/completions`.  Undeclared keys are kept: see `refused_key`, `unknown_keys`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: Prompt
    max_tokens: PositiveInt | None = DEFAULT_MAX_TOKENS
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts, as texts or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * (self.n or 1)


class TokenizeBody(StrictModel):
    """Body of `POST /tokenize`: a text, or a conversation without media."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    return_token_strs: Literal[False] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "The body must have either 'prompt' or 'messages'.")
        return self


class DetokenizeBody(StrictModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[TokenId]
