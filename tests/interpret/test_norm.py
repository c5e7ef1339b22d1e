import itertools

import pytest
import torch

from tests import row_ops
from tinyfuse.kernels import _rows, add_layer_norm, add_rms_norm, layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = [(layout, 24, torch.bfloat16) for layout in row_ops.LAYOUTS]
CASES += [("contiguous", 1, torch.float16), ("outliers", 341, torch.float16), ("offset", 341, torch.float32)]


@pytest.mark.parametrize("op", row_ops.NORMS, ids=lambda op: op.__name__.rpartition(".")[2])
@pytest.mark.parametrize("layout, N, dtype", CASES)
def test_error_and_layout(op, layout, N, dtype):
    x = row_ops.rows(layout, N, dtype, "cpu", (2, 2, 3))
    weight, bias = row_ops.norm_weights(N, dtype, "cpu")[0]
    row_ops.check_norm(op, x, row_ops.residual_like(op, x), weight, bias)


@pytest.mark.parametrize("op", row_ops.NORMS, ids=lambda op: op.__name__.rpartition(".")[2])
def test_long_rows_are_read_in_blocks(op):
    x = row_ops.rows("transposed", _rows.MAX_BLOCK + 37, torch.bfloat16, "cpu", (1, 2, 2))
    weight, bias = row_ops.norm_weights(x.shape[-1], x.dtype, "cpu")[0]
    row_ops.check_norm(op, x, row_ops.residual_like(op, x), weight, bias)


@pytest.mark.parametrize("op", [layer_norm, add_layer_norm], ids=lambda op: op.__name__.rpartition(".")[2])
@pytest.mark.parametrize("N", [24, _rows.MAX_BLOCK + 37])
def test_the_columns_of_patches(op, N):
    row_ops.check_norm_of_patches(op, N, torch.bfloat16, "cpu")


@pytest.mark.parametrize("op", [rms_norm, add_layer_norm], ids=lambda op: op.__name__.rpartition(".")[2])
def test_many_short_rows_share_a_program(op):
    x = row_ops.rows("fused view", 96, torch.float16, "cpu", (1, 5, 205))
    assert _rows.tile(96, True).rows > 1
    weight, bias = row_ops.norm_weights(96, x.dtype, "cpu")[0]
    row_ops.check_norm(op, x, row_ops.residual_like(op, x), weight, bias)


@pytest.mark.parametrize("which", [1, 2])
def test_fp32_and_absent_weights(which):
    x = row_ops.rows("contiguous", 48, torch.bfloat16, "cpu")
    weight, bias = row_ops.norm_weights(48, x.dtype, "cpu")[which]
    row_ops.check_norm(rms_norm, x, None, weight, None)
    if which == 2:
        row_ops.check_norm(layer_norm, x, None, None, None)
    else:
        row_ops.check_norm(layer_norm, x.float(), None, weight, bias)


@pytest.mark.parametrize("dtype, weight_dtype", list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("unit_offset, cast_first", list(itertools.product([False, True], repeat=2)))
def test_roundings(dtype, weight_dtype, unit_offset, cast_first):
    x = row_ops.rows("outliers", 576, dtype, "cpu", (1, 1, 4))
    row_ops.check_rms_casts(x, torch.randn(576).to(weight_dtype), unit_offset, cast_first)


def test_the_sum_has_the_layout_of_eager_addition():
    x = torch.randn(4, 1, 24).expand(4, 6, 24)
    residual = torch.randn(6, 4, 24).transpose(0, 1)
    total, y = add_rms_norm.run_triton(x, residual, None, 1e-5, False, True)
    assert total.stride() == (x + residual).stride() == y.stride()
    assert torch.equal(total, x + residual)


def test_no_rows():
    x = torch.randn(0, 8)
    assert rms_norm.run_triton(x, torch.randn(8), 1e-5, False, True).shape == (0, 8)


@pytest.mark.parametrize(
    "x, weight, reason",
    [
        (torch.randn(3, 8).double(), torch.randn(8), "float64"),
        (torch.randn(8, 3).t(), torch.randn(8), "contiguous"),
        (torch.randn(20).unfold(0, 8, 1), torch.randn(8), "overlap"),
        (torch.randn(3, 8), torch.randn(1), "per channel"),
        (torch.randn(3, 8), torch.randn(16)[::2], "per channel"),
        (torch.randn(3, 4, 5, 4, 8)[::2, ::2, ::2, ::2], None, "merge"),
    ],
)
def test_declines(x, weight, reason):
    assert reason in rms_norm.supports_triton(x, weight, 1e-5, False, True)


def test_add_declines_broadcasting():
    assert "shape" in add_rms_norm.supports_triton(torch.randn(3, 8), torch.randn(8), None, 1e-5, False, True)
