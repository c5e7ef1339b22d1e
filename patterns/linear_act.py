"""A linear layer and the activation of its result, ``act(x W^T + b)``, in one.

GELU (Hendrycks and Gimpel, 2016) in its tanh form 0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))) is one function of
torch, or written out by hand, the cube as a power or multiplied out; so are ``y * sigmoid(1.702 y)`` and the squared
ReLU (So et al., 2021).
"""

import math

import torch
import torch.nn.functional as F

import tinyfuse.kernels.gated_linear  # noqa: F401
from tinyfuse.graph import nodes
from tinyfuse.graph.pattern import Check, Expr, Match, Pattern, call, one_of, optional, scalar, tensor

ops = torch.ops.tinyfuse
x, w = tensor("x w")
s, b = optional("s b")
slope, cubic = scalar("slope cubic")
CONSTANTS = {"slope": math.sqrt(2 / math.pi), "cubic": 0.044715}
constants = (
    Check(lambda m: near(m, "slope"), "it is not the tanh form of GELU: sqrt(2 / pi) is another number"),
    Check(lambda m: near(m, "cubic"), "it is not the tanh form of GELU: 0.044715 is another number"),
)


def near(m: Match, name: str) -> bool:
    """Models write more or fewer digits."""
    number = m.captures.get(name, CONSTANTS[name])
    return isinstance(number, float) and abs(number - CONSTANTS[name]) < 1e-7


def spellings(y: Expr) -> dict[str, Expr]:
    """The activations of ``y`` by the names that the ops know."""
    relu = call(F.relu, y)
    inner = one_of((y + call(torch.pow, y, 3) * cubic) * slope, y * slope * (y * cubic * y + 1))
    return {
        "silu": call(F.silu, y),
        "gelu": call(nodes.gelu, y, "none"),
        "gelu_tanh": one_of(call(nodes.gelu, y, "tanh"), y * 0.5 * (call(torch.tanh, inner) + 1)),
        "relu": relu,
        "relu_squared": one_of(call(torch.square, relu), call(torch.pow, relu, 2)),
        "quick_gelu": y * call(torch.sigmoid, y * 1.702),
    }


def epilogue(name: str, activation: Expr) -> Pattern:
    return Pattern(
        name=f"linear_{name}",
        stage="fuse",
        roots=(activation,),
        where=constants,
        to=lambda m: [call(ops.gated_linear.default, m.x, m.w, None, m.s, None, m.b, None, name)],
        example=lambda: {
            "x": torch.randn(2, 3, 8), "w": torch.randn(6, 8), "s": None, "b": torch.randn(6), **CONSTANTS,
        },
    )  # fmt: skip


EPILOGUES = [epilogue(*named) for named in spellings(call(ops.linear.default, x, w, s, b, None)).items()]
