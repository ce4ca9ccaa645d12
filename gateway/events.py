"""What a language model says while it answers, as plain values.  Knows neither protobuf nor JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """A picture, a frame of a video or a page of a document, as the encoder cut it."""

    width: int  # pixels, upright
    height: int
    columns: int
    rows: int
    thumbnail: bool  # the last tile is the whole part
    tiles: int  # with the thumbnail
    timestamp_s: float = 0.0  # of a frame, from the start of the video


@dataclass(frozen=True, slots=True)
class Started:
    """Admitted: whatever goes wrong from here on is not the request's fault."""

    prompt_tokens: int
    media: tuple[tuple[Part, ...], ...] = ()  # of each medium its parts


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: str
    logprob: float
    raw: bytes  # UTF-8; may be part of a character
    top: tuple[TokenLogprob, ...] = ()  # best first


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of one tool call."""

    index: int  # call of the choice, from 0
    arguments: str = ""  # more of its JSON
    name: str = ""  # in the call's first delta only, and never empty there


@dataclass(frozen=True, slots=True)
class Delta:
    """New of one choice: what was thought came before the text, and that before the calls."""

    index: int  # choice
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens of all it has
    reasoning: str = ""  # what the model thinks before its answer; not part of `text`
    calls: tuple[CallDelta, ...] = ()  # not part of `text`

    @property
    def is_empty(self) -> bool:
        """It has tokens at most, whose text is held back."""
        return not (self.text or self.logprobs or self.reasoning or self.calls)


@dataclass(frozen=True, slots=True)
class Finished:
    index: int  # choice
    reason: str  # OpenAI's word: "stop", "length" or "tool_calls"
    stop_string: str = ""  # the one that ended the choice, if one did


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, milliseconds; stages as in GenerateTimings of the contract."""

    layout: float
    encode: float
    queue: float
    prefill: float
    decode: float
    total: float


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of prompt_tokens
    image_tokens: int = 0  # of prompt_tokens
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Restarted:
    """Another language model begins the answer anew: what came before is void, in a stream nothing."""


Event = Started | Delta | Finished | Usage | Restarted
Batches = AsyncGenerator[list[Event], None]  # what came together; an empty one after a while of silence
