"""The decoder's logits against transformers', for every family and every way to cut a batch into steps."""

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.llm_service.model.steps import Runner, load

FAMILIES = ("qwen2", "qwen3", "llama")
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def token_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


class Reference:
    """transformers on a tiny -HF checkpoint, and our decoder on the same files."""

    def __init__(self, folder, family, **overrides):
        self.folder = make_checkpoint(folder, family, "hf", **overrides)
        self.model = InternVLForConditionalGeneration.from_pretrained(self.folder).eval()
        self.decoder = load(self.folder)

    def logits(self, ids):
        with torch.inference_mode():
            return self.model(input_ids=ids[None]).logits[0]


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, tmp_path_factory):
    return Reference(tmp_path_factory.mktemp(request.param), request.param)


def test_a_whole_prompt_gives_the_logits_of_transformers(reference):
    ids = token_ids(70)
    logits = Runner(reference.decoder).step({0: ids})[0]
    assert logits.dtype == torch.float32 and logits.shape == (70, VOCAB_SIZE)
    torch.testing.assert_close(logits, reference.logits(ids), **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_prompt_in_chunks_gives_the_same_logits(reference, chunk):
    ids = token_ids(50)
    runner = Runner(reference.decoder)
    logits = torch.cat([runner.step({0: part})[0] for part in ids.split(chunk)])
    torch.testing.assert_close(logits, reference.logits(ids), **TOLERANCE)


def test_sequences_mixed_in_one_batch_do_not_touch_each_other(reference):
    prompts = {i: token_ids(length, seed=i) for i, length in enumerate((40, 23, 61, 5))}
    cuts = {0: [20, 19, 1], 1: [21, 1, 1], 2: [1, 30, 30], 3: [3, 1, 1]}
    runner = Runner(reference.decoder)
    parts = {i: ids.split(cuts[i]) for i, ids in prompts.items()}
    steps = [runner.step({i: parts[i][k] for i in prompts}) for k in range(3)]
    for i, ids in prompts.items():
        logits = torch.cat([step[i] for step in steps])
        torch.testing.assert_close(logits, reference.logits(ids), **TOLERANCE)


def test_embeddings_may_stand_in_for_token_ids(reference):
    ids = token_ids(9)
    embeds = reference.model.get_input_embeddings()(ids)
    torch.testing.assert_close(reference.decoder.embed(ids), embeds, rtol=0, atol=0)


def test_greedy_text_of_48_tokens_is_the_same_and_varies(reference):
    ids = token_ids(12)
    expected = reference.model.generate(ids[None], max_new_tokens=48, do_sample=False, pad_token_id=0)[0, 12:]
    runner = Runner(reference.decoder)
    last = runner.step({0: ids})[0][-1:].argmax(-1)
    tokens = [last]
    while len(tokens) < 48:
        last = runner.step({0: last})[0].argmax(-1)
        tokens.append(last)
    assert torch.cat(tokens).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 12


def test_the_greedy_tokens_are_the_likeliest_by_the_logits(reference):
    hidden = torch.randn(6, reference.decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens, logits = reference.decoder.greedy(hidden), reference.decoder.logits(hidden)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, logits.argmax(-1))


def test_no_rows_give_no_logits(reference):
    with torch.inference_mode():
        logits = reference.decoder.logits(torch.zeros(0, reference.decoder.config.hidden_size))
    assert logits.shape == (0, VOCAB_SIZE)


ARCHITECTURES = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "no grouped heads": ("llama", {"num_key_value_heads": 4}),
    "one kv head": ("qwen2", {"num_key_value_heads": 1}),
    "tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "dynamic": ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_fact_of_the_architecture_counts(name, tmp_path):
    family, overrides = ARCHITECTURES[name]
    if "rope_parameters" in overrides:
        overrides = {"rope_parameters": overrides["rope_parameters"] | {"rope_theta": 10000.0}}
    reference = Reference(tmp_path, family, **overrides)
    ids = token_ids(90)
    logits = Runner(reference.decoder).step({0: ids})[0]
    torch.testing.assert_close(logits, reference.logits(ids), **TOLERANCE)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_dynamic_rope_is_plain_within_the_context_and_linear_is_not(kind, tmp_path):
    plain = load(make_checkpoint(tmp_path / "plain", "qwen2", "chat"))
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    scaled = load(make_checkpoint(tmp_path / "scaled", "qwen2", "chat", rope_parameters=rope))
    ids = token_ids(90)
    same = torch.equal(Runner(plain).step({0: ids})[0], Runner(scaled).step({0: ids})[0])
    assert same == (kind == "dynamic")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_logits_of_the_cpu(reference):
    decoder = load(reference.folder, device=torch.device("cuda"))
    runner, ids = Runner(decoder), token_ids(50)
    logits = torch.cat([runner.step({0: part})[0] for part in ids.split(16)])
    torch.testing.assert_close(logits, reference.logits(ids), atol=1e-3, rtol=0)
