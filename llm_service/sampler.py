"""Logits to token ids: penalties, bias, truncation and the draw, each row by its own parameters.

A row's token does not depend on the other rows: everything random or order-dependent is decided by the
row's parameters, logits and generator. Knows nothing about sequences, caches and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm_service.messages import TokenOutput
from llm_service.sampling_params import SamplingParams

LOGPROB_FLOOR = -9999.0  # JSON has no -inf
MIN_TEMPERATURE = 1e-5  # below it, division could overflow and the draw is greedy anyway
NUCLEUS_WIDTH = 1024  # candidates looked at first for top_p; sorting a whole vocabulary costs 20x
MAX_SORTED_ROWS = 32  # whole vocabularies sorted at a time: a row takes up to 10 MB of the device


class SampledToken(TokenOutput, frozen=True, gc=False):
    """`logprob` and `top` are of the unprocessed logits; None and empty unless asked for.

    `top` holds exactly the k likeliest (token id, logprob), likeliest first.
    """


class SamplerRow:
    """One sequence as the sampler sees it, kept by the sequence from step to step.

    `output_token_ids` is the sequence's own growing list; tokens are counted once, as they appear.
    `prompt_token_ids` has no placeholder ids. `stop_token_ids` are forbidden while fewer than
    `params.min_tokens` tokens are out. Without a generator the draw is not repeatable.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        stop_token_ids: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        self.params = params
        self.stop_token_ids = tuple(stop_token_ids)
        self.generator = generator
        self.is_greedy = params.temperature < MIN_TEMPERATURE
        repeats = params.repetition_penalty != 1.0
        self.has_penalties = bool(repeats or params.presence_penalty or params.frequency_penalty)
        self.alters_logits = bool(self.has_penalties or params.logit_bias or params.min_tokens)
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
        return self.alters_logits and (
            self.has_penalties or len(self._output_token_ids) < self.params.min_tokens
        )

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        short = len(self._output_token_ids) < self.params.min_tokens
        return self.stop_token_ids if short else ()

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
    ) -> Choice:
        """One token per row; where `mask` is False a token is forbidden.

        Order as in transformers: penalties, logit_bias, min_tokens, mask, temperature, top_k, top_p, min_p.
        Queued on the device; only top_p without top_k waits for it, to see whether its nucleus was covered.
        """
        assert logits.dtype == torch.float32 and len(rows) == len(logits)
        logprobs = _RawLogprobs.of(logits, rows)
        altered = [(index, row) for index, row in enumerate(rows) if row.alters_logits]
        if altered:
            _apply_penalties(logits, altered)
            _apply_bias(logits, altered)
            _forbid_stops(logits, altered)
        if mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        token_ids = self._choose(logits, rows)
        return Choice(token_ids, None if logprobs is None else logprobs.chosen(token_ids))

    def _choose(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        chosen = logits.argmax(-1)
        vocab_size = logits.shape[1]
        by_width: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if not row.is_greedy:
                by_width.setdefault(row.width(vocab_size), []).append(index)
        whole = by_width.pop(vocab_size, [])
        for width, group in by_width.items():
            candidates = _Candidates(logits, rows, group, width)
            whole += candidates.uncovered
            self._draw(candidates, rows, chosen)
        for start in range(0, len(whole), MAX_SORTED_ROWS):
            group = whole[start : start + MAX_SORTED_ROWS]
            self._draw(_Candidates(logits, rows, group, vocab_size), rows, chosen)
        return chosen

    def _draw(self, candidates: _Candidates, rows: Sequence[SamplerRow], chosen: torch.Tensor) -> None:
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
        index = _tensor(candidates.group, torch.int64, chosen.device)
        chosen.index_copy_(0, index, candidates.token_ids(places))


@dataclass(frozen=True)
class ChosenLogprobs:
    """Of the rows that asked, in their order."""

    num_top: dict[int, int]  # of each such row
    chosen: torch.Tensor  # [num_asked] float32
    top: torch.Tensor  # [num_asked, most asked for] float32
    top_ids: torch.Tensor  # [num_asked, most asked for] int64


@dataclass(frozen=True)
class Choice:
    """The tokens of a step on their device, perhaps still being computed there."""

    token_ids: torch.Tensor  # [num_rows] int64
    logprobs: ChosenLogprobs | None

    def to_host(self) -> Choice:
        """Queue the copy to pinned memory; readable once what the stream holds by now has run."""

        def host(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to("cpu", non_blocking=True)

        found = self.logprobs
        if found is not None:
            found = ChosenLogprobs(found.num_top, host(found.chosen), host(found.top), host(found.top_ids))
        return Choice(host(self.token_ids), found)

    def tokens(self) -> list[SampledToken]:
        token_ids: list[int] = self.token_ids.tolist()
        tokens = [SampledToken(token_id) for token_id in token_ids]
        found = self.logprobs
        if found is None:
            return tokens
        chosen: list[float] = found.chosen.tolist()
        top: list[list[float]] = found.top.tolist()
        top_ids: list[list[int]] = found.top_ids.tolist()
        for place, (row, num_top) in enumerate(found.num_top.items()):
            best = list(zip(top_ids[place][:num_top], top[place][:num_top], strict=True))
            tokens[row] = SampledToken(token_ids[row], chosen[place], best)
        return tokens


class _Candidates:
    """The tokens that a group of rows may draw, with their weights (not normalised).

    `width` 0 keeps the vocabulary in its order; otherwise the `width` likeliest, likeliest first.
    Rows whose nucleus does not fit into `width` are left out and listed in `uncovered`.
    """

    def __init__(
        self, logits: torch.Tensor, rows: Sequence[SamplerRow], group: list[int], width: int
    ) -> None:
        params = [rows[index].params for index in group]
        device = logits.device
        self.group = group
        self.uncovered: list[int] = []
        self._ids: torch.Tensor | None = None
        temperature = _tensor([p.temperature for p in params], torch.float32, device)
        scores = _select(logits, group) / temperature[:, None]  # [group_size, vocab_size]
        if width == 0:
            self.weights = _min_p(scores.softmax(-1), params)
            return
        top_ks = [rows[index].top_k(logits.shape[1]) for index in group]
        top, self._ids = _likeliest(scores, width)  # [group_size, width]
        probs = _top_k_probs(scores, top, _tensor(top_ks, torch.int64, device))
        # In float64 the sum does not depend on how a kernel splits it, so neither does the cut.
        cumulative = probs.double().cumsum(-1)
        top_p = _tensor([p.top_p for p in params], torch.float64, device)
        outside = (cumulative - probs >= top_p[:, None]) & (top_p < 1.0)[:, None]
        self.weights = _min_p(probs.masked_fill(outside, 0.0), params)
        if width < logits.shape[1]:
            self._leave_out(cumulative[:, -1] < top_p, top_ks)

    def token_ids(self, places: torch.Tensor) -> torch.Tensor:
        return places if self._ids is None else self._ids.gather(1, places[:, None])[:, 0]

    def _leave_out(self, short: torch.Tensor, top_ks: list[int]) -> None:
        # With top_k everything that may be kept is inside the width.
        if all(top_ks):
            return
        out = [is_short and k == 0 for is_short, k in zip(short.tolist(), top_ks, strict=True)]
        if any(out):
            assert self._ids is not None
            kept = [place for place, is_out in enumerate(out) if not is_out]
            self.uncovered = [index for index, is_out in zip(self.group, out, strict=True) if is_out]
            self.group = [self.group[place] for place in kept]
            self.weights, self._ids = _select(self.weights, kept), _select(self._ids, kept)


def _likeliest(scores: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest scores of each row and their ids, largest first, equals by id.

    Logits that were bfloat16 have many equals, and how `topk` orders them depends on the batch size.
    """
    if width == scores.shape[1]:
        top, ids = scores.sort(descending=True, stable=True)
        return top, ids
    ids = scores.topk(width, sorted=False).indices.sort().values
    top, order = scores.gather(1, ids).sort(descending=True, stable=True)
    return top, ids.gather(1, order)


def _top_k_probs(scores: torch.Tensor, top: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Probabilities of the sorted `top` [group_size, width]: among the top_k, or among all scores if 0.

    Tokens tied with the k-th are kept, as in transformers.
    """
    last = top.gather(1, (top_k - 1).clamp_min(0)[:, None])
    limited = top_k[:, None] > 0
    top = top.masked_fill(limited & (top < last), -torch.inf)
    total = torch.where(limited, top.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True))
    return (top - total).exp()


def _min_p(probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Drop tokens less likely than min_p times the likeliest one."""
    if all(p.min_p == 0.0 for p in params):
        return probs
    min_p = _tensor([p.min_p for p in params], probs.dtype, probs.device)
    threshold = min_p[:, None] * probs.amax(-1, keepdim=True)
    return probs.masked_fill(probs < threshold, 0.0)


@dataclass(frozen=True)
class _RawLogprobs:
    """Log-probabilities of the unprocessed logits, for the rows that asked."""

    num_top: dict[int, int]  # of each such row
    values: torch.Tensor  # [num_asked, vocab_size]

    @classmethod
    def of(cls, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> _RawLogprobs | None:
        num_top = {
            index: min(row.params.logprobs, logits.shape[1])
            for index, row in enumerate(rows)
            if row.params.logprobs is not None
        }
        if not num_top:
            return None
        values = _select(logits, list(num_top)).log_softmax(-1).clamp_min_(LOGPROB_FLOOR)
        return cls(num_top, values)

    def chosen(self, token_ids: torch.Tensor) -> ChosenLogprobs:
        asked = _select(token_ids, list(self.num_top))
        top, top_ids = self.values.topk(max(self.num_top.values()))
        chosen = self.values.gather(1, asked[:, None])[:, 0]
        return ChosenLogprobs(self.num_top, chosen, top, top_ids)


def _apply_penalties(logits: torch.Tensor, rows: Sequence[tuple[int, SamplerRow]]) -> None:
    """Repetition over prompt and output (Keskar 2019), presence and frequency over the output (OpenAI).

    One gather and one scatter over the distinct tokens of all rows that have penalties.
    """
    penalised = [(index, row.params, row.counts) for index, row in rows if row.has_penalties]
    if not penalised:
        return
    lengths = [len(counts.ids) for _, _, counts in penalised]
    ids = np.concatenate([counts.ids for _, _, counts in penalised])
    output_counts = np.concatenate([counts.output_counts for _, _, counts in penalised])
    indexes = np.repeat([index for index, _, _ in penalised], lengths)
    settings = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for _, p, _ in penalised]
    per_id = np.repeat(np.array(settings, np.float32), lengths, axis=0)
    at = (_to(indexes, logits), _to(ids, logits))
    count = _to(output_counts, logits)  # [num_ids], as all below
    repetition, presence, frequency = _to(per_id, logits).unbind(-1)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - frequency * count - presence * (count > 0)


def _apply_bias(logits: torch.Tensor, rows: Sequence[tuple[int, SamplerRow]]) -> None:
    entries = [
        (index, token_id, bias) for index, row in rows for token_id, bias in row.params.logit_bias.items()
    ]
    if entries:
        indexes, ids, biases = zip(*entries, strict=True)
        at = (_to(np.array(indexes), logits), _to(np.array(ids), logits))
        logits[at] += _to(np.array(biases, np.float32), logits)


def _forbid_stops(logits: torch.Tensor, rows: Sequence[tuple[int, SamplerRow]]) -> None:
    entries = [(index, token_id) for index, row in rows for token_id in row.forbidden_ids]
    if entries:
        indexes, ids = zip(*entries, strict=True)
        logits[_to(np.array(indexes), logits), _to(np.array(ids), logits)] = -torch.inf


def _to(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)


def _tensor(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Without waiting for the device: a non-blocking copy from pageable memory has read it on return."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _select(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The rows, in their order; the tensor itself where that is all of them."""
    if rows == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, _tensor(rows, torch.int64, tensor.device))
