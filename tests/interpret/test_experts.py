import pytest
import torch

from tests import row_ops
from tests.tolerance import assert_as_exact_as_eager
from tinyfuse.kernels import _experts, _experts_gemm, dequantize, experts_linear, gated_act

E, N, K = 5, 22, 112  # K of int8: one whole step of a warp and a part


def stack(dtype):
    """Weights between other experts' and rows, in ``dtype`` or int8 with scales."""
    w, scale = row_ops.weights((E, N + 2, K), dtype, "cpu")
    return w[:, 2:], None if scale is None else scale[:, 2:]


def rows(S, dtype):
    x = torch.randn(S, K).to(dtype)
    x[:, 7] = 300 if dtype is torch.bfloat16 else 30
    return x


def experts(form):
    """(offs, None) or (None, ids), and the experts of the rows: some without, one with several."""
    ids = torch.tensor([1, 1, 1, 4])
    if form == "sorted":
        return (torch.tensor([0, 3, 3, 3, 4], dtype=torch.int32), None), ids
    ids = ids[torch.randperm(4)]
    return (None, ids - E * (torch.arange(4) == 2)), ids


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "config, form, dtype", [((4, 1), "sorted", torch.bfloat16), ((2, 2), "gathered", torch.float16)]
)
@pytest.mark.parametrize("act", ["", "silu"])
def test_pairs(int8, config, form, dtype, act):
    torch.manual_seed(0)
    x, (w, scale) = rows(4, dtype), stack(torch.int8 if int8 else dtype)
    x = x / 100 if act else x
    given, ids = experts(form)
    assert _experts.reason(x, w, scale, *given) is None
    plain = w if scale is None else dequantize.reference(w, scale, dtype)
    wide = w.double() if scale is None else w.double() * scale.double()[..., None]
    eager = experts_linear.reference(x, plain, None, *given)
    exact = torch.einsum("sk,snk->sn", x.double(), wide[ids])
    if act:
        eager, exact = (gated_act.reference(*y.chunk(2, -1), act) for y in (eager, exact))
    out = _experts.pairs(x, w, scale, *given, act, config)
    assert_as_exact_as_eager("gated_linear" if act else "linear", out, eager, exact)


def test_rows_of_no_expert():
    x, (w, scale) = rows(4, torch.bfloat16), stack(torch.int8)
    out = _experts.pairs(x, w, scale, torch.tensor([1, 1, 2, 2, 2], dtype=torch.int32), None)
    assert out[:2].all() and not out[2:].any()
    out = _experts.pairs(x, w, scale, None, torch.tensor([0, E, 4, -E - 1]))
    assert out[[0, 2]].isfinite().all() and out[[1, 3]].isnan().all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("act", ["", "gelu"])
@pytest.mark.parametrize("counts", [(0, 19, 1, 0, 16), (0, 0, 36, 0, 0)])
def test_grouped(int8, act, counts):
    """Experts without rows, a tile and a part of one; columns and K with parts of tiles; rows of no expert behind.
    Float16 alone: the interpreter's dot product of bfloat16 is wrong."""
    torch.manual_seed(0)
    dtype = torch.float16
    x, (w, scale) = rows(sum(counts) + 2, dtype), stack(torch.int8 if int8 else dtype)
    offs, ids = torch.tensor(counts).cumsum(0).int(), torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    assert _experts_gemm.reason(x, w, scale, offs) is None
    plain = w if scale is None else dequantize.reference(w, scale, dtype)
    wide = w.double() if scale is None else w.double() * scale.double()[..., None]
    eager = experts_linear.reference(x, plain, None, offs, None)[:-2]
    exact = torch.einsum("sk,snk->sn", x[:-2].double(), wide[ids])
    if act:
        eager, exact = (gated_act.reference(*y.chunk(2, -1), act) for y in (eager, exact))
    out = _experts_gemm.experts_gemm(x, w, scale, offs, act, (16, 16, 64, 2, 4))[:-2]
    assert_as_exact_as_eager("gated_linear" if act else "linear", out, eager, exact)
