"""Every sampling feature against transformers' processors or a straightforward reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_service.grammar import Grammar, GrammarVocabulary
from llm_service.response_format import FormatKind, ResponseFormat, grammar_text
from llm_service.sampled_tokens import LOGPROB_FLOOR, SampledToken
from llm_service.sampler import Sampler
from llm_service.sampler_row import NUCLEUS_WIDTH, SamplerRow, TokenCounts
from llm_service.sampling_params import SamplingParams

VOCAB_SIZE = 50
NUM_DRAWS = 20_000
PROMPT, OUTPUT = [3, 4, 4, 7], [7, 9, 9, 9]


def make_row(
    output: Sequence[int] = (), prompt: Sequence[int] = (), stops: Sequence[int] = (), **params: Any
) -> SamplerRow:
    seed = params.get("seed")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return SamplerRow(SamplingParams(**params), prompt, output, stops, generator)


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def processed(logits: torch.Tensor, sampling_row: SamplerRow, **arguments: Any) -> torch.Tensor:
    """What the sampler leaves in the logits: all steps before the temperature."""
    copy = logits.clone()
    Sampler().sample(copy, [sampling_row], **arguments)
    return copy


def frequencies(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """Shares of many draws from one row's logits."""
    rows = [make_row(**params) for _ in range(NUM_DRAWS)]
    tokens = Sampler(seed=11).sample(logits.expand(NUM_DRAWS, -1).clone(), rows)
    counts = np.bincount([token.token_id for token in tokens], minlength=logits.shape[-1])
    return torch.from_numpy(counts / NUM_DRAWS)


def warped(logits: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """transformers' probabilities in its order: temperature, top_k, top_p, min_p."""
    warpers: list[Any] = []
    if "temperature" in params:
        warpers.append(TemperatureLogitsWarper(params["temperature"]))
    if params.get("top_k", 0) > 0:
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    scores = logits[None]
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return scores[0].softmax(-1)


def test_all_greedy_rows_take_the_largest_logit() -> None:
    logits = random_logits(8)
    tokens = Sampler().sample(logits.clone(), [make_row(temperature=0.0) for _ in range(8)])
    assert tokens == [SampledToken(i) for i in logits.argmax(-1).tolist()]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": -1},
        {"top_k": VOCAB_SIZE + 9},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.6, "top_p": 0.95, "min_p": 0.3},
    ],
)
def test_draws_follow_transformers_distribution(params: dict[str, Any]) -> None:
    logits = random_logits(1, seed=5)[0]
    expected = warped(logits, params).double()
    shares = frequencies(logits, **params)
    assert torch.all(shares[expected == 0] == 0)
    # Five standard deviations of each token's share, and two draws for the rare ones.
    tolerance = 5 * (expected * (1 - expected) / NUM_DRAWS).sqrt() + 1e-4
    assert torch.all((shares - expected).abs() <= tolerance)


@pytest.mark.parametrize("scale", [0.0, 4.0], ids=["flat: the whole vocabulary is sorted", "peaked"])
def test_a_nucleus_may_be_wider_than_the_first_look(scale: float) -> None:
    vocab_size = 3 * NUCLEUS_WIDTH
    logits = torch.linspace(1, 0, vocab_size) * max(scale * 20, 0.01)
    expected = warped(logits, {"top_p": 0.9})
    kept = int((expected > 0).sum())
    assert (kept > NUCLEUS_WIDTH) == (scale == 0.0)
    tokens = Sampler(seed=12).sample(
        logits.expand(3000, -1).clone(), [make_row(top_p=0.9) for _ in range(3000)]
    )
    ids = [token.token_id for token in tokens]
    assert max(ids) < kept
    mean = float((expected * torch.arange(vocab_size)).sum())
    assert abs(np.mean(ids) - mean) < 5 * np.std(ids) / math.sqrt(3000) + 1e-9


def test_tokens_tied_with_the_last_of_top_k_are_kept_as_in_transformers() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[[4, 8, 15]] = 2.0
    shares = frequencies(logits, top_k=2)
    assert torch.nonzero(shares).flatten().tolist() == [4, 8, 15]


def test_repetition_penalty_equals_transformers_over_prompt_and_output() -> None:
    logits = random_logits(1)
    sampling_row = make_row(OUTPUT, PROMPT, repetition_penalty=1.3, temperature=0.0)
    reference = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    torch.testing.assert_close(processed(logits, sampling_row), reference)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = random_logits(1)
    sampling_row = make_row(OUTPUT, PROMPT, presence_penalty=0.5, frequency_penalty=-0.25, temperature=0.0)
    expected = logits.clone()
    for token_id in set(OUTPUT):
        expected[0, token_id] -= 0.5 - 0.25 * OUTPUT.count(token_id)
    torch.testing.assert_close(processed(logits, sampling_row), expected)


def test_penalties_keep_up_with_a_growing_output() -> None:
    output: list[int] = []
    sampling_row = make_row(
        output, PROMPT, repetition_penalty=0.9, presence_penalty=0.3, frequency_penalty=0.1, temperature=0.0
    )
    for token_id in [5, 5, 3, *range(VOCAB_SIZE), 5]:
        output.append(token_id)
        logits = random_logits(1, seed=token_id)
        fresh = make_row(list(output), PROMPT, **as_dict(sampling_row.params))
        torch.testing.assert_close(processed(logits, sampling_row), processed(logits, fresh))


def as_dict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def test_counts_grow_past_their_first_arrays() -> None:
    counts = TokenCounts([1, 1, 2])
    output = [token_id % 700 for token_id in range(1000)]
    for end in (1, 10, 999, 1000):
        counts.catch_up(output[:end])
    found = dict(zip(counts.ids.tolist(), counts.output_counts.tolist(), strict=True))
    assert found == {token_id: output.count(token_id) for token_id in range(700)}


def test_logit_bias_is_added_after_penalties() -> None:
    logits = random_logits(1)
    sampling_row = make_row(OUTPUT, logit_bias={9: 2.5, 11: -100.0}, repetition_penalty=1.5, temperature=0.0)
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([OUTPUT]), logits.clone())
    expected[0, 9] += 2.5
    expected[0, 11] -= 100.0
    torch.testing.assert_close(processed(logits, sampling_row), expected)


def test_stop_tokens_are_forbidden_until_min_tokens_are_out() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    output: list[int] = []
    sampling_row = make_row(output, stops=(7, 8), min_tokens=2, temperature=0.0)
    chosen = []
    for _ in range(4):
        chosen.append(Sampler().sample(logits.clone(), [sampling_row])[0].token_id)
        output.append(chosen[-1])
    assert chosen == [9, 9, 7, 7]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_mask_forbids_tokens_whatever_their_bias(params: dict[str, Any]) -> None:
    logits = random_logits(200)
    mask = torch.zeros(200, VOCAB_SIZE, dtype=torch.bool)
    mask[:, [2, 30]] = True
    rows = [make_row(logit_bias={5: 100.0}, **params) for _ in range(200)]
    tokens = Sampler().sample(logits, rows, mask)
    assert {token.token_id for token in tokens} == {2, 30}


def test_logprobs_are_of_the_raw_logits_and_sorted() -> None:
    logits = random_logits(3)
    raw = logits.log_softmax(-1)
    rows = [
        make_row(OUTPUT, logprobs=4, temperature=0.0, logit_bias={6: 100.0}, repetition_penalty=1.7),
        make_row(temperature=0.0),
        make_row(logprobs=0, seed=3),
    ]
    first, second, third = Sampler().sample(logits.clone(), rows)
    assert first.token_id == 6 and first.logprob == pytest.approx(float(raw[0, 6]))
    values, ids = raw[0].topk(4)
    assert [token_id for token_id, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist())
    assert second == SampledToken(int(logits[1].argmax()), None, [])
    assert third.logprob == pytest.approx(float(raw[2, third.token_id])) and third.top == []


def test_logprobs_have_a_finite_floor() -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 3] = 0.0
    (token,) = Sampler().sample(logits, [make_row(logprobs=20, temperature=0.0)])
    assert token.token_id == 3 and len(token.top) == 20
    assert token.top[0] == (3, 0.0) and all(value == LOGPROB_FLOOR for _, value in token.top[1:])


MIXED = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_k": 7},
    {"seed": 3, "top_p": 0.7},
    {"seed": 4, "top_p": 0.9999, "temperature": 2.0},
    {"seed": 5, "top_k": 600, "top_p": 0.8, "min_p": 0.1},
    {"seed": 6, "min_p": 0.2, "presence_penalty": 1.0},
    {"seed": 7, "repetition_penalty": 1.5, "logit_bias": {3: 5.0}, "logprobs": 3},
]


def run_alone_or_together(params: list[dict[str, Any]], vocab_size: int, num_steps: int) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in params]
    rows = [make_row(output, PROMPT, **p) for output, p in zip(outputs, params, strict=True)]
    sampler = Sampler()
    for step in range(num_steps):
        # bfloat16 makes many logits equal: their order must not depend on the batch either.
        logits = torch.cat(
            [random_logits(1, vocab_size, seed=100 * step + int(p.get("seed", 0))) for p in params]
        )
        tokens = sampler.sample(logits.bfloat16().float(), rows)
        for output, token in zip(outputs, tokens, strict=True):
            output.append(token.token_id)
    return outputs


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 5000])
def test_a_seeded_row_repeats_whatever_its_neighbours(vocab_size: int) -> None:
    together = run_alone_or_together(MIXED, vocab_size, 12)
    assert run_alone_or_together(MIXED, vocab_size, 12) == together
    assert run_alone_or_together(MIXED[::-1], vocab_size, 12)[::-1] == together
    noisy = [{"top_p": 0.5}, {"top_k": 64}, {}]
    assert run_alone_or_together(MIXED + noisy, vocab_size, 12)[: len(MIXED)] == together
    for position, params in enumerate(MIXED):
        assert run_alone_or_together([params], vocab_size, 12) == [together[position]]


def test_seeds_differ_and_rows_without_a_seed_differ() -> None:
    logits = torch.zeros(200, 5000)
    seeded = Sampler().sample(logits.clone(), [make_row(seed=seed) for seed in range(200)])
    unseeded = Sampler().sample(logits.clone(), [make_row() for _ in range(200)])
    again = Sampler().sample(logits.clone(), [make_row() for _ in range(200)])
    for tokens in (seeded, unseeded):
        assert len({token.token_id for token in tokens}) > 150
    assert unseeded != again


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = random_logits(4)
    tokens = Sampler().sample(logits.clone(), [make_row(temperature=1e-6) for _ in range(4)])
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


def test_the_likeliest_token_always_survives_truncation() -> None:
    logits = random_logits(64)
    rows = [make_row(top_p=1e-9, min_p=1.0, top_k=1) for _ in range(64)]
    tokens = Sampler().sample(logits.clone(), rows)
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


class TestGrammars:
    def row(self, *choices: str, **params: Any) -> SamplerRow:
        tokens = [bytes([byte]) for byte in range(32, 32 + 90)]
        vocabulary = GrammarVocabulary(tokens + [b""] * 10, lambda text: [])
        rule = ResponseFormat(FormatKind.CHOICE, choices=choices).rule()
        state = Grammar(grammar_text(rule, strips_leading_space=False), vocabulary).start()
        return SamplerRow(SamplingParams(**params), (), [], (95,), grammar=state)

    def id_of(self, letter: str) -> int:
        return ord(letter) - 32

    @pytest.mark.parametrize(
        "params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}]
    )
    def test_a_row_takes_an_allowed_token_and_the_others_keep_theirs(self, params: dict[str, Any]) -> None:
        for seed in range(20):
            logits = random_logits(3, 100, seed)
            free = make_row(temperature=0.0)
            tokens = Sampler(seed=seed).sample(logits.clone(), [free, self.row("xa", "b", **params), free])
            assert tokens[1].token_id in (self.id_of("x"), self.id_of("b"))
            best = logits.argmax(-1).tolist()
            assert [tokens[0].token_id, tokens[2].token_id] == [best[0], best[2]]

    def test_two_rows_have_their_own_grammars(self) -> None:
        tokens = Sampler().sample(random_logits(2, 100), [self.row("q"), self.row("y")])
        assert [token.token_id for token in tokens] == [self.id_of("q"), self.id_of("y")]

    def test_log_probabilities_are_of_the_unprocessed_logits(self) -> None:
        logits = random_logits(1, 100)
        token = Sampler().sample(logits.clone(), [self.row("q", logprobs=1)])[0]
        assert token.logprob == pytest.approx(logits.log_softmax(-1)[0, self.id_of("q")].item())
        assert token.top[0][0] == logits.argmax().item()

    def test_its_tokens_are_needed_before_the_next(self) -> None:
        row = self.row("q", temperature=0.0)
        assert row.alters_logits and row.needs_output and not row.is_plain
