"""A step's numbers on the device: of any step in one transfer, and of decodes in buffers that never move.

Knows neither the model nor what a sequence is.  No Python loop runs over tokens, only over sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from llm_service.messages import StepInput

Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]


class TokenTable:
    """Token ids by the numbers that stand for them: the id itself, or a row of what the last step sampled.

    Both lie in one table on the device, so that one gather makes a step's input.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._table = torch.arange(vocab_size + max_rows, device=device)
        self.sampled = self._table[vocab_size:]  # [max_rows] int64; each step writes its rows

    def places(self, token_ids: Ints) -> Ints:
        """Where a StepInput's `token_ids` are to be looked up."""
        return np.where(token_ids < 0, self._vocab_size - 1 - token_ids, token_ids)

    def look_up(self, places: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int64 -> token ids [num_tokens] int64."""
        return self._table.index_select(0, places)


@dataclass(frozen=True)
class StepTensors:
    """Of a step with any mix of chunks and decodes, on the device."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    slot_mapping: torch.Tensor  # [num_tokens] int64
    logits_positions: torch.Tensor  # [num_rows] int64

    @classmethod
    def of(
        cls, step: StepInput, block_size: int, device: torch.device, tokens: TokenTable | None
    ) -> StepTensors:
        """`tokens` resolves rows of the step before; without it there may be none."""
        token_ids: Ints = np.array(step.token_ids, np.int64)
        if tokens is not None:
            token_ids = tokens.places(token_ids)
        positions = _positions(step)
        rows = np.array(step.logits_positions, np.int64)
        packed = torch.from_numpy(
            np.concatenate((token_ids, positions, _slots(step, positions, block_size), rows))
        )
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        ids, *others = packed.split([len(positions)] * 3 + [len(rows)])
        return cls(ids if tokens is None else tokens.look_up(ids), *others)


class DecodeInputs:
    """One token a sequence: static tensors on the device, filled by one transfer a step.

    Rows behind a step's own are padding: they have no context and write into the scratch block.
    """

    def __init__(
        self, max_batch: int, max_blocks: int, scratch_block: int, block_size: int, tokens: TokenTable
    ) -> None:
        """`max_blocks`: of the longest block table; `scratch_block` belongs to no sequence."""
        device = tokens.sampled.device
        self._tokens = tokens
        self._block_size = block_size
        self._scratch_block = scratch_block
        self._num_bytes = 28 * max_batch + 4 * max_batch * max_blocks
        staging = torch.zeros(self._num_bytes, dtype=torch.uint8, device=device)
        self._staging = staging
        numbers = staging[: 24 * max_batch].view(torch.int64).view(3, max_batch)
        self._places, self.positions, self.slot_mapping = numbers  # [max_batch] each
        self.context_lens = staging[24 * max_batch : 28 * max_batch].view(torch.int32)
        self._packed_tables = staging[28 * max_batch :].view(torch.int32)
        self.block_tables = torch.full(
            (max_batch, max_blocks), scratch_block, dtype=torch.int32, device=device
        )
        # Two, because the transfer of one step may not have begun when the next step is written.
        self._host = [_HostInputs(self._num_bytes, max_batch, device) for _ in range(2)]
        self._tables: Ints = np.full((max_batch, max_blocks), scratch_block, np.int32)
        self._table_of_row: list[list[int]] = [[] for _ in range(max_batch)]

    def token_ids(self, size: int) -> torch.Tensor:
        return self._tokens.look_up(self._places[:size])

    def fill_with_padding(self) -> None:
        """Make every row padding."""
        host = self._host[0]
        self._pad(host, 0, len(self.context_lens))
        host.send(self._staging, 0)

    def fill(self, step: StepInput, size: int) -> None:
        """Queue the transfer of a step of decodes, padded to `size` rows."""
        host = self._host[0]
        self._host.reverse()
        host.wait()
        batch = len(step.context_lens)
        width = self._update_tables(step.block_tables)
        host.places[:batch] = self._tokens.places(np.array(step.token_ids, np.int64))
        host.context_lens[:batch] = step.context_lens
        positions = host.context_lens[:batch] - 1
        host.positions[:batch] = positions
        blocks = self._tables[np.arange(batch), positions // self._block_size]
        host.slot_mapping[:batch] = blocks.astype(np.int64) * self._block_size + positions % self._block_size
        self._pad(host, batch, size)
        host.tables[: batch * width].reshape(batch, width)[:] = self._tables[:batch, :width]
        host.send(self._staging, batch * width)
        packed = self._packed_tables[: batch * width].view(batch, width)
        self.block_tables[:batch, :width].copy_(packed)

    def _pad(self, host: _HostInputs, batch: int, size: int) -> None:
        padding = slice(batch, size)
        host.places[padding] = 0
        host.positions[padding] = 0
        host.context_lens[padding] = 0
        host.slot_mapping[padding] = self._scratch_block * self._block_size

    def _update_tables(self, tables: list[list[int]]) -> int:
        """Write what differs from the last step's tables; returns the longest one's length."""
        for row, (table, before) in enumerate(zip(tables, self._table_of_row, strict=False)):
            if table is not before and table != before:
                same = len(before) if table[: len(before)] == before else 0
                self._tables[row, same : len(table)] = table[same:]
                self._table_of_row[row] = table
        return max(map(len, tables))


class _HostInputs:
    """The pinned memory of one step's transfer; layout as in DecodeInputs."""

    def __init__(self, num_bytes: int, max_batch: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._header = 28 * max_batch
        self._sent = torch.cuda.Event() if is_cuda else None
        array = self._bytes.numpy()
        self.places, self.positions, self.slot_mapping = array[: 24 * max_batch].view(np.int64).reshape(3, -1)
        self.context_lens = array[24 * max_batch : 28 * max_batch].view(np.int32)
        self.tables = array[28 * max_batch :].view(np.int32)

    def send(self, staging: torch.Tensor, num_table_entries: int) -> None:
        end = self._header + 4 * num_table_entries
        staging[:end].copy_(self._bytes[:end], non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def wait(self) -> None:
        """Until the last transfer has read it."""
        if self._sent is not None:
            self._sent.synchronize()


def _positions(step: StepInput) -> Ints:
    """Of every new token in its sequence."""
    query_lens = np.array(step.query_lens, np.int64)
    ends = np.cumsum(query_lens)
    shifts: Ints = np.repeat(np.array(step.context_lens, np.int64) - ends, query_lens)
    return shifts + np.arange(ends[-1])


def _slots(step: StepInput, positions: Ints, block_size: int) -> Ints:
    """Flat cache slot of every new token."""
    written = []  # the blocks of each sequence that get new tokens
    shifts = []  # from a block's number in its sequence to its place in `written`
    num_written = 0
    for query, context, table in zip(step.query_lens, step.context_lens, step.block_tables, strict=True):
        first, end = (context - query) // block_size, (context - 1) // block_size + 1
        written.append(table[first:end])
        shifts.append(num_written - first)
        num_written += end - first
    blocks: Ints = np.fromiter(chain.from_iterable(written), np.int64, num_written)
    places = positions // block_size + np.repeat(np.array(shifts, np.int64), step.query_lens)
    slots: Ints = blocks[places] * block_size + positions % block_size
    return slots
