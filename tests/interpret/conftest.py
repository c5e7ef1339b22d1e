"""Triton's interpreter for every test in this folder: it must be chosen before the first kernel is defined.

The interpreter truncates fp32 to bf16 where GPUs round to nearest even, so that conversion is replaced here:
a kernel's cast order can then be tested to the bit.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

convert_float = interpreter._convert_float


def rounding_convert_float(data, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.array(data, copy=True).view(np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return convert_float(data, source, target, rounding)


interpreter._convert_float = rounding_convert_float
