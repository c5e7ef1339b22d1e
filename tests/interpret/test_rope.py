import itertools

import pytest
import torch

from tests import row_ops
from tinyfuse.kernels import _attention_decode, kv_append, rope

pytestmark = pytest.mark.usefixtures("poisoned")

# B, H, kv heads, S, L, D, Dv, R
SHAPES = [(1, 5, 1, 1, 4, 24, 24, 24), (2, 6, 2, 3, 7, 40, 24, 12), (2, 3, 3, 2, 2, 16, 32, 16)]

CASES = list(itertools.product(row_ops.TABLES, [False, True]))
DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize("kind, interleaved", CASES)
@pytest.mark.parametrize("dtype, table_dtype", DTYPES)
def test_rope(kind, interleaved, dtype, table_dtype):
    for B, H, _, S, _, D, _, R in SHAPES[:2]:
        x = row_ops.heads(B, H, S, D, dtype, "cpu", 8)
        row_ops.check_rope(x, *row_ops.tables(kind, B, S, R, table_dtype, "cpu"), interleaved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_tables(dtype):
    for B, S, half, scale in [(1, 1, 64, 1.0), (2, 5, 12, 1.25), (3, 1, 5, 0.5)]:
        row_ops.check_rope_tables(B, S, half, scale, dtype, "cpu")


def test_many_tokens_and_a_layout_by_heads():
    x = torch.randn(1, 3, 130, 8)
    row_ops.check_rope(x, *row_ops.tables("shared", 1, 130, 8, x.dtype, "cpu"), False)


@pytest.mark.parametrize("shape", SHAPES)
def test_kv_append_writes_its_positions_alone(shape):
    B, _, H, S, L, D, Dv, _ = shape
    row_ops.check_append(B, H, S, L, D, Dv, torch.bfloat16, "cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_append(shape, interleaved):
    row_ops.check_rope_append(*shape, "batched", interleaved, torch.bfloat16, "cpu")


# B, H, kv heads, L, position, D, Dv, R
STEPS = [(1, 4, 2, 70, 0, 16, 16, 16), (2, 6, 2, 70, 33, 40, 24, 24), (1, 2, 2, 37, 36, 32, 16, 32)]


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("kind, interleaved", [("batched", False), ("expanded", True)])
@pytest.mark.parametrize("masked", ["prefix", "window", "not itself", "holes", "nothing", "float", "none"])
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_step(shape, kind, interleaved, masked, splits, monkeypatch):
    plan = _attention_decode.Plan(16, 16, splits)
    monkeypatch.setattr(_attention_decode, "plan", lambda *_: plan)
    B, _, _, L, at = shape[:5]
    j = torch.arange(L)
    mask = {
        "prefix": j <= at,
        "window": (j <= at) & (j > at - 9),
        "not itself": (j != at) & (j < 50),
        "holes": (j <= at) & (j % 3 != 1),
        "nothing": j < 0,
        "float": torch.where(torch.rand(B, 1, 1, L) < 0.5, 0.0, -9.0).half(),
        "none": None,
    }[masked]
    mask = None if mask is None else mask.expand(B, 1, 1, L)
    row_ops.check_attention_step(*shape, kind, interleaved, mask, torch.float16, "cpu")


def test_positions_outside_the_cache_write_nothing():
    whole_keys, whole_values, keys, values = row_ops.caches(1, 2, 4, 8, 8, torch.float32, "cpu")
    before = whole_keys.clone(), whole_values.clone()
    k = torch.randn(1, 2, 2, 8)
    kv_append.run_triton(keys, values, k, k, torch.tensor([4, -1]))
    assert torch.equal(whole_keys, before[0]) and torch.equal(whole_values, before[1])


@pytest.mark.parametrize(
    "x, cos, reason",
    [
        (torch.randn(1, 2, 3, 8).double(), torch.randn(1, 1, 3, 8).double(), "float64"),
        (torch.randn(1, 2, 8, 3).mT, torch.randn(1, 1, 3, 8), "contiguous"),
        (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), "between heads"),
        (torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 10), "even number"),
        (torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 7), "even number"),
        (torch.randn(1, 2, 1, 8), torch.randn(1, 1, 3, 8), "[B, 1, S, R]"),
    ],
)
def test_declines(x, cos, reason):
    assert reason in rope.supports_triton(x, cos, cos, False)


def test_append_declines_another_cache_dtype():
    cache, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 1, 8).bfloat16()
    assert "bfloat16" in kv_append.supports_triton(cache, cache, k, k, torch.tensor([0]))
