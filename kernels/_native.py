"""The CPU kernels of ``native.cpp``: compiled on first use with the system's compiler, called through ctypes.

The library lies in ``$TINYFUSE_CACHE`` or ``~/.cache/tinyfuse`` under a name that hashes source, compiler, flags
and CPU, so a change of any of them builds anew. A kernel's arguments travel as one packed struct of 8-byte
fields: packing and calling costs 0.4 µs, a dozen ctypes arguments 2 µs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import get_ident

import torch

from tinyfuse.choices import cache_folder
from tinyfuse.kernels._rows import empty_sum

log = logging.getLogger("tinyfuse")

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-w"]
TUNING = ["-march=native", "-mcpu=native", None]  # the first that the compiler takes
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.bool: 4}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4, "quick_gelu": 5}
NO_ACTIVATION = 6
ERRORS = {
    1: (IndexError, "a cache position is out of range"),
    2: (MemoryError, "no memory for scratch"),
    3: (IndexError, "an expert's number is out of range"),
}

threads = torch.get_num_threads


class BuildError(RuntimeError):
    """No compiler, or it failed; the message says what to do."""


def compiler() -> str:
    """The C++ compiler: ``$CXX``, else the first of g++, c++ and clang++ on the path."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError("no C++ compiler found: install g++ (or set CXX) for the CPU kernels")


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def _cpu() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _key(cxx: str) -> str:
    version = _run([cxx, "--version"]).stdout
    text = "\0".join([SOURCE.read_text(), cxx, version, *FLAGS, *map(str, TUNING), _cpu(), sys.platform])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _compile(cxx: str, target: Path) -> None:
    """Compile to a file beside ``target``, then rename: another process sees the whole library or none."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        for tuning in TUNING:
            done = _run([cxx, *FLAGS, *([tuning] if tuning else []), str(SOURCE), "-o", name])
            if done.returncode == 0:
                os.chmod(name, 0o755)
                os.replace(name, target)
                return
        raise BuildError(f"{cxx} cannot compile the CPU kernels: {done.stderr.strip()[-2000:]}")
    finally:
        Path(name).unlink(missing_ok=True)


def _folders() -> list[Path]:
    """Where the library may lie, best first: the cache, else (read-only home) a private temporary folder."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return [
        cache_folder(),
        Path(tempfile.gettempdir()) / f"tinyfuse-{user}",
    ]


def _private(folder: Path) -> bool:
    """Whether only this user can have put a library there (a shared temporary folder is anyone's to fill)."""
    status = folder.stat()
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def _open(target: Path) -> ctypes.CDLL | None:
    """The library, or None where the file is absent or damaged."""
    try:
        library = ctypes.CDLL(str(target))
        return library if library.tf_version() == 1 else None
    except (OSError, AttributeError):
        return None


def build(folder: Path) -> ctypes.CDLL:
    """The library from ``folder``, compiled into it where it is missing or damaged."""
    cxx = compiler()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _private(folder):
        raise PermissionError(f"{folder} can be written by others")
    target = folder / f"native-{_key(cxx)}.so"
    library = _open(target)
    if library is None:
        log.info("compiling the CPU kernels into %s", target)
        _compile(cxx, target)
        library = _open(target)
    if library is None:
        raise BuildError(f"{target} was compiled but cannot be loaded")
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded kernels, running on torch's own OpenMP pool; raises :class:`BuildError`."""
    problems = []
    for folder in _folders():
        try:
            loaded = build(folder)
        except OSError as error:
            problems.append(str(error))
            continue
        loaded.tf_init(*_torch_pool())
        if problems:
            log.warning("the CPU kernels lie in %s (set TINYFUSE_CACHE): %s", folder, "; ".join(problems))
        return loaded
    raise BuildError("no folder to compile the CPU kernels into (set TINYFUSE_CACHE): " + "; ".join(problems))


def _torch_pool() -> list[ctypes.c_void_p]:
    """Entry points of the OpenMP library that torch itself links; nulls (one thread) where it has none."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        pool = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return [ctypes.cast(getattr(pool, name), ctypes.c_void_p) for name in names]
    except (OSError, AttributeError) as error:
        log.info("the CPU kernels run on one thread: torch's OpenMP pool was not found (%s)", error)
        return [ctypes.c_void_p()] * 3


@functools.cache
def unavailable() -> str | None:
    """Why the CPU kernels cannot run here, or None."""
    try:
        library()
    except (BuildError, subprocess.SubprocessError) as error:
        return str(error)
    return None


@functools.cache
def function(name: str):
    """A kernel by its C name, taking one packed struct as ``bytes`` and returning an error code."""
    entry = getattr(library(), name)
    entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_int
    return entry


tape: list[tuple[str, bytes]] | None = None  # where ``call`` writes what thread ``taping`` runs, see _program
taping = 0


def call(name: str, packed: bytes) -> None:
    """Run a kernel; raises what its error code means."""
    code = function(name)(packed)
    if tape is not None and get_ident() == taping:
        tape.append((name, packed))
    if code:
        error, text = ERRORS[code]
        raise error(text)


def packer(fields: str):
    """``struct`` packer of native 8-byte fields: ``q`` for integers and pointers, ``d`` for doubles."""
    return struct.Struct("=" + fields).pack


def reason(*tensors: torch.Tensor | None) -> str | None:
    """Why no CPU kernel can run on ``tensors`` (Nones pass), whatever the op, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return "the CPU kernels take dense CPU tensors"
        if tensor.dtype not in DTYPES:
            return f"the CPU kernels take float32, bfloat16, float16 and int8, not {tensor.dtype}"
    return unavailable()


_pack_norm = packer("15qd")


def norm_reason(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> str | None:
    """Why :func:`norm` cannot run, or None."""
    if x.dtype not in FLOATING or (residual is not None and residual.dtype != x.dtype):
        return "the CPU norms take x and residual in one floating dtype"
    if residual is not None and residual.shape != x.shape:
        return "the CPU norms take a residual of x's shape"
    for gain in (weight, bias):
        if gain is not None and (gain.dtype not in FLOATING or gain.shape != x.shape[-1:] or gain.stride(0) != 1):
            return "the CPU norms take a dense weight and bias [N]"
    return reason(x, residual, weight, bias)


def norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    eps: float, center: bool, unit_offset: bool, cast_first: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """(x + residual or None, its norm): LayerNorm where ``center``, else RMSNorm."""
    if not x.is_contiguous() or not (residual is None or residual.is_contiguous()):
        return _strided_norm(x, residual, weight, bias, eps, center, unit_offset, cast_first)
    y = torch.empty_like(x)
    total, residual_pointer, total_pointer = None, 0, 0
    if residual is not None:
        total = torch.empty_like(x)
        residual_pointer, total_pointer = residual.data_ptr(), total.data_ptr()
    width = x.shape[-1]
    call(
        "tf_norm",
        _pack_norm(
            x.data_ptr(), residual_pointer, 0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), total_pointer, y.data_ptr(),
            x.numel() // width, width, DTYPES[x.dtype], 0 if weight is None else DTYPES[weight.dtype],
            0 if bias is None else DTYPES[bias.dtype], center, unit_offset, cast_first, threads(), eps,
        ),
    )  # fmt: skip
    return total, y


def _strided_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    eps: float, center: bool, unit_offset: bool, cast_first: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """:func:`norm` through contiguous copies, with the layouts that eager code gives."""
    like = x if residual is None else empty_sum(x, residual)
    dense = None if residual is None else residual.contiguous()
    total, y = norm(x.contiguous(), dense, weight, bias, eps, center, unit_offset, cast_first)
    if not center:
        y = torch.empty_like(like).copy_(y)
    return (None if total is None else like.copy_(total)), y


def linear_reason(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> str | None:
    """Why :func:`linear` cannot run one part, or None."""
    if x.dtype not in FLOATING:
        return f"the CPU linears take floating activations, not {x.dtype}"
    if weight.dtype != (x.dtype if scale is None else torch.int8):
        return "the CPU linears take a weight in x's dtype, or int8 with a scale"
    if weight.dim() != 2 or not (weight.stride(1) == 1 or (scale is None and weight.stride(0) == 1)):
        return "the CPU linears take a weight [N, K] whose rows (or columns, unless in int8) are contiguous"
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != weight.shape[:1] or scale.stride(0) != 1):
        return "the CPU linears take a dense float32 scale [N]"
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1] or bias.stride(0) != 1):
        return "the CPU linears take a dense bias [N] in x's dtype"
    return reason(x, weight, scale, bias)


def by_columns(weight: torch.Tensor) -> bool:
    """Whether ``weight`` [N, K] lies in memory as [K, N], as that of transformers' Conv1D does."""
    return weight.stride(1) != 1


_pack_linear = [packer(f"{9 + 7 * count}q") for count in range(9)]
MOST_PARTS = len(_pack_linear) - 1


def _has_bf16_units() -> bool:
    """Whether the CPU multiplies bfloat16 by itself (AVX512-BF16, AMX), which oneDNN uses for more than a few rows."""
    try:
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    except OSError:
        return False


# Rows of x from which torch's linear on weights of x's dtype is the faster one. Measured at 576x576 to 4096x4096: fp32
# 1.0 to 1.25 times as fast from 32 rows on; bf16 with such units 1.0 to 1.4 times at 8 rows, where small models would
# lose their replayed steps, and 1.2 to 1.9 at 12; 16-bit without such units is 3 to 8 times slower.
_MANY = {torch.float32: 32, torch.bfloat16: 12 if _has_bf16_units() else 1 << 62}
# And from which it is on int8 weights that are expanded first. Measured at 576x576 to 4096x4096 on one thread: in fp32
# 0.92 to 1.01 of the int8 kernel's time at 128 and 256 rows; in bf16 with such units 0.9 at 32 rows, 0.4 at 256.
_EXPANDED = {torch.float32: 128, torch.bfloat16: 32 if _has_bf16_units() else 1 << 62}


def torch_is_faster(x: torch.Tensor, int8: bool = False) -> bool:
    """Whether torch's own linear is, for as many rows as ``x`` has: on weights in its dtype, or on ``int8`` weights
    expanded to it."""
    return x.numel() >= (_EXPANDED if int8 else _MANY).get(x.dtype, 1 << 62) * x.shape[-1]


_pack_dequantize = packer("8q")


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` int8 [N, K] with contiguous rows times ``scale`` fp32 [N], rounded to ``dtype``."""
    out = torch.empty(weight.shape, dtype=dtype)
    pointers = weight.data_ptr(), scale.data_ptr(), out.data_ptr()
    call("tf_dequantize", _pack_dequantize(*pointers, *weight.shape, weight.stride(0), DTYPES[dtype], threads()))
    return out


def part(
    weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None,
    y: torch.Tensor | None,
) -> tuple[int, ...]:  # fmt: skip
    """The fields of one weight of :func:`linear` and what belongs to it; ``residual`` and ``y`` are contiguous."""
    return (
        weight.data_ptr(), 0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), 0 if y is None else y.data_ptr(),
        weight.shape[0], weight.stride()[by_columns(weight)],
    )  # fmt: skip


def linear(x: torch.Tensor, weight: torch.Tensor, act: int, count: int, fields: Sequence[int]) -> None:
    """Run the ``count`` linears whose :func:`part` fields follow each other in ``fields`` (weights of ``weight``'s
    dtype, layout and K) on the contiguous ``x``.

    ``act`` other than ``NO_ACTIVATION``: of one part, act(it) goes to its y; of two, gate and up, act(gate) * up goes
    to the first part's y.
    """
    width = weight.shape[1]
    call(
        "tf_linear",
        _pack_linear[count](
            x.data_ptr(), x.numel() // width, width, DTYPES[x.dtype], DTYPES[weight.dtype], by_columns(weight), act,
            threads(), count, *fields,
        ),
    )  # fmt: skip


def experts_reason(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, offs: torch.Tensor | None,
    ids: torch.Tensor | None,
) -> str | None:  # fmt: skip
    """Why :func:`experts` cannot run, or None."""
    if weight.dim() != 3 or weight.stride(2) != 1 or x.dim() != 2:
        return "the CPU kernels take expert weights [E, N, K] whose rows are contiguous"
    if scale is not None and (scale.shape != weight.shape[:2] or scale.stride(1) != 1):
        return "the CPU kernels take the scales of expert weights as [E, N] with contiguous rows"
    index, dtype = (ids, torch.int64) if offs is None else (offs, torch.int32)
    if index.dtype != dtype or index.dim() != 1 or index.stride(0) != 1 or index.device.type != "cpu":
        return "the CPU kernels take contiguous int32 ends or int64 numbers of experts"
    one = None if scale is None else scale[0]
    return linear_reason(x, weight[0], one, None)


_pack_experts = [packer(f"{5 + 9 + 7 * count}q") for count in range(3)]


def experts(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, offs: torch.Tensor | None,
    ids: torch.Tensor | None, act: int,
) -> torch.Tensor:  # fmt: skip
    """The products of the contiguous ``x`` [S, K] with the weights [E, N, K] of each row's expert: ``ids`` [S], or rows
    sorted by expert of which those of e end at ``offs`` [e]. With an activation, both halves of N are gate and up."""
    gated = act != NO_ACTIVATION
    width = weight.shape[1] // (1 + gated)
    y = empty(x, width)
    first, rows = weight[0], None if scale is None else scale[0]
    parts = part(first[:width], None if rows is None else rows[:width], None, None, y)
    if gated:
        parts += part(first[width:], None if rows is None else rows[width:], None, None, None)
    call(
        "tf_experts",
        _pack_experts[1 + gated](
            0 if offs is None else offs.data_ptr(), 0 if ids is None else ids.data_ptr(), weight.shape[0],
            weight.stride(0), 0 if scale is None else scale.stride(0),
            x.data_ptr(), x.shape[0], x.shape[1], DTYPES[x.dtype], DTYPES[weight.dtype], False, act, threads(),
            1 + gated, *parts,
        ),
    )  # fmt: skip
    return y


def empty(x: torch.Tensor, width: int) -> torch.Tensor:
    """An uninitialised [..., width] of x's leading shape and dtype (sizes as arguments: a tuple takes 0.7 µs more)."""
    shape = list(x.shape)
    shape[-1] = width
    return x.new_empty(*shape)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., N] as [rows, N] with contiguous rows at one stride, copied only where no view is."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        return tensor.reshape(-1, tensor.shape[-1]).contiguous()
    return tensor.reshape(-1, tensor.shape[-1])


def step_counters(counters: Sequence[torch.Tensor], rings: Sequence[int]) -> torch.Tensor:
    """The ``counters`` (int64 [] each), modulo ``rings[i]`` where that is not 0, as int64 [count, 1]; then adds 1."""
    positions = torch.empty((len(counters), 1), dtype=torch.int64)
    layers = [field for counter, ring in zip(counters, rings, strict=True) for field in (counter.data_ptr(), ring)]
    call("tf_step_counters", packer(f"{2 + len(layers)}q")(positions.data_ptr(), len(counters), *layers))
    return positions


_pack_tables = packer("11qd")


def rope_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Fill the contiguous ``cos`` and ``sin`` [B, S, 2 half] of ``positions`` int32 or int64 [B, S] and
    ``frequencies`` fp32 [half]."""
    pointers = positions.data_ptr(), frequencies.data_ptr(), cos.data_ptr(), sin.data_ptr()
    narrow, half = positions.dtype == torch.int32, frequencies.shape[0]
    sizes = *positions.shape, *positions.stride(), narrow, half, DTYPES[cos.dtype]
    call("tf_rope_tables", _pack_tables(*pointers, *sizes, scale))


_pack_rope = packer("43q")
NO_VIEW = (0, 0, 0, 0)


def view(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Pointer and strides of [B, H, S, D]; the last stride is 1."""
    b, h, s, _ = tensor.stride()
    return tensor.data_ptr(), b, h, s


def _rotary(table: torch.Tensor) -> tuple[int, int]:
    """Strides over B and S of cos or sin, broadcastable to [B, 1, S, R]."""
    shape, stride = table.shape, table.stride()
    return (stride[0] if len(shape) == 4 and shape[0] > 1 else 0), (stride[-2] if shape[-2] > 1 else 0)


def rotary_reason(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why :func:`rope` cannot turn x by cos and sin, or None."""
    if cos.dtype != sin.dtype or cos.dtype not in FLOATING or x.dtype not in FLOATING:
        return "the CPU rope takes floating tensors, cos and sin of one dtype"
    if torch.float32 not in (x.dtype, cos.dtype) and x.dtype != cos.dtype:
        return "the CPU rope takes cos in float32 or in x's dtype"
    for table in (cos, sin):
        if table.dim() < 2 or table.shape != cos.shape or table.stride(-1) != 1:
            return "the CPU rope takes cos and sin of one shape [..., S, R] with contiguous rows"
        if any(size != 1 for size in table.shape[1:-2]):
            return "the CPU rope takes one cos row for all heads"
        if table.dim() == 3 and table.shape[0] != 1:
            return "the CPU rope takes cos and sin as [B, 1, S, R] or [S, R]"
    if x.dim() != 4 or cos.shape[-1] > x.shape[-1] or cos.shape[-1] % 2:
        return "the CPU rope takes x [B, H, S, D] and an even rotary width of at most D"
    return reason(x, cos, sin)


def rows_reason(*tensors: torch.Tensor) -> str | None:
    """Why the CPU kernels cannot walk these [B, H, S, D] tensors, or None."""
    for tensor in tensors:
        if tensor.dim() != 4 or tensor.dtype != tensors[0].dtype or tensor.dtype not in FLOATING:
            return "the CPU kernels take [B, H, S, D] tensors of one floating dtype"
        if tensor.stride(3) != 1 and tensor.shape[3] != 1:
            return "the CPU kernels take contiguous rows [D]"
    return reason(*tensors)


def rope(
    q: torch.Tensor | None, k: torch.Tensor | None, v: torch.Tensor | None, cos: torch.Tensor | None,
    sin: torch.Tensor | None, keys: torch.Tensor | None, values: torch.Tensor | None, pos: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Rotate ``q`` into a new tensor laid out as [B, S, H, D]; rotate ``k`` (where ``cos`` is given) and write it
    and ``v`` into the cache at ``pos``."""
    x = k if q is None else q
    batch, heads, steps, width = x.shape
    out = None
    if q is not None:
        out = q.new_empty(batch, steps, heads, width).transpose(1, 2)
    if k is None:
        cache = (*NO_VIEW, *NO_VIEW), (*NO_VIEW, *NO_VIEW, 0), (0, 0, 0)
    else:
        if not pos.is_contiguous():
            pos = pos.contiguous()
        cache = (
            (*view(k), *view(v)),
            (*view(keys), *view(values), pos.data_ptr()),
            (k.shape[1], v.shape[3], keys.shape[2]),
        )
    inputs, targets, (kv_heads, value_width, length) = cache
    tables = (0,) * 8 if cos is None else ()
    if cos is not None:
        tables = (cos.data_ptr(), sin.data_ptr(), *_rotary(cos), *_rotary(sin), cos.shape[-1], DTYPES[cos.dtype])
    call(
        "tf_rope",
        _pack_rope(
            *(NO_VIEW if q is None else view(q)), *inputs, *(NO_VIEW if out is None else view(out)), *targets,
            *tables, batch, heads, kv_heads, steps, width, value_width, length, DTYPES[x.dtype], interleaved, threads(),
        ),
    )  # fmt: skip
    return out
