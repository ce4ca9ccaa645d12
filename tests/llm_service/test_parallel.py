"""Ranks over gloo, each in its own process, against one."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_service.parallel import TensorParallel, init
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.llm_service.model.steps import CPU, Runner, load

CHECKPOINTS = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "one kv head for two ranks": ("qwen2", {"num_key_value_heads": 1}),
    "internlm2 with biases": ("internlm2", {"attention_bias": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
}
PROMPT = torch.arange(30) * 11 % VOCAB_SIZE


def all_logits(folders: list[Path], parallel: TensorParallel) -> list[torch.Tensor]:
    """Prefill and one decode beside another sequence's chunk, on every checkpoint."""
    results = []
    for folder in folders:
        runner = Runner(load(folder, parallel), parallel)
        results.append(runner.step({0: PROMPT})[0])
        mixed = runner.step({0: PROMPT[:1], 1: PROMPT[5:14]})
        results += [mixed[0], mixed[1]]
    return results


def run_rank(rank: int, size: int, rendezvous: str, folders: list[Path], output: Path) -> None:
    torch.set_num_threads(1)
    parallel = init(rank, size, f"file://{rendezvous}", CPU)
    results = all_logits(folders, parallel)
    half = torch.ones(2, dtype=torch.bfloat16)
    assert parallel.all_reduce(half).tolist() == [size, size]
    parallel.close()
    save_file(
        {
            str(number): logits.clone(memory_format=torch.contiguous_format)
            for number, logits in enumerate(results)
        },
        output,
    )


def test_two_ranks_give_the_logits_of_one(tmp_path):
    folders = [
        make_checkpoint(tmp_path / str(i), family, "chat", **overrides)
        for i, (family, overrides) in enumerate(CHECKPOINTS.values())
    ]
    outputs = [tmp_path / f"rank{rank}.safetensors" for rank in range(2)]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, 2, str(tmp_path / "meet"), folders, output))
        for rank, output in enumerate(outputs)
    ]
    for process in ranks:
        process.start()
    expected = all_logits(folders, TensorParallel())
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0
    for output in outputs:
        results = load_file(output)
        assert len(results) == len(expected)
        for number, wanted in enumerate(expected):
            torch.testing.assert_close(results[str(number)], wanted, atol=1e-4, rtol=0)


def test_one_rank_needs_no_group():
    parallel = init(0, 1, "tcp://nowhere.invalid:1", CPU)
    tensor = torch.ones(2)
    assert parallel.all_reduce(tensor) is tensor and parallel.all_gather(tensor) is tensor
    parallel.close()


def test_shares_cover_everything_once():
    shares = [TensorParallel(rank, 4).share(12) for rank in range(4)]
    assert [i for share in shares for i in range(12)[share]] == list(range(12))


@pytest.mark.parametrize(("size", "heads"), [(2, [0, 1]), (4, [0, 0, 1, 1]), (8, [0, 0, 0, 0, 1, 1, 1, 1])])
def test_more_ranks_than_kv_heads_hold_copies_beside_their_queries(size, heads):
    shares = [TensorParallel(rank, size).share_kv_heads(2) for rank in range(size)]
    assert [share.start for share in shares] == heads
    assert all(share.stop - share.start == 1 for share in shares)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="14 does not divide by tensor-parallel size 4"):
        TensorParallel(0, 4).share(14)
    with pytest.raises(ValueError, match="size 3 does not divide by 2 KV heads"):
        TensorParallel(0, 3).share_kv_heads(2)
    with pytest.raises(ValueError, match="rank is 2"):
        TensorParallel(2, 2)
