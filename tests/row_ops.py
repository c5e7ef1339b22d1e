"""Inputs and checks of the row-wise ops (norms, rope, cache writes, gated activations), and weights, on any device."""

from functools import partial

import torch
import torch.nn.functional as F

from tests.tolerance import assert_as_exact_as_eager
from tinyfuse.kernels import (
    add_layer_norm,
    add_rms_norm,
    gated_act,
    kv_append,
    layer_norm,
    mask_bounds,
    rms_norm,
    rope,
    rope_append,
    rope_append_attention,
    rope_tables,
    softcap,
)

LAYOUTS = ["contiguous", "offset", "transposed", "fused view", "expanded", "outliers"]
HALVES = [torch.float16, torch.bfloat16]


def rows(layout, N, dtype, device, lead=(2, 3, 5)):
    """Random [*lead, N]; "offset" begins at an address that is not a multiple of 16 bytes."""
    b, h, s = lead
    random = partial(torch.randn, device=device)
    if layout == "offset":
        return random(b * h * s * N + 3).to(dtype)[3:].view(b, h, s, N)
    if layout == "transposed":
        return random(b, s, h, N).to(dtype).transpose(1, 2)
    if layout == "fused view":
        return random(b, s, (h + 2) * N).to(dtype)[..., N : (h + 1) * N].view(b, s, h, N).transpose(1, 2)
    if layout == "expanded":
        return random(b, 1, s, N).to(dtype).expand(b, h, s, N)
    x = random(b, h, s, N)
    if layout == "outliers":
        x[..., N // 2] *= 300
    return x.to(dtype)


def weights(shape, dtype, device):
    """[..., N, K] in ``dtype`` and None, or int8 and scales."""
    w = torch.randn(shape, device=device) / shape[-1] ** 0.5
    if dtype is not torch.int8:
        return w.to(dtype), None
    scale = w.abs().amax(-1) / 127
    return (w / scale[..., None]).round().to(torch.int8), scale


def check_softcap(x, cap):
    assert softcap.supports_triton(x, cap) is None
    exact = cap * torch.tanh(x.double() / cap)
    torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device)  # what the result's memory holds
    out, eager = softcap.run_triton(x, cap), softcap.reference(x, cap)
    assert out.is_contiguous() and out.dtype == x.dtype
    assert_as_exact_as_eager("softcap", out, eager, exact)


def check_rope_tables(B, S, half, scale, dtype, device, kernel="triton"):
    """The tables of positions up to 100,000, of which some are far apart, on a strided view."""
    positions = torch.randint(0, 100_000, (B, 2 * S), device=device)[:, ::2]
    positions[:, 0] = 0
    frequencies = 1e6 ** -(torch.arange(half, device=device) / half)
    args = positions, frequencies, scale, dtype
    supports, run = (getattr(rope_tables, f"{name}_{kernel}") for name in ("supports", "run"))
    assert supports(*args) is None
    angle = positions[..., None].float() * frequencies
    angle = torch.cat((angle, angle), -1).double()
    for out, eager, exact in zip(run(*args), rope_tables.reference(*args), (angle.cos(), angle.sin()), strict=True):
        assert out.dtype is dtype and out.stride() == eager.stride()
        assert_as_exact_as_eager("rope_tables", out, eager, exact * scale)


def check_step_counters(run):
    """Counters that follow each other in memory and counters apart, with and without rings."""
    together = torch.tensor([7, 7, 9, 1000]).unbind()
    apart = [torch.tensor(7), torch.tensor(8), torch.tensor(3)]
    for counters in (list(together), apart):
        before = [int(counter) for counter in counters]
        rings = [0, 4, 8, 0][: len(counters)]
        positions = run(counters, rings)
        want = [[value % ring if ring else value] for value, ring in zip(before, rings, strict=True)]
        assert [position.tolist() for position in positions] == want
        assert [int(counter) for counter in counters] == [value + 1 for value in before]
    return positions


def residual_like(op, x):
    return torch.randn(x.shape, device=x.device).to(x.dtype) if "add" in op.__name__ else None


def check_norm(op, x, residual, weight, bias, flags=(False, True), eps=1e-5):
    """One norm kernel against fp64, eager code's error, and the layout that the reference gives."""
    adds = residual is not None
    given = (x, residual) if adds else (x,)
    wide = None if weight is None else weight.double()
    exact = sum(t.double() for t in given)
    if op in (rms_norm, add_rms_norm):
        args = (*given, weight, eps, *flags)
        gain = 1.0 if wide is None else wide + flags[0]
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps) * gain
    else:
        args = (*given, weight, bias, eps)
        exact = F.layer_norm(exact, exact.shape[-1:], wide, None if bias is None else bias.double(), eps)
    assert op.supports_triton(*args) is None
    out, eager = op.run_triton(*args), op.reference(*args)
    assert all(a.stride() == b.stride() and a.dtype is b.dtype for a, b in zip(out, eager, strict=True))
    if adds:
        assert torch.equal(out[0], eager[0])
        out, eager = out[1], eager[1]
    assert_as_exact_as_eager(op.__name__.rpartition(".")[2], out, eager, exact)
    return out, eager


def check_norm_of_patches(op, N, dtype, device, b=2, s=5):
    """Of [b, s, N] as a convolution over patches leaves it: columns lie s apart, those of a residual too or not."""
    x = torch.randn(b, N, s, device=device).to(dtype).transpose(1, 2)
    weight, bias = norm_weights(N, dtype, device)[0]
    residual = residual_like(op, x)
    for more in (None,) if residual is None else (residual, x + 1):
        check_norm(op, x, more, weight, bias)


def norm_weights(N, dtype, device):
    """Weight and bias pairs: of the model's dtype, fp32, and none."""
    w, b = torch.randn(2, N, device=device)
    return [(w.to(dtype), b.to(dtype)), (w, b), (None, None)]


def check_rms_casts(x, weight, unit_offset, cast_first):
    """The roundings are those of the reference: where a different sum makes them differ, by two units in the last
    place at most, and hardly anywhere."""
    args = (x, weight, 1e-6, unit_offset, cast_first)
    out, eager = rms_norm.run_triton(*args), rms_norm.reference(*args)
    assert out.dtype is eager.dtype
    if x.dtype is not torch.float32:
        apart = (out.contiguous().view(torch.int16).int() - eager.contiguous().view(torch.int16).int()).abs()
        assert apart.max() <= 2 and (apart > 0).float().mean() < 2e-3


def heads(B, H, S, D, dtype, device, extra=0):
    """[B, H, S, D], a view of a merged projection that is ``extra`` channels wider."""
    x = torch.randn(B, S, H * D + extra, device=device).to(dtype)
    return x[..., extra:].view(B, S, H, D).transpose(1, 2)


def tables(kind, B, S, R, dtype, device):
    """cos and sin of any kind that broadcasts to [B, 1, S, R]; their halves do not repeat."""
    cos, sin = torch.randn(2, B, S, R, device=device).to(dtype)
    if kind == "shared":
        return cos[:1, None], sin[:1, None]
    if kind == "expanded":
        return cos[:1, None].expand(B, 1, S, R), sin[:1, None].expand(B, 1, S, R)
    if kind == "transposed":
        return cos.mT.contiguous().mT[:, None], sin.mT.contiguous().mT[:, None]
    if kind == "flat":
        return cos[0], sin[0]
    return cos[:, None], sin[:, None]


TABLES = ["batched", "shared", "expanded", "transposed", "flat"]


def exact_rope(x, cos, sin, interleaved):
    return rope.reference(x.double(), cos.double(), sin.double(), interleaved)


def check_rope(x, cos, sin, interleaved):
    assert rope.supports_triton(x, cos, sin, interleaved) is None
    out, eager = rope.run_triton(x, cos, sin, interleaved), rope.reference(x, cos, sin, interleaved)
    assert out.stride() == eager.stride() and out.dtype is eager.dtype
    R = cos.shape[-1]
    assert torch.equal(out[..., R:], x[..., R:])
    assert_as_exact_as_eager("rope", out, eager, exact_rope(x, cos, sin, interleaved))


def caches(B, H, L, D, Dv, dtype, device):
    """Keys and values with a storage offset and gaps around each head, so that a write outside shows."""
    keys = torch.randn(B, H + 1, L + 2, D + 8, device=device).to(dtype)
    values = torch.randn(B, H + 1, L + 2, Dv + 8, device=device).to(dtype)
    return keys, values, keys[:, 1:, 1:-1, 8:], values[:, 1:, 1:-1, 8:]


def check_append(B, H, S, L, D, Dv, dtype, device):
    k, v = heads(B, H, S, D, dtype, device, 16), torch.randn(B, H, S, Dv, device=device).to(dtype)
    pos = torch.randperm(L, device=device)[:S]
    whole_keys, whole_values, keys, values = caches(B, H, L, D, Dv, dtype, device)
    want_keys, want_values = keys.clone(), values.clone()
    kv_append.reference(want_keys, want_values, k, v, pos)
    before = whole_keys.clone(), whole_values.clone()
    assert kv_append.supports_triton(keys, values, k, v, pos) is None
    kv_append.run_triton(keys, values, k, v, pos)
    assert torch.equal(keys, want_keys) and torch.equal(values, want_values)
    for whole, old, inner in zip((whole_keys, whole_values), before, (want_keys, want_values), strict=True):
        old[:, 1:, 1:-1, 8:] = inner
        assert torch.equal(whole, old)


def check_rope_append(B, H, kv_heads, S, L, D, Dv, R, kind, interleaved, dtype, device):
    """The one launch equals rope and kv_append kernel by kernel, to the bit."""
    q, k = heads(B, H, S, D, dtype, device, 16), heads(B, kv_heads, S, D, dtype, device)
    v = heads(B, kv_heads, S, Dv, dtype, device, 8)
    cos, sin = tables(kind, B, S, R, dtype, device)
    pos = torch.randperm(L, device=device)[:S]
    whole_keys, whole_values, keys, values = caches(B, kv_heads, L, D, Dv, dtype, device)
    want_keys, want_values = whole_keys.clone(), whole_values.clone()
    turned = rope.run_triton(k, cos, sin, interleaved)
    kv_append.run_triton(want_keys[:, 1:, 1:-1, 8:], want_values[:, 1:, 1:-1, 8:], turned, v, pos)
    args = (q, k, v, cos, sin, keys, values, pos, interleaved)
    assert rope_append.supports_triton(*args) is None
    out = rope_append.run_triton(*args)
    assert torch.equal(out, rope.run_triton(q, cos, sin, interleaved)) and out.transpose(1, 2).is_contiguous()
    assert torch.equal(whole_keys, want_keys) and torch.equal(whole_values, want_values)


def check_gated_act(gate, up, act):
    assert gated_act.supports_triton(gate, up, act) is None
    out, eager = gated_act.run_triton(gate, up, act), gated_act.reference(gate, up, act)
    assert out.is_contiguous() and out.dtype is eager.dtype
    name = "gated_act in steps" if act in ("relu_squared", "quick_gelu") else "gated_act"
    assert_as_exact_as_eager(name, out, eager, gated_act.reference(gate.double(), up.double(), act))


NORMS = [rms_norm, add_rms_norm, layer_norm, add_layer_norm]


def check_attention_step(B, H, kv_heads, L, at, D, Dv, R, kind, interleaved, mask, dtype, device):
    """Rotation, cache write and attention in one launch; what the mask leaves out of the cache holds NaN."""
    q, k = heads(B, H, 1, D, dtype, device, 16), heads(B, kv_heads, 1, D, dtype, device)
    v = torch.randn(B, kv_heads, 1, Dv, device=device).to(dtype)
    cos, sin = (table / 2**0.5 for table in tables(kind, B, 1, R, dtype, device))  # turned rows keep their length
    pos = torch.tensor([at], device=device)
    whole_keys, whole_values, keys, values = caches(B, kv_heads, L, D, Dv, dtype, device)
    rest = pos, interleaved, mask, D**-0.5

    def run(op, wide):
        given = [x.double() if wide else x.clone() for x in (q, k, v, cos, sin, keys, values)]
        masked = mask.double() if wide and mask is not None and mask.is_floating_point() else mask
        return op(*given, pos, interleaved, masked, D**-0.5), given[5], given[6]

    exact, exact_keys, _ = run(rope_append_attention.reference, True)
    eager, eager_keys, eager_values = run(rope_append_attention.reference, False)
    if mask is not None and mask.dtype == torch.bool:
        unseen = ~mask.expand(B, H, 1, L).any(1)[:, 0]
        unseen[:, at] = False
        for cache in (keys, values, eager_keys, eager_values):
            cache.masked_fill_(unseen[:, None, :, None], torch.nan)
    before = whole_keys.clone(), whole_values.clone()
    args = (q, k, v, cos, sin, keys, values, *rest)
    assert rope_append_attention.supports_triton(*args) is None
    if mask is not None and mask.dtype == torch.bool:
        bounds = mask_bounds.run_triton(mask)
        assert torch.equal(bounds, mask_bounds.reference(mask))
        bounded = rope_append_attention.run_triton(*args, bounds)
        assert_as_exact_as_eager("attention", bounded, eager, exact)
        keys.copy_(before[0][:, 1:, 1:-1, 8:]), values.copy_(before[1][:, 1:, 1:-1, 8:])
    out = rope_append_attention.run_triton(*args)
    assert out.transpose(1, 2).is_contiguous()
    assert_as_exact_as_eager("attention", out, eager, exact)
    assert torch.equal(values.nan_to_num(7.0), eager_values.nan_to_num(7.0))
    assert_as_exact_as_eager("rope", keys[:, :, at], eager_keys[:, :, at], exact_keys[:, :, at])
    keys[:, :, at], values[:, :, at] = before[0][:, 1:, 1 + at, 8:], before[1][:, 1:, 1 + at, 8:]
    for whole, was in zip((whole_keys, whole_values), before, strict=True):
        assert torch.equal(whole.nan_to_num(7.0), was.nan_to_num(7.0)), "the launch wrote elsewhere too"
