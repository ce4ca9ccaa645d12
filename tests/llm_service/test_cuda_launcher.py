"""The engine on a GPU, by graphs and by operations: the tokens of the CPU, and nothing lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llm_service.grammar import Grammar
from llm_service.grammar_compiler import grammar_vocabulary
from llm_service.response_format import FormatKind, ResponseFormat, grammar_text
from llm_service.sampling_params import SamplingParams
from llm_service.sequence import QueueRank, SequenceGroup
from llm_service.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.llm_service.fakes import Tile, alone, outputs
from tests.llm_service.real_world import Model, RealWorld, live_and_compare, load

PROMPTS = [[5], [40, Tile("cat", 8), 3], [30], [17, Tile("dog", 4), Tile("cat", 8)], [9], [33], [12]]
NUM_TOKENS = 24
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3", "hf")


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> Model:
    return load(folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def on_cuda(folder: Path) -> Model:
    return load(folder, torch.device("cuda", 0))


def test_a_thousand_random_steps_on_cuda(on_cuda: Model) -> None:
    live_and_compare(on_cuda)


def greedy(world: RealWorld) -> list[list[list[int]]]:
    groups = [world.add(parts, NUM_TOKENS) for parts in PROMPTS]
    world.finish()
    return [outputs(group) for group in groups]


def test_greedy_tokens_are_the_same_by_graphs_by_operations_and_on_the_cpu(
    on_cpu: Model, on_cuda: Model
) -> None:
    expected = [alone(parts, NUM_TOKENS, make_world=on_cpu.undisturbed) for parts in PROMPTS]
    for overlap in (False, True):
        for cuda_graphs in ("auto", "off"):
            world = on_cuda.world(overlap=overlap, cuda_graphs=cuda_graphs, max_num_seqs=9, num_blocks=128)
            assert greedy(world) == expected, (overlap, cuda_graphs)


def test_log_probabilities_on_cuda_are_the_cpus(on_cpu: Model, on_cuda: Model) -> None:
    def found(world: RealWorld) -> list[tuple[int, float]]:
        params = SamplingParams(temperature=0.0, logprobs=3)
        world.engine.add(
            SequenceGroup(0, QueueRank(0, 0), list(range(2, 40)), (), params, frozenset(), NUM_TOKENS)
        )
        top: list[tuple[int, float]] = []
        while world.engine.has_work:
            for progress in world.engine.step().progress:
                top += progress.tokens[0].top
        return top

    on_gpu, reference = found(on_cuda.world(overlap=True)), found(on_cpu.undisturbed())
    assert [token_id for token_id, _ in on_gpu] == [token_id for token_id, _ in reference]
    assert [p for _, p in on_gpu] == pytest.approx([p for _, p in reference], abs=1e-3)


def test_a_grammar_chooses_on_cuda_as_on_the_cpu(folder: Path, on_cpu: Model, on_cuda: Model) -> None:
    tokenizer = load_tokenizer(folder)
    vocabulary = grammar_vocabulary(tokenizer, on_cpu.config.vocab_size)
    form = ResponseFormat(FormatKind.REGEX, "the (red|small) house [a-z]{3,9}[.]")
    grammar = Grammar(grammar_text(form.rule(), strips_leading_space=False), vocabulary)
    stops = frozenset({tokenizer.token_id("<|im_end|>")})

    def held(world: RealWorld) -> list[list[int]]:
        groups = [world.add([size], NUM_TOKENS * 2, stops=stops, grammar=grammar) for size in (5, 9, 30)]
        beside = world.add([7], NUM_TOKENS)
        world.finish()
        return [outputs(group)[0] for group in [*groups, beside]]

    expected = held(on_cpu.undisturbed())
    assert all(re.fullmatch(form.text, tokenizer.decode(ids)) for ids in expected[:3])
    for overlap in (False, True):
        assert held(on_cuda.world(overlap=overlap)) == expected, overlap
