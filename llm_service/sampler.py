"""Logits to token ids: penalties, bias, truncation and the draw, each row by its own parameters.

A row's token does not depend on the other rows: everything random or order-dependent is decided by the
row's parameters, logits and generator. Knows nothing about sequences, caches and text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_service.candidates import Candidates
from llm_service.logit_changes import apply_bias, apply_grammars, apply_penalties, forbid_stops
from llm_service.row_tensors import tensor_on
from llm_service.sampled_tokens import ChosenTokens, RawLogprobs, SampledToken
from llm_service.sampler_row import SamplerRow

MAX_SORTED_ROWS = 32  # whole vocabularies sorted at a time: a row takes up to 10 MB of the device


class Sampler:
    """Chooses one token per row; `seed` is for the rows that have no generator of their own."""

    def __init__(self, device: torch.device | str = "cpu", seed: int | None = None) -> None:
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def sample(
        self, logits: torch.Tensor, rows: Sequence[SamplerRow], mask: torch.Tensor | None = None
    ) -> list[SampledToken]:
        """`choose`, and wait for the tokens."""
        return self.choose(logits, rows, mask).tokens()

    @torch.inference_mode()
    def choose(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size] float32, overwritten
        rows: Sequence[SamplerRow],
        mask: torch.Tensor | None = None,  # [num_rows, vocab_size] bool, at least one True a row
    ) -> ChosenTokens:
        """One token per row; where `mask` is False a token is forbidden.

        Order as in transformers: penalties, logit_bias, min_tokens, grammar, mask, temperature, top_k,
        top_p, min_p.
        Queued on the device; only top_p without top_k waits for it, to see whether its nucleus was covered.
        """
        assert logits.dtype == torch.float32 and len(rows) == len(logits)
        logprobs = RawLogprobs.of(logits, rows)
        altered = [(index, row) for index, row in enumerate(rows) if row.alters_logits]
        if altered:
            apply_penalties(logits, altered)
            apply_bias(logits, altered)
            forbid_stops(logits, altered)
            apply_grammars(logits, altered)
        if mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        token_ids = self._choose(logits, rows)
        return ChosenTokens(token_ids, None if logprobs is None else logprobs.chosen(token_ids))

    def _choose(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        chosen = logits.argmax(-1)
        vocab_size = logits.shape[1]
        by_width: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if not row.is_greedy:
                by_width.setdefault(row.width(vocab_size), []).append(index)
        whole = by_width.pop(vocab_size, [])
        for width, group in by_width.items():
            candidates = Candidates(logits, rows, group, width)
            whole += candidates.uncovered
            self._draw(candidates, rows, chosen)
        for start in range(0, len(whole), MAX_SORTED_ROWS):
            group = whole[start : start + MAX_SORTED_ROWS]
            self._draw(Candidates(logits, rows, group, vocab_size), rows, chosen)
        return chosen

    def _draw(self, candidates: Candidates, rows: Sequence[SamplerRow], chosen: torch.Tensor) -> None:
        """Draw by argmax(p / e), e ~ Exp(1): the exponential race, without a cumulative sum."""
        if not candidates.group:
            return
        weights = candidates.weights
        generators = [rows[index].generator for index in candidates.group]
        noise = torch.empty_like(weights)
        if None in generators:
            noise.exponential_(generator=self._generator)
        for place, generator in enumerate(generators):
            if generator is not None:
                noise[place].exponential_(generator=generator)
        # Float noise can be 0, and 0 / 0 would win as NaN.
        places = (weights / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(-1)
        index = tensor_on(candidates.group, torch.int64, chosen.device)
        chosen.index_copy_(0, index, candidates.token_ids(places))
