"""The tokens that a step has chosen and their log-probabilities, on the device and then on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_service.messages import TokenOutput
from llm_service.row_tensors import select_rows
from llm_service.sampler_row import SamplerRow

LOGPROB_FLOOR = -9999.0  # JSON has no -inf


class SampledToken(TokenOutput, frozen=True, gc=False):
    """`logprob` and `top` are of the unprocessed logits; None and empty unless asked for.

    `top` holds exactly the k likeliest (token id, logprob), likeliest first.
    """


@dataclass(frozen=True)
class ChosenLogprobs:
    """Of the rows that asked, in their order."""

    num_top: dict[int, int]  # of each such row
    chosen: torch.Tensor  # [num_asked] float32
    top: torch.Tensor  # [num_asked, most asked for] float32
    top_ids: torch.Tensor  # [num_asked, most asked for] int64


@dataclass(frozen=True)
class ChosenTokens:
    """The tokens of a step on their device, perhaps still being computed there."""

    token_ids: torch.Tensor  # [num_rows] int64
    logprobs: ChosenLogprobs | None

    def to_host(self) -> ChosenTokens:
        """Queue the copy to pinned memory; readable once what the stream holds by now has run."""

        def host(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to("cpu", non_blocking=True)

        found = self.logprobs
        if found is not None:
            found = ChosenLogprobs(found.num_top, host(found.chosen), host(found.top), host(found.top_ids))
        return ChosenTokens(host(self.token_ids), found)

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


@dataclass(frozen=True)
class RawLogprobs:
    """Log-probabilities of the unprocessed logits, for the rows that asked."""

    num_top: dict[int, int]  # of each such row
    values: torch.Tensor  # [num_asked, vocab_size]

    @classmethod
    def of(cls, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> RawLogprobs | None:
        num_top = {
            index: min(row.params.logprobs, logits.shape[1])
            for index, row in enumerate(rows)
            if row.params.logprobs is not None
        }
        if not num_top:
            return None
        values = select_rows(logits, list(num_top)).log_softmax(-1).clamp_min_(LOGPROB_FLOOR)
        return cls(num_top, values)

    def chosen(self, token_ids: torch.Tensor) -> ChosenLogprobs:
        asked = select_rows(token_ids, list(self.num_top))
        top, top_ids = self.values.topk(max(self.num_top.values()))
        chosen = self.values.gather(1, asked[:, None])[:, 0]
        return ChosenLogprobs(self.num_top, chosen, top, top_ids)
