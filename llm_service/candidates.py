"""The tokens that rows may draw after temperature, top_k, top_p and min_p, with their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_service.row_tensors import select_rows, tensor_on
from llm_service.sampler_row import SamplerRow
from llm_service.sampling_params import SamplingParams


class Candidates:
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
        temperature = tensor_on([p.temperature for p in params], torch.float32, device)
        scores = select_rows(logits, group) / temperature[:, None]  # [group_size, vocab_size]
        if width == 0:
            self.weights = _min_p(scores.softmax(-1), params)
            return
        top_ks = [rows[index].top_k(logits.shape[1]) for index in group]
        top, self._ids = _likeliest(scores, width)  # [group_size, width]
        probs = _top_k_probs(scores, top, tensor_on(top_ks, torch.int64, device))
        # In float64 the sum does not depend on how a kernel splits it, so neither does the cut.
        cumulative = probs.double().cumsum(-1)
        top_p = tensor_on([p.top_p for p in params], torch.float64, device)
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
            self.weights, self._ids = select_rows(self.weights, kept), select_rows(self._ids, kept)


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
    min_p = tensor_on([p.min_p for p in params], probs.dtype, probs.device)
    threshold = min_p[:, None] * probs.amax(-1, keepdim=True)
    return probs.masked_fill(probs < threshold, 0.0)
