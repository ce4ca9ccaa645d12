"""What a caller may ask of the form of an answer, and the grammar text that says so.

Knows the grammar language, not who enforces it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from llguidance import regex_to_lark

from protos.errors import InvalidRequest

MAX_FORMAT_BYTES = 256 << 10
MAX_CHOICE_STRINGS = 1024
# A model that may write white space without end sometimes does nothing else.
WHITESPACE = r"[ \n\t]{0,40}"
FIELD = "response_format"

_ANY_OBJECT = '{"type": "object"}'


class FormatKind(Enum):
    """The names are those of the contract's fields."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"

    @property
    def field(self) -> str:
        return f"{FIELD}.{self.value}"


@dataclass(frozen=True)
class ResponseFormat:
    """`text` is a schema or a pattern; `choices` are the allowed answers."""

    kind: FormatKind
    text: str = ""
    choices: tuple[str, ...] = ()

    def rule(self) -> str:
        """The right side of a grammar rule for the whole answer.

        Raises:
            InvalidRequest: empty, too long, or no JSON schema; whether it can be enforced is checked later.
        """
        size = len(self.text.encode()) + sum(len(choice.encode()) for choice in self.choices)
        if size > MAX_FORMAT_BYTES:
            raise self.refusal(f"has {size} bytes, at most {MAX_FORMAT_BYTES} are allowed")
        if self.kind is FormatKind.REGEX:
            return self._regex_rule()
        if self.kind is FormatKind.CHOICE:
            return self._choice_rule()
        return f"%json {self._schema()}"

    def refusal(self, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self.kind.value} {problem}", field=self.kind.field)

    def _regex_rule(self) -> str:
        if not self.text:
            raise self.refusal("must not be empty")
        try:
            return f"/{regex_to_lark(self.text, 'dw')}/"  # digits and words as in JSON Schema
        except UnicodeError:
            raise self.refusal("is not valid text") from None

    def _choice_rule(self) -> str:
        if not self.choices or "" in self.choices:
            raise self.refusal("needs at least one string, and none empty")
        if len(self.choices) > MAX_CHOICE_STRINGS:
            raise self.refusal(f"has {len(self.choices)} strings, at most {MAX_CHOICE_STRINGS} are allowed")
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in self.choices)

    def _schema(self) -> str:
        try:
            schema: Any = json.loads(_ANY_OBJECT if self.kind is FormatKind.JSON_OBJECT else self.text)
            if schema is True:
                schema = {}
            if not isinstance(schema, dict):
                raise self.refusal("must be a JSON object")
            # Also lest a caller sets options of the library.
            return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}, allow_nan=False)
        except (ValueError, RecursionError):  # also numbers that JSON cannot say
            raise self.refusal("is not valid JSON") from None


def grammar_text(rule: str, strips_leading_space: bool) -> str:
    """A grammar whose text is `rule` once it has been decoded.

    Where decoding drops the first space, as with SentencePiece, the tokens must spell one.
    """
    space = '" " ' if strips_leading_space else ""
    return f"start: {space}answer\nanswer: {rule}\n"
