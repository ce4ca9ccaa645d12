"""One choice of a request on its way to text: tokens in, deltas out, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_service.answer_parser import AnswerParser, CallArguments, CallStart, Content, Piece, Reasoning
from llm_service.detokenizer import IncrementalDetokenizer
from llm_service.messages import SequenceOutput, TokenOutput
from llm_service.sampling_params import SamplingParams
from llm_service.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    token_id: int
    logprob: float
    text: str
    raw: bytes


@dataclass(frozen=True)
class TokenLogprobs:
    token: Logprob
    top: list[Logprob]


@dataclass(frozen=True)
class ChoiceDelta:
    """New text, and the tokens since the last delta: those held back come with what follows them."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    reasoning: str = ""
    tool_calls: tuple[CallStart | CallArguments, ...] = ()


@dataclass(frozen=True)
class ChoiceFinished:
    index: int
    reason: str  # "stop", "length" or "tool_calls"
    stop_string: str | None
    stop_token_id: int | None


@dataclass
class _Pending:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reasoning: str = ""
    tool_calls: list[CallStart | CallArguments] = field(default_factory=list)

    @property
    def is_visible(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls)

    def add(self, piece: Piece) -> None:
        if isinstance(piece, Content):
            self.text += piece.text
        elif isinstance(piece, Reasoning):
            self.reasoning += piece.text
        else:
            self.tool_calls.append(piece)


class Choice:
    def __init__(
        self,
        index: int,
        params: SamplingParams,
        stop_token_ids: frozenset[int],
        tokenizer: Tokenizer,
        parser: AnswerParser | None = None,
    ) -> None:
        """Without a parser, all text is content."""
        self.index = index
        self.finished: ChoiceFinished | None = None
        self._params = params
        self._stop_token_ids = stop_token_ids
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            params.stop,
            params.skip_special_tokens,
            params.include_stop_str_in_output,
            params.min_tokens,
            () if parser is None else parser.marker_tokens,
        )
        self._parser = parser
        self._pending = _Pending()

    @property
    def num_output_tokens(self) -> int:
        return self._detokenizer.num_output_tokens

    @property
    def stopped_by_string(self) -> bool:
        return self._detokenizer.stopped is not None

    def push(self, output: SequenceOutput) -> None:
        """Take one step's tokens; ignored after the end."""
        last = len(output.tokens) - 1
        for position, token in enumerate(output.tokens):
            if self.finished is None:
                self._push_token(token, output.finish_reason if position == last else None)

    def take_delta(self) -> ChoiceDelta | None:
        """What can be shown now, or None; after the end, all that is left."""
        pending = self._pending
        if not pending.is_visible and not (self.finished and pending.token_ids):
            return None
        self._pending = _Pending()
        return ChoiceDelta(
            self.index,
            pending.text,
            pending.token_ids,
            pending.logprobs,
            pending.reasoning,
            tuple(pending.tool_calls),
        )

    def _push_token(self, token: TokenOutput, finish_reason: str | None) -> None:
        is_stop_token = finish_reason == "stop" and token.token_id in self._stop_token_ids
        if is_stop_token and not self._params.include_stop_str_in_output:
            # The end token is counted and reported, but it is not part of the text.
            self._detokenizer.num_output_tokens += 1
        else:
            self._show(self._detokenizer.push([token.token_id]))
        self._pending.token_ids.append(token.token_id)
        if token.logprob is not None:
            self._pending.logprobs.append(self._token_logprobs(token, token.logprob))
        if self.stopped_by_string:
            self._end("stop", None)
        elif finish_reason is not None:
            self._finish(finish_reason, token.token_id if is_stop_token else None)

    def _finish(self, reason: str, stop_token_id: int | None) -> None:
        self._show(self._detokenizer.finish())
        if self.stopped_by_string:  # the text held back completed one
            reason, stop_token_id = "stop", None
        self._end(reason, stop_token_id)

    def _end(self, reason: str, stop_token_id: int | None) -> None:
        if self._parser is not None:
            for piece in self._parser.finish():
                self._pending.add(piece)
            if reason == "stop" and self._parser.num_calls:
                reason = "tool_calls"
        self.finished = ChoiceFinished(self.index, reason, self._detokenizer.stopped, stop_token_id)

    def _show(self, text: str) -> None:
        if self._parser is None:
            self._pending.text += text
            return
        for piece in self._parser.push(text):
            self._pending.add(piece)

    def _token_logprobs(self, token: TokenOutput, logprob: float) -> TokenLogprobs:
        top = [self._logprob(token_id, value) for token_id, value in token.top]
        return TokenLogprobs(self._logprob(token.token_id, logprob), top)

    def _logprob(self, token_id: int, logprob: float) -> Logprob:
        raw = self._tokenizer.token_bytes(token_id)
        return Logprob(token_id, logprob, raw.decode("utf-8", "replace"), raw)
