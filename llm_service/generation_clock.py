"""How long the stages of one request took.  Knows neither encoders nor the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llm_service.messages import SequenceOutput


@dataclass(frozen=True)
class GenerationTimings:
    """Nanoseconds; see GenerateTimings of the contract."""

    layout_ns: int
    encode_ns: int
    queue_ns: int
    prefill_ns: int
    overlap_ns: int
    decode_ns: int
    total_ns: int


class GenerationClock:
    """Of one request, from its making on; all times are CLOCK_MONOTONIC, as the engine's."""

    def __init__(self) -> None:
        self._received_ns = time.monotonic_ns()
        self._laid_out_ns = self._received_ns
        self._scheduled_ns = self._overlap_ns = 0
        self._first_token_ns = 0
        self._last_token_ns = 0

    def note_layout(self) -> None:
        """Token ids and positions of the prompt are known."""
        self._laid_out_ns = time.monotonic_ns()

    def note_token(self, output: SequenceOutput) -> bool:
        """True for the request's first token."""
        self._last_token_ns = time.monotonic_ns()
        if self._first_token_ns:
            return False
        self._first_token_ns = self._last_token_ns
        self._scheduled_ns, self._overlap_ns = output.scheduled_ns, output.overlap_ns
        return True

    def timings(self, encode_ns: int) -> GenerationTimings:
        """Behind the last token."""
        return GenerationTimings(
            layout_ns=self._laid_out_ns - self._received_ns,
            encode_ns=encode_ns,
            queue_ns=max(self._scheduled_ns - self._laid_out_ns, 0),
            prefill_ns=self._first_token_ns - self._scheduled_ns,
            overlap_ns=self._overlap_ns,
            decode_ns=self._last_token_ns - self._first_token_ns,
            total_ns=self._last_token_ns - self._received_ns,
        )
