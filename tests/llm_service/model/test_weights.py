"""Both formats fill the same decoder; what is missing, unused or misshapen is named."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_service.attention.base import select_backend
from llm_service.model.config import DecoderConfig
from llm_service.model.float8 import FLOAT8, dequantize
from llm_service.model.weights import load_decoder
from llm_service.parallel import TensorParallel
from protos.checkpoint import CheckpointError, open_checkpoint
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.llm_service.model.steps import CPU, Runner, load

IDS = torch.arange(40) * 7 % VOCAB_SIZE


def logits(folder):
    return Runner(load(folder)).step({0: IDS})[0]


def rewrite(folder, change):
    """Replace a one-shard checkpoint's tensors by `change` of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_original_format_gives_identical_logits(family, tmp_path):
    hf = make_checkpoint(tmp_path / "hf", family, "hf")
    chat = make_checkpoint(tmp_path / "chat", family, "chat")
    assert torch.equal(logits(chat), logits(hf))


@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_internlm2_gives_the_logits_of_its_llama(bias, tmp_path):
    hf = make_checkpoint(tmp_path / "hf", "llama", "hf", attention_bias=bias)
    packed = make_checkpoint(tmp_path / "packed", "internlm2", "chat", attention_bias=bias)
    assert torch.equal(logits(packed), logits(hf))


@pytest.mark.parametrize("head", ["lm_head.", "language_model.lm_head."])
@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model."])
def test_every_age_of_hf_names_is_read(body, head, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", "hf", num_shards=1)
    expected = logits(folder)

    def rename(name):
        for old in ("model.language_model.", "language_model.model."):
            if name.startswith(old):
                return body + name.removeprefix(old)
        return head + "weight" if name.endswith("lm_head.weight") else name

    rewrite(folder, lambda tensors: {rename(name): t for name, t in tensors.items()})
    assert torch.equal(logits(folder), expected)


def test_a_stored_output_matrix_is_used_although_the_config_ties(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", "chat")
    expected = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(folder), expected)


def test_an_absent_output_matrix_is_missing_unless_the_config_ties(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", "chat", num_shards=1)
    head = "language_model.lm_head.weight"
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != head})
    with pytest.raises(CheckpointError, match=f"missing tensors: {head}"):
        load(folder)


def test_missing_and_unused_tensors_are_named_together(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", "chat", num_shards=1)
    gone = "language_model.model.layers.1.mlp.up_proj.weight"
    stray = "language_model.model.layers.1.mlp.extra.weight"
    rewrite(folder, lambda t: {stray if name == gone else name: v for name, v in t.items()})
    with pytest.raises(CheckpointError, match=f"missing tensors: {gone}; unused tensors: {stray}"):
        load(folder)


def test_a_layer_more_than_the_config_says_is_unused(tmp_path):
    folder = make_checkpoint(tmp_path, "internlm2", "chat", num_layers=3)
    checkpoint = open_checkpoint(str(folder))
    config = dataclasses.replace(DecoderConfig.from_checkpoint(checkpoint), num_layers=2)
    with pytest.raises(CheckpointError, match=r"unused tensors: .*layers\.2\.attention\.wo"):
        load_decoder(checkpoint, config, TensorParallel(), select_backend("auto", CPU), CPU, torch.float32)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "language_model.model.layers.0.self_attn.k_proj.weight"),
        ("qwen2", "language_model.model.layers.0.self_attn.o_proj.weight"),
        ("qwen2", "language_model.model.norm.weight"),
        ("qwen2", "language_model.lm_head.weight"),
        ("internlm2", "language_model.model.layers.1.attention.wqkv.weight"),
    ],
)
def test_a_tensor_of_another_shape_is_named(family, name, tmp_path):
    folder = make_checkpoint(tmp_path, family, "chat", num_shards=1)
    rewrite(folder, lambda tensors: tensors | {name: torch.zeros(3, 5)})
    with pytest.raises(CheckpointError, match=name):
        load(folder)


def test_buffers_of_old_llama_checkpoints_are_passed_over(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", "chat", num_shards=1)
    expected = logits(folder)
    stored = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors | {stored: torch.zeros(8)})
    assert torch.equal(logits(folder), expected)


def test_weights_are_converted_to_the_asked_dtype(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", "chat", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(str(folder))
    config = DecoderConfig.from_checkpoint(checkpoint)
    backend = select_backend("auto", CPU)
    decoder = load_decoder(checkpoint, config, TensorParallel(), backend, CPU, torch.float32)
    assert decoder.embed(IDS).dtype == torch.float32


def test_dummy_weights_need_no_tensor_and_are_finite_and_repeatable(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", "chat", num_shards=1)
    (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(str(folder))
    config = DecoderConfig.from_checkpoint(checkpoint)

    def dummy():
        backend = select_backend("auto", CPU)
        place = (backend, CPU, torch.float32)
        return load_decoder(checkpoint, config, TensorParallel(), *place, load_format="dummy")

    first, second = (Runner(dummy()).step({0: IDS})[0] for _ in range(2))
    assert first.isfinite().all() and first.std() > 0 and torch.equal(first, second)


def test_an_unknown_load_format_is_refused(tmp_path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path, "qwen2", "chat")))
    config = DecoderConfig.from_checkpoint(checkpoint)
    place = (select_backend("auto", CPU), CPU, torch.float32)
    with pytest.raises(ValueError, match="'pickle'.*auto, dummy"):
        load_decoder(checkpoint, config, TensorParallel(), *place, load_format="pickle")


def load_quantised(folder, quantization, load_format="auto"):
    checkpoint = open_checkpoint(str(folder))
    config = DecoderConfig.from_checkpoint(checkpoint)
    place = (select_backend("auto", CPU), CPU, torch.float32)
    return load_decoder(checkpoint, config, TensorParallel(), *place, load_format, quantization)


def linears(decoder):
    for layer in decoder.layers:
        yield from (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "internlm2"])
def test_fp8_holds_the_layers_matrices_in_float8_and_everything_else_as_it_was(family, load_format, tmp_path):
    folder = make_checkpoint(tmp_path, family, "chat")
    plain, quantised = (load_quantised(folder, kind, load_format) for kind in ("none", "fp8"))
    ours, theirs = dict(quantised.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    in_float8 = {name for name, parameter in ours.items() if parameter.dtype == FLOAT8}
    kinds = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
    indices = range(plain.config.num_layers)
    assert in_float8 == {f"layers.{index}.{kind}.weight" for index in indices for kind in kinds}
    for name in ours.keys() - in_float8:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_fp8_gives_the_logits_of_the_dequantised_weights_and_nearly_those_of_the_checkpoint(family, tmp_path):
    folder = make_checkpoint(tmp_path, family, "hf")
    quantised, rounded = load_quantised(folder, "fp8"), load_quantised(folder, "none")
    for source, target in zip(linears(quantised), linears(rounded), strict=True):
        weight = dequantize(source.weight, source.scale, torch.float32)
        target.packed, target.weight = None, torch.nn.Parameter(weight, requires_grad=False)
    step = [Runner(decoder).step({0: IDS})[0] for decoder in (quantised, rounded)]
    torch.testing.assert_close(*step, atol=1e-4, rtol=1e-4)
    plain = logits(folder)
    assert 0 < (step[0] - plain).square().mean() < 0.1 * plain.square().mean()


def test_an_unknown_quantisation_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", "chat")
    with pytest.raises(ValueError, match="quantization is 'int4'; known: none, fp8"):
        load_quantised(folder, "int4")
