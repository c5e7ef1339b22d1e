"""How far a kernel may be from float64, as a multiple of what eager code in the same dtype makes on the same input."""

from torch import Tensor

MULTIPLE = {
    "attention": 1.5,  # eager code rounds the probabilities to the dtype where some kernels keep them wider
}


def error(out: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm; NaN where ``out`` holds one."""
    return ((out.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_as_exact_as_eager(op: str, out: Tensor, eager: Tensor, exact: Tensor) -> None:
    allowed = MULTIPLE[op] * error(eager, exact) + 1e-7
    assert error(out, exact) <= allowed, f"error {error(out, exact):.3g}, allowed {allowed:.3g}"
