import pytest
import torch

from tests import row_ops
from tinyfuse.kernels import softcap


@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", row_ops.LAYOUTS)
def test_error(layout, dtype, cap):
    torch.manual_seed(0)
    row_ops.check_softcap(row_ops.rows(layout, 24, dtype, "cpu"), cap)


def test_rows_longer_than_a_program():
    torch.manual_seed(0)
    row_ops.check_softcap(8 * torch.randn(3, 2 * softcap.BLOCK_N + 5)[:, 3:], 30.0)


def test_nan_and_infinity_propagate():
    out = softcap.run_triton(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]), 30.0)
    assert out[0].isnan() and out[1:].tolist() == [30.0, -30.0, 0.0]


def test_declines():
    assert "float64" in softcap.supports_triton(torch.randn(4, 8).double(), 30.0)
