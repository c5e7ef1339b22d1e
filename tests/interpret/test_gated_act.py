import itertools

import pytest
import torch

from tests import row_ops
from tinyfuse.kernels import gated_act


@pytest.mark.parametrize("act", gated_act.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error(act, dtype):
    torch.manual_seed(0)
    halves = (4 * torch.randn(3, 5, 2 * 341)).to(dtype)
    row_ops.check_gated_act(*halves.chunk(2, -1), act)
    row_ops.check_gated_act(*halves.transpose(0, 1).chunk(2, -1), act)


@pytest.mark.parametrize("layouts", list(itertools.product(row_ops.LAYOUTS, ["contiguous", "transposed"])))
def test_layouts(layouts):
    torch.manual_seed(0)
    gate, up = (row_ops.rows(layout, 24, torch.float16, "cpu") for layout in layouts)
    row_ops.check_gated_act(gate, up, "silu")


def test_nan_and_infinity_propagate():
    gate = torch.tensor([float("nan"), float("inf"), -3.0])
    for act in gated_act.ACTIVATIONS:
        out = gated_act.run_triton(gate, torch.ones(3), act)
        assert out[0].isnan() and out[1] == float("inf")


def test_declines():
    x = torch.randn(4, 8)
    assert "swish" in gated_act.supports_triton(x, x, "swish")
    assert "shape" in gated_act.supports_triton(x, x[:, :4], "silu")
