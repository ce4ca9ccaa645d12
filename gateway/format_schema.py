"""Fields of a request that ask for a form of the answer, as OpenAI, vLLM and SGLang name them.

Knows nothing about protobuf; whether a schema or a pattern can be enforced, the language model finds out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gateway.json_size import BOUNDED
from gateway.strict_model import StrictModel

MAX_CHOICE_STRINGS = 1024

FormatKind = Literal["json_object", "json_schema", "regex", "choice"]


@dataclass(frozen=True)
class AskedFormat:
    """One form that a request asks for."""

    kind: FormatKind
    param: str  # path into the JSON body
    text: str = ""  # the schema as JSON, or the pattern
    choices: tuple[str, ...] = ()


class NamedSchema(StrictModel):
    """`strict` changes nothing: a schema is always enforced."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], BOUNDED, Field(alias="schema")]
    strict: bool | None = None


class TextFormat(StrictModel):
    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    type: Literal["json_object"]


class JsonSchemaFormat(StrictModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return f"#{kind}" if kind in ("text", "json_object", "json_schema") else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("#text")]
    | Annotated[JsonObjectFormat, Tag("#json_object")]
    | Annotated[JsonSchemaFormat, Tag("#json_schema")],
    Discriminator(
        _format_tag,
        custom_error_type="unsupported_response_format",
        custom_error_message="must be one of 'text', 'json_object' or 'json_schema'",
    ),
]


def _schema_tag(value: Any) -> str | None:
    return "#string" if isinstance(value, str) else "#object" if isinstance(value, Mapping) else None


JsonSchema = Annotated[
    Annotated[str, Tag("#string")] | Annotated[dict[str, Any], BOUNDED, Tag("#object")],
    Discriminator(
        _schema_tag,
        custom_error_type="schema_type",
        custom_error_message="must be a JSON Schema, as an object or as a string of JSON",
    ),
]
Pattern = Annotated[str, Field(min_length=1)]
Choice = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICE_STRINGS)
]


class StructuredOutputs(StrictModel):
    """vLLM's: exactly one form."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[JsonSchema | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choice | None = None
    json_object: bool | None = None
    grammar: None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_fallback: Literal[False] | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None

    @field_validator("grammar", "structural_tag", "whitespace_pattern", mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if value is not None:
            raise PydanticCustomError("unsupported_parameter", "is not supported by this server")
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if len(list(self.formats())) != 1:
            raise PydanticCustomError(
                "formats", "must have one of 'json', 'regex', 'choice' or 'json_object'"
            )
        return self

    def formats(self) -> Iterator[AskedFormat]:
        yield from _formats("structured_outputs.", self.json_, self.regex, self.choice)
        if self.json_object:
            yield AskedFormat("json_object", "structured_outputs.json_object")


class FormatFields(StrictModel):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choice | None = None
    regex: Pattern | None = None
    json_schema: JsonSchema | None = None

    @cached_property
    def formats(self) -> list[AskedFormat]:
        """All that are asked for; more than one is a contradiction."""
        return [*self._formats()]

    def _formats(self) -> Iterator[AskedFormat]:
        if isinstance(self.response_format, JsonObjectFormat):
            yield AskedFormat("json_object", "response_format")
        if isinstance(self.response_format, JsonSchemaFormat):
            schema = _as_json(self.response_format.json_schema.schema_)
            yield AskedFormat("json_schema", "response_format.json_schema.schema", schema)
        if self.structured_outputs is not None:
            yield from self.structured_outputs.formats()
        yield from _formats("guided_", self.guided_json, self.guided_regex, self.guided_choice)
        if self.regex is not None:
            yield AskedFormat("regex", "regex", self.regex)
        if self.json_schema is not None:
            yield AskedFormat("json_schema", "json_schema", _as_json(self.json_schema))


def _formats(
    prefix: str, schema: str | dict[str, Any] | None, regex: str | None, choice: list[str] | None
) -> Iterator[AskedFormat]:
    if schema is not None:
        yield AskedFormat("json_schema", f"{prefix}json", _as_json(schema))
    if regex is not None:
        yield AskedFormat("regex", f"{prefix}regex", regex)
    if choice is not None:
        yield AskedFormat("choice", f"{prefix}choice", choices=tuple(choice))


def _as_json(schema: str | dict[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
