"""Triton's interpreter for every test in this folder: it must be chosen before the first kernel is defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
