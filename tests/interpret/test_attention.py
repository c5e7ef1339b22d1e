"""Float16 stands for the half precisions: the interpreter's dot product of bfloat16 is wrong."""

import itertools

import pytest
import torch

from tinyfuse.kernels import _attention_decode, _attention_prefill, attention, causal_attention
from tinyfuse.kernels.attention import reference

# B, H, Hkv, Sq, Skv, D, Dv
DECODE = [(1, 2, 2, 1, 37, 32, 32), (2, 4, 2, 1, 40, 40, 24), (1, 6, 1, 3, 35, 16, 16)]
PREFILL = [(2, 2, 1, 20, 37, 16, 24), (1, 2, 2, 17, 5, 16, 16)]
MASKS = ["none", "causal flag", "causal", "sliding", "padded", "by head", "dead", "float", "float32"]


def make_mask(kind, B, H, Sq, Skv, dtype):
    """(mask, is_causal); the last columns of "causal" and "padded" are a cache's unwritten slots."""
    i, j = torch.arange(Sq)[:, None], torch.arange(Skv)
    if kind == "causal":
        return (j <= i)[None, None].expand(B, 1, Sq, Skv), False
    if kind == "sliding":
        return (j <= i + 9) & (j > i - 11), False
    if kind == "padded":
        return ((j >= 3) & (j < Skv - 2)).expand(B, 1, 1, Skv), False
    if kind == "by head":
        mask = torch.rand(Sq, H, B, Skv).permute(2, 1, 0, 3) < 0.3
        return mask.index_fill(2, torch.tensor([0]), False), False
    if kind == "first block":
        return (j < 9).expand(B, 1, 1, Skv), False
    if kind == "dead":
        return torch.zeros(B, 1, 1, Skv, dtype=torch.bool), False
    if kind.startswith("float"):
        own = torch.float32 if kind == "float32" else dtype
        return torch.where(torch.rand(B, 1, Sq, Skv) < 0.5, 0.0, -30.0).to(own), False
    return None, kind == "causal flag"


def make_inputs(shape, dtype):
    """q is a view of a fused projection, k a transposed one, v a cache with a storage offset."""
    B, H, Hkv, Sq, Skv, D, Dv = shape
    q = torch.randn(B, Sq, H, D + 8, dtype=dtype)[..., 8:].transpose(1, 2)
    k = torch.randn(B, Skv, Hkv, D, dtype=dtype).transpose(1, 2)
    v = torch.randn(B, Hkv, Skv + 3, Dv, dtype=dtype)[:, :, 3:]
    return q, k, v


def check(run, shape, kind, dtype, plan, softcap=None):
    torch.manual_seed(0)
    B, H, _, Sq, Skv, D, _ = shape
    q, k, v = make_inputs(shape, dtype)
    mask, is_causal = make_mask(kind, B, H, Sq, Skv, dtype)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = reference(q.double(), k.double(), v.double(), wide, D**-0.5, is_causal, softcap)
    out = run(q, k, v, mask, D**-0.5, is_causal, plan, softcap=softcap)
    assert out.shape == exact.shape and out.transpose(1, 2).is_contiguous()
    error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-9)
    assert error < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("shape, kind", list(itertools.product(DECODE, MASKS)))
def test_decode(shape, kind):
    check(_attention_decode.decode, shape, kind, torch.float16, _attention_decode.Plan(16, 16, 2))


# shape, splits: heads in groups, batches, two blocks of rows; a number of splits that is no power of two
SPLIT = [((1, 2, 2, 1, 37, 32, 32), 3), ((2, 9, 1, 2, 40, 16, 24), 3), ((3, 6, 2, 1, 64, 16, 40), 4)]


@pytest.mark.parametrize("kind", ["none", "by head", "first block", "dead", "float"])
@pytest.mark.parametrize("shape, splits", SPLIT)
def test_splits_are_merged(shape, splits, kind, poisoned):
    check(_attention_decode.decode, shape, kind, torch.float32, _attention_decode.Plan(16, 16, splits))


@pytest.mark.parametrize("shape", DECODE)
def test_decode_in_float32(shape):
    check(_attention_decode.decode, shape, "by head", torch.float32, None)


@pytest.mark.parametrize("shape, kind", list(itertools.product(PREFILL, MASKS)))
def test_prefill(shape, kind):
    check(_attention_prefill.prefill, shape, kind, torch.float16, _attention_prefill.Plan(16, 16, 4, 1, 1))


# The position of the first query and of the first key, the window, the padding.
REACHES = list(itertools.product([(0, 0), (21, 0), (30, 24), (0, 40)], [None, 1, 9], [None, "left", "right", "holes"]))


def make_keys(kind, B, count):
    """Of other strides than a mask's, the first row without padding; "left" leaves some queries nothing."""
    if kind is None:
        return None
    n = torch.arange(count)
    held = {"left": n >= 10, "right": n < count - 25, "holes": n % 3 != 1}[kind]
    keys = torch.zeros(count, B, 2, dtype=torch.bool)[:, :, 1].t()
    keys[:] = held
    keys[0] = True if B > 1 else held
    return keys


@pytest.mark.parametrize("starts, window, padding", REACHES)
@pytest.mark.parametrize("shape", [*PREFILL, (1, 2, 1, 40, 64, 16, 16)])
def test_prefill_by_positions(shape, starts, window, padding):
    torch.manual_seed(0)
    B, _, _, Sq, Skv, D, _ = shape
    q, k, v = make_inputs(shape, torch.float16)
    rows, columns = (torch.arange(n) + start for n, start in zip((Sq, Skv), starts, strict=True))
    reach = _attention_prefill.Reach(rows, columns, make_keys(padding, B, Skv + starts[1] + 3), window)
    mask, softcap = causal_attention.visible(*reach, B), 5.0 if padding else None
    hidden = ~mask.expand(B, 1, Sq, Skv).any(2)[:, 0]
    exact = reference(q.double(), k.double(), v.double(), mask, D**-0.5, False, softcap)
    for x in (k, v):  # what no query attends may be anything
        x.copy_(x.masked_fill(hidden[:, None, :, None], float("nan")))
    plan = _attention_prefill.Plan(16, 16, 4, 1, 1)
    out = _attention_prefill.prefill(q, k, v, None, D**-0.5, True, plan, softcap=softcap, reach=reach)
    assert (out.double() - exact).norm() <= 1e-3 * exact.norm()
    assert not out[~mask.any(-1, keepdim=True).expand(out.shape)].any()


def test_prefill_reads_no_padding_beyond_its_end():
    q, k, v = make_inputs((1, 2, 2, 20, 40, 16, 16), torch.float16)
    rows, columns, held = torch.arange(20) + 19, torch.arange(40), torch.ones(1, 40, dtype=torch.bool)
    held[:, 29:] = False
    short, whole = (
        _attention_prefill.prefill(q, k, v, None, 0.25, True, reach=_attention_prefill.Reach(rows, columns, keys, 9))
        for keys in (held[:, :29], held)
    )
    assert torch.equal(short, whole)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("kind", ["causal", "float32"])
def test_softcap(kind, softcap):
    """Of scores around 1: bounded by half of that, and nearly as they are."""
    plan = _attention_prefill.Plan(16, 16, 4, 1, 1)
    check(_attention_decode.decode, DECODE[1], kind, torch.float32, None, softcap)
    check(_attention_prefill.prefill, PREFILL[0], kind, torch.float16, plan, softcap)


@pytest.mark.parametrize("Sq", [1, 20])
def test_masked_cache_slots_may_hold_anything(Sq):
    q, k, v = make_inputs((1, 2, 2, Sq, 70, 16, 16), torch.float32)
    mask = (torch.arange(70) < 37).expand(1, 1, Sq, 70)
    run = _attention_decode.decode if Sq == 1 else _attention_prefill.prefill
    clean = run(q, k, v, mask, 0.25, False)
    k[:, :, 37:], v[:, :, 37:] = float("nan"), float("inf")
    assert torch.equal(run(q, k, v, mask, 0.25, False), clean)


@pytest.mark.parametrize("processors", [132, 108, 46])
def test_all_splits_of_a_token_run_at_once(monkeypatch, processors):
    """Others would wait for a second wave, which takes as long as the first."""
    monkeypatch.setattr(_attention_decode, "_multiprocessors", lambda device: processors)
    plan, device = _attention_decode.plan.__wrapped__, torch.device("cpu")
    for rows, programs, width, itemsize in itertools.product(
        [1, 4, 8], [1, 4, 8, 32, 40, 128, 256], [64, 128, 256], [2, 4]
    ):
        for length, ahead, new in itertools.product([1, 200, 1000, 8192, 40000], [True, False], [True, False]):
            p = plan(rows, programs, length, width, itemsize, ahead, new, device)
            at_once = _attention_decode.REGISTERS // (32 * p.warps * (p.registers or 255)) * processors
            assert p.splits == 1 or p.splits * programs <= at_once, (rows, programs, length, p)
            assert p.splits <= _attention_decode.MAX_SPLITS and (p.splits - 1) * p.block_n < length


@pytest.mark.parametrize(
    "dtype, mask, why",
    [
        (torch.float32, torch.ones(1, 1, 40, 40, dtype=torch.bool), "float32 stays with SDPA"),
        (torch.float32, None, "float32 stays with SDPA"),
        (torch.bfloat16, torch.zeros(1, 1, 40, 39, dtype=torch.bfloat16)[..., :37], "with a floating mask SDPA is"),
    ],
)
def test_what_is_left_to_the_reference_says_why(dtype, mask, why):
    """It once gave the reason of SDPA's flash kernels, which were the last resort."""
    q = torch.ones(1, 2, 40, 32, dtype=dtype)
    assert why in attention.flashes(q, q, q, mask, 0.1, False)


def test_float_mask_of_minima_averages_as_sdpa_does():
    q, k, v = make_inputs((1, 1, 1, 1, 9, 16, 16), torch.float32)
    mask = torch.full((1, 1, 1, 9), torch.finfo(torch.float32).min)
    out = _attention_decode.decode(q, k, v, mask, 0.25, False)
    torch.testing.assert_close(out, reference(q, k, v, mask, 0.25, False))


def test_map_tells_empty_mixed_and_full_tiles_apart():
    size = (1, 1, 20, 40)
    i, j = torch.arange(20)[:, None], torch.arange(40)
    plan = _attention_prefill.Plan(16, 16, 4, 1, 1)
    for mask, tiles in [
        (j <= i, [[1, 0, 0], [2, 1, 0]]),
        (j < 40, [[2, 2, 1], [2, 2, 1]]),
        ((j >= 16) & (j <= i + 15), [[0, 1, 0], [0, 2, 1]]),
        (j < 0, [[0, 0, 0], [0, 0, 0]]),
    ]:
        assert _attention_prefill.block_map(mask.expand(size), size, plan).tiles[0, 0].tolist() == tiles


def test_map_is_made_again_when_the_mask_changes():
    size = (1, 1, 20, 40)
    plan = _attention_prefill.Plan(16, 16, 4, 1, 1)
    mask = torch.ones(size, dtype=torch.bool)
    first = _attention_prefill.block_map(mask, size, plan)
    assert _attention_prefill.block_map(mask.view(size), size, plan) is first
    mask[..., 16:] = False
    assert _attention_prefill.block_map(mask, size, plan).tiles.tolist() == [[[[2, 0, 0], [2, 0, 0]]]]
