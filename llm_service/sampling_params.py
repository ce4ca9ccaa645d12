"""What a request says about how its tokens are chosen and when it ends; crosses the engine's socket.

Ranges are OpenAI's, and vLLM's for the extensions. Knows nothing about logits.
"""

from __future__ import annotations

import msgspec

from protos.errors import InvalidRequest

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """Defaults leave the model's distribution as it is."""

    max_tokens: int | None = None  # None: up to the end of the context
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the sampled token's and those of the k likeliest
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def validate(self, vocab_size: int) -> None:
        """
        Raises:
            InvalidRequest: the first field out of its range; the message names the range.
        """
        self._validate_lengths()
        self._validate_distribution()
        self._validate_logit_bias(vocab_size)
        self._validate_stops(vocab_size)
        _within("n", self.n, 1, MAX_CHOICES)
        if self.seed is not None:
            _within("seed", self.seed, INT64_MIN, INT64_MAX)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)

    def _validate_lengths(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            _refuse("max_tokens", f"must be at least 1, got {self.max_tokens}")
        if self.min_tokens < 0:
            _refuse("min_tokens", f"must be at least 0, got {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"must be at most max_tokens ({self.max_tokens})")

    def _validate_distribution(self) -> None:
        _within("temperature", self.temperature, 0, 2)
        _above_zero("top_p", self.top_p, 1)
        if self.top_k < -1:
            _refuse("top_k", f"must be at least 1, or 0 or -1 for off, got {self.top_k}")
        _within("min_p", self.min_p, 0, 1)
        _above_zero("repetition_penalty", self.repetition_penalty, 2)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)

    def _validate_logit_bias(self, vocab_size: int) -> None:
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < vocab_size:
                _refuse("logit_bias", f"token id {token_id} is outside [0, {vocab_size - 1}]")
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                _refuse("logit_bias", f"bias of token {token_id} must be in [-100, 100], got {bias}")

    def _validate_stops(self, vocab_size: int) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            _refuse("stop", f"at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        if "" in self.stop:
            _refuse("stop", "a stop string must not be empty")
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                _refuse("stop_token_ids", f"token id {token_id} is outside [0, {vocab_size - 1}]")


def _within(name: str, value: float, low: float, high: float) -> None:
    # NaN fails every comparison, so the test is for being inside.
    if not low <= value <= high:
        _refuse(name, f"must be in [{low}, {high}], got {value}")


def _above_zero(name: str, value: float, high: float) -> None:
    if not 0 < value <= high:
        _refuse(name, f"must be in (0, {high}], got {value}")


def _refuse(name: str, problem: str) -> None:
    raise InvalidRequest(f"{name}: {problem}", field=f"sampling.{name}")
