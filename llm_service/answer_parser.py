"""An answer's text, as it comes, to reasoning, content and tool calls.

Knows nothing about tokens; text that may be the beginning of a marker is held back until it is decided.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from llm_service.call_form import HERMES, CallForm

THINK_START, THINK_END = "<think>", "</think>"

_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of a call's arguments; together the pieces are its JSON."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments


class AnswerParser:
    """The pieces of one answer, in order."""

    def __init__(
        self,
        *,
        reasoning: bool,
        tools: bool,
        in_reasoning: bool = False,
        max_calls: int = 0,
        form: CallForm = HERMES,
        names: Collection[str] = (),
    ) -> None:
        """`in_reasoning`: the prompt has opened it already; `max_calls`: more are dropped, 0 for no limit.

        With `names`, what calls another tool is content.
        """
        self.num_calls = 0
        self.marker_tokens = form.tokens if tools else ()
        self._tools = tools
        self._form = form
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._text = ""  # not decided yet
        self._is_opening = False  # white space behind a marker is no part of anything
        self._call: _Call | None = None
        self._next: Callable[[bool], list[Piece] | None]
        self._next = self._reason if in_reasoning else self._begin if reasoning else self._speak

    def push(self, text: str) -> list[Piece]:
        self._text += text
        return self._advance(is_end=False)

    def finish(self) -> list[Piece]:
        """What was held back; a call that has no end is content unless its name is out."""
        return self._advance(is_end=True)

    def _advance(self, is_end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while (found := self._next(is_end)) is not None:
            pieces += found
        return pieces

    def _begin(self, is_end: bool) -> list[Piece] | None:
        """Reasoning may come first, and only there."""
        start = self._text.lstrip()
        if start.startswith(THINK_START):
            self._text = start.removeprefix(THINK_START)
            self._next, self._is_opening = self._reason, True
        elif is_end or not THINK_START.startswith(start):
            self._next = self._speak
        else:
            return None
        return []

    def _reason(self, is_end: bool) -> list[Piece] | None:
        text, is_over = self._until(THINK_END, is_end)
        if is_over:
            self._next, self._is_opening = self._speak, True
        return [Reasoning(text)] if text else ([] if is_over else None)

    def _speak(self, is_end: bool) -> list[Piece] | None:
        if not self._tools:
            self._skip_opening()
            text, self._text = self._text, ""
            return [Content(text)] if text else None
        text, is_over = self._until(self._form.start, is_end)
        if is_over:
            self._next, self._call = self._read_call, _Call(self._names)
            text = text.rstrip("\n") if self.num_calls else text
        return [Content(text)] if text else ([] if is_over else None)

    def _read_call(self, is_end: bool) -> list[Piece] | None:
        assert self._call is not None
        end = self._text.find(self._form.end)
        if end < 0:
            pieces = [] if self._is_surplus else self._call.read(self._text, self.num_calls)
            if is_end:
                pieces += self._abandon(self._text)
            return pieces or None
        body, self._text = self._text[:end], self._text[end + len(self._form.end) :]
        pieces = [] if self._is_surplus else self._call.read(body, self.num_calls)
        if not self._is_surplus and not self._call.is_named:
            no_call = self._form.start + body + self._form.end
            pieces += self._call.whole(body, self.num_calls) or [Content(no_call)]
        self.num_calls += self._call.is_named
        self._next, self._call, self._is_opening = self._speak, None, True
        return pieces

    @property
    def _is_surplus(self) -> bool:
        return 0 < self._max_calls <= self.num_calls

    def _abandon(self, body: str) -> list[Piece]:
        assert self._call is not None
        is_named = self._call.is_named or self._is_surplus
        self.num_calls += self._call.is_named
        self._text, self._next, self._call = "", self._speak, None
        return [] if is_named else [Content(self._form.start + body)]

    def _until(self, marker: str, is_end: bool) -> tuple[str, bool]:
        """(text that is decided, whether the marker came right behind it)."""
        self._skip_opening()
        start = self._text.find(marker)
        if start >= 0:
            text, self._text = self._text[:start], self._text[start + len(marker) :]
            return text, True
        free = len(self._text) - (0 if is_end else _num_undecided(self._text, marker))
        text, self._text = self._text[:free], self._text[free:]
        return text, False

    def _skip_opening(self) -> None:
        if self._is_opening:
            self._text = self._text.lstrip("\n")
            self._is_opening = not self._text


class _Call:
    """One call, whose body grows."""

    def __init__(self, names: frozenset[str]) -> None:
        self.is_named = False
        self._names = names
        self._given = 0  # up to here the body is out
        self._end: int | None = None
        self._depth = 0
        self._in_string = self._escaped = False

    def read(self, body: str, index: int) -> list[Piece]:
        pieces: list[Piece] = []
        if not self.is_named:
            head = _CALL_HEAD.match(body)
            if head is None or head.end() == len(body):
                return []
            name = json.loads(head.group(1), strict=False)
            if not self._may_be(name):
                return []
            self.is_named = True
            self._given = head.end()
            pieces.append(CallStart(index, name))
        start = self._given
        while self._end is None and self._given < len(body):
            self._step(body[self._given])
        return pieces + ([CallArguments(index, body[start : self._given])] if self._given > start else [])

    def whole(self, body: str, index: int) -> list[Piece]:
        """For a call that `read` could not follow, as with its fields in another order; [] if it is none."""
        try:
            call = json.loads(body, strict=False)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return []
        if not isinstance(name, str) or not self._may_be(name):
            return []
        self.is_named = True
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [CallStart(index, name), CallArguments(index, text)]

    def _may_be(self, name: str) -> bool:
        return not self._names or name in self._names

    def _step(self, char: str) -> None:
        """Follow one character of the arguments; at their end, nothing is taken any more."""
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            if self._depth == 0:  # that of the call itself
                self._end = self._given
                return
            self._depth -= 1
        self._given += 1


def _num_undecided(text: str, marker: str) -> int:
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
