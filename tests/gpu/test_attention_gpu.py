import itertools

import pytest
import torch

from tests import row_ops
from tests.tolerance import assert_as_exact_as_eager
from tinyfuse.kernels import _triton, causal_attention
from tinyfuse.kernels._attention_decode import decode
from tinyfuse.kernels._attention_prefill import prefill
from tinyfuse.kernels.attention import OP, reference

pytestmark = pytest.mark.gpu

# B, H, Hkv, Sq, Skv, D, Dv
DECODE = [
    (1, 32, 32, 1, 777, 128, 128),
    (2, 8, 2, 1, 1000, 64, 64),
    (1, 8, 1, 1, 33000, 96, 96),
    (3, 4, 4, 7, 65, 80, 80),
    (2, 16, 2, 12, 129, 192, 128),
    (1, 2, 2, 1, 1, 32, 32),
    (2, 3, 3, 1, 341, 256, 256),
    (2, 32, 8, 1, 9000, 96, 96),
]
PREFILL = [
    (1, 32, 8, 128, 1024, 128, 128),
    (2, 4, 4, 257, 257, 64, 64),
    (1, 4, 1, 100, 333, 80, 80),
    (1, 2, 2, 61, 61, 256, 256),
    (1, 16, 4, 2048, 2048, 128, 128),
    (2, 4, 2, 341, 341, 192, 128),
]
MASKS = ["none", "causal flag", "causal", "sliding", "left padded", "by head", "random", "dead", "float"]


def make_mask(kind, B, H, Sq, Skv, dtype):
    """(mask, is_causal)"""
    i = torch.arange(Sq, device="cuda")[:, None] + (Skv // 2 if Sq <= 16 else 0)
    j = torch.arange(Skv, device="cuda")
    if kind == "causal":
        return (j <= i)[None, None].expand(B, 1, Sq, Skv), False
    if kind == "sliding":
        return (j <= i) & (j > i - 50), False
    if kind == "left padded":
        pad = torch.arange(B, device="cuda")[:, None, None, None] * 20
        return (j <= i) & (j >= pad), False
    if kind == "by head":
        return torch.rand(Sq, H, B, Skv, device="cuda").permute(2, 1, 0, 3) < 0.3, False
    if kind == "random":
        mask = torch.rand(B, 1, Sq, Skv, device="cuda") < 0.05
        return mask.index_fill(2, torch.tensor([0], device="cuda"), False), False
    if kind == "dead":
        return torch.zeros(B, 1, 1, Skv, dtype=torch.bool, device="cuda"), False
    if kind == "float":
        return torch.where(torch.rand(B, 1, Sq, Skv, device="cuda") < 0.5, 0.0, -3.0).to(dtype), False
    return None, kind == "causal flag"


def make_inputs(shape, dtype=torch.bfloat16):
    """q is a view of a fused projection with outlier channels, k a transposed one, v a cache with an offset."""
    B, H, Hkv, Sq, Skv, D, Dv = shape
    q = torch.randn(B, Sq, H, D + 8, dtype=dtype, device="cuda")[..., 8:].transpose(1, 2)
    k = torch.randn(B, Skv, Hkv, D, dtype=dtype, device="cuda").transpose(1, 2)
    v = torch.randn(B, Hkv, Skv + 8, Dv, dtype=dtype, device="cuda")[:, :, 8:]
    q[..., 3] *= 8
    v[..., 5] *= 300
    return q, k, v


def poison(q, v):
    """The allocator's next blocks of these sizes hold NaN."""
    for n in (q.shape[:3].numel() * v.shape[3], 2**20, 2**16):
        torch.full((n,), float("nan"), device="cuda")


def check(run, q, k, v, mask, is_causal, softcap=None):
    scale = q.shape[-1] ** -0.5
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = reference(q.double(), k.double(), v.double(), wide, scale, is_causal, softcap)
    eager = reference(q, k, v, mask, scale, is_causal, softcap)
    poison(q, v)
    out = run(q, k, v, mask, scale, is_causal, softcap=softcap)
    assert out.dtype == q.dtype and out.shape == exact.shape and out.transpose(1, 2).is_contiguous()
    assert_as_exact_as_eager("attention", out, eager, exact)


@pytest.mark.parametrize("shape, kind", list(itertools.product(DECODE, MASKS)))
def test_decode(shape, kind):
    torch.manual_seed(0)
    B, H, _, Sq, Skv, _, _ = shape
    check(decode, *make_inputs(shape), *make_mask(kind, B, H, Sq, Skv, torch.bfloat16))


@pytest.mark.parametrize("shape, kind", list(itertools.product(PREFILL, MASKS)))
def test_prefill(shape, kind):
    torch.manual_seed(0)
    B, H, _, Sq, Skv, _, _ = shape
    check(prefill, *make_inputs(shape), *make_mask(kind, B, H, Sq, Skv, torch.bfloat16))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("first", [0, 700])
@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize("shape", [*PREFILL, (2, 8, 2, 9, 2000, 128, 128), (1, 4, 4, 5, 800, 64, 64)])
def test_prefill_by_positions(shape, padding, first, window):
    """``first``: the position of the first query. A graph follows the positions and the padding."""
    torch.manual_seed(0)
    q, k, v = make_inputs(shape)
    rows, columns = (torch.arange(n, device="cuda") for n in (q.shape[2], k.shape[2]))
    held = {"left": columns >= 20, "right": columns < len(columns) - 20, "holes": columns % 7 > 0}
    keys = None if padding is None else torch.stack([held[padding], columns >= 0]).repeat(len(q), 1)[1 : 1 + len(q)]
    args = q, k, v, rows, columns, keys, window, q.shape[-1] ** -0.5
    assert causal_attention.OP.choose(*args)[0].name == ("masked" if shape[3:5] == (9, 2000) else "prefill")
    causal_attention.OP(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_attention.OP(*args)
    rows += first
    poison(q, v)
    graph.replay()
    eager = causal_attention.reference(*args)
    exact = causal_attention.reference(q.double(), k.double(), v.double(), *args[3:])
    assert_as_exact_as_eager("attention", out, eager, exact)
    assert not causal_attention.OP.broken


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("kind", ["none", "causal flag", "left padded", "float"])
@pytest.mark.parametrize("shape", [*DECODE[:2], *PREFILL[:3]])
def test_softcap(shape, kind, softcap):
    """The scores of the outlier channel are far above both."""
    torch.manual_seed(0)
    B, H, _, Sq, Skv, _, _ = shape
    run = decode if Sq == 1 else prefill
    check(run, *make_inputs(shape), *make_mask(kind, B, H, Sq, Skv, torch.bfloat16), softcap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_decode_in_other_dtypes(dtype):
    torch.manual_seed(0)
    for shape in (DECODE[0], DECODE[1]):
        check(decode, *make_inputs(shape, dtype), *make_mask("causal", *shape[:2], *shape[3:5], dtype))


@pytest.mark.parametrize("Sq", [1, 128])
def test_masked_cache_slots_may_hold_anything(Sq):
    q, k, v = make_inputs((2, 8, 4, Sq, 1024, 64, 64))
    mask = (torch.arange(1024, device="cuda") < 300).expand(2, 1, Sq, 1024)
    run = decode if Sq == 1 else prefill
    clean = run(q, k, v, mask, 0.125, False)
    k[:, :, 300:], v[:, :, 300:] = float("nan"), float("inf")
    assert torch.equal(run(q, k, v, mask, 0.125, False), clean)


def test_cache_larger_than_two_to_the_31_elements():
    q = torch.randn(1, 2, 1, 64, dtype=torch.bfloat16, device="cuda")
    wide = torch.empty(40000 * 2**16, dtype=torch.bfloat16, device="cuda")
    k, v = (wide.as_strided((1, 2, 40000, 64), (0, 128, 2**16, 1), at) for at in (0, 64))
    k.normal_()
    v.normal_()
    check(decode, q, k, v, None, False)


def test_dependent_launch_changes_no_bit(monkeypatch):
    q, k, v = make_inputs((1, 8, 2, 1, 2000, 128, 128))
    mask = (torch.arange(2000, device="cuda") < 1500)[None, None, None]
    results = []
    for setting in ("1", "0"):
        monkeypatch.setenv("TINYFUSE_PDL", setting)
        _triton.pdl.cache_clear()
        results += [decode(q, k, v, mask, 0.1, False) for _ in range(20)]
    _triton.pdl.cache_clear()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("Sq", [1, 64])
def test_graph_replay_follows_the_mask(Sq):
    q, k, v = make_inputs((1, 8, 2, Sq, 512, 64, 64))
    run = decode if Sq == 1 else prefill
    mask = torch.ones(1, 1, Sq, 512, dtype=torch.bool, device="cuda")
    run(q, k, v, mask, 0.125, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(q, k, v, mask, 0.125, False)
    for length in (3, 512, 100):
        mask.copy_((torch.arange(512, device="cuda") < length).expand_as(mask))
        graph.replay()
        assert torch.equal(out, run(q, k, v, mask, 0.125, False))
        assert_as_exact_as_eager(
            "attention", out, reference(q, k, v, mask, 0.125, False),
            reference(q.double(), k.double(), v.double(), mask, 0.125, False),
        )  # fmt: skip


@pytest.mark.parametrize("Sq", [1, 32])
def test_opcheck(Sq):
    q, k, v = make_inputs((1, 4, 2, Sq, 64, 32, 32))
    mask = torch.ones(Sq, 64, dtype=torch.bool, device="cuda").tril(64 - Sq)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tinyfuse.attention.default, (q, k, v, mask, 0.2, False), test_utils=tests)
    by_position = (q, k, v, *(torch.arange(n, device="cuda") for n in (Sq, 64)), None, 9, 0.2)
    torch.library.opcheck(torch.ops.tinyfuse.causal_attention.default, by_position, test_utils=tests)
    kernel, _ = OP.choose(q, k, v, mask, 0.2, False)
    assert kernel.name == ("decode" if Sq == 1 else "prefill") and not OP.broken


def test_long_rows_without_a_mask_go_to_sdpa():
    torch.manual_seed(0)
    q, k, v = make_inputs((1, 4, 2, 2500, 2500, 128, 128))
    kernel, _ = OP.choose(q, k, v, None, 0.1, True)
    assert kernel.name == "sdpa"
    check(lambda *args, softcap: OP(*args, softcap), q, k, v, None, True)


# B, H, kv heads, L, position, D, Dv, R
STEPS = [
    (1, 32, 32, 256, 130, 128, 128, 128),
    (1, 32, 8, 8192, 8191, 128, 128, 128),
    (3, 16, 8, 1000, 0, 64, 64, 32),
    (2, 6, 2, 341, 77, 80, 96, 40),
    (1, 8, 1, 40000, 33333, 96, 96, 96),
    (1, 32, 8, 9001, 8000, 128, 128, 128),
    (1, 32, 32, 2500, 2400, 128, 128, 128),
    (4, 32, 32, 250, 130, 128, 128, 128),
    (32, 20, 20, 300, 290, 64, 64, 64),
]


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("kind, interleaved", [("batched", False), ("expanded", True)])
@pytest.mark.parametrize("masked", ["prefix", "window", "holes", "float", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_step(shape, kind, interleaved, masked, dtype):
    B, _, _, L, at = shape[:5]
    j = torch.arange(L, device="cuda")
    mask = {
        "prefix": j <= at,
        "window": (j <= at) & (j > at - 50),
        "holes": (j <= at) & (j % 7 > 0),
        "float": torch.where(torch.rand(B, 1, 1, L, device="cuda") < 0.5, 0.0, -9.0).to(dtype),
        "none": None,
    }[masked]
    mask = None if mask is None else mask.expand(B, 1, 1, L)
    for _ in range(2):
        row_ops.check_attention_step(*shape, kind, interleaved, mask, dtype, "cuda")
