"""How far a kernel may be from float64, as a multiple of what eager code in the same dtype makes on the same input."""

from torch import Tensor

MULTIPLE = {
    "linear": 1.1,  # fp32 sums in another order, or int8 products of fixed-point activations, finer than bf16
    "linear_group": 1.1,
    "gated_linear": 1.1,  # eager code rounds both projections and the activation on the way
    "linear expanded": 1.5,  # bf16 only: the products of weights and scales are rounded, as a float model's weights are
    "linear on digits": 1.5,  # fp16 only: 16-bit digits of 256 columns come near its own rounding
    "rms_norm": 1.1,  # the same roundings; the sum of squares runs in another order
    "add_rms_norm": 1.1,
    "layer_norm": 1.1,
    "add_layer_norm": 1.1,
    "rope": 1.0,  # one rounding where eager code makes three
    "rope_tables": 1.1,  # the same roundings; under the interpreter another cosine
    "gated_act": 1.1,  # the same roundings; another exp
    "gated_act in steps": 1.5,  # eager code rounds in between: other errors, of which those at few outliers count
    "softcap": 1.1,  # the same roundings; another tanh
    "attention": 2.0,  # the probabilities are rounded to the dtype, which SDPA's kernels do for some shapes only
}
# How far the fp32 logits of a whole model may be from stock's: sums in another order make 1e-5, one value rounded to 16
# bits 1e-3.
LOGITS = 1e-4
# And those in bf16 from exact ones, as a multiple of stock's own distance.
NARROW_LOGITS = 1.5


def error(out: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm; NaN where ``out`` holds one."""
    return ((out.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_as_exact_as_eager(op: str, out: Tensor, eager: Tensor, exact: Tensor) -> None:
    allowed = MULTIPLE[op] * error(eager, exact) + 1e-7
    assert error(out, exact) <= allowed, f"error {error(out, exact):.3g}, allowed {allowed:.3g}"
