"""Each fused kernel against the same steps in PyTorch's operators, at odd and at real shapes."""

import pytest
import torch

from llm_service.kernels.fused import add_rms_norm, rms_norm, rotate_and_cache, silu_mul
from llm_service.kernels.ops import TORCH_OPS
from llm_service.kv_cache import LayerCache
from llm_service.model.rope import RopeConfig, RotaryTable
from tests.llm_service.kernels.compare import CUTS_BFLOAT16, DTYPES, assert_places, share_equal

EPS = 1e-6
gpu = pytest.mark.gpu
LAUNCHES = [None, pytest.param({"launch_pdl": True}, marks=[gpu])]


def random(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


@pytest.fixture(autouse=True)
def only_where_it_runs(request):
    if CUTS_BFLOAT16 and request.node.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 48), (5, 64), (3, 7), pytest.param((1, 3584), marks=gpu), pytest.param((300, 3584), marks=gpu)],
)
def test_the_norm_of_a_sum_and_the_sum(shape, dtype, launch, device):
    hidden = random(*shape, dtype=dtype, device=device)
    residual = random(*shape, dtype=dtype, device=device, seed=1)
    weight = random(shape[-1], dtype=dtype, device=device, seed=2)
    normed, total = add_rms_norm(hidden, residual, weight, EPS, launch)
    expected, expected_total = TORCH_OPS.add_rms_norm(hidden, residual, weight, EPS)
    assert_places(total, expected_total, 0)
    # The sum of squares may be added up in another order: rarely, a rounding falls the other way.
    assert_places(normed, expected, 4 if dtype == torch.float32 else 2)
    if dtype != torch.float32 and not CUTS_BFLOAT16:
        assert share_equal(normed, expected) > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_alone_leaves_its_input(dtype, device):
    hidden = random(5, 40, dtype=dtype, device=device)
    weight = random(40, dtype=dtype, device=device, seed=2)
    before = hidden.clone()
    assert_places(rms_norm(hidden, weight, EPS), TORCH_OPS.rms_norm(hidden, weight, EPS), 4)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, size",
    [(1, 8), (3, 1025), pytest.param(1, 18944, marks=gpu), pytest.param(300, 18944, marks=gpu)],
)
def test_silu_times_up(rows, size, dtype, launch, device):
    gate_up = 4 * random(rows, 2 * size, dtype=dtype, device=device)
    output, expected = silu_mul(gate_up, launch), TORCH_OPS.silu_mul(gate_up)
    assert_places(output, expected, 16 if dtype == torch.float32 else 2, floor=0.01)
    if dtype != torch.float32 and not CUTS_BFLOAT16:
        assert share_equal(output, expected) > 0.99


SHAPES = [  # tokens, query heads, KV heads, head size
    (1, 4, 2, 16),
    (3, 7, 1, 8),
    (5, 4, 4, 24),
    pytest.param(1, 28, 4, 128, marks=gpu),
    pytest.param(64, 28, 4, 128, marks=gpu),
    pytest.param(700, 32, 8, 128, marks=gpu),
]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("tokens, num_heads, num_kv_heads, head_dim", SHAPES)
def test_rotation_and_write_to_the_cache(
    tokens, num_heads, num_kv_heads, head_dim, with_norm, dtype, launch, device
):
    qkv = random(tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    norm = random(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device) if with_norm else None
    table = RotaryTable(RopeConfig(1e4), head_dim, 1024, dtype, device)
    positions = (torch.arange(tokens) * 37 % 1000).to(device)
    blocks = -(-tokens // 4) + 2
    slots = torch.randperm(blocks * 4, generator=torch.Generator().manual_seed(0))[:tokens].to(device)
    caches = [_cache(blocks, num_kv_heads, head_dim, dtype, device) for _ in range(2)]
    rotation = TORCH_OPS.rotation(table, positions)
    expected = TORCH_OPS.rotate_and_cache(qkv, rotation, norm, EPS, caches[0], slots)
    cos, sin = table.get_buffer("cos"), table.get_buffer("sin")
    cache = caches[1]
    actual = rotate_and_cache(qkv, positions, cos, sin, norm, EPS, cache.key, cache.value, slots, launch)
    exact = norm is None and dtype != torch.float32
    everything = (*actual, cache.key, cache.value), (*expected, caches[0].key, caches[0].value)
    for ours, theirs in zip(*everything, strict=True):
        assert_places(ours, theirs, 0 if exact else 4, floor=0 if exact else 4)
        if dtype != torch.float32 and not CUTS_BFLOAT16:
            assert share_equal(ours, theirs) > 0.99
    assert torch.equal(actual[2], expected[2]) and torch.equal(cache.value, caches[0].value)
    written = cache.key.flatten(0, 1)[slots]
    assert torch.equal(written, actual[1])


def _cache(num_blocks, num_kv_heads, head_dim, dtype, device):
    def tensor():
        return torch.full((num_blocks, 4, num_kv_heads, head_dim), 7.0, dtype=dtype, device=device)

    return LayerCache(tensor(), tensor())


def test_a_negative_slot_is_not_written(device):
    qkv = random(2, 4 * 8, dtype=torch.float32, device=device)
    table = RotaryTable(RopeConfig(1e4), 8, 16, torch.float32, device)
    cos, sin = table.get_buffer("cos"), table.get_buffer("sin")
    cache = _cache(2, 1, 8, torch.float32, device)
    positions = torch.tensor([3, 4], device=device)
    slots = torch.tensor([-1, 5], device=device)
    _, key, value = rotate_and_cache(qkv, positions, cos, sin, None, EPS, cache.key, cache.value, slots)
    keys, values = cache.key.flatten(0, 1), cache.value.flatten(0, 1)
    assert torch.equal(keys[5], key[1]) and torch.equal(values[5], value[1])
    untouched = [slot for slot in range(8) if slot != 5]
    assert (keys[untouched] == 7).all() and (values[untouched] == 7).all()
