"""Attention whose scores a softcap bounds before the mask, ``softmax(c tanh(scale q k^T / c) + bias) v``."""

import torch

from tinyfuse.graph.pattern import call, scalar
from tinyfuse.patterns.attention import HEADS
from tinyfuse.patterns.attention_softmax import between_matmuls, bias, factor

cap = scalar("cap")


def capped(scores):
    return call(torch.tanh, scores * factor / cap) * cap


FORMS = {
    "softcap": (capped, lambda m: m.factor, lambda m: None),
    "softcap_masked": (lambda scores: capped(scores) + bias, lambda m: m.factor, lambda m: m.bias),
}
SOFTCAP = [between_matmuls(name, form, heads, cap=1.5) for name, form in FORMS.items() for heads in HEADS]
