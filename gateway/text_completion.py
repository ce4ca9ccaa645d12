"""The answer of `/v1/completions`, whole and as chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gateway.choices import Choices
from gateway.completion import MIN_LOGPROB, usage_json
from gateway.errors import AnswerBrokeOff, error_body
from gateway.events import Delta, Event, Finished, Started, TokenLogprob, Usage
from gateway.streaming import DONE, KEEPALIVE, sse_json
from protos.errors import ServingError


@dataclass(frozen=True)
class TextReply:
    """What all parts of one answer repeat."""

    id: str
    created: int  # Unix time, seconds
    model: str
    choices_a_prompt: int
    echoes: tuple[str, ...]  # what each prompt's answers begin with
    logprobs: bool = False

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)


class TextCompletion:
    """Collects the answer of one prompt."""

    def __init__(self, reply: TextReply, prompt: int) -> None:
        """`prompt`: its place among those of the request."""
        self._reply = reply
        self._prompt = prompt
        self._choices = Choices(reply.choices_a_prompt, _Choice)

    def add(self, event: Event) -> None:
        self._choices.add(event)

    def finished(self) -> tuple[list[dict[str, Any]], Usage]:
        """Its part of the body's choices, and what they cost.  Raises AnswerBrokeOff."""
        choices, usage = self._choices.finished()
        first = self._prompt * self._reply.choices_a_prompt
        return [self._json(first + i, choice) for i, choice in enumerate(choices)], usage

    def _json(self, index: int, choice: _Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._reply.echoes[self._prompt] + "".join(choice.text),
            "logprobs": text_logprobs(choice.logprobs, 0) if self._reply.logprobs else None,
            "finish_reason": choice.finish_reason,
        }


def text_logprobs(tokens: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
    """OpenAI's older form: parallel lists.  `offset`: characters of the choice before these tokens."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [max(MIN_LOGPROB, token.logprob) for token in tokens],
        "top_logprobs": [
            {each.token: max(MIN_LOGPROB, each.logprob) for each in (*token.top, token)} for token in tokens
        ],
        "text_offset": offsets,
    }


class TextChunkEncoder:
    """Events of the answers to all prompts as chunks."""

    def __init__(
        self, reply: TextReply, *, include_usage: bool = False, usage_in_chunks: bool = False
    ) -> None:
        self._reply = reply
        self._include_usage = include_usage
        self._usage_in_chunks = usage_in_chunks
        self._open = set(range(len(reply.echoes) * reply.choices_a_prompt))  # not finished yet
        self._silent = set(self._open)  # nothing sent yet
        self._offsets = dict.fromkeys(self._open, 0)
        self._usage = Usage(0, 0)
        self._has_ended = False
        self.is_admitted = False

    def encode(self, event: Event) -> bytes:
        if isinstance(event, Delta):
            return self._delta(event)
        if isinstance(event, Finished):
            self._open.discard(event.index)
            return self._echo(event.index) + self._chunk(event.index, "", (), event.reason)
        if isinstance(event, Usage):
            self._has_ended = True
            if not self._include_usage:
                return b""
            return sse_json({**self._reply.head(), "choices": [], "usage": usage_json(event)})
        if isinstance(event, Started):
            self.is_admitted = True
            self._usage = Usage(event.prompt_tokens, self._usage.completion_tokens)
        return b""

    def keepalive(self) -> bytes:
        return KEEPALIVE

    def end(self) -> bytes:
        if self._open or not self._has_ended:
            raise AnswerBrokeOff
        return DONE

    def failure(self, error: ServingError) -> bytes:
        return sse_json(error_body(error)) + DONE

    def _delta(self, delta: Delta) -> bytes:
        self._usage = Usage(self._usage.prompt_tokens, self._usage.completion_tokens + delta.num_tokens)
        if not delta.text and not delta.logprobs:
            return b""
        return self._echo(delta.index) + self._chunk(delta.index, delta.text, delta.logprobs, None)

    def _echo(self, index: int) -> bytes:
        """The prompt, before a choice's first text."""
        text = self._reply.echoes[index // self._reply.choices_a_prompt] if index in self._silent else ""
        self._silent.discard(index)
        return self._chunk(index, text, (), None) if text else b""

    def _chunk(
        self, index: int, text: str, logprobs: tuple[TokenLogprob, ...], finish_reason: str | None
    ) -> bytes:
        shown = text_logprobs(logprobs, self._offsets[index]) if self._reply.logprobs else None
        self._offsets[index] += sum(len(token.token) for token in logprobs)
        choice = {"index": index, "text": text, "logprobs": shown, "finish_reason": finish_reason}
        chunk = {**self._reply.head(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = usage_json(self._usage) if self._usage_in_chunks else None
        return sse_json(chunk)
