"""Every number of a step reaches its place, whatever the mix, and whatever the step before left there."""

import random

import numpy as np
import pytest
import torch

from llm_service.decode_graphs import graph_sizes
from llm_service.messages import StepInput
from llm_service.step_inputs import DecodeInputs, StepTensors, TokenTable

CPU = torch.device("cpu")
BLOCK_SIZE, MAX_BATCH, MAX_BLOCKS, SCRATCH, VOCAB_SIZE = 4, 6, 5, 99, 50


def random_step(rng, num_sequences, only_decodes=False):
    context_lens = [rng.randint(1, BLOCK_SIZE * MAX_BLOCKS) for _ in range(num_sequences)]
    query_lens = [1 if only_decodes else rng.randint(1, context) for context in context_lens]
    tables = [[rng.randrange(SCRATCH) for _ in range(-(-context // BLOCK_SIZE))] for context in context_lens]
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(sum(query_lens))]
    ends = np.cumsum(query_lens).tolist()
    return StepInput(token_ids, query_lens, context_lens, tables, [], [end - 1 for end in ends])


def expected_slots(step):
    return [
        table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for query, context, table in zip(step.query_lens, step.context_lens, step.block_tables, strict=True)
        for position in range(context - query, context)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_positions_and_slots_are_those_of_each_token(seed):
    rng = random.Random(seed)
    step = random_step(rng, rng.randint(1, 5))
    tensors = StepTensors.of(step, BLOCK_SIZE, CPU, None)
    lens = zip(step.query_lens, step.context_lens, strict=True)
    positions = [position for query, context in lens for position in range(context - query, context)]
    assert tensors.token_ids.tolist() == step.token_ids
    assert tensors.positions.tolist() == positions
    assert tensors.slot_mapping.tolist() == expected_slots(step)
    assert tensors.logits_positions.tolist() == step.logits_positions


def test_rows_of_the_step_before_become_what_it_sampled():
    tokens = TokenTable(VOCAB_SIZE, MAX_BATCH, CPU)
    tokens.sampled[:3] = torch.tensor([40, 0, 49])
    step = StepInput([7, -1, 49, -3], [1, 1, 1, 1], [1, 1, 1, 1], [[0]] * 4, [], [])
    assert StepTensors.of(step, BLOCK_SIZE, CPU, tokens).token_ids.tolist() == [7, 40, 49, 49]


@pytest.mark.parametrize("seed", range(10))
def test_static_inputs_hold_each_step_and_padding_behind_it(seed):
    rng = random.Random(seed)
    tokens = TokenTable(VOCAB_SIZE, MAX_BATCH, CPU)
    tokens.sampled.copy_(torch.arange(30, 30 + MAX_BATCH))
    inputs = DecodeInputs(MAX_BATCH, MAX_BLOCKS, SCRATCH, BLOCK_SIZE, tokens)
    inputs.fill_with_padding()
    for _ in range(12):
        batch = rng.randint(1, MAX_BATCH)
        size = rng.randint(batch, MAX_BATCH)
        step = random_step(rng, batch, only_decodes=True)
        step.token_ids[0] = -2
        inputs.fill(step, size)
        padding = size - batch
        assert inputs.token_ids(size).tolist() == [31, *step.token_ids[1:], *[0] * padding]
        assert inputs.positions[:size].tolist() == [n - 1 for n in step.context_lens] + [0] * padding
        assert inputs.context_lens[:size].tolist() == step.context_lens + [0] * padding
        slots = expected_slots(step) + [SCRATCH * BLOCK_SIZE] * padding
        assert inputs.slot_mapping[:size].tolist() == slots
        for row, table in enumerate(step.block_tables):
            assert inputs.block_tables[row, : len(table)].tolist() == table


def test_tables_that_grow_shrink_and_change_hands_are_followed():
    tokens = TokenTable(VOCAB_SIZE, MAX_BATCH, CPU)
    inputs = DecodeInputs(MAX_BATCH, MAX_BLOCKS, SCRATCH, BLOCK_SIZE, tokens)
    for tables in ([[1, 2], [3]], [[1, 2, 4], [3]], [[3, 5]], [[3, 5], [1, 2, 4, 6, 7]], [[3], [1, 9]]):
        context_lens = [BLOCK_SIZE * len(table) for table in tables]
        inputs.fill(StepInput([0] * len(tables), [1] * len(tables), context_lens, tables, [], []), 4)
        for row, table in enumerate(tables):
            assert inputs.block_tables[row, : len(table)].tolist() == table


@pytest.mark.parametrize("max_batch", [1, 2, 3, 8, 100, 256, 300, 1000])
def test_the_ladder_ends_at_the_largest_batch_and_rises(max_batch):
    sizes = graph_sizes(max_batch)
    assert sizes[-1] == max_batch and sizes == sorted(set(sizes)) and sizes[0] == 1
    assert all(
        larger <= max(2 * smaller, smaller + 1) for smaller, larger in zip(sizes, sizes[1:], strict=False)
    )
