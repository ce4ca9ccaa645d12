"""What a row's parameters do to its logits before a token is drawn: penalties, bias, end tokens, grammars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llm_service.grammar import WORD_BITS
from llm_service.sampler_row import SamplerRow


def apply_penalties(logits: torch.Tensor, rows: Sequence[tuple[int, SamplerRow]]) -> None:
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


def apply_bias(logits: torch.Tensor, rows: Sequence[tuple[int, SamplerRow]]) -> None:
    entries = [
        (index, token_id, bias) for index, row in rows for token_id, bias in row.params.logit_bias.items()
    ]
    if entries:
        indexes, ids, biases = zip(*entries, strict=True)
        at = (_to(np.array(indexes), logits), _to(np.array(ids), logits))
        logits[at] += _to(np.array(biases, np.float32), logits)


def forbid_stops(logits: torch.Tensor, rows: Sequence[tuple[int, SamplerRow]]) -> None:
    entries = [(index, token_id) for index, row in rows for token_id in row.forbidden_ids]
    if entries:
        indexes, ids = zip(*entries, strict=True)
        logits[_to(np.array(indexes), logits), _to(np.array(ids), logits)] = -torch.inf


def apply_grammars(logits: torch.Tensor, rows: Sequence[tuple[int, SamplerRow]]) -> None:
    """Forbid what the rows' grammars do not allow: bits are found on the host, spread on the device."""
    ruled = [(index, row, row.grammar) for index, row in rows if row.grammar is not None]
    if not ruled:
        return
    num_words = ruled[0][2].num_words
    words = torch.empty(len(ruled), num_words, dtype=torch.int32, pin_memory=logits.is_cuda)
    for place, (_, row, _) in enumerate(ruled):
        row.fill_mask(words[place].numpy())
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=logits.device)
    spread = words.to(logits.device, non_blocking=True)[:, :, None] >> bits  # [num_ruled, num_words, 32]
    allowed = (spread & 1).bool().flatten(1)[:, : logits.shape[1]]
    at = _to(np.array([index for index, _, _ in ruled]), logits)
    logits.index_copy_(0, at, logits.index_select(0, at).masked_fill_(~allowed, -torch.inf))


def _to(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
