"""One sequence as the sampler sees it, and the tokens that penalties count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llm_service.grammar import GrammarState, Words
from llm_service.sampling_params import SamplingParams

MIN_TEMPERATURE = 1e-5  # below it, division could overflow and the draw is greedy anyway
NUCLEUS_WIDTH = 1024  # candidates looked at first for top_p; sorting a whole vocabulary costs 20x


class SamplerRow:
    """One sequence as the sampler sees it, kept by the sequence from step to step.

    `output_token_ids` is the sequence's own growing list; tokens are counted once, as they appear.
    `prompt_token_ids` has no placeholder ids. `stop_token_ids` are forbidden while fewer than
    `params.min_tokens` tokens are out. Without a generator the draw is not repeatable.
    `grammar` stands behind the latest output token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        stop_token_ids: Sequence[int] = (),
        generator: torch.Generator | None = None,
        grammar: GrammarState | None = None,
    ) -> None:
        self.params = params
        self.stop_token_ids = tuple(stop_token_ids)
        self.generator = generator
        self.grammar = grammar
        self.is_greedy = params.temperature < MIN_TEMPERATURE
        repeats = params.repetition_penalty != 1.0
        self.has_penalties = bool(repeats or params.presence_penalty or params.frequency_penalty)
        self.alters_logits = bool(
            self.has_penalties or params.logit_bias or params.min_tokens or grammar is not None
        )
        # Nothing but the largest logit is asked for.
        self.is_plain = self.is_greedy and not self.alters_logits and params.logprobs is None
        self._prompt_token_ids = prompt_token_ids if repeats else ()
        self._output_token_ids = output_token_ids
        self._counts: TokenCounts | None = None

    @property
    def counts(self) -> TokenCounts:
        """Counts up to the latest output token."""
        if self._counts is None:
            self._counts = TokenCounts(self._prompt_token_ids)
        self._counts.catch_up(self._output_token_ids)
        return self._counts

    @property
    def needs_output(self) -> bool:
        """Whether the next token can be chosen only when all tokens before it are known."""
        return self.alters_logits and (self.has_penalties or self.grammar is not None or self._is_short)

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Where there is a grammar, `fill_mask` says so: a finished answer has to end."""
        return self.stop_token_ids if self._is_short and self.grammar is None else ()

    def fill_mask(self, words: Words) -> None:
        """Bit i of `words` says whether the grammar allows token i."""
        assert self.grammar is not None
        self.grammar.fill(words, self.stop_token_ids, may_end=not self._is_short)

    @property
    def _is_short(self) -> bool:
        return len(self._output_token_ids) < self.params.min_tokens

    def top_k(self, vocab_size: int) -> int:
        """Number of likeliest tokens to keep, 0 for all."""
        return self.params.top_k if 0 < self.params.top_k < vocab_size else 0

    def width(self, vocab_size: int) -> int:
        """How many of the likeliest tokens to look at first; 0 where nothing asks for an order."""
        top_k = self.top_k(vocab_size)
        if top_k == 0 and self.params.top_p >= 1.0:
            return 0
        # Twice top_k leaves room for tokens tied with the last one kept.
        return min(vocab_size, max(64, 2 << (top_k - 1).bit_length()) if top_k else NUCLEUS_WIDTH)


class TokenCounts:
    """The distinct token ids of one sequence and how often each is in the output.

    Arrays grow by doubling, so that a step costs the new tokens and not the history.
    """

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt_token_ids))
        self._place = {token_id: place for place, token_id in enumerate(distinct)}
        self._ids = np.zeros(max(64, 2 * len(distinct)), np.int64)
        self._ids[: len(distinct)] = distinct
        self._counts = np.zeros(len(self._ids), np.float32)
        self._num_counted = 0

    @property
    def ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._ids[: len(self._place)]

    @property
    def output_counts(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """0 for an id that only the prompt has."""
        return self._counts[: len(self._place)]

    def catch_up(self, output_token_ids: Sequence[int]) -> None:
        for position in range(self._num_counted, len(output_token_ids)):
            self._add(output_token_ids[position])
        self._num_counted = len(output_token_ids)

    def _add(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1
